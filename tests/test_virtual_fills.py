"""Numbers that a tensor's type cannot hold: refused as torch refuses them."""

from __future__ import annotations

import re

import pytest
import torch

from planner.virtual.fills import check_fill

aten = torch.ops.aten
LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [LEAST, -65_505.0, float("-inf"), float("nan"), 0])
@pytest.mark.parametrize("func", [aten.masked_fill.Scalar, aten.masked_fill_.Scalar])
def test_a_fill_is_refused_where_torch_refuses_it(func: object, dtype: torch.dtype, value: float) -> None:
    """On an H200, DeBERTa in bf16-amp: "value cannot be converted to type c10::BFloat16 without overflow"."""
    scores, mask = torch.zeros(2, dtype=dtype), torch.tensor([True, False])
    try:
        scores.clone().masked_fill_(mask, value)
    except RuntimeError as error:
        refused = "c10::" + str(error).split("c10::")[1]
        with pytest.raises(RuntimeError, match=re.escape(refused)):
            check_fill(func, (scores, mask, value))
        assert (dtype, value) in {(torch.bfloat16, LEAST), (torch.float16, LEAST), (torch.float16, -65_505.0)}
    else:
        check_fill(func, (scores, mask, value))
