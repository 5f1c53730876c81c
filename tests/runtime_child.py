"""A preloaded process without torch or GPU: real forks, fake trials that end in every way one can."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from subprocess import PIPE

from planner.errors import DeviceLost, DeviceUnavailable, InvalidSpec, ModelError
from planner.processes import describe_exit
from planner.runtime.zygote import Zygote
from planner.specs.packing import unpacked

THRESHOLD = 9


def build(spec_text):
    if unpacked(spec_text).model.name == "bert":
        raise InvalidSpec("unknown key", field="model.config.n_layerz", suggestion="n_layer")
    return {"pid": os.getpid(), "trials": 0, "starts": [], "at": time.monotonic()}


def start(built, *, batch_size, used_before_bytes, **request):
    """The first start of a process that finds another one of the preloaded process's there is that beside a trial."""
    is_beside = not built["starts"] and len(forks_of(os.getppid())) > 1
    built["starts"].append(used_before_bytes)
    if is_beside and batch_size in ACTS_BESIDE:
        ACTS_BESIDE[batch_size]()
    return {"listed_bytes": None if batch_size in UNLISTED else 5, "used_before_bytes": used_before_bytes or 3}


def forks_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def run_trial(built, *, variant, batch_size, capacity_bytes, gpu_uuids, keep, accumulation_steps, beside, settle):
    built["trials"] += 1  # in the fork's copy only
    act = ACTS.get(batch_size)
    if act is not None:
        act()
    is_settled = settle()
    return {
        "outcome": "fits" if batch_size <= THRESHOLD else "oom",
        "error": None if batch_size <= THRESHOLD else "CUDA out of memory",
        "peaks": {"allocated_bytes": 1, "reserved_bytes": 2, "device_bytes": 3},
        "num_alloc_retries": 4,
        "step_times_s": [0.3, 0.2, 0.1],
        "details": {
            "trials": built["trials"], "zygote": built["pid"], "parent": os.getppid(), "pid": os.getpid(),
            "visible": os.environ["CUDA_VISIBLE_DEVICES"], "capacity": capacity_bytes, "uuid": gpu_uuids[0],
            "variant": variant, "accumulation_steps": accumulation_steps, "beside": beside, "starts": built["starts"],
            "is_settled": is_settled,
        },
        "warm": keep and batch_size not in SPOILS,
        "held": {"bytes": 7, "pids": [4242]},
    }  # fmt: skip


def chatter():
    for _ in range(100 * 1024):
        sys.stdout.write("x" * 1023 + "\n")


def leave_a_child_behind():
    """It inherits the result's pipe, has a session of its own and a child, and would outlive the fork."""
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    left = subprocess.Popen([sys.executable, "-c", code], close_fds=False, start_new_session=True, stdout=PIPE)
    print("left", left.pid, left.stdout.readline().decode(), flush=True)
    os._exit(7)


def raising(error):
    def act():
        raise error

    return act


def crash_in_a_thread():
    thread = threading.Thread(target=ctypes.string_at, args=(0,))
    thread.start()
    thread.join()


def kill_the_zygote():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


SPOILS = (7,)
"""Batch sizes whose trial leaves something behind, as an out of memory inside a backward pass can."""
ACTS = {
    101: lambda: time.sleep(600),
    102: lambda: ctypes.string_at(0),
    103: lambda: os.kill(os.getpid(), signal.SIGKILL),
    104: lambda: os._exit(3),
    105: chatter,
    106: raising(ModelError("the training step raised ValueError: no", field="model")),
    107: raising(DeviceLost("the GPU is gone")),
    108: raising(RuntimeError(f"a defect: {describe_exit(0)}")),
    109: leave_a_child_behind,
    110: crash_in_a_thread,
    111: kill_the_zygote,
    112: lambda: sys.exit(4),
}

ACTS_BESIDE = {
    1: lambda: time.sleep(0.3),
    2: lambda: ctypes.string_at(0),
    3: lambda: os.kill(os.getpid(), signal.SIGKILL),
    4: raising(DeviceUnavailable("torch cannot use this GPU")),
    5: chatter,
    6: raising(RuntimeError("a defect")),
    7: lambda: os._exit(3),
    8: lambda: time.sleep(600),
}
"""Batch sizes of trials beside which the next one's process ends so."""
UNLISTED = (10,)
"""Whose processes the driver does not list."""

if __name__ == "__main__":
    Zygote(build, start, run_trial).serve()
