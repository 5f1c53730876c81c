"""Whether a batch size that fits keeps fitting: memory that grows with every step, and an allocator that goes on only
by giving its cache back. Pure: judged from what trials recorded.

A trial's details hold ``allocated_after_step_bytes`` (what tensors hold after each training step, in bytes) and
``retries_after_step`` (``num_alloc_retries`` so far), one entry for each training step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from planner.trials import Source, Trial
from planner.units import format_bytes

GROWING_STEPS = 3
"""So many steps in a row that each leave more allocated are a leak. Fewer may be state that is created late: an
optimizer's, where a gradient scaler skipped the first steps."""
LEAST_STEPS = 2
"""The optimizer creates its state in the first step, so the peak is in the second or later."""
MOST_STEPS = 8
"""For an allocator that takes and gives back memory in every step: it thrashes, and that shows."""
MOST_SKIPPED_STEPS = 24
"""A gradient scaler begins with 65,536 and halves it with each step that it skips (torch/amp/grad_scaler.py): after so
many it is 2^-8, and what overflows is not its doing."""
LONG_STEP_S = 1.0
"""A step that lasts so long is timed once."""
PREDICTED_GROWING_STEPS = 2
"""The same on the virtual GPU, which traces three steps and where no scaler skips one."""
MAX_STEPS = 1_000_000
"""A leak that lasts longer than this harms no training run."""
SLOWER = 1.1
"""Seconds per sample against the best at smaller sizes from which on a trial with allocation retries thrashes: two
trials of one size differ by a few percent.

*Measured* on an H200 (``measurements/h200/probe/unet-256-16.json``): the U-Net in bf16 under 16 GiB had 79 retries in
its first step at 74 samples and above, none later, and all its steps took 2.4 times as long a sample. That is what a
fall back to slower kernels looks like: cuDNN's plans are tried until the workspace of one can be had
(aten/src/ATen/native/cudnn/Conv_v8.cpp, ``try_plans``).
"""
MUCH_SLOWER = 1.5
"""The same without retries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """Allocated bytes that grow with every step."""

    batch_size: int
    bytes_per_step: int
    steps_left: int
    """After the trial's own, until allocated bytes meet the capacity at this pace; fewer if it has to share."""
    source: Source
    in_cycles: bool = False
    """What is left hangs in reference cycles, which Python's garbage collector frees when it runs."""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "source": str(self.source)}

    def sentence(self) -> str:
        predicted = ", predicted" if self.source is Source.PREDICTED else ""
        grows = f"at batch size {self.batch_size} every step leaves {format_bytes(self.bytes_per_step)} more allocated"
        if self.in_cycles:
            return (
                f"memory in reference cycles{predicted}: {grows} until Python's garbage collector runs, in its time; "
                f"without it memory runs out after about {self.steps_left} more steps; nothing is certified"
            )
        return (
            f"a leak{predicted}: {grows}, so that memory runs out after about {self.steps_left} more steps; nothing is "
            "certified"
        )


def growing_steps(allocated_bytes: Sequence[int]) -> int:
    """How many steps in a row, up to the last one, left more allocated than the step before."""
    count = 0
    for before, after in reversed(list(pairwise(allocated_bytes))):
        if after <= before:
            break
        count += 1
    return count


def grown_bytes(allocated_bytes: Sequence[int]) -> int:
    """How much more is allocated than after the second step, when all state is there as a rule: what cycles keep may
    grow in every other step, as collections of young objects fall."""
    return max(allocated_bytes[-1] - allocated_bytes[LEAST_STEPS - 1], 0) if len(allocated_bytes) > LEAST_STEPS else 0


def wants_another_step(
    allocated_bytes: Sequence[int],
    driver_bytes: Sequence[int] = (),
    step_times_s: Sequence[float] = (),
    *,
    skipped: Sequence[bool] = (),
) -> bool:
    """Whether a trial must go on: to tell a leak from state that is created late, to see a step that takes no more
    memory from the driver (``driver_bytes``: all that the allocator has taken so far), to time a short step again, or
    to see one that has the optimizer's state beside it (``skipped``: the steps whose update a gradient scaler left out,
    since gradients overflowed).

    *Measured*, H200 under 16 GiB: at its largest batch size swin-t took more in each of three steps and ran out in the
    fourth; gpt2, bert, t5, vit, resnet50, unet, whisper, opt, mixtral and an LSTM took nothing more for good from the
    first step on that took nothing, the second to the fifth (``measurements/h200/later_steps.json``).
    """
    num_steps = len(allocated_bytes)
    is_settled = len(driver_bytes) < 2 or driver_bytes[-1] == driver_bytes[-2] or num_steps >= MOST_STEPS
    is_timed = num_steps >= 3 or sum(step_times_s[1:]) >= LONG_STEP_S
    had_state = not all(skipped[:-1]) or len(skipped) >= MOST_SKIPPED_STEPS or not skipped
    return (
        num_steps < LEAST_STEPS
        or not is_settled
        or not is_timed
        or not had_state
        or 0 < growing_steps(allocated_bytes) < GROWING_STEPS
    )


def leak_of(trial: Trial, capacity_bytes: int) -> Leak | None:
    """The leak that a trial which fits shows; ``None`` for none, or for one that no training run lives to see."""
    allocated = [int(count) for count in trial.details.get("allocated_after_step_bytes", ())]
    steps, in_cycles = growing_steps(allocated), bool(trial.details.get("in_cycles") and grown_bytes(allocated))
    if in_cycles:
        steps = len(allocated) - LEAST_STEPS
    enough = in_cycles or steps >= (GROWING_STEPS if trial.source is Source.MEASURED else PREDICTED_GROWING_STEPS)
    if not trial.fits or not enough:
        return None
    per_step = (allocated[-1] - allocated[-1 - steps]) // steps
    peak = trial.peaks.allocated_bytes if trial.peaks else allocated[-1]
    steps_left = max(capacity_bytes - peak, 0) // max(per_step, 1)
    if steps_left >= MAX_STEPS:
        return None
    return Leak(
        batch_size=trial.batch_size, bytes_per_step=per_step, steps_left=steps_left, source=trial.source,
        in_cycles=in_cycles,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Thrashing:
    """A size that fits, at a price: memory is so short that steps take far longer than in proportion to their samples.

    The allocator gives cached memory back again and again, or libraries keep to kernels that need less workspace.
    """

    batch_size: int
    num_alloc_retries: int
    slowdown: float
    """Seconds per sample in relation to those at ``compared_with``."""
    compared_with: int
    """The smaller batch size with the fewest seconds per sample."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        retries = f", with {self.num_alloc_retries} allocation retries" if self.num_alloc_retries else ""
        return (
            f"batch size {self.batch_size} fits but thrashes: it takes {self.slowdown:.1f} times as long a sample as "
            f"{self.compared_with}{retries}"
        )


def needs_comparison(trial: Trial) -> bool:
    """Whether only the speed of a smaller size can tell if this one thrashes."""
    return trial.fits and trial.num_alloc_retries > 0


def thrashing(trial: Trial, trials: Iterable[Trial]) -> Thrashing | None:
    """How ``trial`` thrashes, beside the smaller ones of ``trials``; ``None`` where it does not, or none is smaller."""
    seconds = trial.seconds_per_sample
    if not trial.fits or seconds is None:
        return None
    smaller = [
        (other.seconds_per_sample, other.batch_size)
        for other in trials
        if other.fits and other.batch_size < trial.batch_size and other.seconds_per_sample is not None
    ]
    if not smaller:
        return None
    best, size = min(smaller)
    slowdown = seconds / best
    if slowdown < (SLOWER if trial.num_alloc_retries else MUCH_SLOWER):
        return None
    return Thrashing(
        batch_size=trial.batch_size, num_alloc_retries=trial.num_alloc_retries, slowdown=slowdown, compared_with=size
    )
