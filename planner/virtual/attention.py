"""``scaled_dot_product_attention`` as CUDA chooses its kernel, and the kernels' outputs.

The choice follows ``select_sdp_backend`` and its checks in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, the
padding and the calls follow ``scaled_dot_product_attention`` in aten/src/ATen/native/transformers/attention.cpp. Order:
cuDNN where the architecture prefers it, flash, memory efficient, math.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
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
    is_causal: bool = False,
) -> str:
    """``"cudnn"``, ``"flash"``, ``"efficient"`` or ``"math"`` for tensors ``[batch, heads, length, head_dim]``.

    Of those that are switched on (``torch.nn.attention.sdpa_kernel``). Raises ``RuntimeError``, after warnings that say
    why, where none can run: in the words of torch.
    """
    order = ["flash", "efficient", "math", "cudnn"]
    if architecture.prefers_cudnn_attention:
        order = ["cudnn", "flash", "efficient", "math"]
    why: dict[str, str] = {}
    for kernel in order:
        if _is_switched_on(kernel):
            refusal = _refusal(kernel, architecture, query, key, value, attn_mask, enable_gqa, is_causal)
            if refusal is None:
                return kernel
            why[kernel] = refusal
    for kernel, reason in why.items():
        warnings.warn(f"{_HEADINGS[kernel]}:", stacklevel=2)
        warnings.warn(reason, stacklevel=2)
    raise RuntimeError("No available kernel. Aborting execution.")


_HEADINGS = {
    "flash": "Flash attention kernel not used because",
    "efficient": "Memory efficient kernel not used because",
    "cudnn": "cuDNN attention kernel not used because",
}


def _is_switched_on(kernel: str) -> bool:
    backends = torch.backends.cuda
    switches: dict[str, Callable[[], bool]] = {
        "flash": backends.flash_sdp_enabled,
        "efficient": backends.mem_efficient_sdp_enabled,
        "math": backends.math_sdp_enabled,
        "cudnn": backends.cudnn_sdp_enabled,
    }
    return switches[kernel]()


def _refusal(
    kernel: str,
    architecture: Architecture,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    enable_gqa: bool,
    is_causal: bool,
) -> str | None:
    """Why ``kernel`` cannot run, ``None`` where it can."""
    if kernel == "math":
        return None
    if not query.dim() == key.dim() == value.dim() == 4:
        return f"it takes tensors of 4 dimensions, not {query.dim()}, {key.dim()} and {value.dim()}"
    shapes_fit = (
        query.shape[0] == key.shape[0] == value.shape[0]
        and all(item.stride(-1) == 1 for item in (query, key, value))
        and query.shape[2] > 0
        and key.shape[2] > 0
    )
    if not shapes_fit:
        return "it takes dense tensors of one batch size and at least one position, contiguous in the last dimension"
    is_sm80 = architecture.compute_capability >= (8, 0)
    half = [torch.float16, torch.bfloat16]
    dtypes = {"cudnn": half, "flash": half, "efficient": [torch.float16, torch.float32] + half[1:] * is_sm80}[kernel]
    if query.dtype not in dtypes:
        return f"it takes {' and '.join(str(dtype) for dtype in dtypes)}, not {query.dtype}"
    if kernel in ("flash", "cudnn") and not is_sm80:
        return "it needs compute capability 8.0 or newer"
    if attn_mask is not None and kernel == "flash":
        return "it takes no attention mask"
    if attn_mask is not None and attn_mask.requires_grad:
        return "the attention mask requires a gradient"
    same_heads = query.shape[1] == key.shape[1] == value.shape[1]
    grouped = enable_gqa and key.shape[1] == value.shape[1] and query.shape[1] % key.shape[1] == 0
    if kernel != "cudnn" and not (same_heads or (grouped and kernel == "flash")):
        return f"it takes as many heads of keys ({key.shape[1]}) as of queries ({query.shape[1]})"
    widths = [item.shape[-1] for item in (query, key, value)]
    if kernel == "cudnn" and (max(widths) > 128 or any(width % 8 for width in widths)):
        return f"head_dim must be a multiple of 8 of at most 128, not {widths[0]}"
    if kernel == "cudnn" and key.shape[2] == 1:
        return "it takes more than one key"
    if kernel == "flash" and not (widths[0] == widths[1] == widths[2] <= 256):
        return f"head_dim must be the same for queries, keys and values and at most 256, not {widths}"
    if kernel == "flash" and is_causal and query.shape[2] != key.shape[2]:
        return f"a causal mask needs as many queries ({query.shape[2]}) as keys ({key.shape[2]})"
    # check_head_dim_size_mem_efficient and minimum_gemm_alignment: aligned to 16 bytes, where there are tensor cores.
    alignment = 8 if query.dtype is not torch.float32 else 4 if is_sm80 else 1
    if kernel == "efficient" and (widths[0] != widths[1] or any(width % alignment for width in widths)):
        return f"head_dim must be the same for queries and keys and divisible by {alignment}, not {widths}"
    return None


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
    kernel = choose_kernel(architecture, query, key, value, attn_mask, enable_gqa, is_causal)
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
