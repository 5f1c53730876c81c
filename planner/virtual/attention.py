"""``scaled_dot_product_attention`` as CUDA chooses its kernel, and the kernels' outputs.

The choice follows ``select_sdp_backend`` and its checks in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, the
padding and the calls follow ``scaled_dot_product_attention`` in aten/src/ATen/native/transformers/attention.cpp. Order:
cuDNN where the architecture prefers it, flash, memory efficient, math.
"""

from __future__ import annotations

from typing import Any

import torch

from planner.virtual.architecture import Architecture
from planner.virtual.backend import DISPATCH_KEY, library


def install(architecture: Architecture) -> None:
    """Register the operator for the ``vgpu`` backend as a GPU of ``architecture`` runs it."""
    kernels = library("Autograd" + DISPATCH_KEY)

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        return _attend(architecture, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    kernels.impl("scaled_dot_product_attention", attend)


def choose_kernel(
    architecture: Architecture,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    enable_gqa: bool,
) -> str:
    """``"cudnn"``, ``"flash"``, ``"efficient"`` or ``"math"`` for tensors ``[batch, heads, length, head_dim]``."""
    compute_capability = architecture.compute_capability
    shapes_fit = (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[0] == key.shape[0] == value.shape[0]
        and all(item.stride(-1) == 1 for item in (query, key, value))
        and query.shape[2] > 0
        and key.shape[2] > 0
    )
    if not shapes_fit:
        return "math"
    if (
        architecture.prefers_cudnn_attention
        and query.dtype in (torch.float16, torch.bfloat16)
        and not (attn_mask is not None and attn_mask.requires_grad)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 128
        and value.shape[-1] % 8 == 0
        and value.shape[-1] <= 128
        and key.shape[2] > 1
    ):
        return "cudnn"
    same_heads = query.shape[1] == key.shape[1] == value.shape[1]
    if (
        compute_capability >= (8, 0)
        and query.dtype in (torch.float16, torch.bfloat16)
        and attn_mask is None
        and query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
        and (same_heads or (enable_gqa and key.shape[1] == value.shape[1] and query.shape[1] % key.shape[1] == 0))
    ):
        return "flash"
    dtypes = [torch.float16, torch.float32] + ([torch.bfloat16] if compute_capability >= (8, 0) else [])
    # check_head_dim_size_mem_efficient: the last dimension must be aligned to 16 bytes in half precision, 4 in float32.
    alignment = 4 if query.dtype is torch.float32 else 8
    if (
        query.dtype in dtypes
        and not (attn_mask is not None and attn_mask.requires_grad)
        and same_heads
        and query.shape[-1] == key.shape[-1]
        and query.shape[-1] % alignment == 0
        and value.shape[-1] % alignment == 0
    ):
        return "efficient"
    return "math"


def _attend(
    architecture: Architecture,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    aten = torch.ops.aten
    kernel = choose_kernel(architecture, query, key, value, attn_mask, enable_gqa)
    if attn_mask is not None and attn_mask.dtype is torch.bool:  # convert_boolean_attn_mask
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
    needs_logsumexp = torch.is_grad_enabled() and any(item.requires_grad for item in (query, key, value))
    if kernel == "cudnn":
        if attn_mask is not None:
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, attn_mask, needs_logsumexp, dropout_p, is_causal, False, scale=scale
        )[0]
    if kernel == "flash":
        head_dim = query.shape[-1]
        scale = scale if scale is not None else head_dim**-0.5
        if head_dim % 8:
            query, key, value = (torch.nn.functional.pad(item, (0, 8 - head_dim % 8)) for item in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :head_dim] if head_dim % 8 else out
    if kernel == "efficient":
        if attn_mask is not None:
            attn_mask = _expand_mask(attn_mask, query, key)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, needs_logsumexp, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _expand_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``preprocess_mask``: pad a last dimension whose rows are not aligned to 16 elements, then expand."""
    length = mask.shape[-1]
    if length % 16 and not all(stride % 8 == 0 for stride in mask.stride()[:-1]):
        mask = torch.nn.functional.pad(mask, (0, 16 - length % 16))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
