"""A preloaded process without torch or GPU: real forks, fake trials that end in every way one can."""

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from subprocess import PIPE

from planner.errors import DeviceLost, InvalidSpec, ModelError
from planner.processes import describe_exit
from planner.runtime import zygote
from planner.runtime.zygote import Stages

THRESHOLD = 9


def build(document):
    if document["model"]["model_type"] == "bert":
        raise InvalidSpec("unknown key", field="model.config.n_layerz", suggestion="n_layer")
    contexts = mmap.mmap(-1, 1)  # shared with the forks: how many contexts were started
    return {"pid": os.getpid(), "trials": 0, "at": time.monotonic(), "contexts": contexts}


def start_cuda(built):
    """How many contexts were there before, and how many came until this one was there."""
    before = built["contexts"][0]
    time.sleep(0.02)
    built["contexts"][0] += 1
    return before, built["contexts"][0] - before


def start(built, *, variant, batch_size, room_bytes=None, used_before_bytes=None, **request):
    """For the trial of ``batch_size``, or beside it with ``room_bytes``."""
    if used_before_bytes is not None:
        time.sleep(0.1)  # long enough for another context to come
        built["told_bytes"], built["contexts_when_measured"] = used_before_bytes, built["contexts"][0]
        return {"pids": [5000], "used_before_bytes": 11, "bytes": 100}
    _, num_new = start_cuda(built)
    built["began_s"] = time.monotonic()
    found = [5000, 5001][:num_new]
    if room_bytes is None:
        return {"pids": found, "used_before_bytes": 11, "bytes": 0}
    built["room_bytes"] = room_bytes
    built["moved"] = variant
    if batch_size in START_ACTS:
        START_ACTS[batch_size]()
    return {"pids": STRANGERS.get(batch_size, found), "used_before_bytes": 7, "bytes": 100}


def run_trial(built, *, variant, batch_size, capacity_bytes, gpu_uuids, keep, accumulation_steps, settle):
    built["trials"] += 1  # in the fork's copy only
    if "began_s" not in built:
        built["began_s"] = start_cuda(built) and time.monotonic()
    act = ACTS.get(batch_size)
    if act is not None:
        act()
    beside = settle()
    return {
        "outcome": "failed" if batch_size == FAULTY else "fits" if batch_size <= THRESHOLD else "oom",
        "error": None if batch_size <= THRESHOLD else "CUDA out of memory",
        "peaks": {"allocated_bytes": 1, "reserved_bytes": 2, "device_bytes": 3},
        "num_alloc_retries": 4,
        "step_times_s": [0.3, 0.2, 0.1],
        "details": {
            "trials": built["trials"], "zygote": built["pid"], "parent": os.getppid(), "pid": os.getpid(),
            "visible": os.environ["CUDA_VISIBLE_DEVICES"], "capacity": capacity_bytes, "uuid": gpu_uuids[0],
            "variant": variant, "accumulation_steps": accumulation_steps, "beside": beside,
            "began_s": built.get("began_s"), "moved": built.get("moved"), "ended_s": time.monotonic(),
            "used_before_bytes": 11, "told_bytes": built.get("told_bytes"), "room_bytes": built.get("room_bytes"),
            "contexts_when_measured": built.get("contexts_when_measured"), "contexts": built["contexts"][0],
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


FAULTY = 120
"""The batch size of a trial that the GPU fails in, which says all that it measured."""
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

START_ACTS = {
    301: lambda: os._exit(5),
    302: raising(RuntimeError("no CUDA beside another trial")),
    303: lambda: time.sleep(600),
}
"""By the size of the trial beside which a process is started."""
STRANGERS = {304: [5000, 5001]}
STAGES = Stages(start=start, run=run_trial)

if __name__ == "__main__":
    zygote.START_S = 0.5
    zygote.Zygote(build, STAGES).serve()
