"""Trials on the real GPU, in a process of their own: training steps under a limit, and what they took.

A process that ends after its trial gives back everything that an out-of-memory error can leave behind, hence only
such trials certify. One that is kept warm saves the next trial CUDA's start and the model's way to the device.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from planner.endurance import wants_another_step
from planner.errors import DeviceLost, DeviceUnavailable, ModelError, PlannerError, described, first_line
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


SHARED_BYTES = 4 << 20
"""*Measured* on an H200: the first context took 618.8 MiB of the device, one beside it 615.6 MiB."""
_ROOM_BYTES = 1 << 30
"""Beside the model, for what segments are rounded up by."""


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
    driver_bytes: list[int] = field(default_factory=list)
    """All that the allocator has taken from the driver so far, whatever it gave back."""
    num_ooms: int = 0
    """How often it had refused a request when the step began; a library may make do without."""
    device_bytes: int = 0
    beside_bytes: int = 0
    """What was taken off for the process beside: assumed, not measured."""
    settled: Mapping[str, Any] | None = None
    """What ``Settle`` returned, by the end of the first step."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds spent on starting CUDA (``context_s``), moving the model (``move_s``), all steps (``steps_s``), waiting
    for the process beside (``settle_s``, within ``steps_s``) and cleaning a process that is kept (``clean_s``)."""

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = round(time.perf_counter() - start, 4)

    def settle(self, wait: Settle) -> Mapping[str, Any]:
        """Returns once what is beside this trial stays as it is."""
        if self.settled is None:
            with self.timing("settle_s"):
                self.settled = wait()
        return self.settled

    def look(self, card: Card, context: Context) -> None:
        """How much of the device is in use without what a process beside this one holds: a context as large as that of
        this one, which is the same program, but for what the first one on a device takes for all."""
        assert self.settled is not None, "settle comes first"
        context_bytes = self.settled["num_contexts"] * (context.context_bytes - SHARED_BYTES)
        self.beside_bytes = context_bytes + self.settled["bytes"]
        self.device_bytes = max(self.device_bytes, card.used_bytes() - self.beside_bytes)

    def run(self, training: Training, phase: Phase, batch_size: int) -> None:
        """One phase, to its end on the GPU."""
        self.num_ooms = torch.cuda.memory_stats(training.device).get("num_ooms", 0)
        start = time.perf_counter()
        training.run(phase, batch_size)
        torch.cuda.synchronize(training.device)
        took_s = time.perf_counter() - start
        if phase.is_evaluation:
            self.evaluation_s = took_s
        else:
            shorter = phase.sequence_length not in (None, training.spec.data.sequence_length)
            (self.other_step_times_s if shorter else self.step_times_s).append(took_s)
            stats = torch.cuda.memory_stats(training.device)
            self.allocated_after_step_bytes.append(stats.get("allocated_bytes.all.current", 0))
            self.retries_after_step.append(stats.get("num_alloc_retries", 0))
            self.driver_bytes.append(stats.get("reserved_bytes.all.allocated", 0))
        self.phases.append(phase.name)
        self.report = training.report()

    def beside(self) -> dict[str, Any]:
        """What only some trials have, as JSON data."""
        found = {
            "other_step_times_s": self.other_step_times_s,
            "evaluation_s": self.evaluation_s,
            "beside_bytes": self.beside_bytes,
        }
        return {name: value for name, value in found.items() if value} | self.report


Settle = Callable[[], Mapping[str, Any]]
"""Waits until the process that is started beside this one, if any, has its CUDA context. ``num_contexts``: 0 or 1;
``pids``: by which the driver lists it; ``bytes``: what its allocator has reserved."""


def nobody() -> Mapping[str, Any]:
    """Nothing is started beside."""
    return {"num_contexts": 0, "pids": [], "bytes": 0}


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What one trial is to run."""

    spec: Spec
    variant: Variant
    batch_size: int


@dataclass(slots=True)
class _Begun:
    """A trial, as far as its process had got before it was asked for."""

    record: _Record = field(default_factory=_Record)
    training: Training | None = None
    """With the model on the device."""


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
        self._context: Context | None = None
        self._begun: _Begun | None = None

    def start(
        self,
        *,
        variant: Mapping[str, Any],
        capacity_bytes: int,
        gpu_uuid: str,
        accumulation_steps: int = 1,
        room_bytes: int | None = None,
        used_before_bytes: int | None = None,
        **later: Any,
    ) -> dict[str, Any]:
        """Start CUDA. ``room_bytes``: what another trial on this GPU leaves, beside which the model is moved too; this
        process takes no more of it. Once that trial has gone and nothing else is beside, to be called again with the
        ``used_before_bytes`` that were in use on the device when no process of ours was there.

        Returns by which ``pids`` the driver lists this process, the ``used_before_bytes`` and the ``bytes`` that the
        allocator has reserved.
        Raises ``DeviceUnavailable`` where the model does not fit beside, what ``run`` raises, and what running out of
        memory raises.
        """
        if self._context is not None and used_before_bytes is not None:
            with Card.open(gpu_uuid) as card:
                self._context.measure(card, used_before_bytes, capacity_bytes)
            return self._held(self._context)
        if room_bytes is not None and _model_bytes(self._model) + _ROOM_BYTES > room_bytes:
            raise DeviceUnavailable("there is no room on the GPU for another model")
        begun = self._begun = _Begun()
        chosen = Variant.from_dict(variant)
        with Card.open(gpu_uuid) as card, begun.record.timing("context_s"):
            use_allocator(chosen.allocator)
            limit_bytes = capacity_bytes if room_bytes is None else min(capacity_bytes, room_bytes)
            context = self._context = Context.start(limit_bytes, card, self._device_index)
        if room_bytes is not None:
            context.begin()
            with begun.record.timing("move_s"):
                begun.training = Training(self._accumulating(accumulation_steps), chosen, self._model, context.device)
        return self._held(context)

    def _held(self, context: Context) -> dict[str, Any]:
        return {
            "pids": context.pids,
            "used_before_bytes": context.used_before_bytes,
            "bytes": torch.cuda.memory_reserved(context.device),
        }

    def _accumulating(self, accumulation_steps: int) -> Spec:
        return replace(self._spec, train=replace(self._spec.train, accumulation_steps=accumulation_steps))

    def run(
        self,
        *,
        variant: Mapping[str, Any],
        batch_size: int,
        capacity_bytes: int,
        gpu_uuid: str,
        keep: bool,
        accumulation_steps: int = 1,
        settle: Settle = nobody,
    ) -> dict[str, Any]:
        """Run the phases of a trial of ``batch_size``, then steps until one takes nothing more from the driver, and
        report outcome, peaks, retries and step times as JSON data.

        ``accumulation_steps`` stands in for those of the spec that the process was started with.
        What ``start`` did is not done again. ``settle`` is called once, before the device is looked at.
        ``keep`` asks for a process that can run another trial of the same variant; ``warm`` says whether it can.
        Raises ``ModelError`` for what the model or the step raises, ``InvalidSpec`` for a variant that the model does
        not offer, ``DeviceLost``, ``DeviceUnavailable``.
        """
        chosen = Variant.from_dict(variant)
        begun, self._begun = self._begun or _Begun(), None
        record = begun.record
        with Card.open(gpu_uuid) as card:
            if self._context is None:
                use_allocator(chosen.allocator)
                with record.timing("context_s"):
                    self._context = Context.start(capacity_bytes, card, self._device_index, self._join)
            context = self._context
            if begun.training is None:
                context.begin()
            trial = _Attempt(self._accumulating(accumulation_steps), chosen, batch_size)
            outcome, words = self._attempt(trial, begun, context, card, settle)
            settled = record.settle(settle)
            record.look(card, context)
            if outcome is not Outcome.FAILED and (strangers := context.strangers(card, settled["pids"])):
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
                    "retries_after_step": record.retries_after_step,
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

    def _attempt(
        self, trial: _Attempt, begun: _Begun, context: Context, card: Card, settle: Settle
    ) -> tuple[Outcome, str | None]:
        record = begun.record
        try:
            training, begun.training = begun.training, None  # held here alone, to be gone when this returns
            if training is None:
                with record.timing("move_s"):
                    training = Training(trial.spec, trial.variant, self._model, context.device)
            context.moved()
            with record.timing("steps_s"):
                schedule = phases(trial.spec)
                is_plain = all(phase.repeats(schedule[0]) for phase in schedule)
                for number, phase in enumerate(itertools.chain(schedule, itertools.repeat(schedule[-1]))):
                    goes_on = self._agree(
                        wants_another_step(record.allocated_after_step_bytes, record.driver_bytes, record.step_times_s)
                    )
                    if (is_plain or number >= len(schedule)) and not goes_on:
                        break
                    record.run(training, phase, trial.batch_size)
                    record.settle(settle)
                    record.look(card, context)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the border to the user's model: it can raise anything
            return _judge(error, lambda: _is_short(record, context, card))
        return Outcome.FITS, None


def _model_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))


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
    raise ModelError(f"the training step raised {described(error)}", field="model") from error
