"""A card with known limits in place of a GPU, put into the command line at its composition root.

As a program it is the ``planner`` command with that card: ``python tests/cli_fakes.py TRIAL_SECONDS probe SPEC ...``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from planner.cli.app import run
from planner.cli.parts import Parts
from planner.errors import PlannerError
from planner.gpus import default_capacity_bytes, find_gpu
from planner.selection import Selected
from planner.specs.model import Spec
from planner.specs.variants import Checkpointing, Precision, Variant
from planner.trials import Environment, Outcome, Peaks, Source, Trial
from planner.units import GIB, MIB

SPEC = """\
name: small
model: {source: transformers, model_type: gpt2, task: causal-lm}
data: {kind: tokens, sequence_length: 128}
train: {optimizer: adamw}
variants: {precision: [fp32, bf16-amp], checkpointing: [none, full]}
"""
LARGEST = {
    Variant(precision=Precision.FP32): 9,
    Variant(precision=Precision.FP32, checkpointing=Checkpointing.FULL): 21,
    Variant(precision=Precision.BF16_AMP): 15,
    Variant(precision=Precision.BF16_AMP, checkpointing=Checkpointing.FULL): 33,
}


class Card:
    """A real GPU as far as anybody can tell: ``largest`` says per variant how many samples fit.

    ``before`` is called with every batch size before its trial: a test waits, raises or counts there.
    """

    def __init__(
        self, capacity_bytes: int, largest: dict[Variant, int], before: Callable[[Variant, int], None] | None = None
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.largest = largest
        self.before = before
        self.num_trials = 0

    def environment(self, spec: Spec) -> Environment:
        return Environment(
            source=Source.MEASURED, gpu="h200", gpu_name="NVIDIA H200", gpu_uuid="GPU-1", total_bytes=141 * GIB,
            driver_version="580.159.04", cuda_version="13.0", torch_version="2.13.0", planner_version="0.1.0",
        )  # fmt: skip

    limit = None

    def prepare(self, spec: Spec, variants: Sequence[Variant]) -> None: ...

    def rest(self) -> None: ...

    def open(self, spec: Spec, variant: Variant, *, capacity_bytes: int | None = None) -> CardRunner:
        return CardRunner(self, variant)


class CardRunner:
    def __init__(self, card: Card, variant: Variant) -> None:
        self.card = card
        self.variant = variant

    def run(self, batch_size: int, *, fresh: bool = False) -> Trial:
        self.card.num_trials += 1
        if self.card.before is not None:
            self.card.before(self.variant, batch_size)
        largest = self.card.largest[self.variant]
        fits = batch_size <= largest
        reserved = min(self.card.capacity_bytes * batch_size // (largest + 1), self.card.capacity_bytes) // MIB * MIB
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if fits else Outcome.OOM,
            source=Source.MEASURED,
            peaks=Peaks(
                allocated_bytes=reserved - 100 * MIB, reserved_bytes=reserved, device_bytes=reserved + 527 * MIB
            ),
            step_times_s=(0.5, 0.02 * batch_size, 0.021 * batch_size) if fits else (),
            fresh_process=fresh,
            duration_s=0.25,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class CardParts(Parts):
    """The command line's parts with a ``Card`` for a GPU; all else is real."""

    def __init__(
        self, largest: dict[Variant, int] | None = None, before: Callable[[Variant, int], None] | None = None
    ) -> None:
        self.largest = LARGEST if largest is None else largest
        self.before = before
        self.card: Card | None = None

    def choose_device(
        self, gpu: str | None, capacity_bytes: int | None, *, predicted_only: bool, on: str | None
    ) -> Selected:
        kind = find_gpu(gpu or "h200")
        self.card = Card(capacity_bytes or default_capacity_bytes(kind), self.largest, self.before)
        return Selected(device=self.card, gpu=kind, predictor=None, notes=())


def raising_for(variant: Variant, error: PlannerError) -> Callable[[Variant, int], None]:
    """A ``before`` that lets every variant but one run."""

    def before(running: Variant, batch_size: int) -> None:
        if running == variant:
            raise error

    return before


def write_spec(folder: Path, text: str = SPEC, name: str = "spec.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def main(arguments: list[str]) -> Any:
    seconds = float(arguments[0])
    # The first two variants are quick: what is interrupted later must still have something to keep.
    quick = list(LARGEST)[:2]

    def before(variant: Variant, batch_size: int) -> None:
        time.sleep(0.01 if variant in quick else seconds)

    return run(arguments[1:], CardParts(before=before))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
