"""Convolutions on CUDA: how their results lie in memory, and what they allocate beside them, in which order.

``aten/src/ATen/native/Convolution.cpp`` chooses between cuDNN and PyTorch's own kernels, and the layout;
``aten/src/ATen/native/cudnn/ConvShared.cpp`` allocates. Held against the recorded traces of a U-Net, ConvNeXt,
EfficientNet, MobileNetV3, DenseNet and ResNets (``measurements/h200/peaks.json.gz``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from planner.virtual.architecture import Architecture
from planner.virtual.convolutions import Direction, workspace_bytes
from planner.virtual.plans import ELEMENT_BYTES
from planner.virtual.reductions import partial_results
from planner.virtual.rules import Call, Step, bytes_of, rule
from planner.virtual.rules import outputs as results
from planner.virtual.trace import Formula, Workspace

aten = torch.ops.aten


def result(*args: Any) -> torch.Tensor:
    """What ``convolution`` returns, laid out as cuDNN writes it; for a backend that it does not know, PyTorch's shape
    function says contiguous."""
    found: torch.Tensor = _laid_out(aten.convolution.default(*args), runs_channels_last(*args[:2]))
    return found


def gradients(*args: Any) -> list[torch.Tensor | None]:
    """Those of the input, of the weights and of the bias, as ``convolution_backward`` returns them."""
    inputs, weight, bias = aten.convolution_backward.default(*args)
    last = runs_channels_last(args[1], args[2])
    return [_laid_out(inputs, last), _laid_out(weight, last), bias]


def _laid_out(tensor: Any, channels_last: bool) -> Any:
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor is not None else tensor


def runs_channels_last(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """``cudnn_conv_suggest_memory_format`` in aten/src/ATen/native/ConvUtils.h, for images."""
    if inputs.dim() != 4 or inputs.dtype is torch.float64:
        return False
    return any(suggest_memory_format(tensor) is torch.channels_last for tensor in (inputs, weight))


@rule("convolution")
def _convolution(call: Call, architecture: Architecture) -> Iterator[Step]:
    """The input's copy where it is not contiguous, the result, the weights' copy, then cuDNN's workspace."""
    inputs, weight, transposed = call.args[0], call.args[1], bool(call.args[6])
    last = runs_channels_last(inputs, weight)
    yield from _copy(inputs, last)
    yield from results(call)
    yield from _copy(weight, last)
    yield from _workspace_of("dgrad" if transposed else "forward", inputs, weight, call.args[3:9], architecture)


@rule("convolution_backward")
def _convolution_backward(call: Call, architecture: Architecture) -> Iterator[Step]:
    """The input's gradient and its workspace, then the weights', then the bias's sum.

    What is not contiguous is copied: the input at once, the gradient at once too where it has the other layout (a
    sequence's frame by frame: trace of wav2vec2) or the convolution is a transposed one, else for each
    (``cudnn_convolution_backward``,
    ``cudnn_convolution_transpose_backward``); the weights' gradient is made after what it reads (trace of densenet),
    the input's before (convnext). The bias's is summed from the gradient as it came. PyTorch's own depthwise kernel
    begins with the weights (``conv_depthwise2d_backward_cuda_out`` in aten/src/ATen/native/cuda/DepthwiseConv2d.cu).
    """
    grad, inputs, weight, _, *options, mask = call.args
    last = runs_channels_last(inputs, weight)
    own = _runs_own_depthwise(inputs, weight, options)
    transposed = options[3]
    wanted = [name for name, given in zip(("inputs", "weight", "bias"), mask, strict=True) if given]
    sequences = inputs.dim() == 3  # their copy lives as long as the call
    image = grad.unsqueeze(2) if sequences else grad  # what PyTorch makes of a sequence
    at_once = transposed or (image.dim() == 4 and (suggest_memory_format(image) is torch.channels_last) != last)
    if sequences:
        yield from _copy(inputs, last)
    whole = [*(_copy(inputs, last) if mask[1] and not sequences else ()), *(_copy(grad, last) if at_once else ())]
    each = [] if at_once else list(_copy(grad, last))
    yield from whole
    for name in ("weight", "inputs") if own else ("inputs", "weight"):
        if name not in wanted:
            continue
        if name == "inputs":
            copied = [*_copy(weight, last), *each]
            yield "output", wanted.index(name)
            yield from copied
            yield from _workspace_of("forward" if transposed else "dgrad", inputs, weight, options, architecture)
        else:
            copied = each
            yield from copied
            yield "output", wanted.index(name)
            yield from _workspace_of("wgrad", inputs, weight, options, architecture)
        yield from [("free", 0)] * len(copied)
    yield from [("free", 0)] * len(whole)
    if mask[2]:
        yield "output", wanted.index("bias")
        yield from partial_results(grad, (0, *range(2, grad.dim())), architecture)


def _runs_own_depthwise(inputs: torch.Tensor, weight: torch.Tensor, options: Sequence[Any]) -> bool:
    """Whether PyTorch's own kernel runs and not cuDNN: one filter for each channel, in images that are not
    channels-last; in float16 cuDNN runs most of them.

    ``use_cudnn_depthwise`` and ``check_cudnn_depthwise_workload_with_filter`` in
    aten/src/ATen/native/Convolution.cpp.
    """
    strides, _, dilation, transposed, _, groups = options
    c = inputs.shape[1]
    depthwise = inputs.dim() < 5 and not transposed and groups == c > 1 and weight.shape[0] % c == 0
    if not depthwise or runs_channels_last(inputs, weight):
        return False
    if inputs.dtype is not torch.float16 or max(dilation) > 1 or c < 32:
        return True
    (n, width), kernel, stride = (inputs.shape[0], inputs.shape[-1]), tuple(weight.shape[2:]), strides[-1]
    if inputs.dim() == 3 or inputs.shape[2] == 1:
        if stride == 1:
            return False
        kernel = (1, kernel[-1]) if inputs.dim() == 3 else kernel
    elif strides[0] != stride:
        return True
    if kernel[0] != kernel[-1] or kernel[0] not in (1, 3, 5) or width < 7 or stride > 2:
        return True
    if stride == 1:
        return False
    if n == 1:
        return kernel[0] == 1 and width > 28
    if kernel[0] == 1:
        return not (n <= 16 and c >= 128 and width == 7)
    return not (c >= 512 or (c >= 256 and width >= 28))


def _copy(tensor: torch.Tensor, channels_last: bool) -> Iterator[Step]:
    wanted = torch.channels_last if channels_last and tensor.dim() == 4 else torch.contiguous_format
    if not tensor.is_contiguous(memory_format=wanted):
        yield "temporary", bytes_of(tensor)


def _workspace_of(
    direction: Direction, inputs: torch.Tensor, weight: torch.Tensor, options: Sequence[Any], architecture: Architecture
) -> Iterator[Step]:
    """cuDNN's workspace, allocated and freed, and how far it may be off (``planner.virtual.convolutions``)."""
    if str(inputs.dtype)[6:] not in ELEMENT_BYTES or _runs_own_depthwise(inputs, weight, options):
        return
    *sides, transposed, output_padding, groups = options
    spatial = inputs.dim() - 2
    # One number stands for every dimension.
    stride, padding, dilation, beyond = (
        tuple(side) * spatial if len(side) == 1 else tuple(side) for side in (*sides, output_padding)
    )
    if transposed:  # the convolution that it transposes runs from what is this one's result
        size = tuple(
            (length - 1) * step - 2 * pad + gap * (width - 1) + 1 + more
            for length, step, pad, gap, width, more in zip(
                inputs.shape[2:], stride, padding, dilation, weight.shape[2:], beyond, strict=True
            )
        )
        c, k = weight.shape[1] * groups, inputs.shape[1]
    else:
        size, c, k = tuple(inputs.shape[2:]), inputs.shape[1], weight.shape[0]
    layer: dict[str, Any] = {
        "direction": direction, "dtype": str(inputs.dtype)[6:], "c": c, "k": k, "groups": groups,
        "kernel": tuple(weight.shape[2:]), "stride": stride, "padding": padding, "dilation": dilation,
        "input_size": size,
        "channels_last": runs_channels_last(inputs, weight),
        "compute_capability": architecture.compute_capability,
    }  # fmt: skip
    numbers = (inputs.shape[0],)
    yield "workspace", Workspace(partial(_workspace_bytes, layer), numbers, tuple(layer.values()))
    yield "free", 0
    yield "doubt", Formula(partial(_workspace_doubt_bytes, layer), numbers)


def _workspace_bytes(layer: dict[str, Any], n: int) -> int:
    return workspace_bytes(n=n, **layer).bytes


def _workspace_doubt_bytes(layer: dict[str, Any], n: int) -> int:
    workspace = workspace_bytes(n=n, **layer)
    return max(workspace.high - workspace.bytes, workspace.bytes - workspace.low)
