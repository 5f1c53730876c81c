"""``scaled_dot_product_attention`` as CUDA chooses its kernel, and the kernels' outputs.

``planner.virtual.attention_choice`` says which kernel runs; the padding and the calls follow
``scaled_dot_product_attention`` in aten/src/ATen/native/transformers/attention.cpp.
"""

from __future__ import annotations

from typing import Any

import torch

from planner.virtual.architecture import Architecture
from planner.virtual.attention_choice import Attention, choose_kernel
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
    call = Attention(
        query=query, key=key, value=value, mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
        enable_gqa=enable_gqa,
    )  # fmt: skip
    kernel = choose_kernel(architecture, call)
    if attn_mask is not None and attn_mask.dtype is torch.bool:  # convert_boolean_attn_mask
        kept, left_out = (aten.scalar_tensor(x, dtype=query.dtype, device=query.device) for x in (0.0, float("-inf")))
        attn_mask = torch.where(attn_mask, kept, left_out)
        del left_out, kept
    needs_logsumexp = torch.is_grad_enabled() and any(item.requires_grad for item in (query, key, value))
    if kernel == "cudnn":
        if attn_mask is not None:
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return _first(
            aten._scaled_dot_product_cudnn_attention(
                query, key, value, attn_mask, needs_logsumexp, dropout_p, is_causal, False, scale=scale
            )
        )
    if kernel == "flash":
        head_dim = query.shape[-1]
        scale = scale if scale is not None else head_dim**-0.5
        if head_dim % 8:
            query, key, value = (torch.nn.functional.pad(item, (0, 8 - head_dim % 8)) for item in (query, key, value))
        out = _first(
            aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)
        )
        return out[..., :head_dim] if head_dim % 8 else out
    if kernel == "efficient":
        if attn_mask is not None:
            attn_mask = _expand_mask(attn_mask, query, key)
        return _first(
            aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, needs_logsumexp, dropout_p, is_causal, scale=scale
            )
        )
    with _math:
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]


def _first(results: Any) -> Any:
    """The first of a kernel's results; C++ lets go of the others in their order (trace of eva02 with checkpointing)."""
    first, *others = results
    del results
    others.reverse()  # a list lets go of its last item first
    return first


class _MathKernel:
    """Whether the math kernel runs: ``_scaled_dot_product_attention_math`` adds the mask in place, though not to a
    subclass, which fake tensors are."""

    running = False

    def __enter__(self) -> None:
        self.running = True

    def __exit__(self, *_: object) -> None:
        self.running = False


_math = _MathKernel()


def adds_in_place() -> bool:
    """Whether an addition now is that of the math kernel's mask."""
    return _math.running


def _expand_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``preprocess_mask``: pad a last dimension whose rows are not aligned to 8 elements, then expand."""
    length = mask.shape[-1]
    if length % 8 and not all(stride % 8 == 0 for stride in mask.stride()[:-1]):
        mask = torch.nn.functional.pad(mask, (0, 8 - length % 8))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
