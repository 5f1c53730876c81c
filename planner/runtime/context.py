"""CUDA in this process: started under a limit, and cleaned between the trials of a process that is kept warm."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from planner.errors import DeviceUnavailable, first_line
from planner.runtime.card import Card
from planner.runtime.inventory import kernels_for, library_facts


@dataclass(slots=True)
class Context:
    """The one visible GPU, its caching allocator limited to the capacity."""

    device: torch.device
    context_bytes: int
    """Of the CUDA context itself, on the whole device; means nothing while it is not ``alone``."""
    communicator_bytes: int
    """What joining the other ranks took beside it: NCCL's buffers; 0 for a trial on one GPU."""
    used_before_bytes: int
    """In use on the device before it was started."""
    system: dict[str, Any]
    """What else of this machine can change a trial: versions of libraries and how the card is set up."""
    pids: tuple[int, ...]
    """By which ids the driver lists this process: not this process's own in every container; empty in some."""
    others: tuple[int, ...]
    """Processes that were there before."""
    listed_bytes: int | None
    """Of the context, as the driver lists them for this process; ``None`` where it lists this process by another id, or
    others came with it."""
    _held_by_model: tuple[int, int] | None = None
    """Bytes allocated and reserved once the first trial's model had been moved."""

    @classmethod
    def start(
        cls, capacity_bytes: int, card: Card, device_index: int = 0, join: Callable[[], object] | None = None
    ) -> Self:
        """``device_index`` is where ``card`` stands among the visible GPUs; ``join`` makes this process one of several
        ranks.

        Raises ``DeviceUnavailable`` where torch cannot use the GPU.
        """
        used_before_bytes = card.used_bytes()
        others = card.compute_processes()
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            device = torch.device("cuda", device_index)
            torch.cuda.set_device(device)
            _limit(device, capacity_bytes)
            # The context exists from the first tensor on. No kernel here: one that runs before the weights come changes
            # where the driver places them, and by that what a step reserves (``planner.allocator.driver``).
            torch.empty(1, device=device)
            torch.cuda.synchronize(device)
        except (RuntimeError, AssertionError) as error:
            raise DeviceUnavailable(f"torch cannot use this GPU: {first_line(error)}") from error
        torch.cuda.empty_cache()
        context_bytes = card.used_bytes() - used_before_bytes
        if join is not None:
            join()
        pids = tuple(pid for pid in card.compute_processes() if pid not in others)
        return cls(
            device=device,
            context_bytes=context_bytes,
            communicator_bytes=0 if join is None else card.used_bytes() - used_before_bytes - context_bytes,
            used_before_bytes=used_before_bytes,
            system={**_libraries(device), **asdict(card.settings())},
            pids=pids,
            others=tuple(others),
            listed_bytes=card.process_bytes().get(os.getpid()) if pids == (os.getpid(),) else None,
        )

    def alone(self, card: Card, used_before_bytes: int, capacity_bytes: int) -> None:
        """The trial beside which it was started has gone: measure what could not be told then. ``used_before_bytes``
        were in use on the device before any process of ours was there."""
        _limit(self.device, capacity_bytes)
        self.used_before_bytes = used_before_bytes
        self.context_bytes = card.used_bytes() - used_before_bytes
        self.others = tuple(pid for pid in card.compute_processes() if pid not in self.pids)

    def begin(self) -> None:
        """Count peaks and retries from here on."""
        torch.cuda.reset_peak_memory_stats(self.device)
        torch.cuda.reset_accumulated_memory_stats(self.device)

    def strangers(self, card: Card, beside: int | None = None) -> tuple[int, ...]:
        """Processes that came to the GPU since, but for ours ``beside``: what is measured beside them is not the
        trial's own."""
        return tuple(sorted({*card.compute_processes()} - {*self.pids, *self.others, beside}))

    def device_bytes(self, card: Card, beside: int | None = None) -> int:
        """In use on the device, without what a process of ours ``beside`` holds.

        The driver lists for each process all but a constant of what it adds to the device. *Measured* on an H200:
        8.8 MiB less than the device shows where it is alone, whatever it holds (``measurements/h200/contexts.json``).
        """
        listed = None if beside is None else card.process_bytes().get(os.getpid())
        if listed is None or self.listed_bytes is None:
            return card.used_bytes()  # with a process beside too much, never too little
        return self.used_before_bytes + self.context_bytes + listed - self.listed_bytes

    def moved(self) -> None:
        """The model, and what goes with it, is on the device; nothing was trained yet."""
        if self._held_by_model is None:
            self._held_by_model = self._held()

    def clean(self, model: torch.nn.Module) -> bool:
        """Free what the trial that ended has left, all but the model; whether that is all that there is now.

        Not after every trial: an exception in the middle of a backward pass can keep tensors alive for good, and a
        small one that shares a segment with freed blocks keeps the segment. Such a process is of no further use.
        """
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        held, expected = self._held(), self._held_by_model
        return expected is not None and held[0] <= expected[0] and held[1] <= expected[1]

    def _held(self) -> tuple[int, int]:
        return torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)


def _limit(device: torch.device, capacity_bytes: int) -> None:
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(memory_fraction(capacity_bytes, total_bytes), device)


def _libraries(device: torch.device) -> dict[str, Any]:
    facts = library_facts()
    return {**facts, "kernels": kernels_for(torch.cuda.get_device_capability(device), facts["kernels"])}


def memory_fraction(capacity_bytes: int, total_bytes: int) -> float:
    """The fraction that makes torch's limit exactly ``capacity_bytes``.

    torch allows ``static_cast<size_t>(fraction * total)`` (c10/cuda/CUDACachingAllocator.cpp, ``setMemoryFraction``),
    so a quotient that was rounded down would allow a byte less.
    """
    fraction = min(capacity_bytes / total_bytes, 1.0)
    while fraction < 1.0 and int(fraction * total_bytes) < capacity_bytes:
        fraction = math.nextafter(fraction, 1.0)
    return fraction
