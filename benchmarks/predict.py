"""How long a prediction takes, and how that grows with a model's layers and its batch size.

    python benchmarks/predict.py [CASE...] [--runs N] [--json FILE]

For each case, with nothing stored: imports and the model's build, then one variant's whole plan with its checks, as
``planner predict`` makes it. Of that, the traces (the first two run side by side, the third beside the replays of what
it checks) and the replays; processor seconds, which other work on the machine lengthens less than the rest; events
traced per second; the largest resident memory of all its processes together beyond that of a process that has only
imported torch, in a run of its own, since looking at it takes a third of a processor. Then the same for 2 to 32 layers,
and single traces at batch sizes 1 to 1000. The best of ``--runs`` runs is shown, since other work on the machine only
adds. Run from the repository's root; needs torch and transformers, and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path.cwd())]

from planner.gpus import find_gpu
from planner.planning import plan_sweep
from planner.specs.document import parse_spec
from planner.trials import Trial
from planner.units import GIB, MIB
from planner.virtual.device import VirtualDevice

GPU = "h200"


def _spec(model_type: str, length: int, precision: str, checkpointing: str, **config: Any) -> dict[str, Any]:
    return {
        "model": {"source": "transformers", "model_type": model_type, "task": "causal-lm", "config": config},
        "data": {"kind": "tokens", "sequence_length": length},
        "variants": {"precision": [precision], "checkpointing": [checkpointing]},
    }


CASES = {
    "gpt2-124m": _spec("gpt2", 1024, "bf16-amp", "none"),
    "llama-7b": _spec("llama", 2048, "bf16", "none"),
    "llama-7b-checkpointed": _spec("llama", 2048, "bf16", "full"),
}
LAYERS = (2, 4, 8, 16, 32)
BATCH_SIZES = (1, 10, 100, 1000)


class _Memory:
    """The largest resident memory of this process's descendants together, in bytes: what forks share counts once."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.peak_bytes = max(self.peak_bytes, sum(_proportional_bytes(pid) for pid in _descendants()))


def _descendants() -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (ValueError, OSError):  # no process, or one that has ended
            continue
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _proportional_bytes(pid: int) -> int:
    """Resident bytes, each page divided among the processes that share it (``Pss``, proc(5))."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def _processor_s() -> float:
    """Processor seconds of this process's children, with what they waited for: fields 14 to 17 (proc(5))."""
    ticks = 0
    for pid in _descendants():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def _torch_bytes() -> int:
    """Of a process that has only imported torch."""
    code = "import torch, sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return _proportional_bytes(process.pid)


def measure(document: Mapping[str, Any]) -> dict[str, Any]:
    """One plan from nothing; seconds and counts."""
    spec = parse_spec(document)
    kind = find_gpu(GPU)
    device = VirtualDevice(kind, kind.total_bytes - 4 * GIB)
    variant = spec.variants.product()[0]
    start = time.perf_counter()
    device.prepare(spec, [variant])
    device.wait(spec)
    ready, before_s = time.perf_counter(), _processor_s()
    (plan,) = plan_sweep(spec, device)
    end, after_s = time.perf_counter(), _processor_s()
    device.close()
    details = [trial.details for trial in plan.trials]
    tracing_s, replay_s = (sum(item["timings"][key] for item in details) for key in ("tracing_s", "replay_s"))
    traced = _traced(plan.trials)
    num_events = max(item["num_events"] for item in details)
    return {
        "max_batch_size": plan.max_batch_size,
        "traced_batch_sizes": traced,
        "imports_and_build_s": ready - start,
        "plan_s": end - ready,
        "processor_s": after_s - before_s,
        "tracing_s": tracing_s,
        "replay_s": replay_s,
        "num_events": num_events,
        "traced_events_per_s": len(traced) * num_events / tracing_s,
        "replays": sum(item["num_replays"] for item in details),
        # Up to the end: those that run out of memory stop before.
        "replay_ms": 1000 * min(item["timings"]["replay_s"] / item["num_replays"] for item in details),
    }


def measure_memory(document: Mapping[str, Any]) -> int:
    """The largest resident memory of one plan from nothing, in bytes."""
    spec, kind = parse_spec(document), find_gpu(GPU)
    device = VirtualDevice(kind, kind.total_bytes - 4 * GIB)
    with _Memory() as memory:
        plan_sweep(spec, device)
    device.close()
    return memory.peak_bytes


def _traced(trials: tuple[Trial, ...]) -> list[int]:
    return sorted({size for trial in trials for size in trial.details["traced_batch_sizes"]})


def one_trace(document: Mapping[str, Any], batch_sizes: tuple[int, ...]) -> dict[int, float]:
    """Seconds of one trace at each batch size."""
    spec = parse_spec(document)
    device = VirtualDevice(find_gpu(GPU), 1 << 50)
    found = {}
    for batch_size in batch_sizes:
        (plan,) = plan_sweep(spec, device, batch_size=batch_size)
        found[batch_size] = plan.trials[0].details["timings"]["tracing_s"]
        device.close()
    return found


def _best(runs: int, document: Mapping[str, Any]) -> dict[str, Any]:
    best = min((measure(document) for _ in range(runs)), key=lambda run: float(run["plan_s"]))
    return {**best, "peak_bytes": measure_memory(document)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    print(f"{os.cpu_count()} processors; load average of other work: {os.getloadavg()[0]:.1f}")
    own_bytes = _torch_bytes()
    plans, layers = {}, {}
    columns = "imports+build   plan = traces + replays  processor  events  traced/s  replay  beyond torch  largest"
    print(f"{'case':24} {columns}")
    for name in options.cases or CASES:
        plans[name] = _best(options.runs, CASES[name])
        _show(name, plans[name], own_bytes)
    for number in () if options.cases else LAYERS:
        spec = _spec("llama", 2048, "bf16", "none", num_hidden_layers=number)
        layers[number] = _best(options.runs, spec)
        _show(f"llama, {number} layers", layers[number], own_bytes)
    traces = {} if options.cases else one_trace(CASES["gpt2-124m"], BATCH_SIZES)
    for batch_size, seconds in traces.items():
        print(f"one trace of gpt2-124m at batch size {batch_size}: {seconds:.2f} s")
    if options.json:
        found = {"torch_bytes": own_bytes, "plans": plans, "layers": layers, "traces_s": traces}
        options.json.write_text(json.dumps(found, indent=1))


def _show(name: str, run: Mapping[str, Any], own_bytes: int) -> None:
    print(
        f"{name:24} {run['imports_and_build_s']:11.1f} s {run['plan_s']:6.2f} {run['tracing_s']:8.2f}"
        f" {run['replay_s']:8.2f} s {run['processor_s']:8.2f} s {run['num_events']:7} {run['traced_events_per_s']:9.0f}"
        f" {run['replay_ms']:4.0f} ms {(run['peak_bytes'] - own_bytes) / MIB:9.0f} MiB"
        f"  {run['max_batch_size']} (traced at {', '.join(map(str, run['traced_batch_sizes']))})",
        flush=True,
    )


if __name__ == "__main__":
    main()
