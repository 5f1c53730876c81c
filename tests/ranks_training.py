"""Trains a small model on two ranks of a CPU: ``python ranks_training.py ddp|fsdp2``. "Allocated" is what a rank holds
of the first parameter."""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from planner.processes import answer
from planner.runtime.ranks import run_ranks
from planner.specs.document import parse_spec
from planner.training import Training, build_model
from planner.training.schedule import phases

SPEC = parse_spec(
    {
        "model": {"source": "transformers", "model_type": "gpt2", "task": "causal-lm"}
        | {"config": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 100, "use_cache": False}},
        "data": {"kind": "tokens", "sequence_length": 32},
        "train": {"accumulation_steps": 2, "clip_grad_norm": 1.0, "evaluation": True},
        "variants": {"precision": "bf16-amp", "checkpointing": "full", "parallelism": sys.argv[1], "gpus": 2},
    }
)


def run(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    (variant,) = SPEC.variants.product()
    training = Training(SPEC, variant, build_model(SPEC), torch.device("cpu"))
    for phase in phases(SPEC):
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
    print(json.dumps(answer({"ranks": lambda: run_ranks(run, 2)}, {"do": "ranks"})))
