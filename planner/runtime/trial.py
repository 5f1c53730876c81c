"""One trial on the real GPU, in a process of its own: training steps under a limit, and what they took.

The process ends after it, which is the one way to give back everything that an out-of-memory error can leave behind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from planner.errors import DeviceLost, DeviceUnavailable, ModelError, PlannerError, described, first_line
from planner.runtime.card import Card
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.training import Training
from planner.training.oom import is_gpu_fault, is_gpu_lost, is_out_of_memory
from planner.trials import Outcome

NUM_STEPS = 3
"""The optimizer creates its state in the first step, so the peak is in the second or later."""


@dataclass(slots=True)
class _Record:
    """What was seen so far, whatever ends the trial."""

    step_times_s: list[float] = field(default_factory=list)
    device_bytes: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds spent on starting CUDA (``context_s``), moving the model (``move_s``) and all steps (``steps_s``)."""

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = round(time.perf_counter() - start, 4)


def run_trial(
    spec: Spec,
    model: torch.nn.Module,
    *,
    variant: Mapping[str, Any],
    batch_size: int,
    capacity_bytes: int,
    gpu_uuid: str,
) -> dict[str, Any]:
    """Run ``batch_size`` for three steps and report outcome, peaks, retries and step times as JSON data.

    Raises ``ModelError`` for what the model or the step raises, ``InvalidSpec`` for a variant that the model does not
    offer, ``DeviceLost``, ``DeviceUnavailable``.
    """
    chosen = Variant.from_dict(variant)
    record = _Record()
    with Card.open(gpu_uuid) as card:
        used_before = card.used_bytes()
        with record.timing("context_s"):
            device = _limit(capacity_bytes)
        context_bytes = card.used_bytes() - used_before
        outcome, words = _attempt(spec, model, chosen, batch_size, device, card, record)
        record.device_bytes = max(record.device_bytes, card.used_bytes())
    stats = torch.cuda.memory_stats(device)
    return {
        "outcome": str(outcome),
        "error": words,
        "peaks": {
            "allocated_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.max_memory_reserved(device),
            "device_bytes": record.device_bytes,
        },
        "num_alloc_retries": stats.get("num_alloc_retries", 0),
        "step_times_s": record.step_times_s,
        "details": {
            "context_bytes": context_bytes,
            "used_before_bytes": used_before,
            "num_steps": NUM_STEPS,
            "timings": record.timings,
        },
    }


def _limit(capacity_bytes: int) -> torch.device:
    """Start CUDA on the one visible GPU, its caching allocator limited to ``capacity_bytes``."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        device = torch.device("cuda", 0)
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_fraction(capacity_bytes, total_bytes), device)
        torch.zeros(1, device=device)  # the context exists from the first tensor on
        torch.cuda.synchronize(device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceUnavailable(f"torch cannot use this GPU: {first_line(error)}") from error
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return device


def memory_fraction(capacity_bytes: int, total_bytes: int) -> float:
    """The fraction that makes torch's limit exactly ``capacity_bytes``.

    torch allows ``static_cast<size_t>(fraction * total)`` (c10/cuda/CUDACachingAllocator.cpp, ``setMemoryFraction``),
    so a quotient that was rounded down would allow a byte less.
    """
    fraction = min(capacity_bytes / total_bytes, 1.0)
    while fraction < 1.0 and int(fraction * total_bytes) < capacity_bytes:
        fraction = math.nextafter(fraction, 1.0)
    return fraction


def _attempt(
    spec: Spec,
    model: torch.nn.Module,
    variant: Variant,
    batch_size: int,
    device: torch.device,
    card: Card,
    record: _Record,
) -> tuple[Outcome, str | None]:
    try:
        with record.timing("move_s"):
            training = Training(spec, variant, model, device)
        with record.timing("steps_s"):
            for _ in range(NUM_STEPS):
                start = time.perf_counter()
                training.step(batch_size)
                torch.cuda.synchronize(device)
                record.step_times_s.append(time.perf_counter() - start)
                record.device_bytes = max(record.device_bytes, card.used_bytes())
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the border to the user's model: it can raise anything
        return _judge(error)
    return Outcome.FITS, None


def _judge(error: BaseException) -> tuple[Outcome, str]:
    if is_out_of_memory(error):
        return Outcome.OOM, str(error)
    if is_gpu_lost(error):
        raise DeviceLost(f"the GPU vanished during a trial: {first_line(error)}") from error
    if isinstance(error, PlannerError):
        raise error
    if is_gpu_fault(error) or isinstance(error, MemoryError):
        return Outcome.FAILED, described(error)
    raise ModelError(f"the training step raised {described(error)}", field="model") from error
