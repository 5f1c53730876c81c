"""Measure training steps on a real GPU: the peaks that predictions are held against.

    python benchmarks/measure_peaks.py SPEC... [--out FOLDER] [--seconds 500]     # FOLDER defaults to $OUT, else .

For each variant of each spec: the three peaks, allocation retries and step time at several batch sizes with no limit,
and the largest batch size under a limit of 16 GiB with the first that ran out of memory; each trial in a fresh process,
forked before CUDA was touched. And one recorded trace of allocator events at batch 4 (two steps). Writes
``peaks.json.gz``. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "examples")]

from planner.specs.document import load_spec
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.training import Training, build_model

SIZES = (1, 2, 4, 8, 16, 32, 64)
LIMIT_BYTES = 16 << 30
TRIAL_TIMEOUT_S = 120


def in_fork(task: Any) -> dict[str, Any]:
    """``task()`` in a forked process: its result, or how it died."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            result = task()
        except torch.OutOfMemoryError:
            result = {"oom": True}
        except Exception:  # noqa: BLE001 - the parent reports it
            result = {"error": traceback.format_exc()[-1500:]}
        with os.fdopen(writing, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else {"error": "the process died"}


def trial(
    spec: Spec, variant: Variant, model: torch.nn.Module, batch_size: int, limit: int | None, trace: bool = False
) -> dict[str, Any]:
    """Two or three training steps in this process: peaks, or recorded events where ``trace`` is asked for."""
    total = torch.cuda.get_device_properties(0).total_memory
    if trace:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python", context=None)
    if limit is not None:
        torch.cuda.set_per_process_memory_fraction(limit / total)
    training = Training(spec, variant, model, torch.device("cuda", 0))
    times = []
    for _ in range(2 if trace else 3):
        start = time.perf_counter()
        training.step(batch_size)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    free, _ = torch.cuda.mem_get_info()
    result: dict[str, Any] = {
        "alloc": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "device": total - free,
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "step_s": min(times[1:]),
    }
    if trace:
        events = torch.cuda.memory._snapshot()["device_traces"][0]
        result["events"] = [[e["action"], e["addr"], e["size"], e["stream"]] for e in events]
    return result


def largest(spec: Spec, variant: Variant, model: torch.nn.Module, fits: int, deadline: float) -> dict[str, Any] | None:
    """The largest batch size under the limit and the first that ran out, by doubling and bisection in fresh
    processes."""
    low, high, best = 0, None, None
    size = max(1, fits)
    while time.monotonic() < deadline:
        result = in_fork(lambda: trial(spec, variant, model, size, LIMIT_BYTES))  # noqa: B023 - run at once
        if "error" in result:
            return {"error": result["error"]}
        if "oom" in result:
            high = size
        else:
            low, best = size, result
        if high is not None and high - low <= 1:
            return {"max": low, "first_oom": high, **(best or {})}
        size = (low + high) // 2 if high is not None else size * 2
    return None


def measure(spec: Spec, variant: Variant, deadline: float) -> dict[str, Any]:
    """One variant, in a process of its own, so that no model leaves anything behind for the next."""
    model = build_model(spec)
    peaks: dict[str, Any] = {}
    for size in SIZES:
        result = in_fork(lambda: trial(spec, variant, model, size, None))  # noqa: B023 - run at once
        peaks[str(size)] = result
        if "alloc" not in result or result["reserved"] > 60 << 30:
            break
    fitting = [int(size) for size, peak in peaks.items() if peak.get("reserved", LIMIT_BYTES) < LIMIT_BYTES]
    bound = largest(spec, variant, model, max(fitting, default=1), deadline) if "alloc" in peaks["1"] else None
    trace = in_fork(lambda: trial(spec, variant, model, 4, None, trace=True))
    return {"peaks": peaks, "max_batch": {"16": bound}, "trace_at_4": trace}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=500.0)
    options = parser.parse_args()
    import transformers

    torch.set_num_threads(1)  # a process with a pool of OpenMP threads does not survive a fork
    start = time.monotonic()
    deadline = start + options.seconds
    cases = []
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.specs:
        spec = load_spec(path)
        for variant in spec.variants.product():
            if time.monotonic() > deadline:
                print("out of time before", path.stem, variant.label())
                continue
            case = in_fork(lambda: measure(spec, variant, deadline))  # noqa: B023 - run at once
            cases.append({"case": path.stem, "variant": variant.as_dict(), **case})
            peaks, bound = case.get("peaks", {}), case.get("max_batch", {}).get("16")
            first = (case | peaks.get("1", {})).get("error", "").strip().splitlines()[-1:] or ""
            sizes = bound and (bound.get("max"), bound.get("first_oom"))
            allocated = peaks.get("4", {}).get("alloc", 0) / 2**20
            print(
                f"{time.monotonic() - start:5.0f}s {path.stem:28} {variant.label():32} "
                f"B4 {allocated:9.1f} MiB  16GiB: {sizes} {first}",
                flush=True,
            )
            with gzip.open(options.out / "peaks.json.gz", "wt") as file:
                json.dump(
                    {
                        "torch": torch.__version__,
                        "transformers": transformers.__version__,
                        "command": "python benchmarks/measure_peaks.py measurements/specs/*.yaml",
                        "cases": cases,
                    },
                    file,
                )


if __name__ == "__main__":
    main()
