"""The lines beside the table of plans."""

from __future__ import annotations

from typing import Any

import pytest

from planner.cli.tables import expectation, intervals, origin


def plan(precision: str, measured: int | None, predicted: int | None) -> dict[str, Any]:
    return {
        "variant": {"precision": precision, "checkpointing": "none", "compile": "off"},
        "max_batch_size": measured,
        "predicted_max_batch_size": predicted,
    }


@pytest.mark.parametrize(
    ("plans", "line"),
    [
        ([plan("fp32", 8, 8), plan("bf16-amp", 9, 9)], "fp32 8, bf16-amp 9: all exact."),
        ([plan("fp32", 488, 486), plan("bf16-amp", 944, 944)], "fp32 486 (measured 488), bf16-amp 944: 1 of 2 exact."),
        ([plan("fp32", 0, 1), plan("bf16-amp", 9, None)], "fp32 1 (measured 0): 0 of 1 exact."),
    ],
)
def test_what_was_predicted_is_named_per_variant_in_one_line(plans: list[dict[str, Any]], line: str) -> None:
    assert expectation(plans) == [f"Predicted before measuring: {line}"]


def test_nothing_is_said_where_nothing_had_been_predicted() -> None:
    assert expectation([plan("fp32", 8, None), {"variant": {}, "batch_size": 8, "fits": True}]) == []


def test_what_the_headroom_leaves_is_said() -> None:
    seen = {**plan("fp32", 8, None), "source": "predicted", "gpu": "a10g", "capacity_bytes": 4 << 30}
    assert origin([seen]) == ["predicted on a virtual a10g: nothing was measured; the allocator may reserve 4.00 GiB"]
    (line,) = origin([{**seen, "headroom": {"bytes": 1 << 30, "usable_bytes": 3 << 30}}])
    assert line.endswith("the allocator may reserve 4.00 GiB, of which search.headroom leaves 3.00 GiB")


def test_intervals_that_rest_on_the_same_say_so_once() -> None:
    def expected(precision: str, basis: str) -> dict[str, Any]:
        interval = {"low_bytes": 1 << 30, "high_bytes": 3 << 30, "basis": basis}
        return {**plan(precision, 8, None), "reserved_interval": interval}

    assert intervals([expected("fp32", "why"), expected("bf16", "else"), expected("tf32", "why"), {}]) == [
        "Capacity needed (may reserve more where there is more):",
        "  fp32: 1.00 GiB to 3.00 GiB",
        "  tf32: 1.00 GiB to 3.00 GiB",
        "  why",
        "  bf16: 1.00 GiB to 3.00 GiB",
        "  else",
    ]
