"""Measure training steps on a real GPU: the peaks that predictions are held against.

    python benchmarks/measure_peaks.py SPEC... [--out FILE] [--predictions FILE] [--limit GIB] [--jobs N]
        [--seconds S] [--trace-at N...]

For each variant of each spec: peaks and allocation retries at several batch sizes with no limit, the largest batch size
under ``--limit`` with the first that ran out of memory, each trial in a fresh process forked before CUDA was touched;
and recorded traces of allocator events (two steps) at the batch sizes of ``--trace-at``; in fp16-amp the peaks after
each step and the gradient scaler's factor. ``--predictions``, as
``benchmarks/predict_peaks.py`` writes them, say which batch sizes to run and where to look for the largest. ``--jobs``
cases share the GPU: what an allocator holds does not depend on other processes, as long as there is memory for all.
Results are written as they come. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "examples")]

from planner.specs.document import load_spec
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.training import Training, build_model, phases

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes where no prediction says which."""
TRIAL_TIMEOUT_S = 60.0
CASE_TIMEOUT_S = 240.0
GIB = 1 << 30


@dataclass(slots=True, eq=False)
class Fork:
    """A task in a forked process, and the end of the pipe that its result comes from."""

    pid: int
    pipe: int
    deadline: float
    leads_group: bool
    text: bytes = b""

    @classmethod
    def start(cls, task: Callable[[], Any], timeout_s: float, *, group: bool = False) -> Fork:
        """``group``: what the task forks in turn dies with it."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            if group:
                os.setpgid(0, 0)
            try:
                result = task()
            except torch.OutOfMemoryError:
                result = {"oom": True}
            except BaseException:  # noqa: BLE001 - the parent reports it
                result = {"error": traceback.format_exc()[-1500:]}
            with os.fdopen(writing, "w") as pipe:
                json.dump(result, pipe)
            os._exit(0)
        os.close(writing)
        return cls(pid, reading, time.monotonic() + timeout_s, group)

    def read(self) -> bool:
        """Take what has come; whether that was all."""
        piece = os.read(self.pipe, 1 << 20)
        self.text += piece
        return not piece

    def result(self, *, late: bool = False) -> dict[str, Any]:
        """To be called once ``read`` said that all has come, or the deadline passed."""
        os.close(self.pipe)
        if late:
            (os.killpg if self.leads_group else os.kill)(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        if late:
            return {"error": "out of time"}
        return dict(json.loads(self.text)) if self.text else {"error": "the process died"}


def in_fork(task: Callable[[], Any], timeout_s: float = TRIAL_TIMEOUT_S) -> dict[str, Any]:
    """``task()`` in a forked process: its result, or how it died."""
    fork = Fork.start(task, timeout_s)
    while True:
        ready, _, _ = select.select([fork.pipe], [], [], max(0.0, fork.deadline - time.monotonic()))
        if not ready:
            return fork.result(late=True)
        if fork.read():
            return fork.result()


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
    marks = []
    steps = []
    for phase in phases(spec, 2 if trace else 3):
        if trace:
            marks.append(len(torch.cuda.memory._snapshot()["device_traces"][0]))
        training.run(phase, batch_size)
        torch.cuda.synchronize()
        if training.scaler.is_enabled():
            scale = training.scaler.get_scale()
            steps.append([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), scale])
    result: dict[str, Any] = {
        "alloc": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }
    if steps:  # whose updates were skipped: ``benchmarks/accuracy.py`` skips the same
        result["steps"] = steps
    if trace:
        events = torch.cuda.memory._snapshot()["device_traces"][0]
        result["events"] = [[e["action"], e["addr"], e["size"], e["stream"]] for e in events]
        result["marks"] = marks
    return result


def largest(run: Callable[[int], dict[str, Any]], expected: int, sure: bool, deadline: float) -> dict[str, Any] | None:
    """The largest batch size under the limit and the first that ran out.

    ``sure``: ``expected`` is a prediction, so its neighbour is tried next, then ever farther ones; else twice as much.
    """
    low, high, best = 0, None, None
    size, stride = max(1, expected), 1 if sure else max(1, expected)
    while time.monotonic() < deadline:
        result = run(size)
        if "oom" in result:
            high = size
        elif "error" in result:
            return {"error": result["error"], "at": size}
        else:
            low, best = size, result
        if high is not None and high - low <= 1:
            return {"max": low, "first_oom": high, **(best or {})}
        if high is None:
            size, stride = low + stride, stride * 2
        elif low == 0:
            size, stride = max(1, high - stride), stride * 2
        else:
            size = (low + high) // 2
    return None


def measure(
    spec: Spec, variant: Variant, predicted: dict[str, Any] | None, options: argparse.Namespace, deadline: float
) -> dict[str, Any]:
    """One variant, in a process of its own, so that no model leaves anything behind for the next."""
    model = build_model(spec)
    limit = options.limit * GIB
    traces = {
        f"trace_at_{size}": in_fork(lambda: trial(spec, variant, model, size, None, trace=True))  # noqa: B023
        for size in options.trace_at
    }
    sizes = [point["batch_size"] for point in predicted["points"]] if predicted else SIZES
    peaks: dict[str, Any] = {}
    for size in sizes:
        if time.monotonic() > deadline:
            break
        result = in_fork(lambda: trial(spec, variant, model, size, None))  # noqa: B023 - run at once
        peaks[str(size)] = result
        if "alloc" not in result or result["reserved"] > 2 * limit:
            break
    bound = None
    if any("alloc" in peak for peak in peaks.values()):
        fitting = [int(size) for size, peak in peaks.items() if peak.get("reserved", limit) < limit]
        expected = predicted["max"] if predicted else max(fitting, default=1)
        bound = largest(
            lambda size: in_fork(lambda: trial(spec, variant, model, size, limit)),
            expected,
            predicted is not None,
            deadline,
        )
    return {"peaks": peaks, "max_batch": {str(options.limit): bound}, **traces}


def _say(case: dict[str, Any], label: str, predicted: dict[str, Any] | None, seconds: float, limit: int) -> None:
    peaks, bound = case.get("peaks", {}), case.get("max_batch", {}).get(str(limit))
    first = (case | next(iter(peaks.values()), {})).get("error", "").strip().splitlines()[-1:]
    sizes = bound and (bound.get("max"), bound.get("first_oom"))
    expected = predicted["max"] if predicted else "-"
    errors = []
    for point in predicted["points"] if predicted else []:
        peak = peaks.get(str(point["batch_size"]), {})
        if "alloc" in peak:
            errors.append(
                f"{point['batch_size']}: {point['alloc'] / peak['alloc'] - 1:+.2%} "
                f"{point['reserved'] / peak['reserved'] - 1:+.2%}"
            )
    line = f"{seconds:4.0f}s {case['case']:22} {label:22} {limit} GiB: {sizes} predicted {expected}"
    print(line, " | ".join(errors), *first, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("peaks.json.gz"))
    parser.add_argument("--predictions", type=Path)
    parser.add_argument("--limit", type=int, default=16, help="GiB")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--trace-at", type=int, nargs="*", default=[4])
    options = parser.parse_args()
    import transformers

    torch.set_num_threads(1)  # a process with a pool of OpenMP threads does not survive a fork
    start = time.monotonic()
    deadline = start + options.seconds
    predictions: dict[str, Any] = {}
    if options.predictions:
        for case in json.loads(options.predictions.read_text())["cases"]:
            if "error" not in case:
                predictions[case["case"] + json.dumps(case["variant"], sort_keys=True)] = case
    waiting = [(path.stem, load_spec(path), variant) for path in options.specs
               for variant in load_spec(path).variants.product()]  # fmt: skip
    waiting.reverse()
    running: dict[Fork, tuple[str, Variant, Any]] = {}
    cases: list[dict[str, Any]] = []
    written = start

    def write() -> None:
        document = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": "python " + " ".join(sys.argv),
            "cases": cases,
        }
        partial = options.out.with_suffix(".partial")
        with gzip.open(partial, "wt", compresslevel=6) as file:
            json.dump(document, file, separators=(",", ":"))
        partial.replace(options.out)

    while waiting or running:
        while waiting and len(running) < options.jobs and time.monotonic() < deadline:
            name, spec, variant = waiting.pop()
            predicted = predictions.get(name + json.dumps(variant.as_dict(), sort_keys=True))

            def task(spec: Any = spec, variant: Any = variant, predicted: Any = predicted) -> dict[str, Any]:
                return measure(spec, variant, predicted, options, deadline)

            left = min(CASE_TIMEOUT_S, max(1.0, deadline - time.monotonic() + 10))
            running[Fork.start(task, left, group=True)] = (name, variant, predicted)
        if not running:
            break
        ready, _, _ = select.select([fork.pipe for fork in running], [], [], 0.5)
        for fork in list(running):
            late = time.monotonic() > fork.deadline
            if late or (fork.pipe in ready and fork.read()):
                name, variant, predicted = running.pop(fork)
                case = {"case": name, "variant": variant.as_dict(), **fork.result(late=late)}
                cases.append(case)
                _say(case, variant.label(), predicted, time.monotonic() - start, options.limit)
        if time.monotonic() - written > 20:
            write()
            written = time.monotonic()
    for name, _, variant in waiting:
        print("out of time before", name, variant.label())
    write()


if __name__ == "__main__":
    main()
