"""What the kernels of norms allocate beside their results, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod

from planner.virtual.architecture import Architecture
from planner.virtual.reductions import staging_buffer_bytes
from planner.virtual.rules import Call, Step, copies, outputs, rule
from planner.virtual.trace import Formula


@rule("native_layer_norm_backward")
def _layer_norm_backward(call: Call, architecture: Architecture) -> Iterator[Step]:
    """A contiguous copy of the input comes before the results, that of the gradient after them (traces of vit and
    wav2vec2-bert). Of more than 65,536 narrow rows the gradients of weight and bias are summed for 32 rows at a time
    first, then in all: ``layer_norm_backward_cuda`` and ``LaunchGammaBetaBackwardCUDAKernel`` in
    aten/src/ATen/native/cuda/layer_norm_kernel.cu; trace of eva02."""
    gradient, inputs, shape, mask = *call.args[:3], call.args[7]
    yield from copies([inputs])
    yield from outputs(call)
    yield from copies([gradient])
    weight = call.args[5] if call.args[5] is not None else inputs
    width, element_bytes = prod(shape), weight.element_size()
    if width // _WARP >= architecture.num_sms // 2:
        return
    rows = (inputs.numel() // width,)
    wanted = [given for given in mask[1:] if given]

    for _ in wanted:
        yield "temporary", Formula(partial(_partial_sums, width, element_bytes), rows)
    for _ in wanted:  # the result of this sum and its counters are left out: 512 bytes each
        yield "temporary", Formula(partial(_staging, width, architecture.num_sms, architecture.threads_per_sm), rows)
        yield "free", 0


_WARP = 32
_MANY_ROWS = 64 * 1024
_MOST_BLOCKS = 32 * 1024


def _blocks(width: int, rows: int) -> int:
    """Of 32 rows each, or of more: as many as a grid has at most for each 32 columns; 0 where rows are few."""
    return min(-(-rows // _WARP), _MOST_BLOCKS // -(-width // _WARP)) if rows > _MANY_ROWS else 0


def _partial_sums(width: int, element_bytes: int, rows: int) -> int:
    return _blocks(width, rows) * width * element_bytes


def _staging(width: int, num_sms: int, threads_per_sm: int, rows: int) -> int:
    loops = [(_blocks(width, rows), width, True), (width, 1, False)]
    return staging_buffer_bytes(4, num_sms, threads_per_sm, loops)


@rule("native_group_norm")
def _group_norm(call: Call, _: Architecture) -> Iterator[Step]:
    """Scale and shift of each channel of each sample in float32, and a contiguous copy: group_norm_kernel.cu and
    group_norm.cpp of aten/src/ATen/native; recorded calls."""
    yield from copies(call.args[:1])
    yield from outputs(call)
    yield "temporary", 4 * call.args[3] * call.args[4]
    yield "temporary", 4 * call.args[3] * call.args[4]


@rule("native_group_norm_backward")
def _group_norm_backward(call: Call, _: Architecture) -> Iterator[Step]:
    """Sums for each channel of each sample, then factors for each group, in float32: group_norm_kernel.cu."""
    yield from copies(call.args[:2])
    yield from outputs(call)
    samples, channels, groups = call.args[5], call.args[6], call.args[8]
    for count in (channels, channels, groups, groups, channels):
        yield "temporary", 4 * samples * count
    yield "free", 1
    yield "free", 1
