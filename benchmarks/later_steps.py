"""What training steps after the third do to memory, at the largest batch sizes under 16 GiB and one sample above.

    python benchmarks/later_steps.py [--out FILE] [--seconds 150]
    python benchmarks/later_steps.py --compare [CASE...]              # anywhere, with what was measured

Eight steps of each case in a fresh process; per step: seconds, peak and held bytes, segments taken from the driver,
retries. It is what ``planner.endurance.wants_another_step`` rests on. ``--compare``
replays each case for as many steps as that rule asks for. Run from the repository's root; needs transformers, timm and
torchvision, and one idle GPU to measure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU must not start CUDA before a fork
sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "examples")]

import torch

from planner.endurance import wants_another_step
from planner.forks import Fork
from planner.local_gpus import local_gpus
from planner.runtime.context import memory_fraction
from planner.specs.document import parse_spec
from planner.specs.files import read_document
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.training import Training, build_model
from planner.units import GIB

FILE = Path("measurements/h200/later_steps.json")
TOTAL_BYTES = 150_109_880_320
CAPACITY_BYTES = 16 * GIB
NUM_STEPS = 8
CASES = (
    ("examples/gpt2-s1024.yaml", "bf16-amp", "none", 9),
    ("examples/unet.yaml", "bf16-amp", "none", 77),
    ("examples/gpt2-s1024.yaml", "bf16-amp", "full", 20),
    ("examples/bert-large-s512.yaml", "fp32", "none", 12),
    ("examples/t5-base-s512.yaml", "bf16-amp", "none", 16),
    ("examples/vit-large-224.yaml", "bf16-amp", "none", 62),
    ("examples/resnet50-224.yaml", "bf16-amp", "none", 372),
    ("measurements/specs/whisper-small.yaml", "bf16-amp", "full", 77),
    ("measurements/specs/convnext-tiny-timm.yaml", "fp32", "none", 150),
    ("measurements/specs/opt-350m-s1024.yaml", "fp16-amp", "none", 9),
    ("measurements/specs/lstm-lm.yaml", "fp32", "none", 390),
    ("measurements/specs/swin-t-torchvision.yaml", "bf16-amp", "none", 233),
    ("measurements/specs/mixtral-small-s512.yaml", "bf16-amp", "none", 25),
)
"""Spec, precision, checkpointing, and the largest batch size that ran for three steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--seconds", type=float, default=150.0, help="start nothing after so many")
    parser.add_argument("--compare", nargs="*", metavar="CASE", help="predict what was measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.compare is not None:
        compare(arguments.compare)
        return
    (gpu, *_) = local_gpus()
    deadline, cases = time.monotonic() + arguments.seconds, []
    for path, precision, checkpointing, largest in CASES:
        if time.monotonic() > deadline:
            break
        variant = {"precision": precision, "checkpointing": checkpointing}
        axes = {name: [value] for name, value in variant.items()}
        spec = parse_spec({**read_document(Path(path)), "variants": axes})
        model = build_model(spec)
        for size in (largest, largest + 1):
            fork = Fork.start(lambda request: steps(spec, model, request["size"]))  # noqa: B023 - asked at once
            found = fork.ask({"size": size}, 60) or {"error": fork.ending}
            fork.end()
            cases.append({"case": Path(path).stem, "variant": variant, "batch_size": size, **found})
            print(*tell(cases[-1]), flush=True)
    if arguments.out:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "gpu": gpu.name,
            "driver": gpu.driver_version,
            "versions": {"torch": torch.__version__},
            "capacity_bytes": CAPACITY_BYTES,
        }
        lines = ",\n".join(f"  {json.dumps(case)}" for case in cases)
        head = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
        arguments.out.write_text(f'{{\n{head},\n "cases": [\n{lines}\n ]\n}}\n')


def steps(spec: Spec, model: torch.nn.Module, size: int) -> dict[str, Any]:
    device = torch.device("cuda", 0)
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(memory_fraction(CAPACITY_BYTES, total_bytes), device)
    (variant,) = spec.variants.product()
    seen: list[dict[str, Any]] = []
    try:
        training = Training(spec, variant, model, device)
        for _ in range(NUM_STEPS):
            start = time.perf_counter()
            training.step(size)
            torch.cuda.synchronize()
            stats = torch.cuda.memory_stats()
            seen.append(
                {
                    "step_s": round(time.perf_counter() - start, 3),
                    "peak_reserved_bytes": stats["reserved_bytes.all.peak"],
                    "segments_taken": stats["segment.all.allocated"],
                    "segments_held": stats["segment.all.current"],
                    "num_alloc_retries": stats["num_alloc_retries"],
                    "allocated_bytes": stats["allocated_bytes.all.current"],
                    "peak_allocated_bytes": stats["allocated_bytes.all.peak"],
                }
            )
    except torch.OutOfMemoryError:
        return {"oom_in_step": len(seen) + 1, "steps": seen}
    return {"oom_in_step": None, "steps": seen}


def compare(names: list[str]) -> None:
    """Measured and predicted: in which step memory runs out, or after how many nothing more is taken."""
    measured = json.loads(FILE.read_text())["cases"]
    for path, precision, checkpointing, _ in CASES:
        rows = [case for case in measured if (case["case"], *case["variant"].values())
                == (Path(path).stem, precision, checkpointing)]  # fmt: skip
        if names and Path(path).stem not in names:
            continue
        variant = {"precision": precision, "checkpointing": checkpointing}
        fork = Fork.start(lambda request: predicted(request["path"], request["variant"], request["sizes"]))
        found = fork.ask({"path": path, "variant": variant, "sizes": [row["batch_size"] for row in rows]}, 600)
        fork.end()
        for row, said in zip(rows, (found or {"rows": []})["rows"], strict=True):
            steps = row["steps"]
            counts = [[step[key] for step in steps] for key in ("allocated_bytes", "segments_taken")]
            ends = (n for n in range(2, len(steps) + 1) if not wants_another_step(*(count[:n] for count in counts)))
            ended = f"out of memory in step {row['oom_in_step']}" if row["oom_in_step"] else f"{next(ends)} steps"
            head = f"{row['case']:22} {precision:8} {checkpointing:5} {row['batch_size']:4}"
            print(f"{head} measured: {ended}; predicted: {said}", flush=True)


def predicted(path: str, variant: dict[str, str], sizes: list[int]) -> dict[str, Any]:
    from planner.allocator import AllocatorConfig, replay
    from planner.virtual.architecture import Architecture
    from planner.virtual.scaling import TraceFamily
    from planner.virtual.tracing import trace_steps

    spec = parse_spec({**read_document(Path(path)), "variants": {name: [value] for name, value in variant.items()}})
    architecture = Architecture(compute_capability=(9, 0), num_sms=132, torch_version=(2, 11))
    family = TraceFamily(lambda size: trace_steps(spec, Variant.from_dict(variant), size, architecture))
    rows = []
    for size in sizes:
        events = family.scaled(size).events
        result = replay(
            events, AllocatorConfig(), CAPACITY_BYTES, device_total_bytes=TOTAL_BYTES, goes_on=wants_another_step
        )
        rows.append(f"{result.num_steps} steps" if result.fits else f"out of memory in step {result.num_steps + 1}")
    return {"rows": rows}


def tell(case: dict[str, Any]) -> tuple[Any, ...]:
    taken = [step["segments_taken"] for step in case.get("steps", ())]
    end = case.get("error") or (f"out of memory in step {case['oom_in_step']}" if case["oom_in_step"] else "fits")
    return case["case"], *case["variant"].values(), case["batch_size"], end, taken


if __name__ == "__main__":
    main()
