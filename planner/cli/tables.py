"""The final tables: what a person reads on standard output. Numbers are never cut off: narrow terminals fold words.

Plans are JSON data here (``planner.reports.plan_dict``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from planner.cli import wording
from planner.cli.folding import Name
from planner.cli.terminal import print_lines
from planner.specs.variants import variant_label
from planner.units import format_bytes

NARROW = 153
"""Columns below which cells stack their words and the gaps between columns shrink to one."""


def plain_table(console: Console, *headers: str, right: Iterable[str] = ()) -> Table:
    """An unframed table; the columns named in ``right`` hold numbers: right-aligned, as wide as their widest cell."""
    gap = 1 if console.width < NARROW else 2
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for header in headers:
        if header in right:
            table.add_column(header, justify="right", overflow="fold")
        else:
            table.add_column(Name(header), overflow="fold")
    return table


def plans_table(console: Console, plans: Sequence[Mapping[str, Any]]) -> Table:
    """One row per variant: batch sizes, the three peaks, speed, and what kind of evidence stands behind them."""
    one_size = any(plan.get("batch_size") is not None for plan in plans)
    sizes = ("batch size", "fits") if one_size else ("largest batch", "first OOM")
    numbers = (*sizes, "allocated GiB", "reserved GiB", "device GiB", "step time", "samples per s")
    narrow = console.width < NARROW
    headers = {name: name.replace(" ", "\n") if narrow else name for name in (*numbers, "evidence")}
    table = plain_table(console, "variant", *headers.values(), right=[headers[name] for name in numbers])
    for plan in plans:
        label = variant_label(plan["variant"])
        words = f"{wording.evidence(plan)}, {wording.counted(plan.get('num_trials') or 0, 'trial')}"
        if narrow:
            label = label.replace("checkpointing ", "checkpointing\n").replace(" + ", " +\n")
            words = words.replace(", ", "\n")
        table.add_row(Name(label), *_sizes(plan, one_size), *_figures(plan), words)
    return table


def intervals(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    """The smallest capacity that each prediction is expected to run under, and after the ranges what they rest on."""
    lines: dict[str, list[str]] = {}
    for plan in plans:
        if interval := plan.get("reserved_interval"):
            low, high = format_bytes(interval["low_bytes"]), format_bytes(interval["high_bytes"])
            label = variant_label(plan["variant"])
            lines.setdefault(str(interval["basis"]), []).append(f"  {label}: {low} to {high}")
    found = [line for basis, ranges in lines.items() for line in (*ranges, f"  {basis}")]
    return ["Capacity needed (may reserve more where there is more):", *found] if found else []


def shares(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    """What takes most of the allocated bytes at each plan's peak, a line each: predicted, whatever the plan is."""
    lines = [f"  {variant_label(plan['variant'])}, {words}" for plan in plans if (words := wording.shares(plan))]
    return ["At the peak of allocated bytes, predicted (planner explain says more):", *lines] if lines else []


def remarks(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    """What must be read beside the table: failures, retries, stated assumptions; each sentence once."""
    lines: list[str] = []
    for plan in plans:
        label = variant_label(plan["variant"])
        if wording.status(plan) != "planned":
            lines.append(f"{label}: {wording.sizes_line(plan)}")
        if (retries := plan.get("num_alloc_retries")) and plan.get("fits") is not False:
            gave = "is predicted to give" if plan["source"] == "predicted" else "gave"
            times = wording.counted(retries, "time")
            lines.append(f"{label}: the allocator {gave} cached memory back {times} to go on")
    for plan in plans:
        lines.extend(plan.get("notes") or ())
    return list(dict.fromkeys(lines))


def expectation(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line: what had been predicted before it was measured, and where that was wrong."""
    known = [plan for plan in plans if plan.get("predicted_max_batch_size") is not None]
    if not known:
        return []
    each = [f"{variant_label(plan['variant'])} {_predicted_against(plan)}" for plan in known]
    exact = sum(plan["predicted_max_batch_size"] == plan.get("max_batch_size") for plan in known)
    verdict = "all exact" if exact == len(known) else f"{exact} of {len(known)} exact"
    return [f"Predicted before measuring: {', '.join(each)}: {verdict}."]


def _predicted_against(plan: Mapping[str, Any]) -> str:
    predicted, measured = plan["predicted_max_batch_size"], plan.get("max_batch_size")
    return str(predicted) if measured in (predicted, None) else f"{predicted} (measured {measured})"


def origin(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the figures come from: the GPU, its capacity, the versions; and that a prediction measured nothing."""
    lines: list[str] = []
    for plan in plans:
        seen = plan.get("environment") or {}
        if plan["source"] == "predicted":
            where = f"predicted on a virtual {plan['gpu']}: nothing was measured"
        else:
            where = (
                f"measured on {seen.get('gpu_name') or plan['gpu']}, driver {seen.get('driver_version') or 'unknown'}"
            )
            if plan.get("measured_under_limit"):
                where += f", under a limit{' for ' + plan['stands_for'] if plan.get('stands_for') else ''}"
        torch = f"; torch {seen['torch_version']}" if seen.get("torch_version") else ""
        room = f"the allocator may reserve {format_bytes(plan['capacity_bytes'])}"
        if headroom := plan.get("headroom"):
            room += f", of which search.headroom leaves {format_bytes(headroom['usable_bytes'])}"
        lines.append(f"{where}; {room}{torch}")
    return list(dict.fromkeys(lines))


def print_plans(
    console: Console, plans: Sequence[Mapping[str, Any]], summary: Iterable[str] = (), notes: Iterable[str] = ()
) -> None:
    """The table, then its remarks, the summary sentences, and where it all comes from with ``notes``."""
    console.print(plans_table(console, plans))
    found = (intervals(plans), shares(plans), remarks(plans), expectation(plans), list(summary))
    for block in (*found, [*origin(plans), *notes]):
        if block:
            console.print()
            print_lines(console, block)


def _sizes(plan: Mapping[str, Any], one_size: bool) -> tuple[str, str]:
    if wording.status(plan) != "planned":
        return "-", "-"
    if one_size:
        return str(plan["batch_size"]), {True: "yes", False: "no", None: "unknown"}[plan["fits"]]
    return _count(plan.get("max_batch_size")), _count(plan.get("first_oom_batch_size"))


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _figures(plan: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        wording.gib(plan.get("peak_allocated_bytes")),
        wording.gib(plan.get("peak_reserved_bytes")),
        wording.gib(plan.get("peak_device_bytes")),
        wording.seconds(plan.get("step_time_s")),
        wording.rate(plan.get("samples_per_second")),
    )
