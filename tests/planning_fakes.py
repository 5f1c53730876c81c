"""A device with known thresholds, a store in memory that keeps a log, and specs, for the tests of planning."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from planner.planning import PlanStore
from planner.specs.model import DataKind, DataSpec, ModelSource, ModelSpec, OptimizerSpec, Spec, TrainSpec
from planner.specs.variants import Checkpointing, Precision, Variant, VariantAxes
from planner.trials import Environment, Interval, Outcome, Peaks, Plan, Source, Trial
from planner.units import GIB, MIB

FP32 = Variant()
BF16 = Variant(precision=Precision.BF16_AMP)
FP32_FULL = Variant(checkpointing=Checkpointing.FULL)
BF16_FULL = Variant(precision=Precision.BF16_AMP, checkpointing=Checkpointing.FULL)


def make_spec(*precisions: Precision, checkpointing=(Checkpointing.NONE,), **changes) -> Spec:
    given = {
        "name": "label",
        "model": ModelSpec(source=ModelSource.TRANSFORMERS, name="gpt2", task="causal-lm"),
        "data": DataSpec(kind=DataKind.TOKENS, sequence_length=128),
        "train": TrainSpec(optimizer=OptimizerSpec(name="adamw")),
        "variants": VariantAxes(precision=precisions or (Precision.FP32,), checkpointing=checkpointing),
    }
    return Spec(**{**given, **changes})


def make_environment(source=Source.MEASURED, **changes) -> Environment:
    measured = source is Source.MEASURED
    given = {
        "source": source, "gpu": "h200", "gpu_name": "NVIDIA H200" if measured else None,
        "gpu_uuid": "GPU-1" if measured else None, "total_bytes": 141 * GIB,
        "driver_version": "580.1" if measured else None, "cuda_version": "13.0", "torch_version": "2.13.0+cu130",
        "library_versions": {"transformers": "5.17.0"}, "planner_version": "0.1.0",
    }  # fmt: skip
    return Environment(**{**given, **changes})


def make_trial(batch_size=9, outcome=Outcome.FITS, source=Source.MEASURED, **changes) -> Trial:
    given = {
        "peaks": Peaks(allocated_bytes=batch_size * GIB, reserved_bytes=batch_size * GIB + MIB),
        "fresh_process": source is Source.MEASURED,
    }
    return Trial(batch_size=batch_size, outcome=outcome, source=source, **{**given, **changes})


class ThresholdDevice:
    """Every batch size of a variant up to ``largest[variant]`` fits.

    ``script`` says what happens instead at a ``(variant, batch size)``: outcomes or exceptions, one per run.
    """

    def __init__(self, largest, *, source=Source.MEASURED, capacity_bytes=16 * GIB, script=None, interval=None):
        self.largest = largest if isinstance(largest, dict) else None
        self.same = None if isinstance(largest, dict) else largest
        self.source, self.capacity_bytes = source, capacity_bytes
        self.interval = interval or Interval(low_bytes=0, high_bytes=1, basis="test")
        self.script = {key: list(value) for key, value in (script or {}).items()}
        self.runs: list[tuple[Variant, int, bool]] = []
        self.num_open = 0
        self.num_rests = 0
        self.prepared: list[tuple[Variant, ...]] = []

    limit = None

    def prepare(self, spec, variants):
        self.prepared.append(tuple(variants))

    def rest(self):
        self.num_rests += 1

    def environment(self, spec):
        return make_environment(self.source)

    def open(self, spec, variant, *, capacity_bytes=None):
        return _Runner(self, variant)

    def sizes(self, variant=FP32):
        return [size for ran, size, _ in self.runs if ran == variant]


class _Runner:
    def __init__(self, device, variant):
        self.device, self.variant = device, variant

    def __enter__(self):
        self.device.num_open += 1
        return self

    def __exit__(self, *_):
        self.device.num_open -= 1

    def run(self, batch_size, *, fresh=False):
        device = self.device
        device.runs.append((self.variant, batch_size, fresh))
        measured = device.source is Source.MEASURED
        largest = device.same if device.largest is None else device.largest[self.variant]
        script = device.script.get((self.variant, batch_size))
        act = script.pop(0) if script else (Outcome.FITS if batch_size <= largest else Outcome.OOM)
        if isinstance(act, BaseException):
            raise act
        reserved = GIB + (device.capacity_bytes - GIB) * batch_size // (largest + 1)
        if measured:  # a prediction says what would be taken without the limit
            reserved = min(reserved, device.capacity_bytes)
        return Trial(
            batch_size=batch_size,
            outcome=act,
            source=device.source,
            peaks=None
            if act is Outcome.FAILED
            else Peaks(
                allocated_bytes=reserved * 9 // 10,
                reserved_bytes=reserved,
                device_bytes=reserved + GIB // 2 if measured else None,
            ),
            step_times_s=(0.9, batch_size * 0.01 + 0.1, batch_size * 0.01 + 0.1)
            if measured and act is Outcome.FITS
            else (),
            fresh_process=measured and fresh,
            reserved_interval=None if measured else device.interval,
            error="cuDNN error: CUDNN_STATUS_EXECUTION_FAILED" if act is Outcome.FAILED else None,
            details={} if measured else {"notes": ["an assumption"]},
        )


class ExplainingDevice(ThresholdDevice):
    """A ``ThresholdDevice`` that can also say what takes the memory; keeps which sizes it was asked about."""

    def __init__(self, largest, **changes):
        super().__init__(largest, **changes)
        self.explained: list[tuple[Variant, int]] = []

    def open(self, spec, variant, *, capacity_bytes=None):
        return _ExplainingRunner(self, variant)


class _ExplainingRunner(_Runner):
    def explain(self, batch_size):
        self.device.explained.append((self.variant, batch_size))
        return {"source": "predicted", "batch_size": batch_size}


@dataclass
class StoredTrial:
    id: str
    environment: Environment
    capacity_bytes: int
    trial: Trial


@dataclass
class MemoryStore:
    """A ``PlanStore`` in memory. ``log`` tells in which order things were stored."""

    plans: list[Plan] = field(default_factory=list)
    trials: list[tuple[str, Variant, StoredTrial]] = field(default_factory=list)
    log: list[tuple[str, object]] = field(default_factory=list)

    def find_plan(self, spec_hash, variant, environment_key, capacity_bytes, batch_size=None, question=None):
        for plan in reversed(self.plans):
            asked = (spec_hash, variant, environment_key, capacity_bytes, batch_size, question or {})
            environment, capacity = plan.environment.key(), plan.capacity_bytes
            answers = (plan.spec_hash, plan.variant, environment, capacity, plan.batch_size, plan.question)
            if answers == asked and plan.status == "planned":
                return plan
        return None

    def find_trials(self, spec_hash, variant, gpu=None, environment_key=None, source=None):
        return [
            stored
            for work, tried, stored in reversed(self.trials)
            if (work, tried) == (spec_hash, variant)
            and gpu in (None, stored.environment.gpu)
            and environment_key in (None, stored.environment.key())
            and source in (None, stored.trial.source)
        ]

    def add_trial(self, spec, variant, environment, capacity_bytes, trial, worker=None):
        name = f"trial-{len(self.trials)}"
        self.trials.append((spec.hash, variant, StoredTrial(name, environment, capacity_bytes, trial)))
        self.log.append(("trial", (variant, trial.batch_size)))
        return name

    def add_plan(self, spec, plan, trial_ids):
        known = {stored.id: stored.trial for _, _, stored in self.trials}
        assert tuple(known[name] for name in trial_ids) == plan.trials
        name = f"plan-{len(self.plans)}"
        self.plans.append(replace(plan, id=name, stored=True))
        self.log.append(("plan", plan.variant))
        return name


_: type[PlanStore] = MemoryStore
