"""The staging buffer of CUDA reductions that span several thread blocks.

``staging_buffer_bytes`` follows ``setReduceConfig`` and ``ReduceConfig`` in aten/src/ATen/native/cuda/Reduce.cuh. When
there are few outputs and many inputs for each, the inputs are divided among blocks, and the partial results meet in
global memory: a buffer and one semaphore for each block, from the caching allocator, freed when the kernel was
launched. The buffer is large: a sum of ``[2048, 1024]`` bf16 over its rows takes 16 MiB for 2 KiB of result (seen in
the recorded trace of bert-large).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from planner.virtual.architecture import Architecture
from planner.virtual.rules import Step
from planner.virtual.trace import Formula

WARP = 32
MAX_THREADS = 512
MIN_VALUES, MAX_VALUES = 16, 256  # per thread


Loop = tuple[int, int, bool]
"""One dimension: size, stride in elements, whether it is reduced."""


def staging_buffer_bytes(accumulator_bytes: int, num_sms: int, threads_per_sm: int, loops: Sequence[Loop]) -> int:
    """Bytes of the partial results that a reduction over ``loops`` (see ``reduction_loops``) takes beside its output; 0
    for none.

    ``accumulator_bytes`` is the size of one partial result: 4 for sums of floats up to 32 bits.
    """
    return _staging(accumulator_bytes, num_sms, threads_per_sm, loops)[0]


def semaphore_bytes(accumulator_bytes: int, num_sms: int, threads_per_sm: int, loops: Sequence[Loop]) -> int:
    """Bytes of the counters by which a reduction's blocks find the last one; 0 where there is no buffer."""
    return _staging(accumulator_bytes, num_sms, threads_per_sm, loops)[1]


def _staging(accumulator_bytes: int, num_sms: int, threads_per_sm: int, loops: Sequence[Loop]) -> tuple[int, int]:
    """``setReduceConfig`` and ``ReduceConfig::global_memory_size``, ``semaphore_size``."""
    num_inputs = num_outputs = 1
    for size, _, reduced in loops:
        if reduced:
            num_inputs *= size
        else:
            num_outputs *= size
    if num_inputs <= 1 or num_outputs == 0:
        return 0, 0
    num_reduced = sum(1 for _, _, reduced in loops if reduced)
    reduces_fastest = num_reduced == len(loops) or loops[0][1] < loops[num_reduced][1]
    fastest_stride = loops[0][1] if reduces_fastest else loops[num_reduced][1]
    dim0, dim1 = (num_inputs, num_outputs) if reduces_fastest else (num_outputs, num_inputs)
    output_vector = 1
    if fastest_stride == 1:
        if reduces_fastest and dim0 > 128 and len(loops) == 1:
            dim0 //= 4  # vectorised along the input
        elif not reduces_fastest:
            output_vector = _output_vector(loops, num_reduced)
            dim0 //= output_vector
    max_threads = MAX_THREADS // output_vector
    width, height = _block(dim0, dim1, max_threads)
    step_input = width if reduces_fastest else 1
    step_output = 1 if reduces_fastest else width
    if _div_up(num_inputs, step_input) < min(height * 16, MAX_VALUES):
        return 0, 0
    step_input *= height
    values = _div_up(num_inputs, step_input)
    grid = _div_up(num_outputs // output_vector, step_output)
    target = num_sms * (threads_per_sm // (width * height))
    if values < MAX_VALUES or grid > target:
        return 0, 0
    blocks = max(min(_div_up(target, grid), _div_up(values, MIN_VALUES)), _div_up(values, MAX_VALUES))
    if blocks <= 1:
        return 0, 0
    buffer = accumulator_bytes * num_outputs * blocks
    if not reduces_fastest:
        buffer *= width * output_vector
    return buffer, 4 * grid


def reduction_loops(tensor: torch.Tensor, dims: tuple[int, ...]) -> list[Loop]:
    """The dimensions of ``tensor`` when it is reduced over ``dims`` (all when empty): reduced first, each by ascending
    stride, neighbours coalesced.

    As ``TensorIteratorBase::reorder_dimensions`` and ``coalesce_dimensions`` leave them
    (aten/src/ATen/TensorIterator.cpp).
    """
    wanted = {dim % tensor.dim() for dim in dims} if dims else set(range(tensor.dim()))
    loops = [
        (size, stride, index in wanted)
        for index, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
        if size != 1
    ]
    loops.reverse()
    loops.sort(key=lambda loop: (not loop[2], loop[1]))
    merged: list[Loop] = []
    for size, stride, reduced in loops:
        if merged and merged[-1][2] == reduced and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = (merged[-1][0] * size, merged[-1][1], reduced)
        else:
            merged.append((size, stride, reduced))
    return merged or [(1, 1, True)]


def _output_vector(loops: Sequence[Loop], num_reduced: int) -> int:
    """``get_output_vec_size``: outputs that a thread makes at once, at most 4, as sizes and strides allow."""
    vector = 4
    size = loops[num_reduced][0]
    while vector > 1 and size % vector:
        vector //= 2
    for position, (_, stride, _) in enumerate(loops):
        if position != num_reduced:
            while vector > 1 and stride % vector:
                vector //= 2
    return vector


def _block(dim0: int, dim1: int, max_threads: int) -> tuple[int, int]:
    first = _last_pow2(dim0) if dim0 < max_threads else max_threads
    second = _last_pow2(dim1) if dim1 < max_threads else max_threads
    width = min(first, WARP)
    height = min(second, max_threads // width)
    return min(first, max_threads // height), height


def _last_pow2(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)


def _div_up(a: int, b: int) -> int:
    return -(-a // b)


def partial_results(
    tensor: torch.Tensor, dims: tuple[int, ...], architecture: Architecture, accumulator: int = 4
) -> Iterator[Step]:
    """The temporaries of reducing ``tensor`` over ``dims`` (all when empty), with partial results of ``accumulator``
    bytes."""
    loops = reduction_loops(tensor, dims)
    reduced = tuple(flag for _, _, flag in loops)
    numbers = tuple(number for size, stride, _ in loops for number in (size, stride))
    device = (architecture.num_sms, architecture.threads_per_sm)
    for size_of in (staging_buffer_bytes, semaphore_bytes):
        yield "temporary", Formula(partial(_of_loops, size_of, accumulator, *device, reduced), numbers)


def _of_loops(
    size_of: Callable[..., int],
    accumulator: int,
    num_sms: int,
    threads_per_sm: int,
    reduced: tuple[bool, ...],
    *numbers: int,
) -> int:
    """``size_of`` the loops whose sizes and strides ``numbers`` lists in turn."""
    loops: list[Loop] = list(zip(numbers[::2], numbers[1::2], reduced, strict=True))
    return size_of(accumulator, num_sms, threads_per_sm, loops)
