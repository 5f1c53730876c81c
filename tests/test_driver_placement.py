"""Where the driver puts segments and what it takes among them, as recorded on an H200."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.allocator.driver import TopDownAddresses
from planner.units import MIB
from planner.virtual.driver_memory import DriverMemory

aten = torch.ops.aten

FILE = Path(__file__).parent.parent / "measurements/h200/driver.json.xz"
OLDER_RANGE_BYTES = 96 * MIB
HOST_SHARED = 1 << 40
"""Lower lies what has an address that the driver picks itself: its queues, and memory shared with the host."""


def _processes() -> list[Any]:
    rows = json.loads(lzma.decompress(FILE.read_bytes()))["rows"]
    return [pytest.param(row, id=f"{row['case']}-{row['flavour']}-{row.get('run', 1)}") for row in rows if row["calls"]]


class RecordedRanges(TopDownAddresses):
    """Each range where it was recorded."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        start = next(index for index, (_, size) in enumerate(ranges) if size == OLDER_RANGE_BYTES)
        self._ranges_to_come = ranges[start:][::-1]
        super().__init__()

    def _take(self, size: int) -> int:
        address, recorded = self._ranges_to_come.pop()
        if (
            recorded == OLDER_RANGE_BYTES and size == self.RANGE_BYTES
        ):  # what its lower part has was there from the start
            return address + recorded - size
        assert recorded == size
        return address


def _aligned(address: int, size: int) -> tuple[int, int]:
    """The range that a mapping was asked for: it has 32 MiB less a page more."""
    step = TopDownAddresses.RANGE_BYTES
    return -(-address // step) * step, size + 4096 - step


@pytest.mark.parametrize("process", _processes())
def test_every_segment_lies_where_it_was_recorded(process: Any) -> None:
    calls = [(kind, address, size) for kind, address, size in process["calls"] if address > HOST_SHARED]
    step = TopDownAddresses.RANGE_BYTES
    ranges = [_aligned(a, size) for kind, a, size in calls if kind == "m" and size > step and (size + 4096) % step == 0]
    addresses = RecordedRanges(ranges)
    segments = {(address, size) for address, size in process["segments"]}
    start = next(index for index, call in enumerate(calls) if call[1:] in segments)
    taken = iter(call for call in calls[start:] if call[0] != "m")
    found = []
    for kind, address, size in taken:
        if kind == "-":
            if size == TopDownAddresses.FREED_BY_LOADING_BYTES:
                addresses.load_kernels()
                assert [next(taken)[2], next(taken)[2]] == [addresses.TAKEN_BY_LOADING_BYTES, addresses.PIECE_BYTES]
        elif (address, size) in segments:
            found.append([addresses.reserve(size), size])
        else:
            addresses.take(-(-size // (2 * MIB)) * 2 * MIB)
    assert found == process["segments"]


def _launched(memory: DriverMemory, packet: Any, *dtypes: torch.dtype) -> list[int]:
    """Of a call with tensors of all but the last of ``dtypes``, which is its result's."""
    *args, output = (torch.empty(1, dtype=dtype) for dtype in dtypes or (torch.float32,))
    return [size // MIB for size in memory.of_launch(packet, tuple(args), output)]


def _called(memory: DriverMemory, packet: Any, thread: str = "forward") -> list[int]:
    return [size // MIB for size in memory.of_handles(packet, thread)]


def test_what_is_taken_while_a_convolutional_network_runs_first() -> None:
    """unet-256 in bf16-amp as recorded, but for the 2 MiB of code that a transposed convolution brought."""
    memory = DriverMemory()
    assert _launched(memory, aten.empty) == []
    assert _launched(memory, aten.randn) == [2]
    assert _launched(memory, aten._to_copy, torch.float32, torch.bfloat16) == []
    assert _called(memory, aten.convolution) == [2] * 6
    assert _launched(memory, aten.native_batch_norm) == _called(memory, aten.convolution) == []
    assert _launched(memory, aten._to_copy, torch.bfloat16, torch.float32) == [10]
    assert _called(memory, aten.convolution_backward, "backward") == [2] * 4
    assert _launched(memory, aten.sum) == _called(memory, aten.convolution_backward, "backward") == []


def test_what_is_taken_while_a_transformer_runs_first() -> None:
    """mixtral-four as recorded, but for the 2 MiB of code that products brought; cuBLAS's 64 MiB are counted apart."""
    memory = DriverMemory()
    assert _launched(memory, aten.randint) == [2]
    assert _launched(memory, aten.embedding) == [10]
    assert _launched(memory, aten._local_scalar_dense) == [2]
    assert _called(memory, aten.bmm) == [2]
    assert _called(memory, aten._scaled_dot_product_cudnn_attention) == [2] * 5
    assert _called(memory, aten.mm, "backward") == []
    assert _called(memory, aten._scaled_dot_product_cudnn_attention, "backward") == [2] * 4


def test_a_number_that_changes_the_dtype_is_cast_in_a_kernel_that_asserts() -> None:
    """The positions of diffusion-64: whole numbers times a fraction."""
    memory = DriverMemory()
    assert _launched(memory, aten.mul, torch.float32, torch.float32, torch.float32) == [2]
    assert _launched(memory, aten.mul, torch.int64, torch.float32) == [10]
