"""Autocast as CUDA does it: which operators run in lower precision, which in float32, and the cache of cast weights.

The lists are those of ``AT_FORALL_LOWER_PRECISION_FP``, ``AT_FORALL_FP32``, ``AT_FORALL_FP32_SET_OPT_DTYPE`` and
``AT_FORALL_PROMOTE`` in aten/src/ATen/autocast_mode.h; ``linalg_matrix_sqrth``, which knows no lower precision, is
registered beside them since torch 2.15 (github.com/pytorch/pytorch/pull/187987). The rules of the cache are
``cached_cast`` in aten/src/ATen/autocast_mode.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from planner.virtual import recurrent
from planner.virtual.backend import DISPATCH_KEY, NAME, library

_KEY = "Autocast" + DISPATCH_KEY

LOWER_PRECISION = """_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d
convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul
linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
_scaled_dot_product_flash_attention scaled_dot_product_attention""".split()

FLOAT32 = """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm
native_layer_norm rms_norm group_norm norm frobenius_norm nuclear_norm cosine_similarity poisson_nll_loss
cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss
margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d _upsample_nearest_exact1d
upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d
upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa
linalg_matrix_sqrth""".split()

# Run in their input's precision and return float32, by being given ``dtype=float32`` where the caller gave none.
FLOAT32_RESULT = "prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm sum".split()

PROMOTE = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add".split()

_LOW = (torch.float16, torch.bfloat16)


class WeightCache:
    """Casts of leaf parameters, kept until the outermost autocast context ends."""

    def __init__(self, noted: Callable[[torch.Tensor], None]) -> None:
        self._noted = noted
        self._casts: dict[
            int, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # by id; holds the source so that ids stay unique

    def clear(self) -> None:
        self._casts.clear()

    def cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``tensor`` in ``dtype``, from the cache where CUDA's autocast would keep it."""
        if not _eligible(tensor) or tensor.dtype is dtype:
            return tensor
        keep = (
            dtype is torch.get_autocast_dtype(NAME)
            and tensor.dtype is torch.float32
            and tensor.requires_grad
            and tensor.is_leaf
            and not tensor._is_view()
            and torch.is_autocast_cache_enabled()
        )
        if not keep:
            return tensor.to(dtype)
        found = self._casts.get(id(tensor))
        if found is None:
            found = (tensor, tensor.to(dtype))
            self._casts[id(tensor)] = found
            self._noted(found[1])
        return found[1]


def _eligible(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == NAME
        and value.is_floating_point()
        and value.dtype is not torch.float64
    )


def install(noted: Callable[[torch.Tensor], None] = lambda cast: None) -> None:
    """Register the kernels for the ``vgpu`` backend and empty the cache where torch empties CUDA's.

    ``noted`` is told of each cast that the cache keeps.
    """
    cache = WeightCache(noted)
    clear = torch.clear_autocast_cache

    def clear_both() -> None:
        cache.clear()
        clear()

    torch.clear_autocast_cache = clear_both
    fallthrough = library(_KEY, "_")
    fallthrough.fallback(torch.library.fallthrough_kernel)
    kernels = library(_KEY)
    makers = {
        **dict.fromkeys(LOWER_PRECISION, _lower_precision),
        **dict.fromkeys(FLOAT32, _float32),
        **dict.fromkeys(FLOAT32_RESULT, _float32_result),
        **dict.fromkeys(PROMOTE, _promote),
    }
    # Only the overloads that CUDA's autocast knows in this version of torch; a CPU build registers them too.
    on_cuda = set(torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA"))
    for name, make in makers.items():
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            operator = getattr(packet, overload)
            if operator.name().removesuffix(".default") in on_cuda:
                kernels.impl(operator, make(operator, cache))
    kernels.impl("_cudnn_rnn", _recurrent(cache))


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY)))


def _cast_all(cache: WeightCache, arguments: Any, dtype: torch.dtype) -> Any:
    """Cast right to left: the order in which the compiler evaluates a C++ call's arguments, seen in recorded traces."""
    if isinstance(arguments, torch.Tensor):
        return cache.cast(arguments, dtype)
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(reversed([_cast_all(cache, item, dtype) for item in reversed(arguments)]))
    return arguments


def _call_cast(cache: WeightCache, operator: Any, args: Any, kwargs: Any, dtype: torch.dtype) -> Any:
    """``operator`` with its arguments cast, which are let go of from the first one on: C++ destroys what it made last
    first (trace of wavlm with checkpointing)."""
    named = {key: _cast_all(cache, value, dtype) for key, value in reversed(kwargs.items())}
    casts = list(_cast_all(cache, args, dtype))
    result = operator(*casts, **named)
    casts.reverse()  # a list lets go of its last item first
    return result


def _lower_precision(operator: Any, cache: WeightCache) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            return _call_cast(cache, operator, args, kwargs, torch.get_autocast_dtype(NAME))

    return kernel


def _float32(operator: Any, cache: WeightCache) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            return _call_cast(cache, operator, args, kwargs, torch.float32)

    return kernel


def _float32_result(operator: Any, cache: WeightCache) -> Any:
    has_dtype = any(argument.name == "dtype" for argument in operator._schema.arguments)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            if has_dtype and _eligible(args[0]):
                position = next(i for i, item in enumerate(operator._schema.arguments) if item.name == "dtype")
                given = args[position] if position < len(args) else kwargs.get("dtype")
                if given is None:
                    args, kwargs = args[:position], {**kwargs, "dtype": torch.float32}
            return operator(*args, **kwargs)

    return kernel


def _recurrent(cache: WeightCache) -> Any:
    cast_and_flatten = recurrent.cast_and_flatten(partial(_cast_all, cache))

    def kernel(*args: Any) -> Any:
        with _without_autocast():
            return cast_and_flatten(*args)

    return kernel


def _promote(operator: Any, cache: WeightCache) -> Any:
    def widest(values: Any, dtype: torch.dtype) -> torch.dtype:
        for value in values:
            if isinstance(value, (list, tuple)):
                dtype = widest(value, dtype)
            elif _eligible(value) and value.dtype is torch.float32:
                dtype = torch.float32
        return dtype

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            dtype = widest([*args, *kwargs.values()], torch.get_autocast_dtype(NAME))
            return _call_cast(cache, operator, args, kwargs, dtype)

    return kernel
