"""Count the trials that finding the largest batch size takes: ours with and without a prediction, and a bisection.

    python benchmarks/accuracy.py --json predicted.json
    python benchmarks/search.py predicted.json

Every search is replayed against what was measured on a real GPU: which sizes fit is known from the measured largest
batch size, peaks from the measured ones, linearly between them. The start is what the virtual GPU predicts for the
case; without a file of predictions those columns are empty. The bisection tries 1, 2, 4, ... until one runs out of
memory, then halves. Both run the deciding two sizes in fresh processes, again where they had run in warm ones. Run from
the repository's root; needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accuracy import cases

from planner.search import SearchResult, search_max_batch
from planner.specs.variants import variant_label
from planner.trials import Outcome, Peaks, Source, Trial

Points = Mapping[int, tuple[int, int]]
"""Batch size -> peaks of allocated and reserved bytes."""


class Measured:
    """The GPU as it was measured, under one limit."""

    def __init__(self, points: Points, largest: int, limit_bytes: int) -> None:
        self._points, self._largest, self._limit_bytes = sorted(points.items()), largest, limit_bytes

    def __call__(self, size: int, fresh: bool) -> Trial:
        allocated, reserved = (min(round(self._peak(size, kind)), self._limit_bytes) for kind in (0, 1))
        return Trial(
            batch_size=size,
            outcome=Outcome.FITS if size <= self._largest else Outcome.OOM,
            source=Source.MEASURED,
            peaks=Peaks(allocated_bytes=allocated, reserved_bytes=reserved),
            fresh_process=fresh,
        )

    def _peak(self, size: int, kind: int) -> float:
        """Bytes at ``size``, on the line through the nearest two measured sizes."""
        pairs = list(zip(self._points, self._points[1:], strict=False))
        (left, low), (right, high) = next((pair for pair in pairs if size <= pair[1][0]), pairs[-1])
        return low[kind] + (high[kind] - low[kind]) * (size - left) / (right - left)


def bisection_trials(largest: int) -> int:
    """1, 2, 4, ... up to the first out of memory, then halving the bracket until it is one sample wide, then both of
    its ends (nothing fits: the one) in fresh processes."""
    return 2 * int(math.log2(largest)) + 4 if largest else 2


def replayed(case: Mapping[str, Any], limit_bytes: int, largest: int, start: int | None) -> SearchResult:
    """Our search on one measured case, told to confirm its answer in fresh processes."""
    points = {
        size: (seen["alloc"], seen["reserved"])
        for size, limit, seen in case["points"]
        if limit in (None, limit_bytes)
    }  # fmt: skip
    card = Measured(points, largest, limit_bytes)
    result = search_max_batch(card, start=start, confirm_fresh=True, capacity_bytes=limit_bytes)
    assert (result.max_batch_size, result.certified) == (largest, True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", nargs="?", type=Path, help="what benchmarks/accuracy.py --json wrote")
    options = parser.parse_args()
    predicted = _predictions(options.predictions) if options.predictions else {}
    rows: list[tuple[str, ...]] = []
    counts: dict[str, list[int]] = {"with": [], "without": [], "bisection": []}
    for case in cases():
        label = variant_label(case["variant"])
        for limit_bytes, largest, _ in case["bounds"]:
            start = predicted.get((case["case"], label, limit_bytes))
            trials = {
                "with": len(replayed(case, limit_bytes, largest, start).trials) if start is not None else None,
                "without": len(replayed(case, limit_bytes, largest, None).trials),
                "bisection": bisection_trials(largest),
            }
            for name, count in trials.items():
                counts[name] += [] if count is None else [count]
            figures = (largest, start, *trials.values())
            cells = ("-" if figure is None else str(figure) for figure in figures)
            rows.append((case["case"], label, f"{limit_bytes >> 30} GiB", *cells))
    _print(rows)
    print()
    for name, values in counts.items():
        if values:
            print(f"{_NAMES[name]}: {_summary(values)}, {len(values)} cases")
    more = sum(ours > theirs for ours, theirs in zip(counts["without"], counts["bisection"], strict=True))
    print(f"more trials than the bisection, without a prediction: {more} of {len(rows)} cases")


_NAMES = {"with": "started from the prediction", "without": "without a prediction", "bisection": "bisection"}


def _predictions(file: Path) -> dict[tuple[str, str, int], int]:
    return {
        (result["case"], result["variant"], bound["limit_bytes"]): bound["predicted"]
        for result in json.loads(file.read_text())
        for bound in result.get("bounds", [])
    }


def _summary(counts: Sequence[int]) -> str:
    ordered = sorted(counts)
    most = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return f"median {statistics.median(ordered):g} trials, at most {most} in 95% of cases, worst {ordered[-1]}"


def _print(rows: Sequence[tuple[str, ...]]) -> None:
    head = ("case", "variant", "limit", "largest", "predicted", "with it", "without", "bisection")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        print("  ".join((*left, *right)))


if __name__ == "__main__":
    main()
