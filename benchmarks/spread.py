"""How far peaks differ between processes that do the same: the driver places segments as it likes.

    python benchmarks/spread.py [--out FILE] [--seconds 90] [--variations NAME...] [--last-first]     # on a GPU
    python benchmarks/spread.py --compare                                                             # anywhere

Each variation (``VARIATIONS``: nothing, pinned memory, cuBLAS used before, ...) is a fresh interpreter with an address
space of its own. In it every point of ``POINTS`` runs five training steps in a fork, which does first what the
variation says. Recorded are the peaks after each step and the segments in the order in which the driver gave them. The
GPU may be shared: bytes do not depend on that. ``--compare`` predicts the same, for a process that did nothing before
and for one that ran a kernel. Run from the repository's root; needs transformers, timm and torchvision.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU must not start CUDA before a fork
sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "examples"), str(Path.cwd() / "benchmarks")]

from measure_peaks import in_fork

FILE = Path("measurements/h200/spread.json.gz")
NUM_STEPS = 5
TRIAL_TIMEOUT_S = 45.0
VARIATIONS = ("plain",) * 5 + ("pinned", "threads", "limit", "tensor", "cublas", "kernel")
"""What the process does on the GPU before: nothing; pins memory; has threads; sets a limit on the allocator; makes a
tensor; multiplies matrices; runs a kernel under a limit and empties the cache."""
AMP, CHECKPOINTED = {"precision": "bf16-amp"}, {"checkpointing": "full"}
GPT2, VIT = "examples/gpt2-s1024.yaml", "measurements/specs/vit-base-timm.yaml"
SWIN = "measurements/specs/swin-t-torchvision.yaml"
POINTS: tuple[tuple[str, dict[str, str], int], ...] = (
    (GPT2, {**AMP, **CHECKPOINTED}, 1),
    ("swin_t", {**AMP, **CHECKPOINTED}, 64),
    (VIT, {**AMP, **CHECKPOINTED}, 4),
    ("gpt2", {**AMP, **CHECKPOINTED, "loss": "chunked"}, 4),
    (VIT, {"precision": "fp32", **CHECKPOINTED}, 8),
    ("swin_t", {**AMP, **CHECKPOINTED}, 8),
    (SWIN, AMP, 16),
    (VIT, AMP, 1),
    ("swin_t", {**AMP, "checkpointing": "selective"}, 64),
)
"""Spec (a file, or a name of ``benchmarks/variants.py``), variant, batch size."""


def document_of(name: str) -> dict[str, Any]:
    from planner.specs.files import read_document

    if name.endswith(".yaml"):
        return dict(read_document(Path(name)))
    from variants import CASES

    return next(case[1] for case in CASES if case[0] == name)


def layout(number: int, variation: str, last_first: bool, deadline: float) -> None:
    """Every point in this interpreter's address space: one line of JSON each, on standard output."""
    import torch

    from planner.specs.document import parse_spec
    from planner.training import build_model

    torch.set_num_threads(1)
    built: dict[str, Any] = {}
    for name, axes, size in reversed(POINTS) if last_first else POINTS:
        if time.time() > deadline:
            break
        spec = parse_spec({**document_of(name), "variants": {axis: [value] for axis, value in axes.items()}})
        if name not in built:
            built = {name: build_model(spec)}
        model = built[name]
        start = time.time()
        found = in_fork(partial(trial, spec, model, size, variation), TRIAL_TIMEOUT_S)
        row = {"name": name, "variant": axes, "batch_size": size, "layout": number, "variation": variation}
        print(json.dumps({**row, "seconds": round(time.time() - start, 1), **found}), flush=True)


def trial(spec: Any, model: Any, size: int, variation: str) -> dict[str, Any]:
    import torch

    from planner.training import Training

    (variant,) = spec.variants.product()
    if variation == "threads":
        for _ in range(4):
            threading.Thread(target=time.sleep, args=(TRIAL_TIMEOUT_S,), daemon=True).start()
    torch.cuda.init()  # type: ignore[no-untyped-call]
    device = torch.device("cuda", 0)
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python", context=None)
    if variation in ("limit", "kernel"):
        torch.cuda.set_per_process_memory_fraction(40 * 2**30 / torch.cuda.get_device_properties(device).total_memory)
    kept = [torch.empty(64 << 20, pin_memory=True)] if variation == "pinned" else []
    if variation == "cublas":
        torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    if variation == "tensor":
        kept.append(torch.zeros(1, device=device))
    if variation == "kernel":
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    training = Training(spec, variant, model, device)
    alloc, reserved = [], []
    for _ in range(NUM_STEPS):
        training.step(size)
        torch.cuda.synchronize()
        alloc.append(torch.cuda.max_memory_allocated())
        reserved.append(torch.cuda.max_memory_reserved())
    segments = [
        [event["action"] == "segment_alloc", event["addr"], event["size"]]
        for event in torch.cuda.memory._snapshot()["device_traces"][0]
        if event["action"].startswith("segment")
    ]
    return {"alloc": alloc, "reserved": reserved, "segments": segments}


def compare() -> None:
    """Per point: peaks of reserved bytes in MiB as measured, by what the process had done before, and as predicted."""
    rows = [row for row in json.loads(gzip.decompress(FILE.read_bytes()))["rows"] if "reserved" in row]
    for name, axes, size in POINTS:
        found = [row for row in rows if (row["name"], row["variant"], row["batch_size"]) == (name, axes, size)]
        seen: dict[str, list[int]] = {}
        for row in found:
            seen.setdefault(row["variation"], []).append(row["reserved"][-1] >> 20)
        each = ", ".join(f"{how} {len(sizes)}x {sorted({*sizes})}" for how, sizes in sorted(seen.items()))
        measured = f"measured {each}" if each else "not measured"
        plain, warm = in_fork(partial(predict, name, axes, size), 600)["reserved"]
        label = " ".join(axes.values())
        print(f"{name} {label} batch {size}: {measured}; predicted {plain}, after a kernel {warm}", flush=True)


def predict(name: str, axes: dict[str, str], size: int) -> dict[str, list[int]]:
    from planner.allocator import replay
    from planner.allocator.driver import TopDownAddresses
    from planner.endurance import wants_another_step
    from planner.specs.document import parse_spec
    from planner.virtual.architecture import Architecture
    from planner.virtual.scaling import TraceFamily
    from planner.virtual.tracing import trace_steps

    spec = parse_spec({**document_of(name), "variants": {axis: [value] for axis, value in axes.items()}})
    (variant,) = spec.variants.product()
    architecture = Architecture(compute_capability=(9, 0), num_sms=132, torch_version=(2, 11))
    events = TraceFamily(lambda batch_size: trace_steps(spec, variant, batch_size, architecture)).traced(size).events
    plain, warm = TopDownAddresses(), TopDownAddresses()
    warm.load_kernels()
    return {
        "reserved": [
            replay(events, addresses=addresses, goes_on=wants_another_step).peak_reserved_bytes >> 20
            for addresses in (plain, warm)
        ]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--variations", nargs="*", default=VARIATIONS, choices=VARIATIONS)
    parser.add_argument("--last-first", action="store_true", help="the points in reverse")
    parser.add_argument("--layout", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--compare", action="store_true", help="predict what was measured")
    options = parser.parse_args()
    if options.compare:
        compare()
        return
    if options.layout is not None:
        layout(options.layout, options.variations[options.layout], options.last_first, options.deadline)
        return
    deadline = time.time() + options.seconds
    rows: list[dict[str, Any]] = []

    def follow(number: int) -> None:
        command = [sys.executable, *sys.argv, "--layout", str(number), "--deadline", str(deadline - 12)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        timer = threading.Timer(deadline - time.time(), process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            rows.append(json.loads(line))
            print(f"{deadline - time.time():4.0f}s left", tell(rows[-1]), flush=True)
            if len(rows) % 10 == 0:
                write(options.out, rows)
        process.wait()
        timer.cancel()

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(len(options.variations))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    write(options.out, rows)


_writing = threading.Lock()


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    from importlib.metadata import version

    with _writing:
        ordered = sorted(rows, key=lambda row: (row["name"], str(row["variant"]), row["batch_size"], row["layout"]))
        document = {
            "versions": {name: version(name) for name in ("torch", "transformers", "timm", "torchvision")},
            "command": " ".join(["python", *sys.argv]),
            "rows": ordered,
        }
        partial = out.with_suffix(".partial")
        partial.write_bytes(gzip.compress(json.dumps(document, separators=(",", ":")).encode(), 6, mtime=0))
        partial.replace(out)


def tell(row: dict[str, Any]) -> str:
    head = f"{row['name']} {row['variant']} {row['batch_size']} layout {row['layout']} {row['variation']}"
    if "alloc" not in row:
        return f"{head}: {row.get('error', 'out of memory')}"
    sizes = [f"{reserved / 2**20:.0f}" for reserved in row["reserved"]]
    return f"{head}: {row['seconds']} s, {row['alloc'][-1] / 2**20:.0f} MiB in {' '.join(sizes)}"


if __name__ == "__main__":
    main()
