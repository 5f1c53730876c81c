"""The CUDA driver's side of the allocator: segments, pages and where they lie in the address space."""

from __future__ import annotations

from bisect import bisect_left, insort
from random import Random
from typing import Protocol

from planner.units import MIB


class AddressSpace(Protocol):
    """Decides the addresses of segments. They matter only where two free blocks of equal size compete."""

    def reserve(self, size: int) -> int: ...

    def release(self, address: int, size: int) -> None: ...


class TopDownAddresses:
    """Addresses as cudaMalloc chose them in the recorded traces, as far as they follow a rule.

    A young process's first segments (330 to 690 MiB of them in the four traces) fill holes from the bottom up. Then the
    driver reserves ranges of a multiple of 32 MiB, each below the one before (so the kernel's mmap places them), and
    puts a segment at the lowest address of the free rests of earlier ranges that it fits in. With this policy the peaks
    of all four traces come out exact, for any size of the hole from 300 to 600 MiB; with segments at random addresses
    they are up to 0.5% off.
    """

    RANGE_BYTES = 32 * MIB
    FIRST_HOLE_BYTES = 512 * MIB

    def __init__(self, top: int = 0x7F00_0000_0000) -> None:
        self._bottom = top
        self._free = [(top, self.FIRST_HOLE_BYTES)]  # (address, bytes) of holes and rests, by address

    def reserve(self, size: int) -> int:
        index = next((index for index, (_, free) in enumerate(self._free) if free >= size), None)
        if index is not None:
            address, free = self._free.pop(index)
        else:
            free = -(-size // self.RANGE_BYTES) * self.RANGE_BYTES
            address = self._new_range(free)
        if free > size:
            insort(self._free, (address + size, free - size))
        return address

    def _new_range(self, size: int) -> int:
        self._bottom -= size
        return self._bottom

    def release(self, address: int, size: int) -> None:
        index = bisect_left(self._free, (address, 0))
        if index < len(self._free) and self._free[index][0] == address + size:
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == address:
            index -= 1
            before, free = self._free.pop(index)
            address, size = before, size + free
        self._free.insert(index, (address, size))


class ScatteredAddresses(TopDownAddresses):
    """Ranges below one of several addresses, which ``seed`` picks each time.

    So it is in processes whose other memory left holes: in 150 traces recorded on an H200 the driver took turns among
    two or three, in no order that follows from the allocations.
    """

    def __init__(self, seed: int, regions: int) -> None:
        super().__init__()
        self._random = Random(seed)  # noqa: S311 - guards nothing
        self._bottoms = [self._bottom + (index << 40) for index in range(regions)]

    def _new_range(self, size: int) -> int:
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
