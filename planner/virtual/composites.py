"""Composite operators whose C++ takes another path for subclasses, which fake tensors are, than for CUDA's tensors."""

from __future__ import annotations

import torch

from planner.virtual.backend import DISPATCH_KEY, library

aten = torch.ops.aten


def install() -> None:
    """Register them for the ``vgpu`` backend."""
    library("Autograd" + DISPATCH_KEY).impl("linear", _linear)


def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``linear`` (aten/src/ATen/native/Linear.cpp): a contiguous input becomes one ``addmm`` (trace of convnext, whose
    inputs have four dimensions); else the bias is added in place, though not to a subclass (lstm-lm, whose input
    is transposed)."""
    fused = inputs.dim() == 2 or inputs.is_contiguous()
    if bias is None or fused:
        result: torch.Tensor = aten.linear.default.decompose(inputs, weight, bias)
        return result
    return torch.matmul(inputs, weight.t()).add_(bias)
