"""Several ranks, started by torchrun's agent: one result of theirs, and no rank that waits for one that is gone."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from planner.errors import InvalidSpec, ModelError
from planner.runtime.ranks import Ending, combined

GIB = 1 << 30
CHILD = Path(__file__).with_name("ranks_child.py")


def ranks(kind: str) -> dict[str, Any]:
    ended = subprocess.run([sys.executable, str(CHILD), kind], capture_output=True, text=True, timeout=120, check=True)
    reply: dict[str, Any] = json.loads(ended.stdout)
    return reply


def test_what_fits_on_all_ranks_fits() -> None:
    reply = ranks("fits")["ok"]
    assert reply["outcome"] == "fits"
    assert reply["peaks"] == {"allocated_bytes": GIB, "reserved_bytes": 2 * GIB, "device_bytes": 3 * GIB}
    assert (reply["num_alloc_retries"], reply["step_times_s"]) == (1, [2.0, 2.0])
    assert [rank["peak_reserved_bytes"] for rank in reply["details"]["ranks"]] == [2 * GIB, GIB]
    assert [rank["communicator_bytes"] for rank in reply["details"]["ranks"]] == [7, 8]


@pytest.mark.parametrize("kind", ["oom", "oom-while-others-hang"])
def test_one_rank_out_of_memory_ends_all(kind: str) -> None:
    start = time.monotonic()
    reply = ranks(kind)["ok"]
    assert time.monotonic() - start < 60
    assert (reply["outcome"], reply["error"]) == ("oom", "rank 1: CUDA out of memory")
    assert [rank["outcome"] for rank in reply["details"]["ranks"]] == ["ended with the others", "oom"]


def test_a_rank_that_dies_is_a_failed_trial() -> None:
    reply = ranks("kill")["ok"]
    assert reply["outcome"] == "failed"
    assert "rank 1 was killed by SIGKILL" in reply["error"]


def test_what_all_ranks_raise_and_what_is_wrong_with_the_spec_is_raised() -> None:
    assert ranks("all-raise")["error"]["message"] == "the training step raised a hand"
    assert ranks("refuse")["error"]["field"] == "variants.precision"


def test_an_error_after_another_rank_ran_out_of_memory_says_nothing() -> None:
    oom = {
        "outcome": "oom", "error": "CUDA out of memory", "details": {}, "num_alloc_retries": 0, "step_times_s": [],
        "peaks": {"allocated_bytes": 1, "reserved_bytes": 2, "device_bytes": 3},
    }  # fmt: skip
    lost = ModelError("the training step raised RuntimeError: connection closed", field="model").as_dict()
    assert combined([{"error": lost}, {"ok": oom}], None)["outcome"] == "oom"
    for others in ({"error": lost}, None):
        with pytest.raises(ModelError):
            combined([{"error": lost}, others], Ending(0, 70))
    assert combined([{"error": lost}, None], Ending(1, -9))["outcome"] == "failed"
    with pytest.raises(InvalidSpec):
        combined([{"error": InvalidSpec("no", field="variants.precision").as_dict()}, None], Ending(1, -15))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_training_step_runs_on_two_ranks(kind: str) -> None:
    """gloo in place of NCCL: two micro-batches, clipping, checkpointing and an evaluation, bf16-amp."""
    ended = subprocess.run(
        [sys.executable, str(CHILD.with_name("ranks_training.py")), kind],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    first, second = json.loads(ended.stdout)["ok"]["details"]["ranks"]
    assert (first["outcome"], second["outcome"]) == ("fits", "fits")
    # Of the embedding of 100 tokens in 64 dimensions.
    assert first["peak_allocated_bytes"] == 4 * 64 * (100 if kind == "ddp" else 50)
