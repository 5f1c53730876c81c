"""What kernels allocate that look tensors up by index, select, sort and scan: embeddings, indexing, cub's algorithms.

The order of each rule's steps is that of recorded calls on an H200 (``measurements/h200/kernels.json.gz``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from math import prod
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from planner.virtual import cub
from planner.virtual.architecture import Architecture
from planner.virtual.rules import Call, Step, bytes_of, outputs, rule
from planner.virtual.trace import Formula
from planner.virtual.values import value_of

aten = torch.ops.aten
_INDEX = 8  # bytes of an int64
_SORTED_BY_BLOCKS = 4096
"""Rows up to so long are sorted by one block each (aten/src/ATen/native/cuda/Sort.cpp)."""


def _temporary(function: Callable[..., int], *numbers: int) -> Step:
    return "temporary", Formula(function, numbers)


@rule("embedding")
def _embedding(call: Call, _: Architecture) -> Iterator[Step]:
    """``index_select`` on indices flattened by a copy where they are not contiguous
    (aten/src/ATen/native/Embedding.cpp)."""
    indices = call.args[1]
    if not indices.is_contiguous():
        yield "temporary", bytes_of(indices)
    yield from outputs(call)


@rule("embedding_dense_backward")
def _embedding_backward(call: Call, architecture: Architecture) -> Iterator[Step]:
    """More than 3072 indices are sorted and summed by segments: aten/src/ATen/native/cuda/Embedding.cu,
    EmbeddingBackwardKernel.cu.

    10 is ``NROWS_PER_THREAD``; partial sums are float32. A table of few rows that are looked up often is summed in
    another way, without a partial sum for each, in float32 beside a table of less: seen on 132 SMs up to 513 rows, not
    from 640 on, and from 32 lookups a row on, not up to 24.
    """
    grad, indices, num_weights = call.args[0], call.args[1], call.args[2]
    for item in (indices, grad):  # the gradient of what a recurrent layer reads is transposed: trace of lstm-lm
        if not item.is_contiguous():
            yield "temporary", bytes_of(item)
    count, width, rows = indices.numel(), grad.shape[-1], int(num_weights)

    def sorting(size: Callable[..., int], *constants: int) -> Step:
        return _temporary(partial(_while_sorting, size, *constants), count)

    yield sorting(_linear, _INDEX, 0)  # sorted indices
    yield sorting(_linear, _INDEX, 0)  # where each came from
    yield sorting(_linear, _INDEX, 0)
    yield sorting(cub.radix_sort_bytes, _INDEX, 64)
    yield "free", 0
    yield "free", 0
    yield from outputs(call)
    yield sorting(_linear, _INDEX, 0)  # where segments of equal indices begin
    yield sorting(_linear, 0, _INDEX)
    yield sorting(_linear, _INDEX, 0)
    yield sorting(cub.unique_by_key_bytes)
    yield "free", 0
    yield "free", 0
    yield sorting(_segments, rows)
    yield sorting(_segments, rows)
    yield sorting(_scan_of_segments, rows)
    yield "free", 0
    yield sorting(_linear, 0, _INDEX)
    few = rows <= 4 * architecture.num_sms
    yield sorting(_partial_sums, rows, _INDEX, _INDEX)
    yield sorting(_partial_sums, rows, 4 * width, _INDEX if few else 4 * width)
    yield sorting(_float_table, rows, 4 * rows * width if few and grad.element_size() < 4 else 0)


_OFTEN = 32


def _while_sorting(size: Callable[..., int], *numbers: int) -> int:
    """``size(*numbers)``, the last of which is how many indices there are, where so many are sorted."""
    return size(*numbers) if numbers[-1] > 3072 else 0


def _linear(slope: int, intercept: int, count: int) -> int:
    return slope * count + intercept


def _segments(rows: int, count: int) -> int:
    return _INDEX * min(rows, count)


def _scan_of_segments(rows: int, count: int) -> int:
    return cub.scan_bytes(_INDEX, min(rows, count))


def _partial_sums(rows: int, bytes_each: int, bytes_if_often: int, count: int) -> int:
    return (bytes_if_often if count >= _OFTEN * rows else bytes_each) * (count // 10 + min(count, rows))


def _float_table(rows: int, size: int, count: int) -> int:
    return size if count >= _OFTEN * rows else 0


@rule("sort", "argsort")
def _sort(call: Call, _: Architecture) -> Iterator[Step]:
    """Rows of up to 4096 by one block each, longer ones by cub's radix sort: aten/src/ATen/native/cuda/Sort.cpp."""
    tensor = call.args[0]
    yield from outputs(call)
    if tensor.numel() == 0 or tensor.dim() == 0:
        return
    arguments = [*call.args[1:], *call.kwargs.values()]
    dim = next((item for item in arguments if isinstance(item, int) and not isinstance(item, bool)), -1)
    row, key, bits = tensor.shape[dim], tensor.element_size(), 8 * tensor.element_size()
    yield _temporary(_row_numbers, row, tensor.numel())
    yield _temporary(partial(_long_rows, _INDEX), row, tensor.numel())
    yield _temporary(partial(_long_rows, key), row, tensor.numel())
    yield _temporary(partial(_long_sort, key, bits), row, tensor.numel())


def _row_numbers(row: int, count: int) -> int:
    return _INDEX * (row if row <= _SORTED_BY_BLOCKS else count)


def _long_rows(element: int, row: int, count: int) -> int:
    """Several long rows are sorted at once, as one, from a copy."""
    return element * count if _SORTED_BY_BLOCKS < row < count else 0


def _long_sort(key: int, bits: int, row: int, count: int) -> int:
    if row <= _SORTED_BY_BLOCKS:
        return 0
    # Several rows: keys with their row beside them, then sorted by row again.
    return cub.radix_sort_bytes(key, bits, count)


@rule("topk")
def _topk(call: Call, architecture: Architecture) -> Iterator[Step]:
    """Few long rows are searched by several blocks each: ``mbtopk`` of aten/src/ATen/native/cuda/TensorTopK.cu."""
    tensor = call.args[0]
    yield from outputs(call)
    if tensor.dim() == 0 or tensor.numel() == 0:
        return
    arguments = [*call.args[2:], call.kwargs.get("dim")]
    dim = next((item for item in arguments if isinstance(item, int) and not isinstance(item, bool)), -1)
    element, row = tensor.element_size(), tensor.shape[dim]
    numbers = (tensor.numel() // max(row, 1), row)
    for part in range(7):
        yield "temporary", Formula(partial(_topk_part, part, element, architecture.num_sms), numbers)
    yield "temporary", Formula(partial(_topk_part, 7, element, architecture.num_sms), numbers)
    yield "free", 0
    yield "temporary", Formula(partial(_topk_part, 7, element, architecture.num_sms), numbers)


def _topk_part(part: int, element: int, num_sms: int, rows: int, row: int) -> int:
    if not _takes_several_blocks(rows, row):
        return 0
    # 6 blocks of 256 threads with 40 registers each fit one SM; a thread takes 4 to 64 elements.
    per_thread = min(64, max(4, -(-rows * row // (num_sms * 6 * 256))))
    blocks = -(-row // (256 * per_thread))
    radix = max(4, element)
    sizes = (
        element * rows, _INDEX * rows, 2 * radix * rows, 2 * 256 * rows * blocks, 4 * 256 * rows,
        4 * rows * blocks, 4 * rows * blocks, cub.scan_bytes(_INDEX, rows * blocks),
    )  # fmt: skip
    return sizes[part]


def _takes_several_blocks(rows: int, row: int) -> bool:
    """``should_use_multiblock`` of TensorTopK.cu."""
    for most_rows, least in ((20, 20_000), (40, 10_000), (80, 8000), (199, 5000), (799, 3000), (4000, 800)):
        if rows <= most_rows:
            return row >= least
    return row >= 400


@rule("cumsum", "cumprod", "logcumsumexp")
def _scan(call: Call, _: Architecture) -> Iterator[Step]:
    """A cast of what the result is wider than (``_cumsum_out`` of aten/src/ATen/native/ReduceOps.cpp), and cub's scan
    where there is one dimension (aten/src/ATen/native/cuda/ScanKernels.cpp)."""
    tensor = call.args[0]
    yield from outputs(call)
    if not call.sizes or tensor.numel() == 0:
        return
    element = call.sizes[0] // tensor.numel()
    if element > tensor.element_size():
        yield "temporary", call.sizes[0]
    if max(tensor.shape, default=1) == tensor.numel() and tensor.numel() > 1:
        yield _temporary(partial(cub.scan_bytes, element), tensor.numel())


@rule("nonzero")
def _nonzero(call: Call, _: Architecture) -> Iterator[Step]:
    """Count, then list: aten/src/ATen/native/cuda/Nonzero.cu."""
    count = call.args[0].numel()
    yield "temporary", 4
    yield _temporary(cub.count_bytes, count)
    yield "free", 0
    yield from outputs(call)
    yield _temporary(cub.select_bytes, count)


def _positions(mask: torch.Tensor, found: int) -> Iterator[Step]:
    """``mask.nonzero()`` inside another operator, which keeps ``found`` positions to its end."""
    yield "temporary", 4
    yield _temporary(cub.count_bytes, mask.numel())
    yield "free", 0
    yield "temporary", _INDEX * mask.dim() * found
    yield _temporary(cub.select_bytes, mask.numel())
    yield "free", 0
    yield "free", 1  # the count


@rule("masked_select")
def _masked_select(call: Call, _: Architecture) -> Iterator[Step]:
    """Indexing by the positions that the mask lists (aten/src/ATen/native/cuda/IndexKernel.cpp)."""
    if call.sizes:
        yield from _positions(call.args[1], call.sizes[0] // call.args[0].element_size())
    yield from outputs(call)


@rule("index", "_unsafe_index")
def _index(call: Call, _: Architecture) -> Iterator[Step]:
    """A mask becomes the positions that it lists (``expandTensors`` of aten/src/ATen/native/IndexingUtils.h)."""
    tensor, indices = call.args[0], call.args[1]
    masks = [item for item in indices if item is not None and item.dtype in (torch.bool, torch.uint8)]
    if masks and call.sizes:
        taken = sum(mask.dim() for mask in masks) + sum(1 for item in indices if item is None)
        row = prod(tensor.shape[taken:]) * tensor.element_size()
        for mask in masks:
            yield from _positions(mask, call.sizes[0] // max(row, 1))
    else:
        yield from _restrided([item for item in indices if item is not None])
    yield from outputs(call)


def _restrided(indices: Sequence[torch.Tensor]) -> Iterator[Step]:
    """Copies of index tensors that broadcast, where their strides differ then: ``AdvancedIndex`` of
    aten/src/ATen/native/TensorAdvancedIndexing.cpp, trace of bloom."""
    if len(indices) < 2:
        return
    shaped = [torch.empty_strided(item.shape, item.stride(), device="meta") for item in indices]
    expanded: Sequence[torch.Tensor] = torch.broadcast_tensors(*shaped)  # type: ignore[no-untyped-call]
    if len({item.stride() for item in expanded}) > 1:
        for item in expanded:
            if not item.is_contiguous():
                yield "temporary", _INDEX * item.numel()


@rule("index_put", "index_put_", "_index_put_impl_")
def _index_put(call: Call, _: Architecture) -> Iterator[Step]:
    """Accumulation sorts the indices first: ``index_put_with_sort_kernel`` of aten/src/ATen/native/cuda/Indexing.cu."""
    tensor, indices = call.args[0], call.args[1]
    yield from outputs(call)
    listed = [item for item in indices if item is not None]
    masks = [item for item in listed if item.dtype in (torch.bool, torch.uint8)]
    if masks or not listed:
        for mask in masks:
            yield from _positions(mask, _num_marked(mask))
        return
    if not (len(call.args) > 3 and call.args[3]):
        return
    count = _broadcast_count([item.shape for item in listed])
    places = prod(size for size, item in zip(tensor.shape, indices, strict=False) if item is not None)
    bits = max(1, (places - 1).bit_length())
    indexed = _INDEX * count
    for number in range(len(listed)):  # each adds to the linear index, which the first begins
        yield "temporary", indexed
        yield "temporary", indexed
        yield "free", 1
        if number:
            yield "free", 0
    if not call.args[2].is_contiguous():
        yield "temporary", bytes_of(call.args[2])
    for _copy in range(3):  # sorted, where each came from, the numbers up to their count
        yield "temporary", indexed
    yield _temporary(partial(cub.radix_sort_bytes, _INDEX, bits), count)


def _num_marked(mask: torch.Tensor) -> int:
    """How many positions a mask lists: half of them where that is not known."""
    known = value_of(mask)
    if known is None:
        return mask.numel() // 2
    with unset_fake_temporarily():
        return int(known.count_nonzero())


def _broadcast_count(shapes: Sequence[Sequence[int]]) -> int:
    """Elements of what tensors of these shapes broadcast to."""
    return prod(max(sizes) for sizes in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1))


@rule("roll")
def _roll(call: Call, _: Architecture) -> Iterator[Step]:
    """One dimension after the other (``roll_common`` of aten/src/ATen/native/TensorTransformations.h)."""
    dims: Any = call.args[2] if len(call.args) > 2 else call.kwargs.get("dims", ())
    dims = (dims,) if isinstance(dims, int) else dims
    for _dim in dims[1:]:
        yield "temporary", bytes_of(call.args[0])
    yield from outputs(call)
