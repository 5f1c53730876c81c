"""Variants: the combinations of precision, checkpointing, compilation and more that a sweep tries.

Nothing here imports torch or pydantic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, Self


class Precision(StrEnum):
    FP32 = "fp32"
    TF32 = "tf32"
    FP16_AMP = "fp16-amp"
    BF16_AMP = "bf16-amp"
    BF16 = "bf16"
    FP16 = "fp16"


class Checkpointing(StrEnum):
    NONE = "none"
    FULL = "full"
    SELECTIVE = "selective"


class Compile(StrEnum):
    OFF = "off"
    ON = "on"


class Sdpa(StrEnum):
    """Back ends of ``torch.nn.functional.scaled_dot_product_attention`` (``torch.nn.attention.SDPBackend``)."""

    DEFAULT = "default"
    """PyTorch chooses."""
    FLASH = "flash"
    EFFICIENT = "efficient"
    CUDNN = "cudnn"
    MATH = "math"


class OptimizerImplementation(StrEnum):
    """How torch.optim walks over the parameters."""

    DEFAULT = "default"
    """PyTorch chooses: foreach on CUDA."""
    FOR_LOOP = "for-loop"
    FOREACH = "foreach"
    FUSED = "fused"


class MemoryFormat(StrEnum):
    CONTIGUOUS = "contiguous"
    CHANNELS_LAST = "channels-last"


class Loss(StrEnum):
    DEFAULT = "default"
    """As the model works it out."""
    CHUNKED = "chunked"
    """A language model's logits and their loss are made for a part of the tokens at a time, and again in the backward
    pass: the logits of all tokens never exist together."""


class Parallelism(StrEnum):
    SINGLE = "single"
    DDP = "ddp"
    FSDP2 = "fsdp2"


DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Variant:
    """One combination of the sweep's axes."""

    precision: Precision = Precision.FP32
    checkpointing: Checkpointing = Checkpointing.NONE
    compile: Compile = Compile.OFF
    sdpa: Sdpa = Sdpa.DEFAULT
    optimizer_implementation: OptimizerImplementation = OptimizerImplementation.DEFAULT
    memory_format: MemoryFormat = MemoryFormat.CONTIGUOUS
    loss: Loss = Loss.DEFAULT
    allocator: str = DEFAULT
    """``PYTORCH_ALLOC_CONF`` of the process, e.g. ``expandable_segments:True``; ``default``: as the environment has
    it."""
    parallelism: Parallelism = Parallelism.SINGLE
    gpus: int = 1
    """GPUs of one host; more than one only with ``ddp`` or ``fsdp2``. A batch size is that of one GPU."""

    def as_dict(self) -> dict[str, Any]:
        """As the contract writes it: ``{"precision": "bf16-amp", "checkpointing": "none", "compile": "off"}``, and of
        the other axes those that differ from the default."""
        return {
            name: value if isinstance(value, int) else str(value)
            for name, value in asdict(self).items()
            if name in CONTRACT_AXES or value != _DEFAULT_VARIANT[name]
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The variant that ``as_dict`` wrote. Raises ``ValueError`` for a value and ``TypeError`` for an axis that
        there is not."""
        return cls(**{name: AXES[name](value) if name in AXES else value for name, value in data.items()})

    def label(self) -> str:
        """For people: the axes that differ from a plain loop, e.g. ``bf16-amp + checkpointing full``."""
        return variant_label(self.as_dict())


CONTRACT_AXES = ("precision", "checkpointing", "compile")
AXES: Mapping[str, Callable[[Any], Any]] = {
    "precision": Precision,
    "checkpointing": Checkpointing,
    "compile": Compile,
    "sdpa": Sdpa,
    "optimizer_implementation": OptimizerImplementation,
    "memory_format": MemoryFormat,
    "loss": Loss,
    "allocator": str,
    "parallelism": Parallelism,
}
"""The axes of a sweep, slowest first, and what makes a value of each."""
_DEFAULT_VARIANT = {item.name: item.default for item in fields(Variant)}


def variant_label(variant: Mapping[str, Any]) -> str:
    """``{"precision": "fp32", "checkpointing": "full", ...}`` -> ``"fp32 + checkpointing full"``."""
    parts = [str(variant.get("precision", "?"))]
    if variant.get("checkpointing", "none") != "none":
        parts.append(f"checkpointing {variant['checkpointing']}")
    if variant.get("compile", "off") != "off":
        parts.append("compiled")
    for axis, words in _WORDS.items():
        if variant.get(axis, _DEFAULT_VARIANT[axis]) != _DEFAULT_VARIANT[axis]:
            parts.append(words.format(variant[axis] or "no allocator settings"))
    if variant.get("parallelism", "single") != "single":
        parts.append(f"{variant['parallelism']} on {variant.get('gpus', 1)} GPUs")
    return " + ".join(parts)


_WORDS = {
    "sdpa": "{} attention",
    "optimizer_implementation": "{} optimizer",
    "memory_format": "{}",
    "loss": "{} loss",
    "allocator": "{}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantAxes:
    """Every list is one axis of the sweep."""

    precision: tuple[Precision, ...] = (Precision.FP32,)
    checkpointing: tuple[Checkpointing, ...] = (Checkpointing.NONE,)
    compile: tuple[Compile, ...] = (Compile.OFF,)
    sdpa: tuple[Sdpa, ...] = (Sdpa.DEFAULT,)
    optimizer_implementation: tuple[OptimizerImplementation, ...] = (OptimizerImplementation.DEFAULT,)
    memory_format: tuple[MemoryFormat, ...] = (MemoryFormat.CONTIGUOUS,)
    loss: tuple[Loss, ...] = (Loss.DEFAULT,)
    allocator: tuple[str, ...] = (DEFAULT,)
    parallelism: tuple[Parallelism, ...] = (Parallelism.SINGLE,)
    gpus: int = 1
    """Of the variants that are parallel."""

    def product(self) -> tuple[Variant, ...]:
        """Every combination, precision slowest, in the order that the user wrote."""
        chosen = itertools.product(*(getattr(self, axis) for axis in AXES))
        variants = (Variant(**dict(zip(AXES, values, strict=True))) for values in chosen)
        return tuple(
            variant if variant.parallelism is Parallelism.SINGLE else replace(variant, gpus=self.gpus)
            for variant in variants
        )
