"""What CUDA kernels allocate beside the tensors that they return, and in which order.

Each rule says where it comes from: PyTorch's source, or a trace recorded on a real GPU (``tests/golden/traces``). The
order matters little to the peak of allocated bytes, and much to which cached block the allocator reuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from planner.units import MIB
from planner.virtual import attention_kernels, convolution_kernels, ctc, index_kernels, norm_kernels, recurrent_kernels
from planner.virtual.architecture import Architecture
from planner.virtual.reductions import partial_results
from planner.virtual.rules import RULES, Call, Step, bytes_of, copies, outputs, rule

aten = torch.ops.aten
_MODULES_OF_RULES = (attention_kernels, convolution_kernels, ctc, index_kernels, norm_kernels, recurrent_kernels)
"""Importing them declares their rules."""


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
        found = RULES.get(call.packet)
        return outputs(call) if found is None else found(call, self.architecture)

    def of_handles(self, packet: Any, thread: str) -> Iterator[Step]:
        """What the libraries that ``packet`` calls keep from the first call on each thread."""
        if packet in _GEMMS:
            if ("cublas", thread) not in self._handles:
                yield "library", CUBLAS_HANDLE_BYTES
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


CUBLAS_HANDLE_BYTES = 64 * MIB
"""What lies before the workspace of each handle among the segments that an H200 recorded, with CUDA 13.0
(``measurements/h200/spread.json.gz``)."""

_GEMMS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addmv, aten.mv}


def has_handles(packet: Any) -> bool:
    """Whether ``Kernels.of_handles`` may have something to say of this operator."""
    return packet in _GEMMS or packet is aten._cudnn_init_dropout_state


def is_modelled(packet: Any) -> bool:
    """Whether the temporary memory of this operator's kernels is described (for most operators: there is none)."""
    return packet not in _UNMODELLED


# Operators whose CUDA kernels take temporary memory that no rule here describes: cub's sorts and scans, cuFFT,
# cuSOLVER, and loops.
_UNMODELLED = {
    packet
    for name in """kthvalue median mode unique_dim _unique2 unique_consecutive multinomial bincount _fft_r2c _fft_c2r
    _fft_c2c linalg_qr linalg_inv_ex linalg_cholesky_ex _linalg_svd _linalg_eigh _linalg_solve_ex _linalg_det
    linalg_lu_factor_ex _cdist_forward _cdist_backward grid_sampler_3d_backward _scaled_grouped_mm
    segment_reduce""".split()
    if (packet := getattr(aten, name, None)) is not None
}


@rule("native_dropout")
def _dropout(call: Call, _: Architecture) -> Iterator[Step]:
    """The mask is made before the result (``dropout_cuda``, aten/src/ATen/native/cuda/Dropout.cu)."""
    for index in reversed(range(len(call.sizes))):
        yield "output", index


@rule("sum", "mean", "prod", "linalg_vector_norm", "any", "all", "max", "min", "amax", "amin", "nansum")
def _reduction(call: Call, architecture: Architecture) -> Iterator[Step]:
    """Partial results of reductions that span several thread blocks (``planner.virtual.reductions``).

    Integers are cast to the wider result's dtype first, floats while they are read: ``make_reduction`` of
    aten/src/ATen/native/ReduceOpsUtils.h.
    """
    yield from outputs(call)
    tensor = call.args[0]
    if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
        return
    if call.packet in (aten.sum, aten.prod, aten.nansum):
        yield from _promoted(tensor, call.kwargs.get("dtype"))
    position = 2 if call.packet is aten.linalg_vector_norm else 1
    if call.packet in _EXTREMES:  # in their own dtype; with where they are, padded, where that is asked for
        accumulator = tensor.element_size() if len(call.sizes) == 1 else 2 * _INDEX
    elif call.packet in (aten.any, aten.all):
        accumulator = 1
    else:
        accumulator = max(4, tensor.element_size())  # sums of halves are float32
    yield from partial_results(tensor, _dims(call, position), architecture, accumulator)


_EXTREMES = {aten.max, aten.min, aten.amax, aten.amin}
_INDEX = 8
_WELFORD = 16
"""Bytes of ``WelfordData``, what a variance is accumulated in: aten/src/ATen/native/SharedReduceOps.h."""


def _promoted(tensor: torch.Tensor, dtype: torch.dtype | None) -> Iterator[Step]:
    """The input in the result's dtype, int64 for integers and bools: ``make_reduction_from_out_ty`` in
    aten/src/ATen/native/ReduceOpsUtils.h, which spares low precision summed in float32 (trace of lstm-tagger)."""
    exact = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    wanted = dtype or (tensor.dtype if exact else torch.int64)
    spared = tensor.dtype in (torch.float16, torch.bfloat16) and wanted is torch.float32
    if wanted is not tensor.dtype and not spared:
        yield "temporary", tensor.numel() * wanted.itemsize


@rule("var", "std", "var_mean", "std_mean")
def _variance(call: Call, architecture: Architecture) -> Iterator[Step]:
    """A reduction of means and squared differences: aten/src/ATen/native/cuda/ReduceMomentKernel.cu."""
    yield from outputs(call)
    if call.args[0].numel() > 0:
        yield from partial_results(call.args[0], _dims(call, 1), architecture, _WELFORD)


def _dims(call: Call, position: int) -> tuple[int, ...]:
    """The dimensions that are reduced, by position or by name; none for all."""
    dims = call.args[position] if len(call.args) > position else call.kwargs.get("dim")
    dims = (dims,) if isinstance(dims, int) and not isinstance(dims, bool) else dims
    return tuple(dims) if isinstance(dims, (list, tuple)) else ()


@rule(
    "native_layer_norm", "_softmax", "_log_softmax", "_log_softmax_backward_data",
)  # fmt: skip
def _contiguous_inputs(call: Call, _: Architecture) -> Iterator[Step]:
    """Kernels that first copy an input which is not contiguous (``expect_contiguous``): recorded trace of whisper.

    aten/src/ATen/native/cuda/layer_norm_kernel.cu, SoftMax.cu.
    """
    yield from copies(call.args[:2])
    yield from outputs(call)


@rule("_foreach_norm")
def _foreach_norm(call: Call, _: Architecture) -> Iterator[Step]:
    """Partial norms of every chunk of the largest tensor, for each tensor, in float32, made before the results:
    ``_foreach_tensor_norm_cuda_impl`` in aten/src/ATen/native/cuda/ForeachReduceOp.cu (``kChunkSize`` is 65,536)."""
    tensors = call.args[0]
    chunks = max(-(-tensor.numel() // 65_536) for tensor in tensors)
    yield "temporary", 4 * len(tensors) * chunks
    yield from outputs(call)


@rule("_softmax_backward_data")
def _softmax_backward(call: Call, _: Architecture) -> Iterator[Step]:
    """The product of gradient and result, and contiguous copies: ``softmax_backward_cuda_out`` of
    aten/src/ATen/native/cuda/SoftMax.cu; as large as the result (recorded calls)."""
    yield from outputs(call)
    yield "temporary", bytes_of(call.args[0])
    yield from copies(call.args[1:2])


@rule("_safe_softmax")
def _safe_softmax(call: Call, _: Architecture) -> Iterator[Step]:
    """Which elements are minus infinity, which rows have nothing else, and the zero that these become:
    ``_safe_softmax`` of aten/src/ATen/native/transformers/attention.cpp; recorded calls."""
    yield from outputs(call)
    tensor = call.args[0]
    yield "temporary", tensor.numel()
    yield "temporary", tensor.numel() // max(1, tensor.shape[call.args[1]])
    yield "temporary", tensor.element_size()


@rule("mse_loss", "smooth_l1_loss", "huber_loss")
def _elementwise_loss(call: Call, architecture: Architecture) -> Iterator[Step]:
    """Each element's loss, then their mean into a result that keeps the storage of as many:
    aten/src/ATen/native/Loss.cpp; recorded calls."""
    first = call.args[0]
    reduction = call.args[2] if len(call.args) > 2 else call.kwargs.get("reduction", 1)
    if reduction == 0:
        yield from outputs(call)
        return
    yield "size", bytes_of(first)
    yield from outputs(call)
    yield "temporary", bytes_of(first)
    yield from partial_results(torch.empty(first.shape, device="meta"), (), architecture)


@rule("binary_cross_entropy_with_logits", "kl_div")
def _composite_loss(call: Call, architecture: Architecture) -> Iterator[Step]:
    """Two intermediate tensors of the inputs' size and their mean: aten/src/ATen/native/Loss.cpp; recorded calls."""
    yield "temporary", bytes_of(call.args[0])
    yield "temporary", bytes_of(call.args[0])
    yield from outputs(call)
    yield from partial_results(torch.empty(call.args[0].shape, device="meta"), (), architecture)


@rule("logsumexp")
def _logsumexp(call: Call, architecture: Architecture) -> Iterator[Step]:
    """Maxima, then the exponentials of what is left: aten/src/ATen/native/ReduceOps.cpp; recorded calls."""
    yield "temporary", call.sizes[0]
    yield "temporary", call.sizes[0]
    yield "temporary", call.sizes[0] // call.args[0].element_size()
    yield "free", 0
    yield "free", 0
    yield "temporary", bytes_of(call.args[0])
    yield from outputs(call)


@rule("argmax", "argmin")
def _extreme_index(call: Call, architecture: Architecture) -> Iterator[Step]:
    """A reduction of values with where they are: aten/src/ATen/native/cuda/ReduceArgMaxKernel.cu."""
    yield from outputs(call)
    if call.args[0].numel() > 0:
        yield from partial_results(call.args[0], _dims(call, 1), architecture, 2 * _INDEX)


@rule("im2col")
def _im2col(call: Call, _: Architecture) -> Iterator[Step]:
    """The result begins in the input's size and is resized: aten/src/ATen/native/cuda/Im2Col.cu; recorded calls."""
    yield "temporary", bytes_of(call.args[0])
    copied = list(copies(call.args[:1]))
    yield from copied
    yield from outputs(call)
    yield "free", len(copied)


@rule("col2im")
def _col2im(call: Call, _: Architecture) -> Iterator[Step]:
    """The result keeps the storage of as many elements as the columns have: aten/src/ATen/native/cuda/Col2Im.cu;
    recorded calls."""
    yield "size", bytes_of(call.args[0])
    yield from outputs(call)


@rule("unfold_backward")
def _unfold_backward(call: Call, _: Architecture) -> Iterator[Step]:
    """The numbers up to the unfolded dimension's size: aten/src/ATen/native/UnfoldBackward.h."""
    yield from outputs(call)
    yield "temporary", _INDEX * call.args[1][call.args[2]]


@rule(
    "upsample_bicubic2d_backward", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward",
    "reflection_pad2d", "reflection_pad1d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip
def _contiguous_after_output(call: Call, _: Architecture) -> Iterator[Step]:
    """Kernels that copy an input which is not contiguous once their result is there: recorded calls of channels-last
    images."""
    yield from outputs(call)
    yield from copies(call.args[:1])


@rule("_grouped_mm")
def _grouped_mm(call: Call, architecture: Architecture) -> Iterator[Step]:
    """In bf16 the problem sizes and pointers of each group, and 512 bytes for each SM: recorded calls; the other dtypes
    multiply group by group (aten/src/ATen/native/cuda/GroupedBlas.cpp)."""
    yield from outputs(call)
    offsets = call.args[2] if len(call.args) > 2 else call.kwargs.get("offs")
    if call.args[0].dtype is torch.bfloat16 and isinstance(offsets, torch.Tensor):
        yield "temporary", 60 * offsets.numel()
        yield "temporary", 512 * architecture.num_sms
