"""Every part of a training step and every axis of a sweep, predicted and measured side by side.

    python benchmarks/variants.py measure [--out FILE] [--seconds 260] [--workers 3]     # on a GPU
    python benchmarks/variants.py compare [NAME...] [--json FILE]                        # anywhere

``measure`` runs small models through the planner's own trials, each in a fresh process, at two batch sizes, and writes
``measurements/h200/variants.json`` by default; compiled variants run twice at the first, so that the second finds the
compiler's cache warm. ``compare`` predicts the same and prints both. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "examples")]

from planner.errors import PlannerError
from planner.specs.document import parse_spec
from planner.specs.variants import Variant

FILE = Path("measurements/h200/variants.json")
TOTAL_BYTES = 150_109_880_320
CAPACITY_BYTES = 100 << 30


def _transformers(model_type: str, task: str, **config: Any) -> dict[str, Any]:
    return {"source": "transformers", "model_type": model_type, "task": task, "config": config}


TOKENS = {"kind": "tokens", "sequence_length": 512}
LENGTHS = {"kind": "tokens", "lengths": {"distribution": "lognormal", "min": 16, "max": 512, "mean": 120, "std": 100}}
IMAGES = {"kind": "images", "size": 224}
GPT2 = {"model": _transformers("gpt2", "causal-lm", n_layer=4, n_embd=512, n_head=8), "data": TOKENS}
BERT = {"model": _transformers("bert", "masked-lm", num_hidden_layers=4), "data": TOKENS}
RESNET = {"model": {"source": "torchvision", "name": "resnet50"}, "data": IMAGES}
SWIN = {"model": {"source": "torchvision", "name": "swin_t"}, "data": IMAGES}
VIT = {"model": {"source": "timm", "name": "vit_small_patch16_224"}, "data": IMAGES}
EXPERTS = {"num_hidden_layers": 2, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
QWEN_MOE = {
    "model": _transformers(
        "qwen2_moe", "causal-lm", num_experts=16, num_experts_per_tok=4, moe_intermediate_size=512,
        intermediate_size=1024, shared_expert_intermediate_size=512, vocab_size=32_000, **EXPERTS,
    ),
    "data": TOKENS,
}  # fmt: skip
MIXTRAL_EAGER = {
    "model": _transformers(
        "mixtral", "causal-lm", num_local_experts=8, intermediate_size=1024, vocab_size=32_000,
        experts_implementation="eager", **EXPERTS,
    ),
    "data": TOKENS,
}  # fmt: skip
AMP = {"precision": "bf16-amp"}


def _train(spec: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {**spec, "train": train}


GPT2_VARIANTS = (
    {}, AMP, {**AMP, "sdpa": "flash"}, {**AMP, "sdpa": "efficient"}, {**AMP, "sdpa": "cudnn"}, {**AMP, "sdpa": "math"},
    {"sdpa": "flash"}, {**AMP, "optimizer_implementation": "for-loop"}, {**AMP, "optimizer_implementation": "fused"},
    {"precision": "fp16-amp", "optimizer_implementation": "fused"}, {**AMP, "loss": "chunked"},
    {**AMP, "loss": "chunked", "checkpointing": "full"}, {**AMP, "checkpointing": "selective"},
    {**AMP, "allocator": "expandable_segments:True"}, {**AMP, "allocator": "max_split_size_mb:64"},
    {**AMP, "compile": "on"},
)  # fmt: skip
CASES: tuple[tuple[str, dict[str, Any], tuple[dict[str, str], ...], tuple[int, int]], ...] = (
    ("gpt2", GPT2, GPT2_VARIANTS, (4, 24)),
    ("resnet50", RESNET, ({**AMP, "memory_format": "channels-last"}, {"memory_format": "channels-last"},
                          {**AMP, "checkpointing": "full"}, {**AMP, "checkpointing": "selective"}), (8, 64)),
    ("gpt2 accumulation 4", _train(GPT2, accumulation_steps=4), (AMP, {}), (4, 24)),
    ("gpt2 clip", _train(GPT2, clip_grad_norm=1.0), (AMP, {"precision": "fp16-amp"}), (1, 24)),
    ("gpt2 ema", _train(GPT2, ema=0.999), (AMP,), (4, 24)),
    ("gpt2 freeze", _train(GPT2, freeze=["transformer.wte.*", "transformer.h.[01].*"]), (AMP,), (4, 24)),
    ("gpt2 evaluation", _train(GPT2, evaluation={"batch_size": 32}), (AMP,), (4, 24)),
    ("gpt2 lengths", {**GPT2, "data": LENGTHS}, (AMP, {**AMP, "checkpointing": "full"}), (4, 24)),
    ("bert", BERT, ({**AMP, "loss": "chunked"}, {**AMP, "checkpointing": "selective"}, {**AMP, "compile": "on"}),
     (4, 24)),
    ("swin_t", SWIN, ({**AMP, "checkpointing": "full"}, {**AMP, "checkpointing": "selective"}), (8, 64)),
    ("vit_small", VIT, ({**AMP, "checkpointing": "selective"}, {**AMP, "sdpa": "math"}), (8, 64)),
    ("mixtral eager", MIXTRAL_EAGER, (AMP, {"precision": "bf16"}), (4, 16)),
    ("qwen2_moe", QWEN_MOE, (AMP, {"precision": "bf16"}), (4, 16)),
)  # fmt: skip
"""``(name, spec, variants, batch sizes)``"""


def measure(out: Path, seconds: float, num_workers: int) -> None:
    """Run all cases, ``num_workers`` specs side by side: peaks do not depend on it, times do."""
    from planner.local_gpus import local_gpus
    from planner.runtime.device import LocalDevice

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    deadline = time.monotonic() + seconds
    gpu = local_gpus()[0]
    results: list[dict[str, Any]] = []

    def run(case: tuple[str, dict[str, Any], tuple[dict[str, str], ...], tuple[int, int]]) -> None:
        name, document, variants, sizes = case
        spec = parse_spec(document)
        device = LocalDevice(gpu, CAPACITY_BYTES, trial_timeout_s=150.0, wait_idle=lambda *_: None)
        try:
            for variant in variants:
                chosen = Variant.from_dict(variant)
                for size in (*sizes, *([sizes[0]] if variant.get("compile") == "on" else [])):
                    if time.monotonic() > deadline:
                        return
                    row = {"name": name, "variant": chosen.as_dict(), "batch_size": size}
                    results.append(row | _trial(device, spec, chosen, size))
                    print(f"{deadline - time.monotonic():5.0f}s left", _line(results[-1]), flush=True)
        finally:
            device.close()

    with ThreadPoolExecutor(num_workers) as pool:
        for future in [pool.submit(run, case) for case in CASES]:
            try:
                future.result()
            except Exception as error:  # noqa: BLE001 - the other cases are measured all the same
                print("failed:", error, flush=True)
            _write(out, results)


def _trial(device: Any, spec: Any, variant: Variant, size: int) -> dict[str, Any]:
    start = time.monotonic()
    try:
        with device.open(spec, variant) as runner:
            trial = runner.run(size, fresh=True)
    except PlannerError as error:
        return {"outcome": "unsupported", "error": str(error)}
    peaks = trial.peaks
    return {
        "outcome": str(trial.outcome),
        "error": trial.error,
        "alloc": peaks and peaks.allocated_bytes,
        "reserved": peaks and peaks.reserved_bytes,
        "retries": trial.num_alloc_retries,
        "step_times_s": [round(step, 4) for step in trial.step_times_s],
        "seconds": round(time.monotonic() - start, 2),
        **{key: trial.details[key] for key in ("compile", "phases", "notes", "output") if trial.details.get(key)},
    }


def _line(row: dict[str, Any]) -> str:
    label = Variant.from_dict(row["variant"]).label()
    if row["outcome"] != "fits":
        return f"{row['name']:20} {label:44} {row['batch_size']:3}  {row['outcome']}: {str(row['error'])[:150]}"
    compiled = f"  compile {row['compile']['compile_s']} s {row['compile']['cache']}" if "compile" in row else ""
    sizes = f"{row['alloc'] / 2**20:10.1f} {row['reserved'] / 2**20:10.1f} MiB"
    return f"{row['name']:20} {label:44} {row['batch_size']:3} {sizes} retries {row['retries']}{compiled}"


def _write(out: Path, results: list[dict[str, Any]]) -> None:
    from importlib.metadata import version

    body = {
        "torch": version("torch"),
        "transformers": version("transformers"),
        "command": "python benchmarks/variants.py measure",
        "results": sorted(results, key=lambda row: (row["name"], str(row["variant"]), row["batch_size"])),
    }
    out.write_text(json.dumps(body, indent=1) + "\n")


def _predict(job: tuple[str, dict[str, str], tuple[int, ...]]) -> list[dict[str, Any]]:
    """Of one variant at each size: allocated and reserved bytes, or why not. In a process of its own."""
    from planner.allocator import AllocatorConfig, parse_conf, replay
    from planner.endurance import wants_another_step
    from planner.specs.variants import DEFAULT
    from planner.virtual.architecture import Architecture
    from planner.virtual.scaling import TraceFamily
    from planner.virtual.tracing import trace_steps

    name, variant, sizes = job
    chosen = Variant.from_dict(variant)
    document = next(case[1] for case in CASES if case[0] == name)
    architecture = Architecture(compute_capability=(9, 0), num_sms=132, torch_version=(2, 11))
    family = TraceFamily(lambda size: trace_steps(parse_spec(document), chosen, size, architecture))
    config = AllocatorConfig() if chosen.allocator == DEFAULT else parse_conf(chosen.allocator)
    found: list[dict[str, Any]] = []
    for size in sizes:
        try:
            events = family.scaled(size).events
        except PlannerError as error:
            found.append({"error": str(error)})
            continue
        result = replay(events, config, None, device_total_bytes=TOTAL_BYTES, goes_on=wants_another_step)
        found.append({"alloc": result.peak_allocated_bytes, "reserved": result.peak_reserved_bytes})
    return found


def compare(names: list[str], out: Path | None) -> None:
    rows = [row for row in json.loads(FILE.read_text())["results"] if not names or row["name"] in names]
    jobs: dict[str, tuple[str, dict[str, str], tuple[int, ...]]] = {}
    for row in rows:
        key = json.dumps([row["name"], row["variant"]], sort_keys=True)
        before = jobs.get(key, (row["name"], row["variant"], ()))
        jobs[key] = (*before[:2], tuple(sorted({*before[2], row["batch_size"]})))
    predicted: dict[tuple[str, int], dict[str, Any]] = {}
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        for (key, job), found in zip(jobs.items(), pool.imap(_predict, jobs.values()), strict=True):
            predicted.update({(key, size): item for size, item in zip(job[2], found, strict=True)})
            for row in rows:
                if json.dumps([row["name"], row["variant"]], sort_keys=True) == key:
                    row["predicted"] = predicted[key, row["batch_size"]]
                    print(_compared(row), flush=True)
    if out is not None:
        out.write_text(json.dumps(rows, indent=1))


def _compared(row: dict[str, Any]) -> str:
    label, predicted = Variant.from_dict(row["variant"]).label(), row["predicted"]
    head = f"{row['name']:20} {label:44} {row['batch_size']:3} "
    if "error" in predicted or row["outcome"] != "fits":
        words = f"measured: {row['outcome']} {row['error'] or ''}"
        return f"{head} {words}\n{'':20} predicted: {predicted.get('error', 'runs')}"
    figures = []
    for what in ("alloc", "reserved"):
        off = 100 * (predicted[what] - row[what]) / row[what]
        figures.append(f"{what} {row[what] / 2**20:9.1f} MiB, predicted {off:+7.3f}%")
    return head + "  ".join(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--out", type=Path, default=FILE)
    measuring.add_argument("--seconds", type=float, default=260.0)
    measuring.add_argument("--workers", type=int, default=3)
    comparing = commands.add_parser("compare")
    comparing.add_argument("names", nargs="*")
    comparing.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.command == "measure":
        measure(options.out, options.seconds, options.workers)
    else:
        compare(options.names, options.json)


if __name__ == "__main__":
    main()
