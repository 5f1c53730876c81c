"""Which attention kernel runs: every choice that an H200 made, and the rules for other architectures."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from planner.virtual.architecture import Architecture
from planner.virtual.attention_choice import Attention, choose_kernel

RECORDED = Path(__file__).parent.parent / "measurements/h200/kernels.json.gz"
KERNELS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
"""``torch.nn.attention.SDPBackend``."""


def _gpu(major: int, minor: int, torch_version: tuple[int, int] = (2, 11)) -> Architecture:
    return Architecture(compute_capability=(major, minor), num_sms=100, torch_version=torch_version)


HOPPER, AMPERE, ADA, TURING, VOLTA = _gpu(9, 0), _gpu(8, 0), _gpu(8, 9), _gpu(7, 5), _gpu(7, 0)
BLACKWELL, BLACKWELL_RTX = _gpu(10, 0), _gpu(12, 0)


def _call(
    dtype: torch.dtype = torch.bfloat16,
    *,
    heads: int = 4,
    key_heads: int | None = None,
    length: int = 16,
    keys: int | None = None,
    width: int = 64,
    value_width: int | None = None,
    **options: Any,
) -> Attention:
    def made(heads: int, length: int, width: int) -> torch.Tensor:
        flat = torch.empty(2, length, heads, width, dtype=dtype, device="meta", requires_grad=True)
        return flat.transpose(1, 2)

    fewer, keys = key_heads or heads, keys or length
    return Attention(
        query=made(heads, length, width),
        key=made(fewer, keys, width),
        value=made(fewer, keys, value_width or width),
        enable_gqa=fewer != heads,
        **options,
    )


def _mask(*shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)


def test_every_choice_of_an_h200() -> None:
    """432 combinations of dtype, shape, mask and dropout, asked of ``torch._fused_sdp_choice`` there."""
    found = 0
    for row in json.loads(gzip.decompress(RECORDED.read_bytes()))["calls"]:
        if row["name"] != "sdpa-choice" or "value" not in row:
            continue
        found += 1
        _, heads, key_heads, length, keys, width, value_width = row["shape"]
        dtype = getattr(torch, row["dtype"])
        batch = row["shape"][0]
        masks = {
            "none": None,
            "causal": None,
            "bool": _mask(batch, 1, length, keys, dtype=torch.bool),
            "row": _mask(batch, 1, 1, keys, dtype=dtype),
            "float": _mask(1, heads, length, keys, dtype=dtype),
            "float-grad": _mask(1, heads, length, keys, dtype=dtype, requires_grad=True),
        }
        call = _call(
            dtype, heads=heads, key_heads=key_heads, length=length, keys=keys, width=width, value_width=value_width,
            mask=masks[row["mask"]] if row["mask"] != "bool" else _mask(2, 1, length, keys, dtype=torch.bool),
            dropout_p=row["dropout"], is_causal=row["mask"] == "causal",
        )  # fmt: skip
        if row["mask"] == "row":
            call = _with_mask(call, _mask(2, 1, 1, keys, dtype=dtype))
        assert choose_kernel(HOPPER, call) == KERNELS[row["value"]], row
    assert found == 432


def _with_mask(call: Attention, mask: torch.Tensor) -> Attention:
    return Attention(
        query=call.query, key=call.key, value=call.value, mask=mask, dropout_p=call.dropout_p,
        is_causal=call.is_causal, enable_gqa=call.enable_gqa,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "dtype", "kernel"),
    [
        (HOPPER, torch.bfloat16, "cudnn"),
        (BLACKWELL, torch.bfloat16, "cudnn"),
        (AMPERE, torch.bfloat16, "flash"),
        (ADA, torch.float16, "flash"),
        (BLACKWELL_RTX, torch.float16, "flash"),
        (HOPPER, torch.float32, "efficient"),
        (AMPERE, torch.float32, "efficient"),
        (TURING, torch.float16, "efficient"),
        (VOLTA, torch.float16, "efficient"),
        (VOLTA, torch.float32, "efficient"),
        (TURING, torch.bfloat16, "math"),
    ],
)
def test_the_kernel_of_each_architecture(gpu: Architecture, dtype: torch.dtype, kernel: str) -> None:
    assert choose_kernel(gpu, _call(dtype)) == kernel


def test_a_mask_rules_flash_out() -> None:
    assert choose_kernel(AMPERE, _call(mask=_mask(2, 1, 16, 16))) == "efficient"
    assert choose_kernel(HOPPER, _call(mask=_mask(2, 1, 16, 16))) == "cudnn"


def test_a_learned_mask_rules_cudnn_out() -> None:
    assert choose_kernel(HOPPER, _call(mask=_mask(1, 4, 16, 16, requires_grad=True))) == "efficient"


def test_a_permuted_mask_leaves_the_math_kernel() -> None:
    """T5's position bias is a table looked up, then permuted: its last stride is the number of heads."""
    mask = _mask(1, 16, 16, 4, requires_grad=True).permute(0, 3, 1, 2)
    assert choose_kernel(HOPPER, _call(mask=mask)) == choose_kernel(AMPERE, _call(mask=mask)) == "math"


def test_small_shared_memory_limits_the_head_size_of_flash_in_training() -> None:
    assert choose_kernel(AMPERE, _call(width=224)) == "flash"
    assert choose_kernel(ADA, _call(width=224)) == choose_kernel(BLACKWELL_RTX, _call(width=224)) == "efficient"
    assert choose_kernel(ADA, _call(width=256)) == "flash"
    assert choose_kernel(ADA, _call(width=256, dropout_p=0.1)) == "efficient"
    with torch.no_grad():
        assert choose_kernel(ADA, _call(width=224)) == "flash"


def test_head_sizes() -> None:
    assert choose_kernel(HOPPER, _call(width=256)) == "cudnn"
    assert choose_kernel(BLACKWELL, _call(width=256)) == "flash"
    assert choose_kernel(BLACKWELL, _call(width=192, value_width=128)) == "cudnn"
    assert choose_kernel(AMPERE, _call(width=192, value_width=128)) == "efficient"
    assert choose_kernel(AMPERE, _call(width=264)) == "efficient"
    assert choose_kernel(AMPERE, _call(width=63)) == "flash"
    assert choose_kernel(AMPERE, _call(torch.float32, width=63)) == "math"
    assert choose_kernel(VOLTA, _call(torch.float32, width=63)) == "efficient"


def test_grouped_heads() -> None:
    assert choose_kernel(AMPERE, _call(key_heads=2)) == "flash"
    assert choose_kernel(AMPERE, _call(torch.float32, key_heads=2)) == "math"
    assert choose_kernel(AMPERE, _call(key_heads=3)) == "math"


def test_flash_aligns_a_causal_mask_elsewhere() -> None:
    assert choose_kernel(AMPERE, _call(keys=32, is_causal=True)) == "efficient"
    assert choose_kernel(AMPERE, _call(keys=32)) == "flash"


def test_older_torch_does_not_prefer_cudnn() -> None:
    assert choose_kernel(_gpu(9, 0, (2, 9)), _call()) == "flash"


def test_what_the_user_enables_is_heeded() -> None:
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # type: ignore[no-untyped-call]
        assert choose_kernel(HOPPER, _call()) == "efficient"
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # type: ignore[no-untyped-call]
        assert choose_kernel(AMPERE, _call()) == "cudnn"
