"""Predict the peaks and the largest batch size of specs, and keep them: so that what is measured later was predicted
blind.

    python benchmarks/predict_peaks.py SPEC... --out FILE [--limit GIB] [--jobs N]

For each variant of each spec: peaks of allocated and reserved bytes with no limit at batch sizes 1 and 4 and at three
and seven tenths of the largest batch size under the limit, that largest size, and the interval around each. Writes JSON
that ``benchmarks/measure_peaks.py --predictions FILE`` starts from. Needs no GPU. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "examples")]

from benchmarks.accuracy import TORCH_MEASURED, TOTAL_BYTES, fits
from planner.specs.document import load_spec
from planner.specs.variants import Variant


def predict(path: Path, variant: Variant, limit: int) -> dict[str, Any]:
    """One variant, in this process, which is good for nothing else after it."""
    import torch

    from planner.allocator import AllocatorConfig
    from planner.virtual.architecture import Architecture
    from planner.virtual.prediction import predict_trial
    from planner.virtual.scaling import TraceFamily
    from planner.virtual.trace import Trace
    from planner.virtual.tracing import trace_steps

    torch.set_num_threads(1)
    spec = load_spec(path)
    architecture = Architecture(compute_capability=(9, 0), num_sms=132, torch_version=TORCH_MEASURED)
    start = time.perf_counter()

    def trace(size: int) -> Trace:
        found = trace_steps(spec, variant, size, architecture)
        found.successors = None  # three steps were measured, and no more
        return found

    family = TraceFamily(trace)

    def trial(size: int, capacity: int) -> dict[str, Any]:
        return predict_trial(
            family,
            size,
            fresh=True,
            config=AllocatorConfig(),
            capacity_bytes=capacity,
            device_total_bytes=TOTAL_BYTES,
            compute_capability=(9, 0),
        )

    largest = _largest(lambda size: fits(family, size, limit))
    points = []
    for size in sorted({1, 4, max(1, largest * 3 // 10), max(1, largest * 7 // 10), max(1, largest)}):
        try:
            found = trial(size, TOTAL_BYTES)
        except ValueError:  # batch norm over a single value
            if size > 1:
                raise
            continue
        points.append(
            {
                "batch_size": size,
                "alloc": found["peak_allocated_bytes"],
                "reserved": found["peak_reserved_bytes"],
                **found["needed"],
                "unmodelled": found["unmodelled"],
            }
        )
    return {"max": largest, "points": points, "seconds": time.perf_counter() - start}


def _largest(runs: Callable[[int], bool]) -> int:
    """By doubling and bisection, from two samples on: batch norm over a single value is an error."""
    low, high = 1, 2
    if not runs(high):
        return int(runs(low))
    while runs(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if runs(middle) else (low, middle)
    return low


def _in_process(path: Path, index: int, limit: int) -> dict[str, Any]:
    """``predict`` in a process of its own: tracing changes torch for good."""
    command = [sys.executable, __file__, str(path), "--limit", str(limit >> 30), "--only", str(index)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    lines = result.stdout.strip().splitlines()
    if not lines:
        return {"error": (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1][:400]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=int, default=8, help="GiB")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    limit = options.limit << 30
    if options.only is not None:
        variant = load_spec(options.specs[0]).variants.product()[options.only]
        try:
            found = predict(options.specs[0], variant, limit)
        except Exception as error:  # noqa: BLE001 - the parent reports it
            found = {"error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps(found), flush=True)
        os._exit(0)  # torch's interpreter exit is not safe with a Python backend registered
    work = [(path, i, v) for path in options.specs for i, v in enumerate(load_spec(path).variants.product())]
    done: list[dict[str, Any]] = []
    if options.out and options.out.exists():
        done = [case for case in json.loads(options.out.read_text())["cases"] if "error" not in case]

    def run(item: tuple[Path, int, Variant]) -> None:
        path, index, variant = item
        key = {"case": path.stem, "variant": variant.as_dict()}
        if any(case["case"] == key["case"] and case["variant"] == key["variant"] for case in done):
            return
        try:
            found = _in_process(path, index, limit)
        except subprocess.TimeoutExpired:
            found = {"error": "out of time"}
        done.append({**key, **found})
        said = found.get("error") or f"largest {found['max']}, {found['points'][0]['unmodelled']}"
        print(f"{path.stem:28} {variant.label():30} {found.get('seconds', 0):6.1f} s  {said}", flush=True)
        if options.out:
            options.out.write_text(json.dumps({"limit_bytes": limit, "cases": done}, indent=1))

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, work))


if __name__ == "__main__":
    main()
