"""Runs one made-up trial on two ranks of a CPU and prints what came of it: ``python ranks_child.py KIND``.

torchrun's agent starts the same file for each rank, with the folder to report to.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.errors import InvalidSpec, ModelError
from planner.processes import answer
from planner.runtime.ranks import report, run_ranks

GIB = 1 << 30


def result(outcome: str, rank: int, error: str | None = None) -> dict[str, Any]:
    return {
        "outcome": outcome, "error": error,
        "peaks": {"allocated_bytes": rank * GIB, "reserved_bytes": (2 - rank) * GIB, "device_bytes": 3 * GIB},
        "num_alloc_retries": rank, "step_times_s": [1.0 + rank, 2.0 - rank],
        "details": {"context_bytes": 5, "communicator_bytes": 7 + rank},
    }  # fmt: skip


def run(rank: int, request: dict[str, Any]) -> dict[str, Any]:
    kind = request["kind"]
    dist.init_process_group("gloo")
    met = torch.ones(1)
    dist.all_reduce(met)
    assert met.item() == 2
    if kind == "all-raise":
        raise ModelError("the training step raised a hand", field="model")
    if rank == 1:
        if kind == "oom":
            return result("oom", rank, "CUDA out of memory")
        if kind == "oom-while-others-hang":
            time.sleep(0.5)
            return result("oom", rank, "CUDA out of memory")
        if kind == "refuse":
            raise InvalidSpec("cannot be", field="variants.precision")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "oom-while-others-hang":
        time.sleep(300)  # as in a collective of NCCL, which no lost rank ends
    if kind != "fits":
        dist.all_reduce(met)
    return result("fits", rank)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "LOCAL_RANK" in os.environ:
        report(Path(sys.argv[1]), run)
    else:
        request = {"kind": sys.argv[1]}
        print(json.dumps(answer({"ranks": lambda: run_ranks([__file__], 2, request)}, {"do": "ranks"})))
