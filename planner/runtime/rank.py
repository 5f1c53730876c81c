"""One rank of a trial on several GPUs: ``python -m planner.runtime.rank FOLDER``, started by torchrun's agent.

It builds the model by itself, as every rank of a real run does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.runtime.child import build
from planner.runtime.ranks import report
from planner.runtime.trial import TrialProcess
from planner.trials import Outcome


def run_rank(rank: int, request: dict[str, Any]) -> Mapping[str, Any]:
    """This rank's part of the trial: NCCL's process group, and the steps that all ranks agree on.

    ``request``: ``spec`` (packed), ``gpu_uuids`` by rank, and the arguments of ``TrialProcess.run``.
    """
    spec_text, uuids = request.pop("spec"), request.pop("gpu_uuids")
    built = build(spec_text)

    def join() -> None:
        # With a device it connects at once, so that NCCL's memory is there before the first step.
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", rank))

    def agree(wanted: bool) -> bool:
        flag = torch.tensor(int(wanted))  # on the CPU: on the GPU it would be a tensor of the trial's
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    process = TrialProcess(built.spec, built.model, device_index=rank, join=join, agree=agree)
    result = process.run(**{**request, "gpu_uuid": uuids[rank], "keep": False})
    if result["outcome"] == Outcome.FITS:
        dist.barrier()
        dist.destroy_process_group()
    return result


if __name__ == "__main__":
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    report(Path(sys.argv[1]), run_rank)
