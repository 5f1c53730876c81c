"""What the kernels of ``scaled_dot_product_attention`` allocate; ``planner.virtual.attention`` says which one runs.

Sizes and order are those of recorded calls on an H200, 18 shapes in three dtypes
(``measurements/h200/kernels.json.gz``); formulas are those of PyTorch's sources. Shapes are ``[batch, heads, length,
head_dim]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from planner.virtual.architecture import Architecture
from planner.virtual.rules import Call, Step, bytes_of, outputs, rule
from planner.virtual.trace import Formula


@rule("_scaled_dot_product_cudnn_attention")
def _cudnn(call: Call, _: Architecture) -> Iterator[Step]:
    """Seed and offset, result, log-sum-exp, then a workspace of 256 B, none for a query of one token."""
    yield "output", 2
    yield "output", 3
    yield "output", 0
    yield "output", 1
    if call.args[0].shape[2] > 1:
        yield "temporary", 256


@rule("_scaled_dot_product_cudnn_attention_backward")
def _cudnn_backward(call: Call, _: Architecture) -> Iterator[Step]:
    """Queries' gradient and rows' sums in float32, in one workspace; where heads are grouped, also the gradients of
    keys and values for each head of the queries."""
    yield from outputs(call)
    query, key = call.args[1], call.args[2]
    batch, heads, length, head_dim = query.shape
    expanded = 2 * batch * heads * key.shape[2] * head_dim * key.element_size() if key.shape[1] != heads else 0
    yield "temporary", 4 * batch * heads * length * (head_dim + 1) + expanded + 256


@rule("_scaled_dot_product_flash_attention")
def _flash(call: Call, architecture: Architecture) -> Iterator[Step]:
    """Result, log-sum-exp, partial ones where the keys are split among blocks, then the random state: ``mha_fwd`` in
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp."""
    query, key = call.args[0], call.args[1]
    dropout = call.args[3] if len(call.args) > 3 else call.kwargs.get("dropout_p", 0.0)
    yield "output", 0
    yield "output", 1
    if dropout:
        yield "temporary", 16
        yield "output", 3
        yield "output", 2
        return
    batch, heads, length, head_dim = query.shape
    rounded = _round_up(head_dim, 32 if head_dim <= 128 else 64)
    numbers = (batch, heads, length, key.shape[2])
    for row in (4, 4 * rounded):
        yield "temporary", Formula(partial(_splits_bytes, architecture.num_sms, head_dim, row), numbers)
    yield "output", 2
    yield "output", 3
    yield "free", 1


def _splits_bytes(num_sms: int, head_dim: int, row_bytes: int, batch: int, heads: int, length: int, keys: int) -> int:
    """``set_params_splitkv`` and ``num_splits_heuristic``: as many splits as fill the SMs to 85% of the best."""
    block = 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64
    blocks, work, units = -(-keys // block), batch * heads * -(-length // 64), 2 * num_sms
    if work >= 0.8 * units:
        return 0
    efficiency: dict[int, float] = {}
    for splits in range(1, min(128, units, blocks) + 1):
        if splits == 1 or -(-blocks // splits) != -(-blocks // (splits - 1)):
            waves = work * splits / units
            efficiency[splits] = waves / -(-work * splits // units)
    chosen = next(splits for splits, share in efficiency.items() if share >= 0.85 * max(efficiency.values()))
    return chosen * batch * heads * length * row_bytes if chosen > 1 else 0


@rule("_scaled_dot_product_flash_attention_backward")
def _flash_backward(call: Call, _: Architecture) -> Iterator[Step]:
    """``mha_bwd``: gradients, ``softmax_d``, the queries' gradient in float32, and expanded gradients for grouped
    heads."""
    grad, query, key = call.args[0], call.args[1], call.args[2]
    if not grad.transpose(1, 2).is_contiguous():
        yield "temporary", bytes_of(grad)
    yield from outputs(call)
    batch, heads, length, head_dim = query.shape
    rounded = _round_up(length, 128)
    yield "temporary", 4 * batch * heads * rounded
    yield "temporary", 4 * batch * rounded * heads * _round_up(head_dim, 32 if head_dim <= 128 else 64)
    if key.shape[1] != heads:
        expanded = batch * key.shape[2] * heads * head_dim * key.element_size()
        yield "temporary", expanded
        yield "temporary", expanded


@rule("_scaled_dot_product_efficient_attention")
def _efficient(call: Call, _: Architecture) -> Iterator[Step]:
    """Result and log-sum-exp; beyond 128 features a result in float32 (``kNeedsOutputAccumulatorBuffer`` of
    mem_eff_attention/kernel_forward.h). Seed and offset are in host memory."""
    query, value = call.args[0], call.args[2]
    yield "output", 0
    yield "output", 1
    if query.element_size() < 4 and max(query.shape[-1], value.shape[-1]) > 128:
        batch, heads, length, _head_dim = query.shape
        yield "temporary", 4 * batch * heads * length * value.shape[-1]


@rule("_scaled_dot_product_efficient_attention_backward")
def _efficient_backward(call: Call, architecture: Architecture) -> Iterator[Step]:
    """``_efficient_attention_backward`` of aten/src/ATen/native/transformers/cuda/attention_backward.cu: gradients,
    sums of rows (made by other kernels for float32, through their products), and a workspace."""
    grad, query, key, value = call.args[:4]
    if not grad.transpose(1, 2).is_contiguous():
        yield "temporary", bytes_of(grad)
    yield from outputs(call)
    batch, heads, length, head_dim = query.shape
    rows = 4 * batch * heads * length
    if query.element_size() < 4:
        yield "temporary", rows
    else:
        yield "temporary", rows * value.shape[-1]
        yield "temporary", rows
        if heads > 1 and length > 1:
            yield "temporary", rows
            yield "free", 1
            yield "free", 1
        else:
            yield "free", 1
    blocks = _blocks(architecture, query.element_size() < 4, max(head_dim, value.shape[-1]))
    size = partial(_efficient_workspace_bytes, blocks, head_dim, value.shape[-1])
    yield "temporary", Formula(size, (batch * heads, length, key.shape[2]))
    yield "free", 1


def _blocks(architecture: Architecture, half: bool, widest: int) -> tuple[int, int, int, bool]:
    """``(queries, keys, columns)`` of the first backward kernel that fits, and whether it accumulates the keys' and
    values' gradients in memory: ``BwdKernel.get_all`` of mem_eff_attention/kernels/generate_kernels.py.

    Blocks of 128 queries take more shared memory than sm_75, sm_86, sm_89 and sm_120 have, but for one kernel of up to
    96 features.
    """
    if widest <= 64:
        return 64, 64, 64, False
    large = architecture.shared_memory_per_block >= 160 * 1024
    if not half:
        return 128 if large else 64, 64, 64, False
    if large:
        return (128, 128, 128, False) if widest <= 128 else (128, 64, 64, True)
    if widest <= 96 and architecture.compute_capability in ((8, 6), (8, 9)):
        return 128, 64, 64, False
    return 64, 64, 64, True


def _efficient_workspace_bytes(
    blocks: tuple[int, int, int, bool], head_dim: int, value_dim: int, batch_heads: int, length: int, keys: int
) -> int:
    """``Params::workspace_size`` of mem_eff_attention/kernel_backward.h."""
    queries_block, keys_block, columns, accumulates = blocks
    tile = 4 * queries_block * columns + 16
    total = -(-length // queries_block) * -(-head_dim // columns) * tile
    if accumulates:
        splits = max(1, min(-(-keys // keys_block), 200 // batch_heads))
        widths = _round_up(head_dim, queries_block) + _round_up(value_dim, queries_block)
        total += 4 * splits * keys_block * widths
    return batch_heads * total


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
