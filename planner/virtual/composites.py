"""Composite operators whose C++ takes another path for subclasses, which fake tensors are, or for another device than
for CUDA's tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from planner.virtual.backend import DISPATCH_KEY, library
from planner.virtual.recorder import Recorder

aten = torch.ops.aten


def install() -> None:
    """Register them for the ``vgpu`` backend."""
    kernels = library("Autograd" + DISPATCH_KEY)
    kernels.impl("linear", _linear)
    for name in ("softmax", "log_softmax"):
        kernels.impl(f"{name}.int", partial(_softmax, getattr(aten, name).int, getattr(aten, f"_{name}").default))


def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``linear`` (aten/src/ATen/native/Linear.cpp): a contiguous input becomes one ``addmm`` (trace of convnext, whose
    inputs have four dimensions); else the bias is added in place, though not to a subclass (lstm-lm, whose input
    is transposed) or where a dispatch mode looks on (vit with selective checkpointing)."""
    fused = inputs.dim() == 2 or inputs.is_contiguous()
    if bias is None or fused:
        result: torch.Tensor = aten.linear.default.decompose(inputs, weight, bias)
        return result
    product = torch.matmul(inputs, weight.t())
    return product + bias if under_a_mode() else product.add_(bias)


def _softmax(
    composite: Any, kernel: Any, inputs: torch.Tensor, dim: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Of float16 in float32 in one kernel, without a copy (aten/src/ATen/native/SoftMax.cpp; trace of hiera)."""
    whole = dtype is torch.float32 and inputs.dtype is torch.float16
    result: torch.Tensor = kernel(inputs, dim, True) if whole else composite.decompose(inputs, dim, dtype)
    return result


def under_a_mode() -> bool:
    """Whether a dispatch mode other than the virtual GPU's own looks on, as selective checkpointing's does.

    ``isTensorSubclassLike`` (aten/src/ATen/TensorSubclassLikeUtils.h) is true under one: then nothing is written in
    place.
    """
    return not all(isinstance(mode, (FakeTensorMode, Recorder)) for mode in _get_current_dispatch_mode_stack())
