"""What takes the memory, as tables and a chart: explanations and advice as JSON data in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from planner.cli import wording
from planner.cli.folding import Name
from planner.cli.tables import plain_table
from planner.cli.terminal import print_lines
from planner.reports import KIND_NAMES, SUM_NAMES
from planner.specs.variants import variant_label
from planner.summaries import why_explained
from planner.units import format_bytes

CHART_ROWS = 8
_CHART_MARGIN = 11
_MOST_COLUMNS = 96


def print_explanation(console: Console, plan: Mapping[str, Any]) -> None:
    """The tables of one plan's explanation: kinds, modules, largest tensors, timeline."""
    explanation = plan["explanation"]
    size = explanation["batch_size"]
    why = why_explained(plan.get("batch_size"), explanation)
    fits = "" if why is None else f"; {why}: this is without a limit"
    print_lines(
        console, [f"{variant_label(plan['variant'])}, batch size {size} on {plan['gpu']} (predicted{fits})", ""]
    )
    _print_kinds(console, explanation["peaks"])
    _print_modules(console, explanation)
    _print_largest(console, explanation["largest"])
    _print_timeline(console, explanation["timeline"])


def _print_kinds(console: Console, peaks: Mapping[str, Any]) -> None:
    moments = (peaks["allocated"], peaks["reserved"])
    numbers = ("most allocated, GiB", "share", "most reserved, GiB", " share")  # told apart by a space
    table = plain_table(console, "what takes the memory", *numbers, right=numbers)
    kinds = sorted(KIND_NAMES, key=lambda kind: -moments[0]["kinds"].get(kind, 0))
    for kind in kinds:
        counts = [moment["kinds"].get(kind, 0) for moment in moments]
        if any(counts):
            cells = [_cells(moment, count) for moment, count in zip(moments, counts, strict=True)]
            table.add_row(KIND_NAMES[kind], *cells[0], *cells[1])
    for key, name in SUM_NAMES.items():
        table.add_row(name, *_cells(moments[0], moments[0][key]), *_cells(moments[1], moments[1][key]))
    console.print(table)
    first, second = (moment["when"] for moment in moments)
    line = f"most allocated: {first}; most reserved: first at {second}; shares are of the device bytes"
    print_lines(console, [line])


def _cells(peak: Mapping[str, Any], count: int) -> tuple[str, str]:
    share = 100 * count / peak["device_bytes"]
    return wording.gib(count), "-" if not count else f"{share:.0f}%" if share >= 0.5 else "<1%"


def _print_modules(console: Console, explanation: Mapping[str, Any]) -> None:
    rows = explanation["activations"]
    if not rows:
        return
    total = sum(row["bytes"] for row in rows)
    console.print()
    table = plain_table(console, "activations by module", "modules", "GiB", "share", right=("modules", "GiB", "share"))
    shown = [row for row in rows if row["module"] is not None and 100 * row["bytes"] >= total]
    for row in shown:
        name = row["module"] or "outside any module"
        table.add_row(
            Name(name), str(row["num_modules"]), wording.gib(row["bytes"]), f"{100 * row['bytes'] / total:.0f}%"
        )
    others = [row for row in rows if row not in shown]
    if others:
        count, held = sum(row["num_modules"] for row in others), sum(row["bytes"] for row in others)
        share = f"{100 * held / total:.0f}%" if 200 * held >= total else "<1%"
        table.add_row("all others", str(count), wording.gib(held), share)
    console.print(table)


def _print_largest(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    console.print()
    table = plain_table(console, "largest tensors", "size", "kind", "made by", "in", right=("size",))
    for row in rows:
        name = ".".join(part for part in (row["module"], row["tensor"]) if part) or "outside any module"
        if " of " in row["tensor"]:
            key, _, of = row["tensor"].partition(" of ")
            name = f"{key} of {row['module']}.{of}" if row["module"] else row["tensor"]
        kind = KIND_NAMES[row["kind"]]
        table.add_row(Name(name), format_bytes(row["bytes"]), kind, Name(row["operator"]), row["made"])
    console.print(table)


def _print_timeline(console: Console, timeline: Mapping[str, Any]) -> None:
    console.print()
    blocks = "█░" if _encodes(console, "█░") else "#."
    print_lines(console, chart(timeline, min(console.width - _CHART_MARGIN, _MOST_COLUMNS), *blocks))


def chart(timeline: Mapping[str, Any], columns: int, used: str, cached: str) -> list[str]:
    """Allocated (``used``) and cached bytes over the events, ``columns`` wide, above the names of the steps."""
    points = timeline["points"]
    columns = max(10, min(columns, len(points)))
    stretches = [points[len(points) * i // columns : len(points) * (i + 1) // columns] for i in range(columns)]
    most = max(point[2] for point in points) or 1
    heights = [
        [round(CHART_ROWS * max(point[key] for point in stretch) / most) for key in (1, 2)] for stretch in stretches
    ]
    lines = []
    for row in range(CHART_ROWS, 0, -1):
        label = wording.gib(most * row // CHART_ROWS) if row in (CHART_ROWS, CHART_ROWS // 2) else ""
        drawn = "".join(used if low >= row else cached if high >= row else " " for low, high in heights)
        lines.append(f"{label:>9} {drawn.rstrip()}".rstrip())
    lines.append(" " * 10 + _marks(timeline, stretches))
    events = f"from left to right {timeline['num_events']} allocations and frees"
    lines.append(f"{'GiB':>9} {used} allocated  {cached} cached; {events}")
    return lines


def _marks(timeline: Mapping[str, Any], stretches: Sequence[Sequence[Sequence[int]]]) -> str:
    """``|step 1      |step 2     ``: each step's name where it begins, if it has room."""
    starts = [stretch[0][0] for stretch in stretches]
    line = [" "] * len(starts)
    shown = ""
    for index, name in timeline["phases"]:
        step = name.partition(", ")[0]
        column = max(position for position, start in enumerate(starts) if start <= index or position == 0)
        if step == shown or step in ("move", "end"):
            continue
        shown = step
        for offset, letter in enumerate(f"|{step}"):
            if column + offset < len(line):
                line[column + offset] = letter
    return "".join(line).rstrip()


def _encodes(console: Console, text: str) -> bool:
    try:
        text.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def print_advice(console: Console, plan: Mapping[str, Any]) -> None:
    """What single changes gain, the largest gain first, and what was left out and why."""
    advice = plan["advice"]
    base = advice["max_batch_size"] or 0
    console.print()
    head = f"one change to {variant_label(plan['variant'])}"
    table = plain_table(console, head, "largest batch", "gain", "beside memory", right=("largest batch", "gain"))
    table.add_row("none", str(base), "", "")
    for row in advice["changes"]:
        gained = row["gained_samples"]
        table.add_row(row["change"], str(row["max_batch_size"]), f"{gained:+d}" if gained else "0", row["effect"])
    console.print(table)
    lines = [f"left out: {row['change']}: {row['reason']}" for row in advice["left_out"]]
    print_lines(console, ["each one predicted by a search of its own", *lines])
