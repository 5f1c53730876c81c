"""Replay a step's allocations and frees through the model of the caching allocator."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from planner.allocator.caching import CachingAllocator, OutOfMemory
from planner.allocator.config import AllocatorConfig
from planner.allocator.driver import AddressSpace


@dataclass(frozen=True, slots=True)
class Plans:
    """The plans that a convolution can run by, by their workspaces: it goes on with the next one where one is refused.

    ``run_single_conv`` in aten/src/ATen/native/cudnn/Conv_v8.cpp: the plan that this convolution last ran by comes
    first, then every plan that cuDNN proposes, in its order, until a workspace can be had. Each refused one costs a
    retry, thus every cached segment. Equal convolutions share what they ran by.
    """

    convolution: int
    """The same number for equal convolutions of one thread."""
    sizes: Sequence[int]
    """Workspaces in cuDNN's order, in bytes; the first is what the convolution takes where memory is plentiful."""


@dataclass(frozen=True, slots=True)
class Events:
    """The allocations and frees of a program, compact enough for millions of them.

    Blocks are numbered from 0. ``order`` holds ``i`` where block ``i`` is allocated and ``~i`` where it is freed, so a
    trace at another batch size is the same ``order`` with other ``sizes``.
    """

    order: Sequence[int]
    sizes: Sequence[int]
    """Bytes asked for, by block; a block of 0 bytes is never seen by the allocator."""
    streams: Sequence[int] | None = None
    """Stream of each block; ``None``: all on the default stream, 0."""
    plans: Mapping[int, Plans] = field(default_factory=dict)
    """Of the blocks that are workspaces of cuDNN's convolutions."""
    steps: Sequence[tuple[int, int]] = ()
    """Of each training step: its first event, and the one after its last. The last step ends with the events."""
    successors: Mapping[int, int] | None = None
    """Where the last step can be taken again as it is: the blocks of earlier steps that it frees, and which of its own
    it leaves in the place of each."""

    library_bytes: Mapping[int, int] = field(default_factory=dict)
    """What libraries take from the driver themselves before an event, by its index. It counts to no figure here, but
    lies among the segments."""
    driver_bytes: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """What the driver takes for itself before an event, one by one, by its index: likewise."""
    first_kernel: int = 0
    """The event before which the driver loads the first kernel (``AddressSpace.load_kernels``): weights are copied and
    random numbers drawn before it; 0 where that is not known."""

    def __len__(self) -> int:
        return len(self.order)

    def prepare(self, index: int, addresses: AddressSpace) -> None:
        """What the driver does before event ``index``, beside what the allocator asks of it."""
        if index == self.first_kernel:
            addresses.load_kernels()
        for size in self.driver_bytes.get(index, ()):
            addresses.take(size)
        if index in self.library_bytes:
            addresses.load_library(self.library_bytes[index])

    def live_after(self, index: int) -> list[int]:
        """The blocks that are live after event ``index``, in the order of their allocation."""
        live: dict[int, None] = {}
        for event in self.order[: index + 1]:
            if event >= 0:
                live[event] = None
            else:
                del live[~event]
        return list(live)


@dataclass(frozen=True, slots=True)
class OomEvent:
    """Where a replay ran out of memory."""

    index: int
    """Of the event in ``Events.order``."""
    block: int
    error: OutOfMemory
    """The figures that PyTorch's message states, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What the allocator did; bytes. After an OOM, up to the request that was refused."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    num_alloc_retries: int
    oom: OomEvent | None
    num_steps: int
    """Training steps that ended."""
    peak_allocated_index: int
    """Event after which the peak of allocated bytes was first reached; -1 where nothing was allocated."""
    allocated_timeline: Sequence[int] | None = None
    """Allocated bytes after each event, where asked for."""
    reserved_timeline: Sequence[int] | None = None

    @property
    def fits(self) -> bool:
        return self.oom is None


class Workspaces:
    """The workspaces of convolutions in a replay of ``events``: which plan each convolution last ran by."""

    def __init__(self, events: Events) -> None:
        self._plans = events.plans
        self._last: dict[int, int] = {}

    def allocate(
        self, block: int, malloc: Callable[[int], int], refused: Callable[[OutOfMemory], None] | None = None
    ) -> int:
        """The address of the first workspace for ``block`` that can be had; 0 for a plan that needs none.

        ``refused`` is told of each that cannot. Raises ``OutOfMemory`` where none can.
        """
        plans = self._plans[block]
        last = self._last.get(plans.convolution)
        sizes = plans.sizes if last is None else (last, *plans.sizes)
        for tried, size in enumerate(sizes, 1):
            try:
                address = malloc(size) if size else 0
            except OutOfMemory as error:
                if refused is not None:
                    refused(error)
                if tried == len(sizes):
                    raise
            else:
                self._last[plans.convolution] = size
                return address
        return 0


GoesOn = Callable[[Sequence[int], Sequence[int]], bool]
"""Whether another step is to be taken, by what each step so far left allocated and what the driver had handed out by
then, in bytes: ``planner.endurance.wants_another_step``, which decides it for trials on a GPU too."""


def replay(
    events: Events,
    config: AllocatorConfig | None = None,
    capacity_bytes: int | None = None,
    *,
    device_bytes: int | None = None,
    device_total_bytes: int | None = None,
    addresses: AddressSpace | None = None,
    goes_on: GoesOn | None = None,
    timeline: bool = False,
) -> ReplayResult:
    """Replay ``events`` in a fresh allocator (parameters as of ``CachingAllocator``), up to an OOM if there is one.

    Where the last step can be taken again, it is as long as ``goes_on`` says so; ``None``: never.
    """
    allocator = CachingAllocator(
        config,
        capacity_bytes,
        device_bytes=device_bytes,
        device_total_bytes=device_total_bytes,
        addresses=addresses,
    )
    malloc, free, sizes, streams = allocator.malloc, allocator.free, events.sizes, events.streams
    plans, workspaces = events.plans, Workspaces(events)
    where = [0] * len(sizes)
    allocated_timeline, reserved_timeline = array("q"), array("q")
    peak, peak_index = 0, -1
    oom: OomEvent | None = None
    index = -1
    allocated_after_step: list[int] = []
    taken_after_step: list[int] = []

    def step_ended() -> None:
        allocated_after_step.append(allocator.allocated_bytes)
        taken_after_step.append(allocator.driver.taken_bytes)

    def spans() -> Iterator[tuple[int, int]]:
        ends = {end for _, end in events.steps}
        for start, end in pairwise(
            sorted({0, events.first_kernel, *events.library_bytes, *events.driver_bytes, *ends, len(events)})
        ):
            events.prepare(start, allocator.driver.addresses)
            yield start, end
            if end in ends:
                step_ended()
        if events.successors is not None and goes_on is not None:
            while goes_on(allocated_after_step, taken_after_step):
                for block, successor in events.successors.items():
                    where[block] = where[successor]
                yield events.steps[-1]
                step_ended()

    try:
        for start, end in spans():
            for index, event in enumerate(events.order[start:end], start):
                if event >= 0:
                    size = sizes[event]
                    if size:
                        if plans and event in plans:
                            where[event] = workspaces.allocate(event, malloc)
                        else:
                            where[event] = malloc(size) if streams is None else malloc(size, streams[event])
                        if allocator.allocated_bytes > peak:
                            peak, peak_index = allocator.allocated_bytes, index
                elif address := where[~event]:
                    free(address)
                if timeline:
                    allocated_timeline.append(allocator.allocated_bytes)
                    reserved_timeline.append(allocator.reserved_bytes)
    except OutOfMemory as error:
        oom = OomEvent(index, events.order[index], error)
    return ReplayResult(
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        num_alloc_retries=allocator.num_alloc_retries,
        oom=oom,
        num_steps=len(allocated_after_step),
        peak_allocated_index=peak_index,
        allocated_timeline=allocated_timeline if timeline else None,
        reserved_timeline=reserved_timeline if timeline else None,
    )
