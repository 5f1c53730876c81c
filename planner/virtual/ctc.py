"""The connectionist temporal classification (CTC) loss of speech recognizers, as PyTorch runs it on CUDA.

Which implementation runs, and what it allocates, follows from the lengths of inputs and targets, which PyTorch reads
from memory; here they are read from the values known beside the fakes (``planner.virtual.values``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from typing import Any

import torch

from planner.errors import ModelError
from planner.virtual import values
from planner.virtual.architecture import Architecture
from planner.virtual.backend import DISPATCH_KEY, library
from planner.virtual.rules import Call, Step, rule
from planner.virtual.trace import Formula

aten = torch.ops.aten
_INDEX = 8  # bytes of an int64
_CUDNN_MAX_TARGET = 256
_MEAN, _SUM = 1, 2


def install() -> None:
    """Register the loss for the ``vgpu`` backend."""
    kernels = library("Autograd" + DISPATCH_KEY)
    kernels.impl("ctc_loss.Tensor", _ctc_loss_of_tensors)
    kernels.impl("ctc_loss.IntList", _ctc_loss)


def _ctc_loss_of_tensors(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int = 0,
    reduction: int = _MEAN,
    zero_infinity: bool = False,
) -> torch.Tensor:
    inputs, wanted = _known(input_lengths), _known(target_lengths)
    on_device = targets.dtype is input_lengths.dtype is target_lengths.dtype is torch.int32
    return _loss(log_probs, targets, inputs, wanted, blank, reduction, zero_infinity, may_use_cudnn=on_device)


def _ctc_loss(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: list[int],
    target_lengths: list[int],
    blank: int = 0,
    reduction: int = _MEAN,
    zero_infinity: bool = False,
) -> torch.Tensor:
    suits = targets.device.type == "cpu" and targets.dtype is torch.int32
    full = all(length == log_probs.shape[0] for length in input_lengths)
    return _loss(
        log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity, may_use_cudnn=suits and full
    )


def _known(lengths: torch.Tensor) -> list[int]:
    known = values.value_of(lengths)
    if known is None:
        raise ModelError("the lengths of a CTC loss depend on the weights", field="model")
    return [int(length) for length in known.reshape(-1).tolist()]


def _loss(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: list[int],
    target_lengths: list[int],
    blank: int,
    reduction: int,
    zero_infinity: bool,
    *,
    may_use_cudnn: bool,
) -> torch.Tensor:
    """``ctc_loss_impl`` of aten/src/ATen/native/LossCTC.cpp; ``_use_cudnn_ctc_loss`` of its cudnn/LossCTC.cpp."""
    batched = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    use_cudnn = (
        may_use_cudnn
        and torch.backends.cudnn.enabled
        and blank == 0
        and targets.dim() == 1
        and targets.is_contiguous()
        and log_probs.dim() == 3
        and log_probs.dtype is torch.float32
        and all(
            length < _CUDNN_MAX_TARGET and length <= longest
            for length, longest in zip(target_lengths, input_lengths, strict=True)
        )
    )
    if use_cudnn:
        lengths = (input_lengths, target_lengths, blank, True, zero_infinity)
        losses = aten._cudnn_ctc_loss(batched, targets, *lengths)[0]
    else:
        on_device = targets.to(device=batched.device, dtype=torch.int64)
        losses = aten._ctc_loss(batched, on_device, input_lengths, target_lengths, blank, zero_infinity)[0]
        if zero_infinity:
            losses = torch.where(losses == inf, losses.new_zeros(()), losses)
    if reduction == _MEAN:
        lengths_of_targets = torch.tensor(target_lengths, dtype=losses.dtype).to(losses.device).clamp_min(1)
        mean: torch.Tensor = (losses / lengths_of_targets).mean()
        return mean
    if reduction == _SUM:
        total: torch.Tensor = losses.sum()
        return total
    each: torch.Tensor = losses if log_probs.dim() == 3 else losses.squeeze(0)
    return each


def _native_outputs(
    log_probs: torch.Tensor, targets: torch.Tensor, input_lengths: list[int], target_lengths: list[int], *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's loss, and the alphas ``[samples, steps, 2 * longest target + 1]``."""
    steps, samples, _labels = log_probs.shape
    return log_probs.new_empty(samples), log_probs.new_empty(samples, steps, 2 * max(target_lengths, default=0) + 1)


def _cudnn_outputs(log_probs: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's loss, and the gradient."""
    contiguous = torch.empty_like(log_probs, memory_format=torch.contiguous_format)
    return log_probs.new_empty(log_probs.shape[1]), contiguous


def _backward_output(_grad: torch.Tensor, log_probs: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)


def _log_softmax_gradient(grad: torch.Tensor, _: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous, however ``grad`` lies (the loss's gradient comes step by step): ``log_softmax_backward_data`` of
    aten/src/ATen/native/SoftMax.cpp. torch's function for fake tensors says it lies like ``grad``."""
    return torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)


SHAPE_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten._ctc_loss.default: _native_outputs,
    aten._cudnn_ctc_loss.default: _cudnn_outputs,
    aten._ctc_loss_backward.default: _backward_output,
    aten._log_softmax_backward_data.default: _log_softmax_gradient,
}
"""Of the operators that torch has none for, one that reads tensors, or one that knows less than CUDA."""


@rule("_ctc_loss")
def _native_forward(call: Call, _: Architecture) -> Iterator[Step]:
    """Lengths of targets and inputs and where each sample's targets begin, then both results:
    ``ctc_loss_gpu_template`` of aten/src/ATen/native/cuda/LossCTC.cu; recorded calls."""
    yield from _lengths(call.args[0].shape[1])
    yield "output", 1
    yield "output", 0
    yield from _LENGTHS_FREED


def _lengths(samples: int) -> Iterator[Step]:
    for _ in range(3):
        yield "temporary", _INDEX * samples


_LENGTHS_FREED: tuple[Step, ...] = (("free", 1), ("free", 1))
"""What comes after them goes first; where targets begin is freed last."""


@rule("_ctc_loss_backward")
def _native_backward(call: Call, _: Architecture) -> Iterator[Step]:
    """The betas, the gradient and, in a problem that is not small, sums over blanks:
    ``ctc_loss_backward_gpu_template`` of aten/src/ATen/native/cuda/LossCTC.cu; recorded calls."""
    log_probs, log_alpha, zero_infinity = call.args[1], call.args[6], call.args[8] if len(call.args) > 8 else False
    steps, samples, labels = log_probs.shape
    targets, element = log_alpha.shape[2] // 2, log_probs.element_size()

    def if_large(bytes_each: int) -> Step:
        return "temporary", Formula(partial(_if_large, bytes_each), (steps, samples, labels))

    yield from _lengths(samples)
    yield "temporary", log_alpha.numel() * element
    if zero_infinity:  # a first gradient, then one without that of infinite losses; in a small problem the kernel's own
        yield if_large(element * labels)
    else:
        yield "output", 0
    yield if_large(element * (targets + 1))  # alphas and betas at the blanks, and their logsumexp in its parts
    yield if_large(element)
    yield if_large(element)
    yield if_large(1)
    yield "free", 0
    yield "free", 0
    yield if_large(element * (targets + 1))
    yield if_large(element)
    yield "free", 1
    yield "free", 1
    yield "free", 0
    yield "free", 0
    if zero_infinity:
        yield "output", 0
        yield "free", 0
    yield "free", 0
    yield from _LENGTHS_FREED


def _is_large(steps: int, samples: int, labels: int) -> bool:
    return 2 * steps + 24 * samples // 10 + 2 * labels // 10 > 450


def _if_large(bytes_each: int, steps: int, samples: int, labels: int) -> int:
    return bytes_each * steps * samples if _is_large(steps, samples, labels) else 0


@rule("_cudnn_ctc_loss")
def _cudnn(call: Call, _: Architecture) -> Iterator[Step]:
    """The gradient, a workspace that cuDNN sizes, the losses: ``_cudnn_ctc_loss`` of
    aten/src/ATen/native/cudnn/LossCTC.cpp."""
    steps, samples, _labels = call.args[0].shape
    yield "output", 1
    yield "output", 0
    yield "doubt", Formula(_cudnn_doubt, (steps, samples))


def _cudnn_doubt(steps: int, samples: int) -> int:
    """Alphas and betas in float32 for the longest targets that cuDNN takes."""
    return 2 * 4 * steps * samples * (2 * _CUDNN_MAX_TARGET + 1)
