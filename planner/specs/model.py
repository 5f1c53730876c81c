"""The spec as the rest of the planner sees it: frozen, checked, complete, with a canonical hash.

``planner.specs.document`` makes these from YAML, JSON or TOML. Nothing here imports torch or pydantic.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class ModelSource(StrEnum):
    TRANSFORMERS = "transformers"
    TIMM = "timm"
    TORCHVISION = "torchvision"
    PYTHON = "python"


class DataKind(StrEnum):
    TOKENS = "tokens"
    IMAGES = "images"
    TENSORS = "tensors"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Where the model comes from. Nothing is ever downloaded: weights are random, from a config."""

    source: ModelSource
    name: str
    """``model_type`` of transformers, a model name of timm or torchvision, or a ``module:attribute`` target."""
    task: str | None = None
    """transformers only: the AutoModelFor* family, e.g. ``causal-lm``."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of the config's defaults (transformers) or keyword arguments of the constructor (the others)."""

    def arguments(self) -> dict[str, Any]:
        """``config`` as a fresh copy, for a library that may change what it is given."""
        return deepcopy(dict(self.config))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInput:
    """One input tensor, per sample: the planner adds the batch dimension in front."""

    shape: tuple[int, ...]
    dtype: str
    """A torch dtype name: ``float32``, ``int64``, ``bool``, ..."""
    low: int = 0
    high: int | None = None
    """Exclusive; integers only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    kind: DataKind
    sequence_length: int | None = None
    """``tokens``: tokens per sample."""
    size: int | None = None
    """``images``: height and width in pixels."""
    classes: int | None = None
    """``images``: number of class labels; ``None`` = what the model has."""
    inputs: Mapping[str, TensorInput] = field(default_factory=dict)
    """``tensors``: by the name of the keyword argument."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    name: str
    """As ``planner.specs.document`` lists them: ``adamw``, ``sgd``, ``sgd-momentum``, ..."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the torch.optim class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    optimizer: OptimizerSpec
    loss: str | None = None
    """``module:function`` of ``(outputs, batch)`` that returns the scalar loss."""
    step: str | None = None
    """``module:function`` that replaces the whole training step."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Variant:
    """One combination of the sweep's axes."""

    precision: Precision = Precision.FP32
    checkpointing: Checkpointing = Checkpointing.NONE
    compile: Compile = Compile.OFF

    def as_dict(self) -> dict[str, str]:
        """As the contract writes it: ``{"precision": "bf16-amp", "checkpointing": "none", "compile": "off"}``."""
        return {name: str(value) for name, value in asdict(self).items()}

    def label(self) -> str:
        """For people: the axes that differ from a plain loop, e.g. ``bf16-amp + checkpointing full``."""
        parts = [str(self.precision)]
        if self.checkpointing is not Checkpointing.NONE:
            parts.append(f"checkpointing {self.checkpointing}")
        if self.compile is not Compile.OFF:
            parts.append("compiled")
        return " + ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantAxes:
    """Every list is one axis of the sweep."""

    precision: tuple[Precision, ...] = (Precision.FP32,)
    checkpointing: tuple[Checkpointing, ...] = (Checkpointing.NONE,)
    compile: tuple[Compile, ...] = (Compile.OFF,)

    def product(self) -> tuple[Variant, ...]:
        """Every combination, precision slowest, in the order that the user wrote."""
        return tuple(
            Variant(precision=p, checkpointing=c, compile=k)
            for p, c, k in itertools.product(self.precision, self.checkpointing, self.compile)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    model: ModelSpec
    data: DataSpec
    train: TrainSpec
    variants: VariantAxes
    name: str | None = None

    def work(self) -> dict[str, Any]:
        """What is trained, as JSON data: all but the label and the sweep."""
        data = asdict(self)
        return {key: data[key] for key in ("model", "data", "train")}

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of ``work()``: equal for equal work, however it was written."""
        canonical = json.dumps(self.work(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()
