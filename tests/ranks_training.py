"""Trains a small model on two ranks of a CPU: ``python ranks_training.py ddp|fsdp2``. "Allocated" is what a rank holds
of the first parameter."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.processes import answer
from planner.runtime.ranks import report, run_ranks
from planner.specs.document import parse_spec
from planner.specs.model import Spec
from planner.training import Training, build_model
from planner.training.schedule import phases


def spec_of(kind: str) -> Spec:
    return parse_spec(
        {
            "model": {"source": "transformers", "model_type": "gpt2", "task": "causal-lm"}
            | {"config": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 100, "use_cache": False}},
            "data": {"kind": "tokens", "sequence_length": 32},
            "train": {"accumulation_steps": 2, "clip_grad_norm": 1.0, "evaluation": True},
            "variants": {"precision": "bf16-amp", "checkpointing": "full", "parallelism": kind, "gpus": 2},
        }
    )


def run(rank: int, request: dict[str, Any]) -> dict[str, Any]:
    spec = spec_of(request["kind"])
    dist.init_process_group("gloo")
    (variant,) = spec.variants.product()
    training = Training(spec, variant, build_model(spec), torch.device("cpu"))
    for phase in phases(spec):
        training.run(phase, 2)
    weight: Any = next(training.model.parameters())
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    held = local.numel() * local.element_size()
    return {
        "outcome": "fits", "error": None, "num_alloc_retries": 0, "step_times_s": [], "details": {},
        "peaks": {"allocated_bytes": held, "reserved_bytes": 0, "device_bytes": 0},
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "LOCAL_RANK" in os.environ:
        report(Path(sys.argv[1]), run)
    else:
        request = {"kind": sys.argv[1]}
        print(json.dumps(answer({"ranks": lambda: run_ranks([__file__], 2, request)}, {"do": "ranks"})))
