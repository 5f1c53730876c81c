"""Which kernel of ``scaled_dot_product_attention`` runs: ``select_sdp_backend`` and the checks of
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and sdp_utils_cpp.h, as torch 2.11 has them.

Held against 432 choices of an H200 (``tests/test_virtual_attention.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from planner.virtual.architecture import Architecture

Capability = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One call of ``scaled_dot_product_attention``: tensors ``[batch, heads, length, head_dim]``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    enable_gqa: bool = False

    @property
    def requires_grad(self) -> bool:
        return torch.is_grad_enabled() and any(item.requires_grad for item in (self.query, self.key, self.value))

    @property
    def heads(self) -> tuple[int, int, int]:
        """Of query, key and value."""
        return self.query.shape[1], self.key.shape[1], self.value.shape[1]

    @property
    def widths(self) -> tuple[int, int, int]:
        """Features of each head of query, key and value."""
        return self.query.shape[-1], self.key.shape[-1], self.value.shape[-1]

    @property
    def is_grouped(self) -> bool:
        """Whether heads of queries share heads of keys and values as the caller allows."""
        heads, key_heads, value_heads = self.heads
        return self.enable_gqa and key_heads == value_heads and heads % key_heads == 0


def choose_kernel(architecture: Architecture, call: Attention) -> str:
    """``"cudnn"``, ``"flash"``, ``"efficient"`` or ``"math"``: the first whose checks all pass.

    Of those that are switched on (``torch.nn.attention.sdpa_kernel``). Raises ``RuntimeError``, after warnings that say
    why, where none can run: in the words of torch.
    """
    order = ["flash", "efficient", "math", "cudnn"]
    if architecture.prefers_cudnn_attention:
        order = ["cudnn", "flash", "efficient", "math"]
    why: dict[str, str] = {}
    for kernel in order:
        is_switched_on, refusal = _KERNELS[kernel]
        if is_switched_on():
            reason = refusal(architecture.compute_capability, call)
            if reason is None:
                return kernel
            why[kernel] = reason
    for kernel, reason in why.items():
        warnings.warn(f"{_HEADINGS[kernel]}:", stacklevel=2)
        warnings.warn(reason, stacklevel=2)
    raise RuntimeError("No available kernel. Aborting execution.")


_HEADINGS = {
    "flash": "Flash attention kernel not used because",
    "efficient": "Memory efficient kernel not used because",
    "cudnn": "cuDNN attention kernel not used because",
}


def _refused_by_all(call: Attention, dtypes: list[torch.dtype]) -> str | None:
    """``check_tensor_shapes``, ``check_tensor_dtype``, ``check_nonzero_sequence_lengths_dense``."""
    tensors = (call.query, call.key, call.value)
    if not all(item.dim() == 4 for item in tensors):
        return f"it takes tensors of 4 dimensions, not {', '.join(str(item.dim()) for item in tensors)}"
    if len({item.shape[0] for item in tensors}) > 1 or not (call.query.shape[2] and call.key.shape[2]):
        return "it takes dense tensors of one batch size and at least one position"
    if {item.dtype for item in tensors} - set(dtypes) or len({item.dtype for item in tensors}) > 1:
        return f"it takes {' and '.join(str(dtype) for dtype in dtypes)}, not {call.query.dtype}"
    return None


def _refused_strides(call: Attention, *, ignore_single: bool) -> str | None:
    """``check_last_dim_stride_equals_1_dense``, of the mask too: T5's, a table looked up and permuted, fails."""
    tensors = (call.query, call.key, call.value)
    if not (ignore_single and call.query.shape[-1] == 1) and any(item.stride(-1) != 1 for item in tensors):
        return "it takes tensors that are contiguous in the last dimension"
    if call.mask is not None and call.mask.stride(-1) != 1:
        return "the attention mask is not contiguous in the last dimension"
    return None


def _refused_heads(call: Attention, *, grouped: bool) -> str | None:
    """``check_batch_size_and_num_heads_dense``."""
    if len(set(call.heads)) == 1 or (grouped and call.is_grouped):
        return None
    return f"it takes as many heads of keys ({call.heads[1]}) as of queries ({call.heads[0]})"


def _low_precision(capability: Capability) -> list[torch.dtype]:
    """``check_dtypes_low_precision``."""
    return [torch.float16, torch.bfloat16] if capability >= (8, 0) else [torch.float16]


def _refused_by_cudnn(capability: Capability, call: Attention) -> str | None:
    """``can_use_cudnn_attention``, with cuDNN 9.15 or newer."""
    if not (8, 0) <= capability <= (12, 1):
        return "it needs compute capability 8.0 or newer"
    refusal = _refused_by_all(call, _low_precision(capability)) or _refused_strides(call, ignore_single=True)
    if refusal is not None:
        return refusal
    width, _, value_width = call.widths
    limit = 256 if capability == (9, 0) else 128
    if capability[0] == 10 and (width, value_width) == (192, 128):
        limit = 192
    if max(width, value_width) > limit or width % 8 or value_width % 8:
        return f"head_dim must be a multiple of 8 of at most {limit}, not {width}"
    if call.key.shape[2] == 1:
        return "it takes more than one key"
    if call.dropout_p and call.query.shape[2] == 1:
        return "it takes no dropout for a single query"
    return _refused_mask(call) or _refused_heads(call, grouped=True)


def _refused_mask(call: Attention) -> str | None:
    """``check_attn_mask_shape``."""
    mask = call.mask
    if mask is None:
        return None
    if mask.requires_grad:
        return "the attention mask requires a gradient"
    wanted = (call.query.shape[0], call.query.shape[1], call.query.shape[2], call.key.shape[2])
    if mask.dim() in (2, 4) and all(
        size in (1, whole) for size, whole in zip(mask.shape, wanted[-mask.dim() :], strict=True)
    ):
        return None
    return f"it takes no attention mask of shape {list(mask.shape)}"


def _refused_by_flash(capability: Capability, call: Attention) -> str | None:
    """``can_use_flash_attention``."""
    if not (8, 0) <= capability <= (12, 1):
        return "it needs compute capability 8.0 or newer"
    if call.mask is not None:
        return "it takes no attention mask"
    refusal = _refused_by_all(call, _low_precision(capability)) or _refused_heads(call, grouped=True)
    refusal = refusal or _refused_strides(call, ignore_single=True)
    if refusal is not None:
        return refusal
    width = call.widths[0]
    if len(set(call.widths)) > 1 or width > 256:
        return f"head_dim must be the same for queries, keys and values and at most 256, not {list(call.widths)}"
    if call.is_causal and call.query.shape[2] != call.key.shape[2]:
        return f"a causal mask needs as many queries ({call.query.shape[2]}) as keys ({call.key.shape[2]})"
    # check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120: too little shared memory.
    small = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
    if small and call.requires_grad and width > 192 and (width <= 224 or call.dropout_p > 0):
        return f"it cannot train head_dim {width} on compute capability {capability[0]}.{capability[1]}"
    return None


def _refused_by_efficient(capability: Capability, call: Attention) -> str | None:
    """``can_use_mem_efficient_attention``: any mask, no grouped heads."""
    dtypes = [torch.float32, *_low_precision(capability)]
    refusal = _refused_by_all(call, dtypes) or _refused_heads(call, grouped=False)
    refusal = refusal or _refused_strides(call, ignore_single=False)
    if refusal is not None:
        return refusal
    # check_head_dim_size_mem_efficient and minimum_gemm_alignment: aligned to 16 bytes, where there are tensor cores.
    alignment = 8 if call.query.dtype is not torch.float32 else 4 if capability >= (8, 0) else 1
    width, key_width, value_width = call.widths
    if width != key_width or width % alignment or value_width % alignment:
        return f"head_dim must be the same for queries and keys and divisible by {alignment}, not {list(call.widths)}"
    return None


Refusal = Callable[[Capability, Attention], str | None]
_KERNELS: dict[str, tuple[Callable[[], bool], Refusal]] = {
    "cudnn": (torch.backends.cuda.cudnn_sdp_enabled, _refused_by_cudnn),
    "flash": (torch.backends.cuda.flash_sdp_enabled, _refused_by_flash),
    "efficient": (torch.backends.cuda.mem_efficient_sdp_enabled, _refused_by_efficient),
    "math": (torch.backends.cuda.math_sdp_enabled, lambda *_: None),
}
"""Whether a kernel is switched on, and why it cannot run a call: ``None`` where it can."""
