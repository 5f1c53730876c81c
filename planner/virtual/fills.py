"""Numbers that a tensor's type cannot hold: an error where a kernel converts them, which a step without data would
pass by."""

from __future__ import annotations

import math
from typing import Any

import torch

aten = torch.ops.aten
_FILLS = {aten.masked_fill.Scalar, aten.masked_fill_.Scalar}
_NAMES = {torch.float16: "Half", torch.bfloat16: "BFloat16"}


def check_fill(func: Any, args: Any) -> None:
    """Raises ``RuntimeError`` as torch does where ``masked_fill`` writes a finite number that 16 bits cannot hold.

    ``checked_convert`` in c10/util/TypeCast.h, which the kernel's ``value.to<scalar_t>()`` calls. *Measured* on an
    H200: DeBERTa fills scores in bfloat16 with the least float32 and cannot train in bf16-amp.
    """
    if func not in _FILLS or args[0].dtype not in _NAMES or not isinstance(args[2], float | int):
        return
    value, dtype = args[2], args[0].dtype
    if math.isfinite(value) and abs(value) > torch.finfo(dtype).max:
        raise RuntimeError(f"value cannot be converted to type c10::{_NAMES[dtype]} without overflow")
