"""The CUDA driver's side of the allocator: segments, pages and where they lie in the address space."""

from __future__ import annotations

import sys
from bisect import bisect_left
from dataclasses import dataclass
from random import Random
from typing import Protocol

from planner.units import MIB


class AddressSpace(Protocol):
    """Decides the addresses of segments. They matter only where two free blocks of equal size compete."""

    def reserve(self, size: int) -> int: ...

    def release(self, address: int, size: int) -> None: ...

    def load_kernels(self) -> None:
        """The process is about to run its first kernel: the driver loads the program that has it."""

    def load_library(self, size: int) -> None:
        """A library (cuBLAS) takes ``size`` bytes from the driver. Its workspace is the next segment."""

    def take(self, size: int) -> None:
        """The driver takes ``size`` bytes for itself."""


_TOP = 1 << 52
"""Higher than any process has it: a batch size that fits nowhere may take hundreds of TiB."""


@dataclass(slots=True)
class _Range:
    """Addresses that the driver has from the kernel, and what of them is free: ``(address, bytes)``, by address."""

    address: int
    size: int
    free: list[tuple[int, int]]


class TopDownAddresses:
    """Addresses as the driver chose them in recorded processes.

    The kernel gives the driver ranges of a multiple of 32 MiB, each at the top of the highest gap that it fits in with
    32 MiB more (mmap, of which what is not aligned goes back). A segment, and what the driver takes for itself, goes to
    the newest range with room for it, there to the lowest address, else to a new range; a range that is wholly free
    goes back to the kernel. CUDA's start leaves 24 MiB free in one range and 2 MiB in a newer one. The first kernel but
    those that draw random numbers frees the other 414 MiB there (a hole where something lies in the 2 MiB by then, else
    a gap, of which cuBLAS's kernels take what is left once its workspace is there) for 504 elsewhere, and a piece of
    code: threads' own memory, it seems, of which it needs more.

    *Measured* on an H200 (torch 2.11, ``measurements/h200/driver.json.xz``): with each range where it was recorded,
    this gives the address of every segment of 65 processes. Where ranges lie is a process's own: weights that leave the
    CPU make gaps, and threads take parts.
    """

    RANGE_BYTES = 32 * MIB
    OLDER_REST_BYTES = 24 * MIB
    NEWER_REST_BYTES = 2 * MIB
    FREED_BY_LOADING_BYTES = 414 * MIB
    TAKEN_BY_LOADING_BYTES = 504 * MIB
    PIECE_BYTES = 2 * MIB

    def __init__(self) -> None:
        self._bottom = _TOP
        self._gaps: list[tuple[int, int]] = []
        self._of_segment: dict[int, _Range] = {}
        older = self._started_with(self.RANGE_BYTES - self.OLDER_REST_BYTES, self.OLDER_REST_BYTES)
        self._newer = self._started_with(self.FREED_BY_LOADING_BYTES, self.NEWER_REST_BYTES)
        self._loaded = self._library_loads = False
        self._ranges = [self._newer, older]  # the newest first
        self._no_room_for = sys.maxsize  # no range has a hole of so many bytes

    def _started_with(self, taken: int, rest: int) -> _Range:
        """A range that has something of the driver's own in its lower part."""
        address = self._take(taken + rest)
        return _Range(address, taken + rest, [(address + taken, rest)])

    def load_kernels(self) -> None:
        if not self._loaded:
            self._loaded = True
            if not self._of_segment:  # the process's first kernel: it brings code too
                self._place(self.PIECE_BYTES)
            self._free(self._newer, self._newer.address, self.FREED_BY_LOADING_BYTES)
            self._place(self.TAKEN_BY_LOADING_BYTES)
            self._place(self.PIECE_BYTES)

    def take(self, size: int) -> None:
        self._place(size)

    def load_library(self, size: int) -> None:
        self._place(size)
        self._library_loads = True

    def reserve(self, size: int) -> int:
        address = self._place(size)
        if self._library_loads:
            self._library_loads = False
            self._gaps = [gap for gap in self._gaps if gap[0] < self._newer.address]
        return address

    def _place(self, size: int) -> int:
        if size < self._no_room_for:  # else there is no need to look through hundreds of ranges
            for among in self._ranges:
                for index, (address, free) in enumerate(among.free):
                    if free >= size:
                        among.free[index : index + 1] = [(address + size, free - size)] if free > size else []
                        self._of_segment[address] = among
                        return address
            self._no_room_for = size
        range_bytes = -(-size // self.RANGE_BYTES) * self.RANGE_BYTES
        address = self._take(range_bytes)
        self._ranges.insert(0, _Range(address, range_bytes, []))
        self._of_segment[address] = self._ranges[0]
        if range_bytes > size:
            self._open(self._ranges[0], address + size, range_bytes - size)
        return address

    def release(self, address: int, size: int) -> None:
        self._free(self._of_segment.pop(address), address, size)

    def _free(self, among: _Range, address: int, size: int) -> None:
        self._open(among, address, size)
        if among.free == [(among.address, among.size)]:
            self._ranges.remove(among)
            _give_back(self._gaps, among.address, among.size)
            if self._gaps[0][0] == self._bottom:
                self._bottom = sum(self._gaps.pop(0))

    def _open(self, among: _Range, address: int, size: int) -> None:
        """Make a hole there."""
        self._no_room_for = max(self._no_room_for, _give_back(among.free, address, size) + 1)

    def _take(self, size: int) -> int:
        """The kernel's part: where ``size`` bytes lie that it maps, aligned."""
        for index in reversed(range(len(self._gaps))):
            address, free = self._gaps[index]
            if free >= size + self.RANGE_BYTES:
                self._gaps[index] = (address, free - size)
                return address + free - size
        self._bottom -= size
        return self._bottom


def _give_back(holes: list[tuple[int, int]], address: int, size: int) -> int:
    """Add a hole to ``holes``, which are sorted by address, and merge it with its neighbours; its bytes then."""
    index = bisect_left(holes, (address, 0))
    if index < len(holes) and holes[index][0] == address + size:
        size += holes.pop(index)[1]
    if index and sum(holes[index - 1]) == address:
        index -= 1
        before, free = holes.pop(index)
        address, size = before, size + free
    holes.insert(index, (address, size))
    return size


class ScatteredAddresses(TopDownAddresses):
    """Ranges in gaps of several parts of the address space, which ``seed`` picks each time.

    So it is where the process's other memory comes and goes, the CPU's copies of the weights among it: in 150 traces
    recorded on an H200 the driver took turns among two or three parts.
    """

    def __init__(self, seed: int, regions: int) -> None:
        self._random = Random(seed)  # noqa: S311 - guards nothing
        self._bottoms = [_TOP + (index << 49) for index in range(regions)]
        super().__init__()

    def _take(self, size: int) -> int:
        region = self._random.randrange(len(self._bottoms))
        self._bottoms[region] -= size
        return self._bottoms[region]


class Driver:
    """Hands out device memory and counts it: what it has handed out is the allocator's ``reserved``.

    ``device_bytes`` is the memory that there is for this process at all; ``None``: more than will be asked for.
    """

    def __init__(self, addresses: AddressSpace, device_bytes: int | None = None, *, log: bool = False) -> None:
        self.addresses = addresses
        self.device_bytes = device_bytes
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self.taken_bytes = 0
        """All that was handed out so far, whatever came back."""
        self.calls: list[tuple[str, int, int]] | None = [] if log else None
        """Where kept: ``(action, address, bytes)`` of each call, by the action names of PyTorch's memory history."""

    def allocate(self, size: int) -> int | None:
        """cudaMalloc: the address of a new segment, or ``None`` when the device is full."""
        if not self._fits(size):
            return None
        address = self.addresses.reserve(size)
        self._took("segment_alloc", address, size)
        return address

    def free(self, address: int, size: int) -> None:
        """cudaFree."""
        self._gave("segment_free", address, size)
        self.addresses.release(address, size)

    def map(self, address: int, size: int) -> bool:
        """cuMemCreate and cuMemMap of pages at ``address``; ``False`` when the device is full."""
        if not self._fits(size):
            return False
        self._took("segment_map", address, size)
        return True

    def unmap(self, address: int, size: int) -> None:
        self._gave("segment_unmap", address, size)

    def _fits(self, size: int) -> bool:
        return self.device_bytes is None or self.reserved_bytes + size <= self.device_bytes

    def _took(self, action: str, address: int, size: int) -> None:
        self.reserved_bytes += size
        self.taken_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        if self.calls is not None:
            self.calls.append((action, address, size))

    def _gave(self, action: str, address: int, size: int) -> None:
        self.reserved_bytes -= size
        if self.calls is not None:
            self.calls.append((action, address, size))
