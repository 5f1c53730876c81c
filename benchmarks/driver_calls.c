/* Notes the calls by which the CUDA driver has addresses reserved (mmap) and device memory mapped there (nvidia-uvm).
 *
 * To be preloaded. Numbers and layouts of requests: kernel-open/nvidia-uvm/uvm_ioctl.h of NVIDIA's open-gpu-kernel-modules.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST 100000
#define UVM_FREE 34
#define UVM_CREATE_EXTERNAL_RANGE 73
#define LARGE (1 << 20)

static struct { char kind; uint64_t address, bytes; } calls[MOST];
static volatile int count, noting;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void note(char kind, uint64_t address, uint64_t bytes) {
    if (!noting) return;
    pthread_mutex_lock(&lock);
    if (count < MOST) {
        calls[count].kind = kind;
        calls[count].address = address;
        calls[count++].bytes = bytes;
    }
    pthread_mutex_unlock(&lock);
}

void driver_calls_start(void) { noting = 1; }

int driver_calls_write(const char *path) {
    FILE *file = fopen(path, "w");
    noting = 0;
    if (!file) return -1;
    for (int i = 0; i < count; i++)
        fprintf(file, "%c %llu %llu\n", calls[i].kind, (unsigned long long)calls[i].address,
                (unsigned long long)calls[i].bytes);
    return fclose(file);
}

int ioctl(int fd, unsigned long request, ...) {
    va_list list;
    va_start(list, request);
    uint64_t *argument = va_arg(list, uint64_t *);
    va_end(list);
    long result = syscall(SYS_ioctl, fd, request, argument);
    if (request == UVM_CREATE_EXTERNAL_RANGE) note('+', argument[0], argument[1]);
    if (request == UVM_FREE) note('-', argument[0], argument[1]);
    return (int)result;
}

void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset) {
    void *found = (void *)syscall(SYS_mmap, address, bytes, protection, flags, fd, offset);
    if (protection == PROT_NONE && bytes >= LARGE) note('m', (uint64_t)found, bytes);
    return found;
}

void *mmap64(void *address, size_t bytes, int protection, int flags, int fd, off_t offset) {
    return mmap(address, bytes, protection, flags, fd, offset);
}
