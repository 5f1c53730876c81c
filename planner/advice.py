"""Advice: which single change of a variant, or of its optimizer, gains how many samples, each one predicted.

Pure: the predictions come from a function that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from planner.specs.model import OptimizerSpec, Spec
from planner.specs.variants import (
    AXES,
    DEFAULT,
    Checkpointing,
    Compile,
    Loss,
    OptimizerImplementation,
    Precision,
    Variant,
    VariantAxes,
    variant_label,
)
from planner.trials import Plan, PlanStatus

_LANGUAGE_MODELS = ("causal-lm", "masked-lm", "seq2seq-lm")
_HAVE_FUSED = ("adam", "adamw", "adagrad", "sgd", "sgd-momentum")
"""``_fused_supported`` and the ``fused`` argument of torch.optim's classes."""
_SMALLER_STATE = {"sgd": 0, "adafactor": 1}
"""Optimizers that keep less than two tensors for each parameter, with about how many."""
_STATE = {**_SMALLER_STATE, "rprop": 2, "adagrad": 1, "sgd-momentum": 1, "rmsprop": 1}
"""Tensors of state for each parameter; two (adam, adamw, ...) where not listed."""
_NATIVE_BF16 = (8, 0)
_EXPANDABLE = "expandable_segments:True"

SAME_RESULTS = "same results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing done otherwise, everything else equal."""

    axis: str
    """An axis of the variants, or ``optimizer``."""
    value: str
    effect: str
    """What it does beside memory, for people."""
    spec: Spec
    """What to predict: of one variant."""

    @property
    def label(self) -> str:
        """``checkpointing full``, ``chunked loss``, ``optimizer sgd``."""
        if self.axis in ("optimizer", "precision"):
            return f"{self.axis} {self.value}"
        # Of a variant's label, the part after its precision.
        return variant_label({"precision": "", self.axis: self.value}).removeprefix(" + ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a change is predicted to do to the largest batch size."""

    change: Change
    plan: Plan
    samples: int
    """Gained; less than 0 where it costs some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    base: Plan
    gains: tuple[Gain, ...]
    """The largest first."""
    left_out: tuple[tuple[str, str], ...] = ()
    """``(change, why)``: what does not apply, or could not be predicted."""


def only(spec: Spec, variant: Variant) -> Spec:
    """The same work in one variant alone."""
    axes: dict[str, Any] = {axis: (getattr(variant, axis),) for axis in AXES}
    return replace(spec, variants=VariantAxes(**axes, gpus=variant.gpus))


def advise(
    base: Plan,
    spec: Spec,
    predict: Callable[[Spec], Plan],
    *,
    compute_capability: tuple[int, int],
    on_change: Callable[[int, int, Change], None] = lambda number, total, change: None,
) -> Advice:
    """Predict every single change of ``base.variant`` that applies; ``base`` is the prediction without any.

    ``predict`` searches the largest batch size of a spec's only variant. ``on_change`` is told each change before it is
    predicted: its number from 1, how many there are, and the change. Raises what ``predict`` raises.
    """
    changes, left_out = possible_changes(spec, base.variant, base.environment.allocator_conf, compute_capability)
    gains: list[Gain] = []
    for number, change in enumerate(changes, start=1):
        on_change(number, len(changes), change)
        plan = predict(change.spec)
        if plan.status is not PlanStatus.PLANNED or plan.max_batch_size is None:
            reason = str((plan.error or {}).get("message", "it could not be predicted"))
            left_out.append((change.label, reason))
            continue
        gains.append(Gain(change=change, plan=plan, samples=plan.max_batch_size - (base.max_batch_size or 0)))
    gains.sort(key=lambda gain: -gain.samples)
    return Advice(base=base, gains=tuple(gains), left_out=tuple(left_out))


def possible_changes(
    spec: Spec, variant: Variant, allocator_conf: str, compute_capability: tuple[int, int]
) -> tuple[list[Change], list[tuple[str, str]]]:
    """The single changes that can help ``variant``, and ``(change, why not)`` of the others.

    ``allocator_conf`` is the environment's; ``compute_capability`` decides which precisions the GPU has.
    """
    if variant.compile is not Compile.OFF:
        return [], [("any change", "compiled variants are not predicted")]
    steps = (_checkpointing, _precision, _loss, _optimizer, _implementation)
    changes: list[Change] = []
    left_out: list[tuple[str, str]] = []
    found = [item for step in steps for item in step(spec, variant)]
    found += _allocator(variant, allocator_conf)
    for item in found:
        if isinstance(item, tuple):
            left_out.append(item)
        elif item.axis == "precision" and item.value.startswith("bf16") and compute_capability < _NATIVE_BF16:
            left_out.append((f"precision {item.value}", "this GPU type has no bfloat16 arithmetic"))
        else:
            changes.append(_applied(item, spec, variant))
    return changes, left_out


@dataclass(frozen=True, slots=True)
class _Idea:
    axis: str
    value: str
    effect: str


_Ideas = Iterator[_Idea | tuple[str, str]]


def _applied(idea: _Idea, spec: Spec, variant: Variant) -> Change:
    if idea.axis == "optimizer":
        train = replace(spec.train, optimizer=OptimizerSpec(name=idea.value))
        changed = only(replace(spec, train=train), variant)
    else:
        data = {**variant.as_dict(), idea.axis: idea.value}
        changed = only(spec, Variant.from_dict(data))
    return Change(axis=idea.axis, value=idea.value, effect=idea.effect, spec=changed)


def _checkpointing(spec: Spec, variant: Variant) -> _Ideas:
    if variant.checkpointing is Checkpointing.FULL:
        yield "checkpointing", "it is full already"
        return
    if variant.checkpointing is Checkpointing.NONE:
        yield _Idea("checkpointing", "selective", f"{SAME_RESULTS}; cheap parts of the forward pass run twice")
    yield _Idea("checkpointing", "full", f"{SAME_RESULTS}; the forward pass of every block runs twice")


def _precision(spec: Spec, variant: Variant) -> _Ideas:
    mixed = {
        "bf16-amp": "matrix products in bfloat16; weights stay float32",
        "fp16-amp": "matrix products in float16 with loss scaling; weights stay float32",
    }
    if variant.precision in (Precision.BF16, Precision.FP16):
        yield "precision", f"weights are in {variant.precision} already"
        return
    if variant.precision in (Precision.FP32, Precision.TF32):
        for value, effect in mixed.items():
            yield _Idea("precision", value, effect)
    yield _Idea("precision", "bf16", "weights, gradients and optimizer state in bfloat16 too: may cost accuracy")


def _loss(spec: Spec, variant: Variant) -> _Ideas:
    if variant.loss is not Loss.DEFAULT:
        yield "chunked loss", "it is chunked already"
    elif spec.model.task not in _LANGUAGE_MODELS:
        yield "chunked loss", "it is for language models"
    elif spec.train.loss or spec.train.step:
        yield "chunked loss", "the loss is your own"
    else:
        yield _Idea("loss", "chunked", f"{SAME_RESULTS} up to rounding; logits are made twice")


def _optimizer(spec: Spec, variant: Variant) -> _Ideas:
    name = spec.train.optimizer.name
    state = _STATE.get(name, 2)
    smaller = [other for other, tensors in _SMALLER_STATE.items() if tensors < state]
    if not smaller:
        yield "optimizer", f"{name} keeps no state that another would save"
    for other in smaller:
        yield _Idea("optimizer", other, "another optimizer: needs other settings and may train worse")


def _implementation(spec: Spec, variant: Variant) -> _Ideas:
    name, args = spec.train.optimizer.name, spec.train.optimizer.args
    if variant.optimizer_implementation is not OptimizerImplementation.DEFAULT or {"fused", "foreach"} & set(args):
        yield "fused optimizer", "its implementation is chosen already"
    elif name not in _HAVE_FUSED:
        yield "fused optimizer", f"torch has no fused {name}"
    else:
        yield _Idea("optimizer_implementation", "fused", f"{SAME_RESULTS} up to rounding")


def _allocator(variant: Variant, conf: str) -> _Ideas:
    setting = conf if variant.allocator == DEFAULT else variant.allocator
    if "expandable_segments:True" in setting.replace(" ", ""):
        yield _EXPANDABLE, "segments are expandable already"
    else:
        yield _Idea("allocator", ",".join(part for part in (setting, _EXPANDABLE) if part), SAME_RESULTS)
