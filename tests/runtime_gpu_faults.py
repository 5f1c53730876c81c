"""A model that misbehaves on a real GPU: its batch size says how."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import torch
from torch import nn


class Faulty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.table = nn.Embedding(10, 64)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.layer(x)
        fault = FAULTS.get(x.shape[0])
        if fault is not None:
            y = y + fault(self, x)
        return {"loss": y.square().mean()}


def device_side_assert(model, x):
    return model.table(torch.full((x.shape[0],), 1_000_000, device=x.device))


def illegal_address(model, x):
    code = 'extern "C" __global__ void bad(float* p) { p[1ull << 40] = 1.0f; }'
    torch.cuda._compile_kernel(code, "bad")((1, 1, 1), (1, 1, 1), (x,))
    torch.cuda.synchronize()
    return 0


def spin(model, x):
    """A kernel that runs for about 30 s: the process waits for it in the driver."""
    code = """extern "C" __global__ void spin(float* p) {
        long long start = clock64();
        while (clock64() - start < 60000000000ll) {}
    }"""
    torch.cuda._compile_kernel(code, "spin")((1, 1, 1), (1, 1, 1), (x,))
    torch.cuda.synchronize()
    return 0


def chatter(model, x):
    line = "x" * ((1 << 20) - 1) + "\n"
    for _ in range(2048):
        sys.stdout.write(line)
    return 0


def leave_a_child(model, x):
    print("left", subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
    os._exit(7)


def full_device(model, x):
    """Memory that is not the allocator's takes all of the device, and then cuFFT starts."""
    driver = ctypes.CDLL("libcuda.so.1")
    address = ctypes.c_uint64()
    for size in (1 << 30, 64 << 20, 2 << 20):
        while driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0:
            pass
    return torch.fft.fft(x[:, :63]).real.mean()


STRANGER = """
import ctypes, time
cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
assert cuda.cuInit(0) == 0 and cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
print("here", flush=True)
time.sleep(600)
"""


def stranger(model, x):
    """Another process takes the GPU in the middle of the trial."""
    other = subprocess.Popen([sys.executable, "-c", STRANGER], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"here\n"
    model.stranger = other
    return 0


FAULTS = {
    101: device_side_assert,
    102: illegal_address,
    103: spin,
    104: lambda model, x: time.sleep(600),
    105: lambda model, x: os.kill(os.getpid(), signal.SIGKILL),
    106: lambda model, x: ctypes.string_at(0),
    107: lambda model, x: os._exit(3),
    108: chatter,
    109: leave_a_child,
    110: full_device,
    111: stranger,
}
