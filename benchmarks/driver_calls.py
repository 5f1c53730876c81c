"""Where the CUDA driver puts the allocator's segments, and what it takes for itself among them.

    python benchmarks/driver_calls.py record [CASE...] [--out FILE] [--jobs N] [--seconds S]    # needs a GPU and cc
    python benchmarks/driver_calls.py compare [CASE...]                                         # anywhere

A ``CASE`` is ``SPEC,PRECISION,CHECKPOINTING,SIZE[,FLAVOUR...]``; those of ``CASES`` where none is given. Each flavour
is a fresh process that takes three training steps: ``plain``; with batches of a ``loader`` that pins memory; ``copied``
from the host; with a ``tensor`` made before the weights come; with the model made ``on_gpu``. Recorded are the peaks
after each step, the allocator's segments, and the calls that ``driver_calls.c`` notes. ``compare`` prints peaks of
reserved bytes: as measured, in each run, and predicted for the plain process. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "examples"), str(Path.cwd() / "benchmarks")]

from step_events import spec_of

FILE = Path("measurements/h200/driver.json.xz")
FLAVOURS = ("plain", "loader", "copied", "tensor", "on_gpu")
_ALL = ",".join(FLAVOURS)
CASES = (
    f"unet-256,bf16-amp,none,1,{_ALL}", "unet-256,bf16-amp,none,2", "unet-256,fp32,none,1",
    f"qwen3-600m-s1280,bf16-amp,full,1,{_ALL}", f"t5-base-s256,bf16-amp,full,54,{_ALL}",
    f"mixtral-four-s1024,bf16-amp,full,1,{_ALL}", f"bart-base-s512,bf16-amp,full,4,{_ALL}",
    f"wav2vec2-bert,fp32,none,1,{_ALL}", "resnet50-224,bf16-amp,none,1", "resnet50-224,fp32,none,1",
    "resnext50-timm,fp32,none,1", "densenet121-torchvision,bf16-amp,none,1",
    "efficientnet-b0-torchvision,bf16-amp,none,1",
    "mobilenetv3-timm,bf16-amp,none,1", "vgg16-bn-torchvision,bf16-amp,none,1", "convnext-tiny-timm,bf16-amp,none,1",
    "convnext-hf-224,bf16-amp,none,1", "resnet152-torchvision,bf16-amp,none,75", "unet-48-224,bf16-amp,none,1",
    "unet-48-224,fp32,none,1", "unet-128,bf16-amp,none,1", "unet-narrow-320,bf16-amp,none,1",
    "unet-narrow-320,fp32,none,1", "unet-3ch-384,bf16-amp,none,1", "unet-half-512,bf16-amp,none,1",
    "unet-320,bf16-amp,none,1", "diffusion-64,bf16-amp,none,1", "text-unet-32,bf16-amp,none,1",
    *(f"{case},1" for case in (
        "gpt2-s1024,bf16-amp,full", "opt-350m-s1024,bf16-amp,full", "llama-gqa-s2048,bf16-amp,full",
        "whisper-tiny,bf16-amp,full", "swin-t-torchvision,bf16-amp,full", "resnet34-timm,bf16-amp,none",
        "regnety-032-timm,bf16-amp,none", "inception-v3-torchvision,bf16-amp,none", "hrnet-w18-timm,fp32,none",
    )), "unet-256,bf16-amp,none,3",
)  # fmt: skip
"""The last ten are of no part in any rule."""
SOURCE = Path("benchmarks/driver_calls.c")
LIBRARY = "DRIVER_CALLS_LIBRARY"
LEAST_S = 8.0


def trial(case: str, flavour: str) -> dict[str, Any]:
    """Three steps in this process, in which the library is preloaded."""
    import torch

    import planner.training.step as step
    from planner.specs.variants import Variant
    from planner.training import Training, build_model, phases

    torch.set_num_threads(1)
    name, precision, checkpointing, size, *_ = case.split(",")
    spec, variant = spec_of(name), Variant.from_dict({"precision": precision, "checkpointing": checkpointing})
    device = torch.device("cuda", 0)
    model = build_model(spec) if flavour != "on_gpu" else None
    noted = ctypes.CDLL(os.environ[LIBRARY])
    noted.driver_calls_start()
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python", context=None)
    kept = torch.zeros(1, device=device) if flavour == "tensor" else None
    if model is None:
        with device:
            model = build_model(spec)
    if flavour in ("loader", "copied"):
        step.make_batch = partial(_on_host, step.make_batch, pinned=flavour == "loader")
    training = Training(spec, variant, model, device)
    steps = []
    for phase in phases(spec, 3):
        training.run(phase, int(size))
        torch.cuda.synchronize()
        steps.append([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()])
    del kept
    history = torch.cuda.memory._snapshot()["device_traces"][0]
    with tempfile.NamedTemporaryFile("r") as file:
        noted.driver_calls_write(file.name.encode())
        lines = [line.split() for line in file]
    return {
        "case": case, "flavour": flavour, "torch": torch.__version__, "gpu": torch.cuda.get_device_name(0),
        "steps": steps,
        "segments": [[e["addr"], e["size"]] for e in history if e["action"] == "segment_alloc"],
        "calls": [[kind, int(address), int(size)] for kind, address, size in lines],
    }  # fmt: skip


def _on_host(make: Any, spec: Any, model: Any, size: int, device: Any, *, pinned: bool, **options: Any) -> Any:
    import torch
    from torch.utils.data import DataLoader

    batch = make(spec, model, size, torch.device("cpu"), **options)
    if pinned:
        rows: Any = [{name: item[index] for name, item in batch.items()} for index in range(size)]
        batch = next(iter(DataLoader(rows, batch_size=size, pin_memory=True)))
    return {name: item.to(device, non_blocking=True) for name, item in batch.items()}


def record(cases: list[str], out: Path, jobs: int, deadline: float) -> None:
    rows: list[dict[str, Any]] = []

    def run(item: tuple[str, str]) -> None:
        left = deadline - time.monotonic()
        if left < LEAST_S:
            print("out of time before", *item, flush=True)
            return
        environment = {**os.environ, "LD_PRELOAD": library, LIBRARY: library}
        command = [sys.executable, __file__, "trial", *item]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            print("out of time in", *item, flush=True)
            return
        if done.returncode:
            print(*item, done.stderr[-600:], flush=True)
            return
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{left:4.0f}s left", *item, [reserved >> 20 for _, reserved in rows[-1]["steps"]], flush=True)
        out.write_bytes(lzma.compress(json.dumps({"rows": rows}, separators=(",", ":")).encode()))

    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "driver_calls.so"))
        compiler = shutil.which("cc") or shutil.which("gcc") or sys.exit("no C compiler")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, str(SOURCE), "-lpthread"], check=True)
        with ThreadPoolExecutor(jobs) as pool:
            items = [(",".join(fields[:4]), flavour) for fields in (case.split(",") for case in cases)
                     for flavour in fields[4:] or FLAVOURS[:1]]  # fmt: skip
            list(pool.map(run, items))


def compare(case: str, rows: list[dict[str, Any]]) -> None:
    """Tracing changes torch for good: in a process of its own."""
    from measure_peaks import in_fork

    def predicted() -> dict[str, Any]:
        from step_events import predict

        from planner.allocator import replay
        from planner.virtual import scaling

        name, precision, checkpointing, size = case.split(",")
        axes = {"precision": precision, "checkpointing": checkpointing}
        trace = predict({"spec": name, "variant": axes, "size": int(size), "steps": []})
        result = replay(scaling.events_of(trace, trace.sizes))
        return {"peaks": [result.peak_allocated_bytes, result.peak_reserved_bytes]}

    found = in_fork(predicted, 600)
    measured: dict[str, list[int]] = {}
    for row in rows:
        if row["case"] == case:
            measured.setdefault(row["flavour"], []).append(row["steps"][-1][1])
    if "peaks" not in found or "plain" not in measured:
        print(case, found, measured, flush=True)
        return
    mine = found["peaks"][1]
    errors = ", ".join(f"{mine / size - 1:+.2%}" for size in measured["plain"])
    each = ", ".join(f"{flavour} {[size >> 20 for size in sizes]}" for flavour, sizes in measured.items())
    print(f"{case}: predicted {mine >> 20} MiB, {errors}; measured {each}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare", "trial"])
    parser.add_argument("items", nargs="*")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=90.0)
    options = parser.parse_args()
    if options.what == "trial":
        print(json.dumps(trial(*options.items)), flush=True)
    elif options.what == "record":
        record(options.items or list(CASES), options.out, options.jobs, time.monotonic() + options.seconds)
    else:
        rows = json.loads(lzma.decompress(FILE.read_bytes()))["rows"]
        for case in options.items or sorted({row["case"] for row in rows}):
            compare(case, rows)


if __name__ == "__main__":
    main()
