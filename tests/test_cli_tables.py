"""The lines beside the table of plans."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from planner.cli.folding import folded, hanging
from planner.cli.tables import expectation, intervals, origin, plans_table, remarks
from planner.cli.terminal import print_lines
from planner.specs.variants import variant_label


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


def test_retries_are_said_of_what_went_on() -> None:
    found = {"source": "predicted", "num_alloc_retries": 2, **plan("fp32", None, None)}
    gave = "fp32: the allocator is predicted to give cached memory back 2 times to go on"
    assert remarks([{**found, "fits": True}]) == remarks([found]) == [gave]
    assert remarks([{**found, "fits": False}]) == []


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


@given(st.text("ab _:,./\n", max_size=60), st.integers(1, 40))
@example("fp32 + expandable_segments:True", 16)
def test_folding_loses_nothing_and_keeps_to_the_width(text: str, width: int) -> None:
    lines = folded(text, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(len(line) <= width for line in lines)


def test_words_break_after_punctuation_where_they_must() -> None:
    text = "bf16-amp + expandable_segments:True,max_split_size_mb:128"
    assert folded(text, 80) == [text]
    assert folded(text, 17) == ["bf16-amp +", "expandable_", "segments:True,", "max_split_size_", "mb:128"]
    assert folded("transformer.h.0.attn.c_attn", 17) == ["transformer.h.0.", "attn.c_attn"]
    assert folded("GPT2LMHeadModel", 8) == ["GPT2LMHe", "adModel"]


def test_what_is_left_of_an_indented_line_is_indented_further() -> None:
    assert hanging("  fp32: 914.0 MiB to 1.06 GiB", 22) == ["  fp32: 914.0 MiB to", "    1.06 GiB"]
    assert hanging("  fp32: 914.0 MiB", 80) == ["  fp32: 914.0 MiB"]
    console = Console(file=io.StringIO(), width=22)
    print_lines(console, ["", "  fp32: 914.0 MiB to 1.06 GiB", "no indent"])
    assert console.file.getvalue() == "\n  fp32: 914.0 MiB to\n    1.06 GiB\nno indent\n"  # type: ignore[attr-defined]


def test_a_narrow_table_breaks_no_word_of_a_variant() -> None:
    allocator = {"precision": "bf16-amp", "allocator": "expandable_segments:True,max_split_size_mb:128"}
    shown = {**plan("fp32", 21, None), "variant": allocator, "source": "predicted", "first_oom_batch_size": 22}
    console = Console(file=io.StringIO(), width=80)
    console.print(plans_table(console, [shown]))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line.rstrip()) <= 80 for line in printed.splitlines())
    first = [line.split()[0] for line in printed.splitlines()[3:]]
    assert first == ["bf16-amp", "expandable_", "segments:True,", "max_split_size_", "mb:128"]


def test_no_allocator_settings_have_a_name() -> None:
    assert variant_label({"precision": "fp32", "allocator": ""}) == "fp32 + no allocator settings"
