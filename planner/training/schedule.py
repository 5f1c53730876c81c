"""What one trial runs, in order: the same phases on the real GPU and on the virtual one."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from planner.specs.model import Spec

NUM_STEPS = 3
"""The optimizer creates its state in the first step, so the peak is in the second or later."""
NUM_MIXED = 4
"""Steps of other lengths, where samples differ in length: what they leave cached must not break the longest after."""
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One training step (of all its micro-batches), or one evaluation step."""

    name: str
    is_evaluation: bool = False
    batch_size: int | None = None
    """``None``: that of the trial."""
    sequence_length: int | None = None
    """Tokens of the batch's longest sample where samples differ in length; ``None``: that of the spec."""

    def size(self, batch_size: int) -> int:
        """Samples of this phase in a trial of ``batch_size``."""
        return batch_size if self.batch_size is None else self.batch_size

    def repeats(self, other: Phase) -> bool:
        """Whether it does what ``other`` does."""
        return replace(self, name=other.name) == other


def phases(spec: Spec, num_steps: int = NUM_STEPS) -> tuple[Phase, ...]:
    """The phases of a trial of any batch size.

    Training steps: ``num_steps`` equal ones; where samples differ in length, the longest twice (the optimizer has its
    state from the first on), then ``NUM_MIXED`` lengths drawn from the histogram with a fixed seed, then the longest
    again. With ``train.evaluation``, an evaluation step and one more training step follow. No length depends on the
    batch size.
    """
    lengths: list[int | None] = [None] * num_steps
    longest: int | None = None
    if spec.data.lengths:
        tokens, counts = zip(*spec.data.lengths, strict=True)
        longest = max(tokens)
        mixed = random.Random(_SEED).choices(tokens, counts, k=NUM_MIXED)  # noqa: S311 - no secret
        lengths = [longest, longest, *mixed, longest]
    steps = [Phase(name=f"step {number}", sequence_length=length) for number, length in enumerate(lengths, start=1)]
    if spec.train.evaluation is None:
        return tuple(steps)
    size = spec.train.evaluation.batch_size
    evaluation = Phase(name="evaluation", is_evaluation=True, batch_size=size, sequence_length=longest)
    return (*steps, evaluation, Phase(name=f"step {len(steps) + 1}", sequence_length=longest))
