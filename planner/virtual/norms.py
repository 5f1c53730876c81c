"""Norms that CUDA runs in another way than PyTorch decomposes them for a backend that it does not know."""

from __future__ import annotations

from typing import Any

import torch

from planner.virtual.backend import DISPATCH_KEY, library
from planner.virtual.repeats import by_meta_kernel

aten = torch.ops.aten


def install() -> None:
    """Register them for the ``vgpu`` backend."""
    kernels = library("Autograd" + DISPATCH_KEY)
    if hasattr(aten, "_fused_rms_norm"):
        kernels.impl("rms_norm", _rms_norm)
    kernels.impl("group_norm", _group_norm)


class _FusedRmsNorm(torch.autograd.Function):
    """What autograd does on CUDA; for a backend without kernel of its own it decomposes ``_fused_rms_norm``."""

    @staticmethod
    def forward(
        context: Any, inputs: torch.Tensor, weight: torch.Tensor | None, shape: list[int], eps: float | None
    ) -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            result, rstd = aten._fused_rms_norm(inputs, shape, weight, eps)
        context.save_for_backward(inputs, weight, rstd)
        context.shape = shape
        found: torch.Tensor = result
        return found

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        inputs, weight, rstd = context.saved_tensors
        wanted = [context.needs_input_grad[0], weight is not None and context.needs_input_grad[1]]
        found = aten._fused_rms_norm_backward(gradients[0], inputs, context.shape, rstd, weight, wanted)
        return (found[0] if wanted[0] else None, found[1] if wanted[1] else None, None, None)


def _rms_norm(
    inputs: torch.Tensor, normalized_shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """One kernel (``rms_norm_symint`` of aten/src/ATen/native/layer_norm.cpp), but for a weight of another dtype."""
    if weight is not None and weight.dtype is not inputs.dtype:
        composite: torch.Tensor = aten.rms_norm.default.decompose(inputs, normalized_shape, weight, eps)
        return composite
    fused: torch.Tensor = _FusedRmsNorm.apply(inputs, weight, normalized_shape, eps)  # type: ignore[no-untyped-call]
    return fused


def _group_norm(
    inputs: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """On a contiguous copy, which autograd saves (``group_norm`` of aten/src/ATen/native/group_norm.cpp)."""
    size = inputs.shape[2:].numel()
    return aten.native_group_norm(
        inputs.contiguous(), weight, bias, inputs.shape[0], inputs.shape[1], size, num_groups, eps
    )[0]


def layer_norm_gradients(*args: Any) -> tuple[torch.Tensor | None, ...]:
    """What ``native_layer_norm_backward`` returns: the input's gradient is contiguous, however the input lies
    (``layer_norm_backward_cuda`` in aten/src/ATen/native/cuda/layer_norm_kernel.cu; trace of wav2vec2-bert)."""
    inputs, *others = by_meta_kernel(aten.native_layer_norm_backward.default, *args)
    return (None if inputs is None else inputs.contiguous(), *others)
