"""How fast the allocator model replays the recorded traces: events per second, and against a bound.

    python benchmarks/allocator.py [--repeats N]

The bound runs the same loop with a counter in place of the allocator's pools (no reuse, no splitting, no merging): no
replay in Python can beat it by much. The last lines replay the largest trace under other settings.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from planner.allocator import Events, parse_conf, replay
from planner.allocator.recorded import read_runs, replayable

TRACES = Path(__file__).parents[1] / "tests" / "golden" / "traces"


def bound(events: Events) -> int:
    """Peak of the bytes asked for: the least that a replay does."""
    live: dict[int, int] = {}
    sizes, current, peak, address = events.sizes, 0, 0, 0
    for event in events.order:
        if event >= 0:
            address += 512
            live[event] = address
            current += sizes[event]
            if current > peak:
                peak = current
        else:
            del live[~event]
            current -= sizes[~event]
    return peak


def events_per_second(events: Events, run: Callable[[Events], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run(events)
        best = min(best, time.perf_counter() - start)
    return len(events) / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    runs = [run for path in sorted(TRACES.glob("*.trace.json.gz")) for run in read_runs(path)]
    print(f"{'case':28} {'events':>8} {'events/s':>10} {'bound':>10} {'of bound':>9}")
    largest, reserved = Events([], []), 0
    for run in runs:
        events = replayable(run.events)
        speed, limit = events_per_second(events, replay, repeats), events_per_second(events, bound, repeats)
        print(f"{run.name:28} {len(events):8} {speed:10.0f} {limit:10.0f} {speed / limit:9.1%}")
        if len(events) > len(largest) and run.capacity_bytes is None:
            largest, reserved = events, run.peak_reserved_bytes
    events = largest
    for conf, share in (
        ("", 1.0),
        ("expandable_segments:True", None),
        ("max_split_size_mb:64", None),
        ("garbage_collection_threshold:0.8", 1.0),
        ("roundup_power2_divisions:4", None),
    ):
        config, capacity = parse_conf(conf), None if share is None else int(share * reserved)
        speed = events_per_second(events, lambda e, c=config, b=capacity: replay(e, c, b), repeats)  # type: ignore[misc]
        name = conf.split(":")[0] or "limit"
        print(f"{name:28} {len(events):8} {speed:10.0f}")


if __name__ == "__main__":
    main()
