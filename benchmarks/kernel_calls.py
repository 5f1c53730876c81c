"""The calls of single CUDA operators that ``benchmarks/measure_kernels.py`` records, in groups."""

# ruff: noqa: E501, B023 - a table of calls, each run before the next is made
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

Thunk = Callable[[], Any]
Case = tuple[str, dict[str, Any], Callable[[], Thunk]]
"""Name, what it was called with, and what makes the call once its inputs exist."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int64": torch.int64}
CUDA = "cuda"


def attention() -> Iterator[Case]:
    """Each kernel by force, forward and backward, and which one is chosen."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    shapes = [
        # batch, heads, key heads, query length, key length, head_dim, value head_dim
        (2, 4, 4, 256, 256, 64, 64), (3, 4, 4, 250, 250, 64, 64), (2, 8, 2, 384, 384, 128, 128), (2, 4, 4, 200, 77, 32, 32),
        (2, 4, 4, 512, 512, 80, 80), (2, 4, 4, 300, 300, 96, 96), (2, 4, 4, 512, 512, 160, 160),
        (2, 4, 4, 512, 512, 192, 192), (2, 4, 2, 512, 512, 256, 256), (2, 4, 4, 130, 130, 40, 40),
        (2, 4, 4, 197, 197, 64, 64), (16, 12, 12, 49, 49, 32, 32), (2, 4, 4, 256, 256, 192, 128), (1, 2, 2, 2048, 2048, 64, 64),
        (2, 4, 4, 1500, 1500, 64, 64), (2, 4, 4, 1, 128, 64, 64), (2, 4, 4, 256, 256, 20, 20), (1, 1, 1, 3000, 3000, 128, 128),
    ]  # fmt: skip
    for dtype in ("bfloat16", "float16", "float32"):
        for shape in shapes:
            for mask in ("none", "causal", "bool", "float", "float-grad", "row"):
                for dropout in (0.0, 0.1):
                    if dropout and mask not in ("none", "float"):
                        continue
                    about = {"dtype": dtype, "shape": shape, "mask": mask, "dropout": dropout}
                    yield "sdpa-choice", about, _choice(dtype, shape, mask, dropout)
                    for name, kernel in kernels.items():
                        if mask != "none" and name == "math":
                            continue
                        yield f"sdpa-{name}", about, _sdpa(sdpa_kernel, kernel, dtype, shape, mask, dropout, False)
                        yield (
                            f"sdpa-{name}-backward",
                            about,
                            _sdpa(sdpa_kernel, kernel, dtype, shape, mask, dropout, True),
                        )


def _inputs(dtype: str, shape: tuple[int, ...], mask: str) -> tuple[Any, ...]:
    batch, heads, key_heads, length, keys, head_dim, value_dim = shape
    kind = DTYPES[dtype]

    def project(length: int, heads: int, width: int) -> torch.Tensor:
        flat = torch.randn(batch, length, heads, width, device=CUDA, dtype=kind, requires_grad=True)
        return flat.transpose(1, 2)

    bias: torch.Tensor | None = None
    if mask == "bool":
        bias = torch.ones(batch, 1, length, keys, device=CUDA, dtype=torch.bool)
    elif mask == "row":
        bias = torch.zeros(batch, 1, 1, keys, device=CUDA, dtype=kind)
    elif mask.startswith("float"):
        bias = torch.zeros(1, heads, length, keys, device=CUDA, dtype=kind, requires_grad=mask == "float-grad")
    return (
        project(length, heads, head_dim),
        project(keys, key_heads, head_dim),
        project(keys, key_heads, value_dim),
        bias,
    )


def _choice(dtype: str, shape: tuple[int, ...], mask: str, dropout: float) -> Callable[[], Thunk]:
    def make() -> Thunk:
        query, key, value, bias = _inputs(dtype, shape, mask)
        choose = torch._fused_sdp_choice
        grouped = shape[1] != shape[2]
        raise Answer(choose(query, key, value, bias, dropout, mask == "causal", scale=None, enable_gqa=grouped))

    return make


class Answer(Exception):
    """Instead of events: a value."""


def _sdpa(
    context: Any, kernel: Any, dtype: str, shape: tuple[int, ...], mask: str, dropout: float, backward: bool
) -> Callable[[], Thunk]:
    def make() -> Thunk:
        query, key, value, bias = _inputs(dtype, shape, mask)

        def forward() -> torch.Tensor:
            with context(kernel):
                return F.scaled_dot_product_attention(
                    query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=mask == "causal",
                    enable_gqa=shape[1] != shape[2],
                )  # fmt: skip

        if not backward:
            return forward
        out = forward()
        gradient = torch.randn_like(out)
        asked = [query, key, value] + ([bias] if mask == "float-grad" else [])
        return lambda: torch.autograd.grad(out, asked, gradient)

    return make


def _simple(function: Callable[..., Any], *inputs: Callable[[], Any]) -> Callable[[], Thunk]:
    def make() -> Thunk:
        made = [item() for item in inputs]
        return lambda: function(*made)

    return make


def _gradient(function: Callable[..., Any], *inputs: Callable[[], Any]) -> Callable[[], Thunk]:
    """The backward pass of ``function`` for those of its inputs that require a gradient."""

    def make() -> Thunk:
        made = [item() for item in inputs]
        out = function(*made)
        gradient = torch.randn_like(out)
        wanted = [item for item in made if isinstance(item, torch.Tensor) and item.requires_grad]
        return lambda: torch.autograd.grad(out, wanted, gradient)

    return make


def _randn(*size: int, dtype: str = "float32", grad: bool = False) -> Callable[[], torch.Tensor]:
    if dtype == "int64":
        return lambda: torch.randint(0, 1000, size, device=CUDA)
    return lambda: torch.randn(*size, device=CUDA, dtype=DTYPES[dtype], requires_grad=grad)


def _indices(high: int, *size: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, high, size, device=CUDA)


SIZES = (100, 1000, 2049, 4096, 5000, 10_000, 65_536, 100_000, 300_000, 1_000_000, 5_000_000)


_ROWS = (
    (2, 1000), (4, 8), (64, 8), (1024, 8), (4096, 16), (8192, 64), (2048, 1024), (128, 2048), (100, 4000), (64, 50_000),
    (16, 300_000), (100_000, 3),
)  # fmt: skip


def sorting() -> Iterator[Case]:
    """Sorts, scans and selections over one dimension and over rows."""
    for dtype in ("float32", "bfloat16", "int64"):
        for n in SIZES:
            about = {"dtype": dtype, "shape": [n]}
            data = _randn(n, dtype=dtype)
            for name in ("cumsum", "cumprod"):
                yield name, about, _simple(lambda x, name=name: getattr(torch, name)(x, 0), data)
            for name in ("sort", "argsort", "nonzero", "unique", "median", "msort"):
                yield name, about, _simple(getattr(torch, name), data)
            yield "sort-stable", about, _simple(lambda x: torch.sort(x, stable=True), data)
            for k in (2, 50):
                yield "topk", {**about, "k": k}, _simple(lambda x, k=k: torch.topk(x, k), data)
            yield "masked_select", about, _simple(lambda x: torch.masked_select(x, x > 0), data)
            yield "index-mask", about, _simple(lambda x: x[x > 0], data)
            yield "where-nonzero", about, _simple(lambda x: torch.where(x > 0), data)
            if dtype != "int64":
                yield "logcumsumexp", about, _simple(lambda x: torch.logcumsumexp(x, 0), data)
                yield "kthvalue", about, _simple(lambda x: torch.kthvalue(x, 10), data)
                yield "mode", about, _simple(torch.mode, data)
            else:
                yield "bincount", about, _simple(torch.bincount, data)
                yield "unique_consecutive", about, _simple(torch.unique_consecutive, data)
                yield "histc", about, _simple(lambda x: torch.histc(x.float(), bins=16, min=0, max=15), data)
        for rows, n in _ROWS:
            about = {"dtype": dtype, "shape": [rows, n]}
            data = _randn(rows, n, dtype=dtype)
            yield "sort", about, _simple(lambda x: torch.sort(x, dim=-1), data)
            yield "argsort", about, _simple(lambda x: torch.argsort(x, dim=-1), data)
            yield "sort-dim0", about, _simple(lambda x: torch.sort(x, dim=0), data)
            for k in (1, 2, 8):
                if k <= n:
                    yield "topk", {**about, "k": k}, _simple(lambda x, k=k: torch.topk(x, k, dim=-1), data)
            yield "cumsum", about, _simple(lambda x: torch.cumsum(x, -1), data)
            yield "cumsum-dim0", about, _simple(lambda x: torch.cumsum(x, 0), data)
            yield "nonzero", about, _simple(torch.nonzero, data)
            yield "argmax", about, _simple(lambda x: torch.argmax(x, -1), data)
            yield "max-dim", about, _simple(lambda x: torch.max(x, -1), data)
            if dtype == "float32":
                yield "multinomial", about, _simple(lambda x: torch.multinomial(x.abs(), 1), data)
                yield "multinomial-replacement", about, _simple(lambda x: torch.multinomial(x.abs(), 4, True), data)
    for n in SIZES:
        yield "randperm", {"shape": [n]}, _simple(lambda n=n: torch.randperm(n, device=CUDA))


def indexing() -> Iterator[Case]:
    """Embeddings, indexing and their gradients."""
    for dtype in ("float32", "bfloat16"):
        for rows, width in ((1000, 64), (30522, 768), (512, 768), (32, 12)):
            for count in (1, 100, 3072, 3073, 4096, 20_000, 65_536, 200_001):
                about = {"dtype": dtype, "rows": rows, "width": width, "count": count}
                table = _randn(rows, width, dtype=dtype, grad=True)
                ids = _indices(rows, count)
                yield "embedding-backward", about, _gradient(lambda t, i: F.embedding(i, t), table, ids)
                yield "embedding-padding-backward", about, _gradient(lambda t, i: F.embedding(i, t, 1), table, ids)
                yield "index-backward", about, _gradient(lambda t, i: t[i], table, ids)
                yield "index_select-backward", about, _gradient(lambda t, i: t.index_select(0, i), table, ids)
                plain = _randn(rows, width, dtype=dtype)
                values = _randn(count, width, dtype=dtype)
                yield (
                    "index_put-accumulate",
                    about,
                    _simple(lambda t, i, v: t.index_put_((i,), v, True), plain, ids, values),
                )
                yield "index_put", about, _simple(lambda t, i, v: t.index_put_((i,), v), plain, ids, values)
                yield "index_add", about, _simple(lambda t, i, v: t.index_add_(0, i, v), plain, ids, values)
        for batch, length, width in ((2, 128, 64), (8, 512, 768), (16, 1024, 256)):
            about = {"dtype": dtype, "shape": [batch, length, width]}
            data = _randn(batch, length, width, dtype=dtype, grad=True)
            yield (
                "index-2-backward",
                about,
                _gradient(
                    lambda x: x[torch.arange(x.shape[0], device=CUDA), x.new_full((x.shape[0],), 3, dtype=torch.int64)],
                    data,
                ),
            )
            yield "index-slice-list-backward", about, _gradient(lambda x: x[:, [0, 2, 3]], data)
            yield "index-mask-backward", about, _gradient(lambda x: x[x[..., 0] > 0], data)
            yield (
                "index-put-mask",
                about,
                _simple(lambda x: x.detach().clone().index_put_((x[..., 0] > 0,), x.new_zeros(x.shape[2])), data),
            )
            yield "gather-backward", about, _gradient(lambda x: x.gather(1, x.argsort(1)), data)
            yield (
                "scatter_add",
                about,
                _simple(lambda x: x.detach().scatter_add(1, torch.zeros_like(x, dtype=torch.int64), x), data),
            )
            yield "masked_fill-backward", about, _gradient(lambda x: x.masked_fill(x[..., :1] > 0, 0.0), data)
            yield "repeat_interleave-backward", about, _gradient(lambda x: x.repeat_interleave(3, 1), data)
            yield "cumsum-backward", about, _gradient(lambda x: x.cumsum(1), data)
            yield "roll-backward", about, _gradient(lambda x: torch.roll(x, 3, 1), data)
            yield "unfold-backward", about, _gradient(lambda x: x.unfold(1, 16, 8), data)
        for rows in (2, 5):
            for count in (100, 5000, 50_000):
                about = {"dtype": dtype, "rows": rows, "width": 768, "count": count}
                yield (
                    "embedding-backward",
                    about,
                    _gradient(
                        lambda t, i: F.embedding(i, t), _randn(rows, 768, dtype=dtype, grad=True), _indices(rows, count)
                    ),
                )


def reducing() -> Iterator[Case]:
    """Losses, norms, pools, interpolation and other operators of training steps."""
    for dtype in ("float32", "bfloat16"):
        for rows, classes in ((7, 1000), (4096, 2), (1024, 50257), (8184, 32000), (65536, 19)):
            about = {"dtype": dtype, "shape": [rows, classes]}
            logits, labels = _randn(rows, classes, dtype=dtype, grad=True), _indices(classes, rows)
            yield "cross_entropy", about, _simple(F.cross_entropy, logits, labels)
            yield "cross_entropy-backward", about, _gradient(F.cross_entropy, logits, labels)
            yield (
                "cross_entropy-smooth",
                about,
                _simple(lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), logits, labels),
            )
            yield (
                "cross_entropy-smooth-backward",
                about,
                _gradient(lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), logits, labels),
            )
        for n, c, h, w in ((2, 19, 256, 256), (5, 21, 65, 65)):
            about = {"dtype": dtype, "shape": [n, c, h, w]}
            logits, labels = _randn(n, c, h, w, dtype=dtype, grad=True), _indices(c, n, h, w)
            yield "cross_entropy-2d", about, _simple(F.cross_entropy, logits, labels)
            yield "cross_entropy-2d-backward", about, _gradient(F.cross_entropy, logits, labels)
        for n, c, h, w in ((2, 64, 56, 56), (8, 256, 14, 14), (3, 96, 31, 33), (32, 768, 7, 7)):
            for last in (False, True):
                about = {"dtype": dtype, "shape": [n, c, h, w], "channels_last": last}

                def image(
                    n: int = n, c: int = c, h: int = h, w: int = w, last: bool = last, dtype: str = dtype
                ) -> torch.Tensor:
                    made = torch.randn(n, c, h, w, device=CUDA, dtype=DTYPES[dtype])
                    kept = made.contiguous(memory_format=torch.channels_last) if last else made
                    return kept.requires_grad_()

                weight, bias = _randn(c, dtype=dtype, grad=True), _randn(c, dtype=dtype, grad=True)
                calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
                    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), (image,)),
                    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), (image,)),
                    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 5), (image,)),
                    "adaptive_avg_pool2d-1": (lambda x: F.adaptive_avg_pool2d(x, 1), (image,)),
                    "interpolate-bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (image,)),
                    "interpolate-bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), (image,)),
                    "interpolate-nearest": (lambda x: F.interpolate(x, scale_factor=2), (image,)),
                    "interpolate-antialias": (lambda x: F.interpolate(x, size=(20, 20), mode="bilinear", antialias=True), (image,)),
                    "pixel_shuffle": (lambda x: F.pixel_unshuffle(F.pad(x, (0, h % 2, 0, w % 2)), 1), (image,)),
                    "reflection_pad2d": (lambda x: F.pad(x, (2, 2, 2, 2), mode="reflect"), (image,)),
                    "group_norm": (lambda x, w, b, c=c: F.group_norm(x, 32 if c % 32 == 0 else 8, w, b), (image, weight, bias)),
                    "instance_norm": (lambda x: F.instance_norm(x), (image,)),
                    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (image, weight, bias)),
                    "layer_norm-2d": (lambda x, w, b, c=c: F.layer_norm(x.permute(0, 2, 3, 1), (c,), w, b), (image, weight, bias)),
                    "gelu": (F.gelu, (image,)),
                    "silu": (F.silu, (image,)),
                    "prelu": (lambda x, w: F.prelu(x, w.float().to(x.dtype)), (image, weight)),
                    "grid_sample": (lambda x: F.grid_sample(x, torch.zeros(x.shape[0], 8, 8, 2, device=CUDA, dtype=x.dtype)), (image,)),
                    "unfold": (lambda x: F.unfold(x, 3), (image,)),
                }  # fmt: skip
                for name, (function, inputs) in calls.items():
                    yield name, about, _simple(function, *inputs)
                    yield f"{name}-backward", about, _gradient(function, *inputs)
        for rows, width in ((16, 768), (1024, 768), (8192, 1024), (1000, 257), (2048, 4096)):
            about = {"dtype": dtype, "shape": [rows, width]}
            data, weight, bias = (
                _randn(rows, width, dtype=dtype, grad=True), _randn(width, dtype=dtype, grad=True),
                _randn(width, dtype=dtype, grad=True),
            )  # fmt: skip
            named: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
                "layer_norm": (lambda x, w, b, k=width: F.layer_norm(x, (k,), w, b), (data, weight, bias)),
                "layer_norm-nobias": (lambda x, w, k=width: F.layer_norm(x, (k,), w), (data, weight)),
                "rms_norm": (lambda x, w, k=width: F.rms_norm(x, (k,), w), (data, weight)),
                "rms_norm-noweight": (lambda x, k=width: F.rms_norm(x, (k,)), (data,)),
                "softmax": (lambda x: F.softmax(x, -1), (data,)),
                "softmax-float": (lambda x: F.softmax(x, -1, dtype=torch.float32), (data,)),
                "softmax-dim0": (lambda x: F.softmax(x, 0), (data,)),
                "log_softmax": (lambda x: F.log_softmax(x, -1), (data,)),
                "logsumexp": (lambda x: torch.logsumexp(x, -1), (data,)),
                "glu": (lambda x: F.glu(x[:, : x.shape[1] // 2 * 2]), (data,)),
                "dropout": (lambda x: F.dropout(x, 0.1), (data,)),
                "std": (lambda x: x.std(-1), (data,)),
                "var-dim0": (lambda x: x.var(0), (data,)),
                "var-all": (lambda x: x.var(), (data,)),
                "norm": (lambda x: x.norm(), (data,)),
                "norm-dim": (lambda x: x.norm(dim=-1, keepdim=True), (data,)),
                "normalize": (lambda x: F.normalize(x, dim=-1), (data,)),
                "mse_loss": (lambda x: F.mse_loss(x, torch.zeros_like(x)), (data,)),
                "smooth_l1_loss": (lambda x: F.smooth_l1_loss(x, torch.zeros_like(x)), (data,)),
                "bce_logits": (lambda x: F.binary_cross_entropy_with_logits(x, torch.zeros_like(x)), (data,)),
                "kl_div": (lambda x: F.kl_div(x, torch.zeros_like(x), reduction="batchmean"), (data,)),
                "cosine_similarity": (lambda x: F.cosine_similarity(x, torch.ones_like(x)), (data,)),
                "cdist": (lambda x: torch.cdist(x[:100], x[:50]), (data,)),
                "weight_norm": (lambda x: torch._weight_norm(x, x.detach().norm(dim=1, keepdim=True), 0), (data,)),
                "prod": (lambda x: x.prod(-1), (data,)),
                "max-all": (lambda x: x.max(), (data,)),
                "fft": (lambda x: torch.fft.rfft(x.float()).real, (data,)),
                "einsum": (lambda x: torch.einsum("ij,kj->ik", x[:64], x[:64]), (data,)),
            }  # fmt: skip
            for name, (function, inputs) in named.items():
                yield name, about, _simple(function, *inputs)
                yield f"{name}-backward", about, _gradient(function, *inputs)
    for time_steps, batch, classes, length in ((100, 4, 32, 20), (149, 8, 40, 60), (500, 2, 1000, 30)):
        about = {"shape": [time_steps, batch, classes], "length": length}

        def ctc(x: torch.Tensor, y: torch.Tensor, t: int = time_steps, b: int = batch, k: int = length) -> torch.Tensor:
            return F.ctc_loss(x.log_softmax(-1), y, torch.full((b,), t), torch.full((b,), k), reduction="sum")

        inputs = (_randn(time_steps, batch, classes, grad=True), lambda b=batch, k=length, c=classes: torch.randint(1, c, (b, k), device=CUDA))  # fmt: skip
        yield "ctc_loss", about, _simple(ctc, *inputs)
        yield "ctc_loss-backward", about, _gradient(ctc, *inputs)
    for experts, tokens, width, wide in ((8, 1024, 512, 1792), (16, 4096, 768, 512), (4, 100, 256, 512)):
        about = {"experts": experts, "tokens": tokens, "width": width, "wide": wide}

        def grouped(x: torch.Tensor, w: torch.Tensor, e: int = experts, t: int = tokens) -> torch.Tensor:
            ends = torch.arange(1, e + 1, device=CUDA, dtype=torch.int32) * (t // e)
            return torch._grouped_mm(x, w, offs=ends)

        for dtype in ("bfloat16", "float32", "float16"):
            inputs = (
                _randn(tokens, width, dtype=dtype, grad=True),
                _randn(experts, width, wide, dtype=dtype, grad=True),
            )
            yield "grouped_mm", {**about, "dtype": dtype}, _simple(grouped, *inputs)
            yield "grouped_mm-backward", {**about, "dtype": dtype}, _gradient(grouped, *inputs)


def products() -> Iterator[Case]:
    """Matrix products: each in a fresh process, for what cuBLAS keeps."""
    for dtype in ("float32", "bfloat16", "float16"):
        for rows, inner, columns in ((64, 256, 512), (1, 256, 512), (64, 1, 512), (64, 256, 1), (63, 255, 511)):
            about = {"dtype": dtype, "shape": [rows, inner, columns]}
            a, b = _randn(rows, inner, dtype=dtype), _randn(inner, columns, dtype=dtype)
            yield "mm", about, _simple(torch.mm, a, b)
            yield "addmm", about, _simple(torch.addmm, _randn(columns, dtype=dtype), a, b)
            yield (
                "linear",
                about,
                _simple(F.linear, a, _randn(columns, inner, dtype=dtype), _randn(columns, dtype=dtype)),
            )
        about = {"dtype": dtype}
        yield (
            "addmm-2d",
            about,
            _simple(
                torch.addmm, _randn(64, 512, dtype=dtype), _randn(64, 256, dtype=dtype), _randn(256, 512, dtype=dtype)
            ),
        )
        yield (
            "addmm-scaled",
            about,
            _simple(
                lambda c, a, b: torch.addmm(c, a, b, beta=0.5),
                _randn(512, dtype=dtype),
                _randn(64, 256, dtype=dtype),
                _randn(256, 512, dtype=dtype),
            ),
        )
        yield "bmm", about, _simple(torch.bmm, _randn(4, 64, 256, dtype=dtype), _randn(4, 256, 32, dtype=dtype))
        yield (
            "baddbmm",
            about,
            _simple(
                torch.baddbmm,
                _randn(4, 64, 32, dtype=dtype),
                _randn(4, 64, 256, dtype=dtype),
                _randn(4, 256, 32, dtype=dtype),
            ),
        )
        yield (
            "linear-3d",
            about,
            _simple(F.linear, _randn(4, 64, 256, dtype=dtype), _randn(512, 256, dtype=dtype), _randn(512, dtype=dtype)),
        )
        yield (
            "linear-3d-nobias",
            about,
            _simple(F.linear, _randn(4, 64, 256, dtype=dtype), _randn(512, 256, dtype=dtype)),
        )
        yield "mv", about, _simple(torch.mv, _randn(64, 256, dtype=dtype), _randn(256, dtype=dtype))
        yield "dot", about, _simple(torch.dot, _randn(256, dtype=dtype), _randn(256, dtype=dtype))
        yield (
            "linear-backward",
            about,
            _gradient(
                F.linear,
                _randn(64, 256, dtype=dtype, grad=True),
                _randn(512, 256, dtype=dtype, grad=True),
                _randn(512, dtype=dtype, grad=True),
            ),
        )
        yield (
            "linear-gelu",
            about,
            _simple(
                lambda a, w, b: F.gelu(F.linear(a, w, b)),
                _randn(64, 256, dtype=dtype),
                _randn(512, 256, dtype=dtype),
                _randn(512, dtype=dtype),
            ),
        )


def tables() -> Iterator[Case]:
    """Gradients of embeddings around the sizes where the kernel changes."""
    for rows in (2, 16, 64, 256, 384, 512, 513, 640, 1000, 1024, 2048, 4096):
        for ratio in (2, 6, 8, 9, 10, 11, 12, 14, 16, 20, 24, 32, 48, 64, 100, 200):
            for width in (64, 768):
                count = rows * ratio
                if 3072 < count <= 300_000:
                    about = {"dtype": "float32", "rows": rows, "width": width, "count": count}
                    table = _randn(rows, width, grad=True)
                    yield (
                        "embedding-backward",
                        about,
                        _gradient(lambda t, i: F.embedding(i, t), table, _indices(rows, count)),
                    )
    for rows, n in ((64, 1000), (8192, 1024), (16, 300_000)):
        about = {"dtype": "bool", "shape": [rows, n]}
        data = _simple(lambda x: x, lambda rows=rows, n=n: torch.ones(rows, n, device=CUDA, dtype=torch.bool))
        for name in ("any", "all"):
            yield name, about, _simple(getattr(torch, name), lambda data=data: data()())
            yield (
                f"{name}-dim",
                about,
                _simple(lambda x, name=name: getattr(torch, name)(x, -1), lambda data=data: data()()),
            )


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention, "sorting": sorting, "indexing": indexing, "reducing": reducing, "products": products, "tables": tables,
}  # fmt: skip
