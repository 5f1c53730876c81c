"""What CUDA kernels allocate beside the tensors that they return, and in which order.

Each rule says where it comes from: PyTorch's source, or a trace recorded on a real GPU (``tests/golden/traces``). The
order matters little to the peak of allocated bytes, and much to which cached block the allocator reuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from planner.virtual import recurrent_kernels
from planner.virtual.architecture import Architecture
from planner.virtual.convolutions import ELEMENT_BYTES, Direction, workspace_bytes
from planner.virtual.reductions import Loop, reduction_loops, semaphore_bytes, staging_buffer_bytes
from planner.virtual.trace import Formula

aten = torch.ops.aten

Step = tuple[str, int | Formula]
"""``("output", i)``: the i-th new storage that the operator returns; ``("size", formula)``: the bytes of the next
output, where they are not affine in the batch size; ``("temporary", bytes)``: freed when the operator
ends, last first; ``("workspace", bytes)``: a temporary that the kernel can do without, should it be refused; ``("kept",
bytes)``: for the life of the process; ``("free", 0)``: the newest temporary is freed now; ``("doubt", bytes)``: nothing
is allocated, but the call may take up to so much more or less."""


@dataclass(frozen=True, slots=True)
class Call:
    """One operator call as the recorder sees it: fake tensors in and out. A rule must keep none of them."""

    packet: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    sizes: Sequence[int]
    """Bytes of each new storage among the results, in order."""


class Kernels:
    """The kernels of one architecture in one process; remembers which handles have their workspace."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._handles: set[tuple[str, str]] = set()

    def layout(self, call: Call, thread: str) -> Iterator[Step]:
        """The allocations and frees of ``call``, made by the autograd engine's thread or by the main one."""
        yield from self.of_call(call)
        yield from self.of_handles(call.packet, thread)

    def of_call(self, call: Call) -> Iterator[Step]:
        """What the kernels of ``call`` themselves allocate and free: the same for an equal call."""
        rule = _RULES.get(call.packet)
        return _outputs(call) if rule is None else rule(call, self.architecture)

    def of_handles(self, packet: Any, thread: str) -> Iterator[Step]:
        """What the libraries that ``packet`` calls keep from the first call on each thread."""
        if packet in _GEMMS:
            yield from self._workspace("cublas", thread, self.architecture.cublas_workspace_bytes)
            if packet is aten.addmm:
                yield from self._workspace("cublaslt", thread, self.architecture.cublaslt_workspace_bytes)
        elif packet is aten._cudnn_init_dropout_state:
            yield from self._dropout_state()

    def _workspace(self, library: str, thread: str, size: int) -> Iterator[Step]:
        if (library, thread) not in self._handles:
            self._handles.add((library, thread))
            yield "kept", size

    def _dropout_state(self) -> Iterator[Step]:
        """``get_dropout_state`` in aten/src/ATen/native/cudnn/RNN.cpp: made once for the process, from a drawn seed."""
        if ("cudnn", "dropout") not in self._handles:
            self._handles.add(("cudnn", "dropout"))
            yield "temporary", 8
            yield "free", 0
            yield "kept", self.architecture.cudnn_dropout_state_bytes


_GEMMS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addmv, aten.mv}

Rule = Callable[[Call, Architecture], Iterator[Step]]
_RULES: dict[Any, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            packet = getattr(aten, name, None)
            if packet is not None:  # an operator that this version of torch lacks is never called
                _RULES[packet] = rule
        return rule

    return register


_rule("_cudnn_rnn")(recurrent_kernels.forward)
_rule("_cudnn_rnn_backward")(recurrent_kernels.backward)


def _outputs(call: Call) -> Iterator[Step]:
    for index in range(len(call.sizes)):
        yield "output", index


def is_modelled(packet: Any) -> bool:
    """Whether the temporary memory of this operator's kernels is described (for most operators: there is none)."""
    return packet not in _UNMODELLED


# Operators whose CUDA kernels take temporary memory that no rule here describes: cub's sorts and scans, cuFFT,
# cuSOLVER, and loops.
_UNMODELLED = {
    packet
    for name in """sort topk kthvalue median mode unique_dim _unique2 unique_consecutive nonzero masked_select
    index_put index_put_ _index_put_impl_ multinomial bincount histc _fft_r2c _fft_c2r _fft_c2c linalg_qr
    linalg_inv_ex linalg_cholesky_ex _linalg_svd _linalg_eigh _linalg_solve_ex _linalg_det linalg_lu_factor_ex
    _ctc_loss _cdist_forward _cdist_backward grid_sampler_3d_backward _grouped_mm
    _scaled_grouped_mm segment_reduce""".split()
    if (packet := getattr(aten, name, None)) is not None
}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@_rule("native_dropout")
def _dropout(call: Call, _: Architecture) -> Iterator[Step]:
    """The mask is made before the result (``dropout_cuda``, aten/src/ATen/native/cuda/Dropout.cu)."""
    for index in reversed(range(len(call.sizes))):
        yield "output", index


@_rule("sum", "mean", "amax", "amin", "prod", "linalg_vector_norm", "any", "all", "max", "min", "nansum")
def _reduction(call: Call, architecture: Architecture) -> Iterator[Step]:
    """Partial results of reductions that span several thread blocks (``planner.virtual.reductions``)."""
    yield from _outputs(call)
    tensor = call.args[0]
    if call.packet in (aten.sum, aten.prod, aten.nansum):
        yield from _promoted(tensor, call.kwargs.get("dtype"))
    if isinstance(tensor, torch.Tensor) and tensor.numel() > 0:
        position = 2 if call.packet is aten.linalg_vector_norm else 1
        dims = call.args[position] if len(call.args) > position else call.kwargs.get("dim")
        dims = (dims,) if isinstance(dims, int) and not isinstance(dims, bool) else dims
        yield from _staging(tensor, tuple(dims) if isinstance(dims, (list, tuple)) else (), architecture)


def _promoted(tensor: torch.Tensor, dtype: torch.dtype | None) -> Iterator[Step]:
    """The input in the result's dtype, int64 for integers and bools: ``make_reduction_from_out_ty`` in
    aten/src/ATen/native/ReduceOpsUtils.h, which spares low precision summed in float32 (trace of lstm-tagger)."""
    exact = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    wanted = dtype or (tensor.dtype if exact else torch.int64)
    spared = tensor.dtype in (torch.float16, torch.bfloat16) and wanted is torch.float32
    if wanted is not tensor.dtype and not spared:
        yield "temporary", tensor.numel() * wanted.itemsize


def _staging(tensor: torch.Tensor, dims: tuple[int, ...], architecture: Architecture) -> Iterator[Step]:
    """The temporaries of reducing ``tensor`` over ``dims`` (all when empty)."""
    loops = reduction_loops(tensor, dims)
    accumulator = max(4, tensor.element_size())
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


@_rule(
    "native_layer_norm", "native_layer_norm_backward", "_softmax", "_softmax_backward_data", "_log_softmax",
    "_log_softmax_backward_data", "native_group_norm", "native_group_norm_backward",
)  # fmt: skip
def _contiguous_inputs(call: Call, _: Architecture) -> Iterator[Step]:
    """Kernels that first copy an input which is not contiguous (``expect_contiguous``): recorded trace of whisper.

    aten/src/ATen/native/cuda/layer_norm_kernel.cu, SoftMax.cu, group_norm_kernel.cu.
    """
    for item in call.args[:2]:
        if isinstance(item, torch.Tensor) and not item.is_contiguous():
            yield "temporary", _bytes(item)
    yield from _outputs(call)


@_rule("_foreach_norm")
def _foreach_norm(call: Call, _: Architecture) -> Iterator[Step]:
    """Partial norms of every chunk of the largest tensor, for each tensor, in float32, made before the results:
    ``_foreach_tensor_norm_cuda_impl`` in aten/src/ATen/native/cuda/ForeachReduceOp.cu (``kChunkSize`` is 65,536)."""
    tensors = call.args[0]
    chunks = max(-(-tensor.numel() // 65_536) for tensor in tensors)
    yield "temporary", 4 * len(tensors) * chunks
    yield from _outputs(call)


@_rule("embedding")
def _embedding(call: Call, _: Architecture) -> Iterator[Step]:
    """``index_select`` on indices flattened by a copy where they are not contiguous
    (aten/src/ATen/native/Embedding.cpp)."""
    indices = call.args[1]
    if not indices.is_contiguous():
        yield "temporary", _bytes(indices)
    yield from _outputs(call)


@_rule("embedding_dense_backward")
def _embedding_backward(call: Call, _: Architecture) -> Iterator[Step]:
    """More than 3072 indices are sorted and summed by segments: aten/src/ATen/native/cuda/Embedding.cu,
    EmbeddingBackwardKernel.cu.

    Temporaries as in the recorded trace of gpt2; 10 is ``NROWS_PER_THREAD``; partial sums are float32.
    """
    grad, indices, num_weights = call.args[0], call.args[1], call.args[2]
    for item in (indices, grad):  # the gradient of what a recurrent layer reads is transposed: trace of lstm-lm
        if not item.is_contiguous():
            yield "temporary", _bytes(item)
    count, width, rows = indices.numel(), grad.shape[-1], int(num_weights)

    def sorting(size: Callable[..., int], *constants: int) -> Step:
        return "temporary", Formula(partial(_while_sorting, size, *constants), (count,))

    yield sorting(_linear, 8, 0)  # sorted indices
    yield sorting(_linear, 8, 0)  # where each came from
    yield sorting(_linear, 8, 0)
    yield sorting(_linear, 8, 50_687)  # cub's radix sort
    yield "free", 0
    yield "free", 0
    yield from _outputs(call)
    for slope, intercept in ((8, 0), (0, 8), (8, 0), (8, 0), (0, 8)):
        yield sorting(_linear, slope, intercept)
    yield sorting(_partial_sums, rows, 8)
    yield sorting(_partial_sums, rows, 4 * width)


def _while_sorting(size: Callable[..., int], *numbers: int) -> int:
    """``size(*numbers)``, the last of which is how many indices there are, where so many are sorted."""
    return size(*numbers) if numbers[-1] > 3072 else 0


def _linear(slope: int, intercept: int, number: int) -> int:
    return slope * number + intercept


def _partial_sums(rows: int, bytes_each: int, number: int) -> int:
    return bytes_each * (number // 10 + min(number, rows))


@_rule("_scaled_dot_product_cudnn_attention")
def _cudnn_attention(call: Call, _: Architecture) -> Iterator[Step]:
    """Seed and offset, result, log-sum-exp, then a workspace of 256 B: recorded traces of bert-large and gpt2."""
    yield "output", 2
    yield "output", 3
    yield "output", 0
    yield "output", 1
    yield "temporary", 256


@_rule("_scaled_dot_product_cudnn_attention_backward")
def _cudnn_attention_backward(call: Call, _: Architecture) -> Iterator[Step]:
    """Queries' gradient and rows' sums in float32, in one workspace: traces of bert-large, gpt2 and vit-large.

    Where heads are grouped, also the gradients of keys and values for each head of the queries: trace of qwen2.
    """
    yield from _outputs(call)
    query, key = call.args[1], call.args[2]
    batch, heads, length, head_dim = query.shape
    expanded = 2 * batch * heads * key.shape[2] * head_dim * key.element_size() if key.shape[1] != heads else 0
    yield "temporary", 4 * batch * heads * length * (head_dim + 1) + expanded + 256


@_rule("_scaled_dot_product_flash_attention")
def _flash_attention(call: Call, _: Architecture) -> Iterator[Step]:
    """Result, log-sum-exp, then the random state: ``mha_fwd`` in
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp."""
    yield from _outputs(call)


@_rule("_scaled_dot_product_flash_attention_backward")
def _flash_attention_backward(call: Call, _: Architecture) -> Iterator[Step]:
    """``mha_bwd``: gradients, ``softmax_d``, the queries' gradient in float32, and expanded gradients for grouped
    heads."""
    yield from _outputs(call)
    query, key = call.args[1], call.args[2]
    batch, heads, length, head_dim = query.shape
    rounded = -(-length // 128) * 128
    width = 32 if head_dim <= 128 else 64
    yield "temporary", 4 * batch * heads * rounded
    yield "temporary", 4 * batch * rounded * heads * (-(-head_dim // width) * width)
    if key.shape[1] != heads:
        expanded = batch * key.shape[2] * heads * head_dim * key.element_size()
        yield "temporary", expanded
        yield "temporary", expanded


@_rule("convolution")
def _convolution(call: Call, architecture: Architecture) -> Iterator[Step]:
    """Copies of what is not contiguous, the result, then cuDNN's workspace (recorded trace of resnet50)."""
    inputs, weight, transposed = call.args[0], call.args[1], bool(call.args[6])
    last = _runs_channels_last(inputs, weight)
    yield from _copy(inputs, last)
    yield from _copy(weight, last)
    yield from _outputs(call)
    yield from _workspace_of("dgrad" if transposed else "forward", inputs, weight, call.args[3:9], architecture)


@_rule("convolution_backward")
def _convolution_backward(call: Call, architecture: Architecture) -> Iterator[Step]:
    """The input's gradient and its workspace, then the weights', then the bias's sum: traces of resnet50 and a U-Net.

    ``cudnn_convolution_backward_input`` and ``_weight`` in aten/src/ATen/native/cudnn/ConvShared.cpp: each makes
    contiguous what it reads.
    """
    grad, inputs, weight, _, stride, padding, dilation, transposed, output_padding, groups, mask = call.args
    options = (stride, padding, dilation, transposed, output_padding, groups)
    outputs = iter(range(len(call.sizes)))
    last = _runs_channels_last(inputs, weight)
    yield from _copy(grad, last)
    if mask[0]:
        yield "output", next(outputs)
        copied = list(_copy(weight, last))
        yield from copied
        yield from _workspace_of("forward" if transposed else "dgrad", inputs, weight, options, architecture)
        yield from [("free", 0)] * len(copied)
    if mask[1]:
        yield "output", next(outputs)
        copied = list(_copy(inputs, last))
        yield from copied
        yield from _workspace_of("wgrad", inputs, weight, options, architecture)
        yield from [("free", 0)] * len(copied)
    for index in outputs:
        yield "output", index
    if mask[2]:
        yield from _staging(grad, (0, *range(2, grad.dim())), architecture)


def _runs_channels_last(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """``cudnn_conv_suggest_memory_format`` in aten/src/ATen/native/ConvUtils.h."""
    return inputs.dim() == 4 and (_is_channels_last(inputs) or _is_channels_last(weight))


def _copy(tensor: torch.Tensor, channels_last: bool) -> Iterator[Step]:
    wanted = torch.channels_last if channels_last and tensor.dim() == 4 else torch.contiguous_format
    if not tensor.is_contiguous(memory_format=wanted):
        yield "temporary", _bytes(tensor)


def _workspace_of(
    direction: Direction, inputs: torch.Tensor, weight: torch.Tensor, options: Sequence[Any], architecture: Architecture
) -> Iterator[Step]:
    """cuDNN's workspace, allocated and freed, and how far it may be off (``planner.virtual.convolutions``)."""
    *sides, transposed, _, groups = options
    spatial = inputs.dim() - 2
    # One number stands for every dimension.
    stride, padding, dilation = (tuple(side) * spatial if len(side) == 1 else tuple(side) for side in sides)
    if str(inputs.dtype)[6:] not in ELEMENT_BYTES:
        return
    if transposed:  # the convolution that it transposes runs from what is this one's result
        size = tuple(
            (length - 1) * step - 2 * pad + gap * (width - 1) + 1
            for length, step, pad, gap, width in zip(
                inputs.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
            )
        )
        c, k = weight.shape[1] * groups, inputs.shape[1]
    else:
        size, c, k = tuple(inputs.shape[2:]), inputs.shape[1], weight.shape[0]
    layer: dict[str, Any] = {
        "direction": direction, "dtype": str(inputs.dtype)[6:], "c": c, "k": k, "groups": groups,
        "kernel": tuple(weight.shape[2:]), "stride": stride, "padding": padding, "dilation": dilation,
        "input_size": size,
        "channels_last": _runs_channels_last(inputs, weight),
        "compute_capability": architecture.compute_capability,
    }  # fmt: skip

    numbers = (inputs.shape[0],)
    yield "workspace", Formula(partial(_workspace_bytes, layer), numbers)
    yield "free", 0
    yield "doubt", Formula(partial(_workspace_doubt_bytes, layer), numbers)


def _workspace_bytes(layer: dict[str, Any], n: int) -> int:
    return workspace_bytes(n=n, **layer).bytes


def _workspace_doubt_bytes(layer: dict[str, Any], n: int) -> int:
    workspace = workspace_bytes(n=n, **layer)
    return max(workspace.high - workspace.bytes, workspace.bytes - workspace.low)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
