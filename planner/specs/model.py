"""The spec as the rest of the planner sees it: frozen, checked, complete, with a canonical hash.

``planner.specs.document`` makes these from YAML, JSON or TOML. Nothing here imports torch or pydantic.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from planner.errors import InvalidSpec
from planner.specs.variants import VariantAxes
from planner.units import format_bytes


class ModelSource(StrEnum):
    TRANSFORMERS = "transformers"
    TIMM = "timm"
    TORCHVISION = "torchvision"
    PYTHON = "python"


class DataKind(StrEnum):
    TOKENS = "tokens"
    IMAGES = "images"
    TENSORS = "tensors"


class Routing(StrEnum):
    """What is assumed of a mixture of experts, whose router's choice depends on weights."""

    BALANCED = "balanced"
    """Every expert gets as many tokens as any other."""
    WORST = "worst"
    """Every token goes to the same experts."""


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
    lengths: tuple[tuple[int, int], ...] = ()
    """``tokens``: ``(tokens, how many samples)`` in ascending order, where samples differ in length. The longest is
    ``sequence_length``; a batch is as long as its longest sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    name: str
    """As ``planner.specs.document`` lists them: ``adamw``, ``sgd``, ``sgd-momentum``, ..."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the torch.optim class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSpec:
    """An evaluation step between training steps: the forward pass without gradients, in evaluation mode."""

    batch_size: int | None = None
    """``None``: that of the training step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    optimizer: OptimizerSpec
    loss: str | None = None
    """``module:function`` of ``(outputs, batch)`` that returns the scalar loss."""
    step: str | None = None
    """``module:function`` that replaces the whole training step."""
    accumulation_steps: int = 1
    """Micro-batches whose gradients are summed before the optimizer steps. A batch size is that of a micro-batch."""
    clip_grad_norm: float | None = None
    """Greatest norm of all gradients together (``torch.nn.utils.clip_grad_norm_``)."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, kept as a second copy on the device."""
    freeze: tuple[str, ...] = ()
    """Shell patterns of the names of parameters that are not trained, e.g. ``transformer.wte.*``."""
    evaluation: EvaluationSpec | None = None
    routing: Routing = Routing.BALANCED
    global_batch_size: int | None = None
    """Samples per optimizer step that micro-batch size times accumulation steps (times GPUs) must reach exactly. A
    question about the plan, no part of the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """What must stay free of the capacity, beyond what a trial needs."""

    bytes: int = 0
    share: float = 0.0
    """Of the capacity, 0 to 1."""

    def of(self, capacity_bytes: int) -> int:
        """Bytes of ``capacity_bytes`` that must stay free."""
        return self.bytes + math.ceil(self.share * capacity_bytes)

    def __str__(self) -> str:
        return f"{100 * self.share:.6g}%" if self.share else format_bytes(self.bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpec:
    """Which answers are wanted. A question about the plan, no part of the work."""

    multiple_of: int = 1
    """Batch sizes that are no multiple of it are not planned."""
    max_batch_size: int | None = None
    headroom: Headroom = Headroom()
    speed: bool = True
    """Whether a real GPU also times some smaller sizes, to tell the fastest and the knee."""

    @property
    def is_constrained(self) -> bool:
        """Whether the answer may be smaller than what fits."""
        return (self.multiple_of, self.max_batch_size, self.headroom) != (1, None, Headroom())


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    model: ModelSpec
    data: DataSpec
    train: TrainSpec
    variants: VariantAxes
    search: SearchSpec = SearchSpec()
    name: str | None = None

    def work(self) -> dict[str, Any]:
        """What is trained, as JSON data: all but the label, the sweep and what is asked of the plan.

        Fields that were added to the spec later count only where they differ from their default, so that what was
        measured before stays found.
        """
        data = asdict(self)
        work = {key: data[key] for key in ("model", "data", "train")}
        del work["train"]["global_batch_size"]
        for section, added in _ADDED.items():
            for key in added:
                if work[section][key] == added[key]:
                    del work[section][key]
        return work

    def usable_bytes(self, capacity_bytes: int) -> int:
        """What trials under ``capacity_bytes`` may reserve, beside the headroom. Raises ``InvalidSpec``."""
        usable = capacity_bytes - self.search.headroom.of(capacity_bytes)
        if usable <= 0:
            kept, capacity = self.search.headroom, format_bytes(capacity_bytes)
            raise InvalidSpec(f"keeps {kept} of {capacity} free, which leaves nothing", field="search.headroom")
        return usable

    def question(self) -> dict[str, Any]:
        """What is asked of the plan beyond the largest batch size, as JSON data; empty when nothing is."""
        asked = {key: value for key, value in asdict(self.search).items() if value != _PLAIN_SEARCH[key]}
        if self.train.global_batch_size is not None:
            asked["global_batch_size"] = self.train.global_batch_size
        return asked

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of ``work()``: equal for equal work, however it was written."""
        canonical = json.dumps(self.work(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


_ADDED: Mapping[str, Mapping[str, Any]] = {
    "data": {"lengths": ()},
    "train": {
        "accumulation_steps": 1, "clip_grad_norm": None, "ema": None, "freeze": (), "evaluation": None,
        "routing": Routing.BALANCED,
    },
}  # fmt: skip
_PLAIN_SEARCH = asdict(SearchSpec())
