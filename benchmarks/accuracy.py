"""Hold predictions against measurements: every case that was measured on a real GPU, at every measured batch size.

    python benchmarks/accuracy.py [CASE...] [--file FILE...] [--jobs N] [--json FILE] [--predicted FILE]

Prints each point, then the median and worst errors, how many largest batch sizes were exact, and how many measured
figures lay inside their interval. Where the gradient scaler is known to have skipped updates (``steps`` of a point: its
factor after each), the peaks are those of a trace that skips the same; the interval knows nothing of it. ``--file``
takes those measurements alone, by their file's name (``unseen-2``).
``--predicted`` predicts nothing: it takes what ``benchmarks/predict_peaks.py`` wrote before the measurement. Run from
the repository's root; needs torch, transformers, timm and torchvision, and no GPU.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import json
import multiprocessing
import os
import sys
import time
import unittest.mock
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "examples")]

from planner.specs.document import load_spec
from planner.specs.variants import Variant, variant_label

DATA = Path("measurements/h200")
TOTAL_BYTES = 150_109_880_320
SMALL = 5
MEASURED = ("peaks", *(f"unseen-{number}" for number in range(1, 10)))
FIRST_SCALE = 65_536.0
"""A gradient scaler's factor before the first step."""
TORCH_MEASURED = (2, 11)  # kernels are chosen as the torch of the measurements chose them


def cases(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """``{case, spec path, variant, points: [(batch size, limit or None, measured)], bounds: [(limit, max, first
    oom)]}``."""
    found = []
    for path in sorted((DATA / "truth").glob("*.json")) if not names or "truth" in names else ():
        for name, measured in json.loads(path.read_text())["variants"].items():
            precision, _, checkpointed = name.partition("+")
            spec = Path("examples") / f"{path.stem}.yaml"
            variant = {"precision": precision, "checkpointing": "full" if checkpointed else "none"}
            found.append(_case(path.stem, spec, variant, measured))
    for name in MEASURED:
        if names and name not in names:
            continue
        document = json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))
        for case in document["cases"]:
            path = Path("measurements/specs") / f"{case['case']}.yaml"
            found.append(_case(case["case"], path, case["variant"], case))
    return found


def _case(name: str, path: Path, variant: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    points = [(int(size), None, peak) for size, peak in measured["peaks"].items() if "alloc" in peak]
    bounds = []
    for limit, bound in measured.get("max_batch", {}).items():
        if bound and "max" in bound:
            bounds.append((int(limit) << 30, bound["max"], bound["first_oom"]))
            if "alloc" in bound:
                points.append((bound["max"], int(limit) << 30, bound))
    return {
        "case": name,
        "path": str(path),
        "variant": variant,
        "points": points,
        "bounds": bounds,
    }


def evaluate(case: dict[str, Any]) -> dict[str, Any]:
    """Predict every point of one case, in this process."""
    import torch

    from planner.allocator import AllocatorConfig, replay
    from planner.virtual.architecture import Architecture
    from planner.virtual.prediction import predict_trial
    from planner.virtual.scaling import TraceFamily
    from planner.virtual.trace import Trace
    from planner.virtual.tracing import trace_steps

    torch.set_num_threads(1)
    spec = load_spec(Path(case["path"]))
    variant = Variant.from_dict(case["variant"])
    architecture = Architecture(compute_capability=(9, 0), num_sms=132, torch_version=TORCH_MEASURED)

    def trace(size: int) -> Trace:
        found = trace_steps(spec, variant, size, architecture)
        found.successors = None  # three steps were measured, and no more
        return found

    family = TraceFamily(trace)
    start = time.perf_counter()

    def needed_bytes(size: int, limit: int) -> dict[str, Any]:
        trial = predict_trial(
            family,
            size,
            fresh=True,
            config=AllocatorConfig(),
            capacity_bytes=limit,
            device_total_bytes=TOTAL_BYTES,
            compute_capability=architecture.compute_capability,
        )
        return dict(trial["needed"])

    rows = []
    for size, limit, measured in case["points"]:
        # A question about one small size is answered by a trace of it; larger ones hold the scaling to account too.
        skipped = skipped_steps(measured)
        if skipped:
            with skipping(skipped):
                events = TraceFamily(trace).traced(size).events
        else:
            events = (family.traced if size <= SMALL else family.scaled)(size).events
        result = replay(events, AllocatorConfig(), limit, device_total_bytes=TOTAL_BYTES)
        needed = needed_bytes(size, limit or TOTAL_BYTES)
        rows.append(
            {
                "batch_size": size,
                "limit_bytes": limit,
                "skipped": sorted(skipped),
                "allocated": result.peak_allocated_bytes / measured["alloc"] - 1,
                "reserved": result.peak_reserved_bytes / measured["reserved"] - 1,
                "width": (needed["high_bytes"] - needed["low_bytes"]) / needed["bytes"],
                # What was measured without a limit needs between its allocated and its reserved bytes.
                "inside": needed["low_bytes"] <= measured["reserved"] and needed["high_bytes"] >= measured["alloc"],
            }
        )
    bounds = []
    for limit, largest, first_oom in case["bounds"]:
        found = _largest(family, limit, largest)
        bounds.append(
            {
                "limit_bytes": limit,
                "measured": largest,
                "predicted": found,
                # A verdict is wrong where the interval excludes what was measured.
                "wrong_fits": needed_bytes(first_oom, limit)["high_bytes"] <= limit,
                "wrong_oom": largest > 0 and needed_bytes(largest, limit)["low_bytes"] > limit,
            }
        )
    seconds = time.perf_counter() - start
    return {"case": case["case"], "variant": variant.label(), "rows": rows, "bounds": bounds, "seconds": seconds}


def skipped_steps(measured: dict[str, Any]) -> set[int]:
    """Numbers of the steps, from 1, after which the gradient scaler's factor was lower than before."""
    factors = [FIRST_SCALE, *(factor for _, _, factor in measured.get("steps", ()) if factor is not None)]
    return {number for number, (before, after) in enumerate(itertools.pairwise(factors), start=1) if after < before}


@contextmanager
def skipping(numbers: Collection[int]) -> Iterator[None]:
    """Have gradient scalers leave out the updates of these steps of a trace, as where gradients overflow."""
    from torch.amp.grad_scaler import GradScaler, OptState

    from planner.virtual import tracing

    step, count = GradScaler.step, itertools.count(1)

    def maybe(scaler: GradScaler, optimizer: Any) -> Any:
        if next(count) not in numbers:
            return step(scaler, optimizer)
        if scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            scaler.unscale_(optimizer)
        return None

    copying = unittest.mock.patch.object(tracing, "repeat_last_step", return_value=False)
    with unittest.mock.patch.object(GradScaler, "step", maybe), copying:
        yield


def foretold(case: dict[str, Any], predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``evaluate`` by what was written down before the measurement: no verdicts, and points without a limit alone."""
    (found,) = (item for item in predictions if item["case"] == case["case"] and item["variant"] == case["variant"])
    label = variant_label(case["variant"])
    if "error" in found:
        return {"case": case["case"], "variant": label, "error": found["error"]}
    points = {point["batch_size"]: point for point in found["points"]}
    rows = [
        {
            "batch_size": size,
            "limit_bytes": None,
            "allocated": points[size]["alloc"] / measured["alloc"] - 1,
            "reserved": points[size]["reserved"] / measured["reserved"] - 1,
            "width": (points[size]["high_bytes"] - points[size]["low_bytes"]) / points[size]["bytes"],
            "inside": points[size]["low_bytes"] <= measured["reserved"]
            and points[size]["high_bytes"] >= measured["alloc"],
        }
        for size, limit, measured in case["points"]
        if limit is None and size in points
    ]
    bounds = [
        {"limit_bytes": limit, "measured": largest, "predicted": found["max"]} for limit, largest, _ in case["bounds"]
    ]
    return {"case": case["case"], "variant": label, "rows": rows, "bounds": bounds, "seconds": 0.0}


def _largest(family: Any, limit: int, start: int) -> int:
    """The largest batch size that the replay says fits, looked for around ``start``."""
    size = max(1, start)
    while size and not fits(family, size, limit):
        size -= 1
    while size and fits(family, size + 1, limit):
        size += 1
    return size


def fits(family: Any, size: int, limit: int) -> bool:
    """Whether the replay of a batch size of ``family`` fits into ``limit`` bytes on an H200."""
    from planner.allocator import AllocatorConfig, replay

    return replay(family.scaled(size).events, AllocatorConfig(), limit, device_total_bytes=TOTAL_BYTES).fits


def _worker(case: dict[str, Any], pipe: Any) -> None:
    try:
        pipe.send(evaluate(case))
    except Exception as error:  # noqa: BLE001 - one case must not hide the others
        message = f"{type(error).__name__}: {error}"[:300]
        pipe.send({"case": case["case"], "variant": variant_label(case["variant"]), "error": message})
    os._exit(0)  # torch's interpreter exit is not safe with a Python backend registered


def _in_process(case: dict[str, Any]) -> dict[str, Any]:
    """``evaluate`` in a process of its own: tracing changes torch for good."""
    context = multiprocessing.get_context("spawn")
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(case, writing))
    os.environ["PYTHONHASHSEED"] = "0"  # as in the process that predicts (``planner.virtual.device``)
    process.start()
    writing.close()
    try:
        result: dict[str, Any] = reading.recv()
    except EOFError:
        result = {"case": case["case"], "variant": variant_label(case["variant"]), "error": "the process died"}
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--file", nargs="*", choices=["truth", *MEASURED], default=[])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--predicted", type=Path)
    options = parser.parse_args()
    chosen = [
        case for case in cases(options.file) if not options.cases or any(part in case["case"] for part in options.cases)
    ]
    results = []
    pool = ThreadPoolExecutor(options.jobs)
    answer = _in_process
    if options.predicted:
        predictions = json.loads(gzip.decompress(options.predicted.read_bytes()))["cases"]
        answer = functools.partial(foretold, predictions=predictions)
    for result in pool.map(answer, chosen):
        results.append(result)
        print(f"{result['case']} {result['variant']}", result.get("error", f"({result.get('seconds', 0):.1f} s)"))
        for row in result.get("rows", []):
            limit = f"{row['limit_bytes'] >> 30:3} GiB" if row["limit_bytes"] else "no limit"
            print(
                f"  batch {row['batch_size']:4} {limit:8}"
                f" allocated {row['allocated']:+9.3%} reserved {row['reserved']:+9.3%}"
                f"  interval width {row['width']:6.1%} {'' if row['inside'] else 'OUTSIDE'}"
                f"{' skipped ' + str(row['skipped']) if row.get('skipped') else ''}"
            )
        for bound in result.get("bounds", []):
            wrong = " WRONG FITS" * bound.get("wrong_fits", 0) + " WRONG OOM" * bound.get("wrong_oom", 0)
            sizes = f"measured {bound['measured']}, predicted {bound['predicted']}"
            print(f"  largest under {bound['limit_bytes'] >> 30} GiB: {sizes}{wrong}")
        sys.stdout.flush()
    _summary(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def _summary(results: list[dict[str, Any]]) -> None:
    rows = [row for result in results for row in result.get("rows", [])]
    bounds = [bound for result in results for bound in result.get("bounds", [])]
    if not rows:
        return
    failed = sum("error" in result for result in results)
    print(f"\n{len(results)} variants, {len(rows)} points, {failed} failed")
    for name in ("allocated", "reserved"):
        errors = sorted(abs(row[name]) for row in rows)
        print(
            f"peak {name}: median {errors[len(errors) // 2]:.4%}, 95% {errors[int(len(errors) * 0.95)]:.3%}, "
            f"worst {errors[-1]:.3%}"
        )
    exact = sum(bound["measured"] == bound["predicted"] for bound in bounds)
    near = sum(abs(bound["measured"] - bound["predicted"]) <= max(1, bound["measured"] // 100) for bound in bounds)
    print(f"largest batch size: {exact} of {len(bounds)} exact, {near} within 1% or one sample")
    print(f"interval: {sum(row['inside'] for row in rows)} of {len(rows)} inside")
    if all("wrong_fits" in bound for bound in bounds):
        fits, ooms = (sum(bound[name] for bound in bounds) for name in ("wrong_fits", "wrong_oom"))
        print(f"verdicts: wrong 'fits' {fits}, wrong 'does not fit' {ooms} of {len(bounds)}")


if __name__ == "__main__":
    main()
