"""Trials on the real GPU, in a process of their own: training steps under a limit, and what they took.

A process that ends after its trial gives back everything that an out-of-memory error can leave behind, hence only
such trials certify. One that is kept warm saves the next trial CUDA's start and the model's way to the device.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from planner.endurance import grown_bytes, wants_another_step
from planner.errors import DeviceLost, ModelError, PlannerError, described, first_line, raised
from planner.runtime.card import Card
from planner.runtime.context import Context
from planner.specs.model import Spec
from planner.specs.variants import DEFAULT, Compile, Variant
from planner.training import Training, phases
from planner.training.oom import is_gpu_fault, is_gpu_lost, is_out_of_memory, may_be_out_of_memory
from planner.training.schedule import Phase
from planner.trials import Outcome

FULL_BYTES = 64 << 20
"""With less than this free on the device a library cannot start: *measured*, cuBLAS, cuDNN, cuSOLVER and cuFFT failed
with 4 to 10 MiB free on an H200, each with a status of its own."""


@dataclass(slots=True)
class _Record:
    """What was seen so far, whatever ends the trial."""

    step_times_s: list[float] = field(default_factory=list)
    other_step_times_s: list[float] = field(default_factory=list)
    """Of the steps of shorter batches, where samples differ in length: they say nothing of the longest."""
    evaluation_s: float | None = None
    phases: list[str] = field(default_factory=list)
    """Names of those that were finished (``planner.training.schedule``)."""
    report: dict[str, Any] = field(default_factory=dict)
    """``Training.report()``."""
    allocated_after_step_bytes: list[int] = field(default_factory=list)
    retries_after_step: list[int] = field(default_factory=list)
    """``num_alloc_retries`` so far."""
    in_cycles: bool = False
    """Whether Python's garbage collector freed half of what they grew by."""
    skipped: list[bool] = field(default_factory=list)
    """Of each training step: whether the gradient scaler left its update out."""
    driver_bytes: list[int] = field(default_factory=list)
    """All that the allocator has taken from the driver so far, whatever it gave back."""
    num_ooms: int = 0
    """How often it had refused a request when the step began; a library may make do without."""
    device_bytes: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds spent on starting CUDA (``context_s``), moving the model (``move_s``), waiting for the process beside
    (``settle_s``), all steps (``steps_s``) and cleaning a process that is kept (``clean_s``)."""

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = round(time.perf_counter() - start, 4)

    def run(self, training: Training, phase: Phase, batch_size: int, look: Callable[[], int]) -> None:
        """One phase, to its end on the GPU; ``look`` tells the bytes in use on the device."""
        self.num_ooms = torch.cuda.memory_stats(training.device).get("num_ooms", 0)
        scale = training.scaler.get_scale()
        start = time.perf_counter()
        training.run(phase, batch_size)
        torch.cuda.synchronize(training.device)
        took_s = time.perf_counter() - start
        if phase.is_evaluation:
            self.evaluation_s = took_s
        else:
            shorter = phase.sequence_length not in (None, training.spec.data.sequence_length)
            (self.other_step_times_s if shorter else self.step_times_s).append(took_s)
            # It lowers its scale where gradients overflowed, and only there.
            self.skipped.append(training.scaler.get_scale() < scale)
            stats = torch.cuda.memory_stats(training.device)
            self.allocated_after_step_bytes.append(stats.get("allocated_bytes.all.current", 0))
            self.retries_after_step.append(stats.get("num_alloc_retries", 0))
            self.driver_bytes.append(stats.get("reserved_bytes.all.allocated", 0))
        self.phases.append(phase.name)
        self.report = training.report()
        self.device_bytes = max(self.device_bytes, look())

    def collect(self, device: torch.device) -> None:
        """Tell a leak from what hangs in reference cycles, where memory has grown."""
        if grown := grown_bytes(self.allocated_after_step_bytes):
            gc.collect()
            freed = self.allocated_after_step_bytes[-1] - torch.cuda.memory_allocated(device)
            self.in_cycles = 2 * freed >= grown

    def beside(self) -> dict[str, Any]:
        """What only some specs and variants have, as JSON data."""
        found = {"other_step_times_s": self.other_step_times_s, "evaluation_s": self.evaluation_s}
        return {name: value for name, value in found.items() if value} | self.report


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What one trial is to run."""

    spec: Spec
    variant: Variant
    batch_size: int
    look: Callable[[], int]
    settle: Callable[[], bool] | None


class TrialProcess:
    """This process and its GPU. Its first trial is a fresh one; a later one finds the model on the device.

    Of several ranks each is such a process, with the visible GPU ``device_index``; ``join`` makes it one of them, once
    CUDA has started; ``agree`` makes one decision of theirs, since a rank that goes on alone waits for ever.
    """

    def __init__(
        self,
        spec: Spec,
        model: torch.nn.Module,
        *,
        device_index: int = 0,
        join: Callable[[], object] | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self._spec, self._model = spec, model
        self._device_index, self._join, self._agree = device_index, join, agree
        self._card: Card | None = None
        self._context: Context | None = None
        self._context_s = 0.0

    def start(
        self,
        *,
        variant: Mapping[str, Any],
        capacity_bytes: int,
        gpu_uuid: str,
        used_before_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Start CUDA, for trials of variants with the same allocator settings; nothing is allocated. Where that was
        done beside a trial, to be called again when this has gone, with the ``used_before_bytes`` of the device without
        any process of ours.

        Returns ``listed_bytes`` (``Context``) and the ``used_before_bytes`` of the device.
        Raises ``DeviceLost``, ``DeviceUnavailable``.
        """
        began = time.perf_counter()
        card = self._card = self._card or Card.open(gpu_uuid)  # for the life of the process: opening takes 20 ms
        if self._context is not None and used_before_bytes is not None:
            self._context.alone(card, used_before_bytes, capacity_bytes)
        else:
            use_allocator(Variant.from_dict(variant).allocator)
            self._context = Context.start(capacity_bytes, card, self._device_index, self._join)
            self._context_s = round(time.perf_counter() - began, 4)
        context = self._context
        return {"listed_bytes": context.listed_bytes, "used_before_bytes": context.used_before_bytes}

    def run(
        self,
        *,
        variant: Mapping[str, Any],
        batch_size: int,
        capacity_bytes: int,
        gpu_uuid: str,
        keep: bool,
        accumulation_steps: int = 1,
        beside: int | None = None,
        settle: Callable[[], bool] = lambda: True,
    ) -> dict[str, Any]:
        """Run the phases of a trial of ``batch_size``, then steps until one takes nothing more from the driver and the
        optimizer's state is there, and report outcome, peaks, retries and step times as JSON data.

        ``accumulation_steps`` stands in for those of the spec that the process was started with.
        ``keep`` asks for a process that can run another trial of the same variant; ``warm`` says whether it can.
        ``beside`` is the id of a process that starts CUDA beside this trial; ``settle`` waits until that is done, and
        says whether it is.
        Raises ``ModelError`` for what the model or the step raises, ``InvalidSpec`` for a variant that the model does
        not offer, ``DeviceLost``, ``DeviceUnavailable``.
        """
        chosen = Variant.from_dict(variant)
        record = _Record()
        if self._context is None:
            self.start(variant=variant, capacity_bytes=capacity_bytes, gpu_uuid=gpu_uuid)
        context, card = self._context, self._card
        assert context is not None, "it was started"
        assert card is not None, "it was started"
        record.timings["context_s"], self._context_s = self._context_s, 0.0
        context.begin()

        def look() -> int:
            return context.device_bytes(card, beside)

        spec = replace(self._spec, train=replace(self._spec.train, accumulation_steps=accumulation_steps))
        attempt = _Attempt(spec, chosen, batch_size, look, settle if beside is not None else None)
        outcome, words = self._attempt(attempt, context, card, record)
        record.device_bytes = max(record.device_bytes, look())
        if outcome is not Outcome.FAILED and (strangers := context.strangers(card, beside)):
            listed = ", ".join(map(str, strangers))
            outcome, words = Outcome.FAILED, f"other processes came to the GPU during the trial ({listed})"
        result = {
            "outcome": str(outcome),
            "error": words,
            "peaks": {
                "allocated_bytes": torch.cuda.max_memory_allocated(context.device),
                "reserved_bytes": torch.cuda.max_memory_reserved(context.device),
                "device_bytes": record.device_bytes,
            },
            "num_alloc_retries": torch.cuda.memory_stats(context.device).get("num_alloc_retries", 0),
            "step_times_s": record.step_times_s,
            "details": {
                "context_bytes": context.context_bytes,
                **({"communicator_bytes": context.communicator_bytes} if self._join else {}),
                "used_before_bytes": context.used_before_bytes,
                "num_steps": len(record.allocated_after_step_bytes),
                "samples_per_step": batch_size * accumulation_steps * chosen.gpus,
                "allocated_after_step_bytes": record.allocated_after_step_bytes,
                **({"in_cycles": True} if record.in_cycles else {}),
                "retries_after_step": record.retries_after_step,
                **({"num_skipped_updates": sum(record.skipped)} if any(record.skipped) else {}),
                "is_steady": len(record.driver_bytes) > 1 and record.driver_bytes[-1] == record.driver_bytes[-2],
                "phases": record.phases,
                **record.beside(),
                "timings": record.timings,
                "system": context.system,
            },
        }
        # A compiled model would compile again for the next size, and torch gives up after some (recompile_limit).
        if keep and outcome is not Outcome.FAILED and chosen.compile is Compile.OFF:
            with record.timing("clean_s"):
                result["warm"] = context.clean(self._model)
            result["held"] = {"bytes": card.used_bytes() - context.used_before_bytes, "pids": context.pids}
        return result

    def _attempt(self, attempt: _Attempt, context: Context, card: Card, record: _Record) -> tuple[Outcome, str | None]:
        try:
            with record.timing("move_s"):
                training = Training(attempt.spec, attempt.variant, self._model, context.device)
            context.moved()
            if attempt.settle is not None:
                with record.timing("settle_s"):
                    is_settled = attempt.settle()
                if not is_settled:
                    return Outcome.FAILED, _UNSETTLED
            with record.timing("steps_s"):
                schedule = phases(attempt.spec)
                is_plain = all(phase.repeats(schedule[0]) for phase in schedule)
                for number, phase in enumerate(itertools.chain(schedule, itertools.repeat(schedule[-1]))):
                    wanted = wants_another_step(
                        record.allocated_after_step_bytes,
                        record.driver_bytes,
                        record.step_times_s,
                        skipped=record.skipped,
                    )
                    goes_on = self._agree(wanted)
                    if (is_plain or number >= len(schedule)) and not goes_on:
                        break
                    record.run(training, phase, attempt.batch_size, attempt.look)
                record.collect(context.device)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the border to the user's model: it can raise anything
            return _judge(error, lambda: _is_short(record, context, card))
        if all(record.skipped):
            return Outcome.FAILED, _NEVER_UPDATED.format(len(record.skipped))
        return Outcome.FITS, None


_UNSETTLED = "the next trial's process, which was begun beside this one, did not start CUDA in time"
_NEVER_UPDATED = (
    "gradients overflowed in each of {} steps, so that none updated the weights: the optimizer's state was never "
    "there, and what a training run takes is not known"
)


def _is_short(record: _Record, context: Context, card: Card) -> bool:
    """Whether memory was short in the step that failed: the allocator refused something, or the device is full."""
    refused = torch.cuda.memory_stats(context.device).get("num_ooms", 0) > record.num_ooms
    return refused or card.free_bytes() < FULL_BYTES


def use_allocator(conf: str) -> None:
    """Give the caching allocator its settings. It reads them once, when it is first used
    (``AcceleratorAllocatorConfig::instance``, c10/core/AllocatorConfig.h): in this process, when CUDA starts."""
    if conf != DEFAULT:
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):  # the second is what torch before 2.9 reads
            os.environ[name] = conf


def _judge(error: BaseException, is_short: Callable[[], bool]) -> tuple[Outcome, str]:
    if is_out_of_memory(error) or (may_be_out_of_memory(error) and is_short()):
        return Outcome.OOM, str(error)
    if is_gpu_lost(error):
        raise DeviceLost(f"the GPU vanished during a trial: {first_line(error)}") from error
    if isinstance(error, PlannerError):
        raise error
    if is_gpu_fault(error) or isinstance(error, MemoryError):
        return Outcome.FAILED, described(error)
    raise ModelError(f"the training step raised {raised(error)}", field="model") from error
