"""Batch size finders side by side: ours, Lightning's and accelerate's, on the same model, capacity and GPU.

    python benchmarks/finders.py [CASE...] [--finder NAME...] [--out FILE] [--seconds 500] [--unverified]

Each finder runs in a process of its own on the same model, optimizer, precision and data, under the same limit of the
caching allocator. Reported are its trials, the seconds of its search (for the others without imports and set-up, for
ours with all of them; ``first_trial_s`` is when the first trial began) and of its whole process. Its answer is then run
by one of our own trials, in a fresh process, and so is the next size (not with ``--unverified``). The case ``sweep`` is
six variants of gpt2 at once for ours, and six searches for each of the others.
Run from the repository's root; needs one idle GPU, lightning and accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "examples")]

from planner.errors import DeviceUnavailable, PlannerError
from planner.local_gpus import local_gpus
from planner.planning import plan_sweep
from planner.progress import Progress, TrialStarted, VariantFinished, VariantStarted
from planner.selection import Selected, choose_device
from planner.specs.document import parse_spec
from planner.specs.files import read_document
from planner.specs.model import Spec
from planner.specs.variants import Checkpointing
from planner.units import GIB

NUM_STEPS = 3
"""Per trial: Lightning's default and ours."""
ACCELERATE_START = 512
"""``find_executable_batch_size`` only goes down and must be told where to begin."""
GPT2 = ("examples/gpt2-s1024.yaml", 80 * GIB)
CASES: dict[str, tuple[str, int, dict[str, list[str]]]] = {
    "gpt2": (*GPT2, {"precision": ["bf16-amp"]}),
    "gpt2-full": (*GPT2, {"precision": ["bf16-amp"], "checkpointing": ["full"]}),
    "gpt2-fp32": (*GPT2, {"precision": ["fp32"]}),
    "gpt2-fp32-full": (*GPT2, {"precision": ["fp32"], "checkpointing": ["full"]}),
    "gpt2-fp16": (*GPT2, {"precision": ["fp16-amp"]}),
    "gpt2-fp16-full": (*GPT2, {"precision": ["fp16-amp"], "checkpointing": ["full"]}),
    "unet": ("examples/unet.yaml", 40 * GIB, {"precision": ["bf16-amp"]}),
    "sweep": (*GPT2, {"precision": ["fp32", "bf16-amp", "fp16-amp"], "checkpointing": ["none", "full"]}),
}
"""Spec, capacity and variants by name."""
SWEPT = tuple(case for case in CASES if case.startswith("gpt2"))
"""The variants of the sweep, each as a case."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ", ".join(CASES)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{names}; without any gpt2, unet and sweep")
    parser.add_argument("--finder", nargs="+", default=list(FINDERS), choices=list(FINDERS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--seconds", type=float, default=500.0, help="start nothing after so many")
    parser.add_argument("--unverified", action="store_true", help="do not run the answers")
    parser.add_argument("--run", nargs=2, metavar=("FINDER", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        finder, case = arguments.run
        print("\n" + json.dumps(FINDERS[finder](*load(case))), flush=True)
        os._exit(0)
    deadline = time.monotonic() + arguments.seconds
    results: list[dict[str, Any]] = []
    unknown = sorted({*arguments.cases} - CASES.keys())
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}")
    for case, finder in runs(arguments.cases or ["gpt2", "unet", "sweep"], arguments.finder):
        if time.monotonic() > deadline:
            continue
        results.append({"case": case, "finder": finder, **in_process(finder, case, deadline)})
        print(json.dumps({k: v for k, v in results[-1].items() if k != "plans"}), file=sys.stderr, flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps({**conditions(), "results": results}, indent=1) + "\n")
    for case in () if arguments.unverified else dict.fromkeys(result["case"] for result in results):
        if case != "sweep":
            verify(case, [result for result in results if result["case"] == case], deadline)
    if arguments.out:
        arguments.out.write_text(json.dumps({**conditions(), "results": results}, indent=1) + "\n")
    report(results)


def runs(cases: list[str], finders: list[str]) -> list[tuple[str, str]]:
    """Case and finder of each process, in order; of the sweep's variants one after another for all but ours."""
    wanted: list[tuple[str, str]] = []
    for case in cases:
        for finder in finders:
            parts = SWEPT if case == "sweep" and finder != "planner" else (case,)
            wanted += [(part, finder) for part in parts]
    return list(dict.fromkeys(wanted))


def load(case: str) -> tuple[Spec, int]:
    path, capacity_bytes, variants = CASES[case]
    # The others time nothing.
    document = {**read_document(Path(path)), "variants": variants, "search": {"speed": False}}
    return parse_spec(document), capacity_bytes


def conditions() -> dict[str, Any]:
    """Versions, GPU and command: what the figures depend on."""
    versions = {}
    for name in ("torch", "transformers", "lightning", "pytorch-lightning", "accelerate"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gpus = [{"name": gpu.name, "driver": gpu.driver_version, "total_bytes": gpu.total_bytes} for gpu in local_gpus()]
    command = " ".join(["python", *sys.argv])
    return {"command": command, "versions": versions, "gpus": gpus, "num_cpus": os.cpu_count(),
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip


def in_process(finder: str, case: str, deadline: float) -> dict[str, Any]:
    """One finder's result from a process of its own, with the seconds that the whole process took as ``wall_s``."""
    start = time.monotonic()
    command = [sys.executable, __file__, "--run", finder, case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(deadline - start, 60), check=False)
    except subprocess.TimeoutExpired:
        return {"error": "ran out of time"}
    wall_s = round(time.monotonic() - start, 2)
    if done.returncode != 0:
        return {"error": done.stderr[-1500:], "wall_s": wall_s}
    return {**json.loads(done.stdout.splitlines()[-1]), "wall_s": wall_s}


def verify(case: str, results: list[dict[str, Any]], deadline: float) -> None:
    """Run every answer and the size after it by our own trials, each size once, each in a fresh process."""
    spec, capacity_bytes = load(case)
    (variant,) = spec.variants.product()
    seen: dict[int, str] = {}
    with real_gpu(capacity_bytes).device.open(spec, variant) as runner:
        for result in results:
            answer = result.get("answer")
            for size in (answer, answer + 1) if answer else ():
                if size not in seen and time.monotonic() < deadline:
                    seen[size] = str(runner.run(size, fresh=True).outcome)
            if answer:
                result["answer_runs"], result["next_runs"] = seen.get(answer), seen.get(answer + 1)


def real_gpu(capacity_bytes: int) -> Selected:
    selected = choose_device(None, capacity_bytes, predicted_only=False)
    if selected.predictor is None:
        raise DeviceUnavailable("no GPU is here, and finders are compared on a real one")
    return selected


def report(results: list[dict[str, Any]]) -> None:
    """A table, each figure beside its ratio to ours."""
    print(
        f"{'case':15} {'finder':20} {'answer':>7} {'runs':>5} {'next':>6} {'trials':>12} {'search':>16} {'process':>16}"
    )
    ours = {result["case"]: result for result in results if result["finder"] == "planner"}
    for result in results:
        if "error" in result:
            print(f"{result['case']:15} {result['finder']:20} {result['error'][-80:]!r}")
            continue
        base = ours.get(result["case"], result)

        def ratio(key: str, result: dict[str, Any] = result, base: dict[str, Any] = base) -> str:
            return f"{result[key]:.4g} ({result[key] / base[key]:.2f}x)" if base.get(key) else f"{result[key]:.4g}"

        print(
            f"{result['case']:15} {result['finder']:20} {result.get('answer') or '-':>7} "
            f"{result.get('answer_runs') or '-':>5} {result.get('next_runs') or '-':>6} "
            f"{ratio('num_trials'):>12} {ratio('search_s'):>16} {ratio('wall_s'):>16}"
        )
    compare_sweep(results)


def compare_sweep(results: list[dict[str, Any]]) -> None:
    """The sweep beside Lightning's binary search for each of its six variants, run twice, and for their mean."""
    done = [result for result in results if "error" not in result]
    sweep = next((result for result in done if result["case"] == "sweep"), None)
    searches = [result for result in done if result["finder"] == "lightning-binsearch" and result["case"] in SWEPT]
    if sweep is None or not searches:
        return
    print(f"the sweep's process took {sweep['wall_s']:.1f} s; twice Lightning's binary search took")
    names = [*[search["case"] for search in searches], *["in the mean"] * (len(searches) > 1)]
    for key, what in (("wall_s", "as processes"), ("search_s", "without imports")):
        seconds = [2 * search[key] for search in searches]
        for name, twice_s in zip(names, [*seconds, sum(seconds) / len(seconds)], strict=False):
            print(f"  {name:15} {twice_s:6.1f} s {what}: the sweep takes {sweep['wall_s'] / twice_s:.2f}x")


def ours(spec: Spec, capacity_bytes: int) -> dict[str, Any]:
    """The whole sweep, as ``planner probe`` runs it without a store; ``variants`` has each one's seconds."""
    events: list[tuple[float, Progress]] = []
    start = time.monotonic()
    selected = real_gpu(capacity_bytes)
    plans = plan_sweep(
        spec,
        selected.device,
        predict_start=selected.predictor,
        listener=lambda event: events.append((time.monotonic() - start, event)),
    )
    search_s = time.monotonic() - start
    began = {event.index: at for at, event in events if isinstance(event, VariantStarted)}
    ended = {event.index: at for at, event in events if isinstance(event, VariantFinished)}
    asked = {(event.variant, event.batch_size): at for at, event in events if isinstance(event, TrialStarted)}
    return {
        "answer": plans[0].max_batch_size if len(plans) == 1 else None,
        "num_trials": sum(len(plan.trials) for plan in plans),
        "search_s": round(search_s, 2),
        "first_trial_s": round(min(asked.values()), 2),
        "plans": [
            {
                "variant": plan.variant.as_dict(), "max_batch_size": plan.max_batch_size, "certified": plan.certified,
                "predicted_max_batch_size": plan.predicted_max_batch_size, "error": plan.error,
                "began_s": round(began[index], 2), "ended_s": round(ended[index], 2),
                "trials": [
                    {"batch_size": trial.batch_size, "outcome": trial.outcome,
                     "asked_s": round(asked[plan.variant, trial.batch_size], 2),
                     "duration_s": round(trial.duration_s, 3),
                     "step_times_s": [round(s, 3) for s in trial.step_times_s],
                     "timings": trial.details.get("timings"), "fresh_process": trial.fresh_process,
                     "started_ahead": trial.details.get("started_ahead", False),
                     "peak_reserved_bytes": trial.peaks and trial.peaks.reserved_bytes,
                     "peak_device_bytes": trial.peaks and trial.peaks.device_bytes,
                     "context_bytes": trial.details.get("context_bytes")}
                    for trial in plan.trials
                ],
            }
            for index, plan in enumerate(plans)
        ],
    }  # fmt: skip


def lightning(mode: str) -> Callable[[Spec, int], dict[str, Any]]:
    def run(spec: Spec, capacity_bytes: int) -> dict[str, Any]:
        import torch

        try:
            import lightning.pytorch as pl
            from lightning.pytorch.tuner import Tuner
        except ImportError:
            import pytorch_lightning as pl
            from pytorch_lightning.tuner import Tuner
        model, samples = _plain(spec, capacity_bytes)

        class Module(pl.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.model, self.batch_size = model, 2
                self.tried: list[int] = []

            def training_step(self, batch: Any, index: int) -> Any:
                return self.model(**batch)["loss"]

            def on_train_start(self) -> None:
                self.tried.append(self.batch_size)

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.model.parameters())

            def train_dataloader(self) -> Any:
                return torch.utils.data.DataLoader(samples, batch_size=self.batch_size)

        (variant,) = spec.variants.product()
        precision = {"fp32": "32-true", "bf16-amp": "bf16-mixed", "fp16-amp": "16-mixed"}[variant.precision]
        module = Module()
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            trainer = pl.Trainer(
                accelerator="gpu", devices=1, precision=precision, max_epochs=1, logger=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            )  # fmt: skip
            answer = Tuner(trainer).scale_batch_size(module, mode=mode, steps_per_trial=NUM_STEPS)
            search_s = time.monotonic() - start
        return _result(answer, module.tried, search_s)

    return run


def accelerate(spec: Spec, capacity_bytes: int) -> dict[str, Any]:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import find_executable_batch_size

    _, samples = _plain(spec, capacity_bytes)
    tried: list[int] = []
    (variant,) = spec.variants.product()
    accelerator = Accelerator(mixed_precision={"fp32": "no", "bf16-amp": "bf16", "fp16-amp": "fp16"}[variant.precision])

    @find_executable_batch_size(starting_batch_size=ACCELERATE_START)  # type: ignore[untyped-decorator]
    def train(batch_size: int) -> int:
        # As its manual has it: everything that holds memory is made anew inside.
        tried.append(batch_size)
        accelerator.free_memory()
        loader = torch.utils.data.DataLoader(samples, batch_size=batch_size)
        model = _checkpointed(spec)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
        for _, batch in zip(range(NUM_STEPS), loader, strict=False):
            optimizer.zero_grad()
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
        torch.cuda.synchronize()
        return batch_size

    start = time.monotonic()
    return _result(train(), tried, time.monotonic() - start)


def _plain(spec: Spec, capacity_bytes: int) -> tuple[Any, Any]:
    """The model on the CPU and a dataset that repeats one sample, with the caching allocator limited."""
    import torch

    from planner.runtime.context import memory_fraction
    from planner.training.data import make_batch

    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(memory_fraction(capacity_bytes, total_bytes), 0)
    model = _checkpointed(spec)
    sample = {name: item[0] for name, item in make_batch(spec, model, 1, torch.device("cpu")).items()}

    class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 1 << 20

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return sample

    return model, Samples()


def _checkpointed(spec: Spec) -> Any:
    """The model on the CPU, with the checkpointing of the spec's one variant."""
    from planner.training import build_model
    from planner.training.checkpointing import enable_checkpointing

    (variant,) = spec.variants.product()
    model = build_model(spec)
    if variant.checkpointing is not Checkpointing.NONE:
        enable_checkpointing(model, variant.checkpointing)
    return model


def _result(answer: int | None, tried: list[int], search_s: float) -> dict[str, Any]:
    return {"answer": answer, "num_trials": len(tried), "search_s": round(search_s, 2), "tried": tried}


FINDERS: dict[str, Callable[[Spec, int], dict[str, Any]]] = {
    "planner": ours,
    "lightning-binsearch": lightning("binsearch"),
    "lightning-power": lightning("power"),
    "accelerate": accelerate,
}

if __name__ == "__main__":
    try:
        main()
    except PlannerError as error:
        sys.exit(f"error: {error}")
