"""What a plan's page shows of its explanation: parts of the peak, the timeline as points, the rows of its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from planner.reports import KIND_NAMES, SUM_NAMES
from planner.summaries import why_explained

WIDTH: Final = 1000
HEIGHT: Final = 240
"""Of the timeline, in the units of its ``viewBox``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the bar that sums to the device's bytes."""

    name: str
    bytes: int
    share: float
    """Percent of the device's bytes; 0 for what is too small to be seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindRow:
    name: str
    allocated: int
    """Bytes where most is allocated."""
    reserved: int
    """Bytes where most is reserved."""
    is_sum: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    name: str
    x: float
    """Where it begins on the timeline, of ``WIDTH``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryView:
    batch_size: int
    unfit: str | None
    """Why it is explained though it does not fit (``planner.summaries.why_explained``)."""
    parts: tuple[Part, ...]
    kinds: tuple[KindRow, ...]
    when_allocated: str
    when_reserved: str
    modules: Sequence[Mapping[str, Any]]
    largest: tuple[dict[str, Any], ...]
    num_events: int
    most_reserved: int
    """Bytes at the top of the timeline."""
    allocated_points: str
    reserved_points: str
    """Polygons in the form of an SVG ``points`` attribute."""
    steps: tuple[Step, ...]


def memory_view(explanation: Mapping[str, Any] | None, batch_size: int | None = None) -> MemoryView | None:
    """The view of the explanation of a plan, for one ``batch_size`` or of a search; ``None`` where it has none."""
    if not explanation:
        return None
    allocated, reserved = explanation["peaks"]["allocated"], explanation["peaks"]["reserved"]
    timeline = explanation["timeline"]
    most = max((point[2] for point in timeline["points"]), default=0)
    return MemoryView(
        batch_size=explanation["batch_size"],
        unfit=why_explained(batch_size, explanation),
        parts=tuple(_parts(allocated)),
        kinds=tuple(_kind_rows(allocated, reserved)),
        when_allocated=allocated["when"],
        when_reserved=reserved["when"],
        modules=explanation["activations"],
        largest=tuple({**row, "kind_name": KIND_NAMES.get(row["kind"], row["kind"])} for row in explanation["largest"]),
        num_events=timeline["num_events"],
        most_reserved=most,
        allocated_points=_polygon(timeline, 1, most),
        reserved_points=_polygon(timeline, 2, most),
        steps=tuple(_steps(timeline)),
    )


def _parts(peak: Mapping[str, Any]) -> Iterable[Part]:
    counts = [(KIND_NAMES.get(kind, kind), count) for kind, count in peak["kinds"].items()]
    counts.sort(key=lambda item: -item[1])
    counts += [(name, peak[key]) for key, name in SUM_NAMES.items() if not name.startswith("=")]
    for name, count in counts:
        share = 100 * count / peak["device_bytes"] if peak["device_bytes"] else 0.0
        yield Part(name=name, bytes=count, share=round(share, 2) if share >= 0.2 else 0.0)


def _kind_rows(allocated: Mapping[str, Any], reserved: Mapping[str, Any]) -> Iterable[KindRow]:
    kinds = {**allocated["kinds"], **reserved["kinds"]}
    for kind in sorted(kinds, key=lambda kind: -allocated["kinds"].get(kind, 0)):
        yield KindRow(
            name=KIND_NAMES.get(kind, kind),
            allocated=allocated["kinds"].get(kind, 0),
            reserved=reserved["kinds"].get(kind, 0),
            is_sum=False,
        )
    for key, name in SUM_NAMES.items():
        yield KindRow(name=name, allocated=allocated[key], reserved=reserved[key], is_sum=name.startswith("="))


def _polygon(timeline: Mapping[str, Any], key: int, most: int) -> str:
    """The area under a curve in steps: each point holds until the next one begins."""
    points, count = timeline["points"], max(1, timeline["num_events"])
    corners = [f"0,{HEIGHT}"]
    ends = [point[0] for point in points[1:]] + [count]
    for point, end in zip(points, ends, strict=True):
        y = round(HEIGHT * (1 - point[key] / most), 1) if most else HEIGHT
        corners += [f"{_x(point[0], count)},{y}", f"{_x(end, count)},{y}"]
    return " ".join([*corners, f"{WIDTH},{HEIGHT}"])


def _steps(timeline: Mapping[str, Any]) -> Iterable[Step]:
    shown = {"move", "end"}
    for index, name in timeline["phases"]:
        step = name.partition(", ")[0]
        if step not in shown:
            shown.add(step)
            yield Step(name=step, x=_x(index, max(1, timeline["num_events"])))


def _x(index: int, count: int) -> float:
    return round(WIDTH * index / count, 1)
