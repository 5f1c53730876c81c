"""Specs, environments, trials and plans for the store's tests: fixed ones, and hypothesis strategies over all their
fields."""

from __future__ import annotations

import string
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from hypothesis import strategies as st

from planner.jobs import JobKind, JobRequest
from planner.specs.model import DataKind, DataSpec, ModelSource, ModelSpec, OptimizerSpec, Spec, TrainSpec
from planner.specs.variants import Checkpointing, Compile, Precision, Variant, VariantAxes  # fmt: skip
from planner.trials import Environment, Interval, Outcome, Peaks, Plan, PlanStatus, Source, Trial

GIB = 1 << 30
FP32 = Variant()
BF16 = Variant(precision=Precision.BF16_AMP, checkpointing=Checkpointing.FULL)


def make_spec(model: str = "gpt2", **config: Any) -> Spec:
    return Spec(
        name=f"{model}-pretrain",
        model=ModelSpec(
            source=ModelSource.TRANSFORMERS, name=model, task="causal-lm", config=config or {"n_layer": 12}
        ),
        data=DataSpec(kind=DataKind.TOKENS, sequence_length=1024),
        train=TrainSpec(optimizer=OptimizerSpec(name="adamw")),
        variants=VariantAxes(),
    )


def make_environment(gpu: str = "h200", source: Source = Source.MEASURED, **changes: Any) -> Environment:
    given: dict[str, Any] = {
        "source": source, "gpu": gpu, "gpu_name": f"NVIDIA {gpu.upper()}", "gpu_uuid": "GPU-1",
        "total_bytes": 150_754_820_096, "driver_version": "575.57.08", "cuda_version": "12.9",
        "torch_version": "2.13.0", "library_versions": {"transformers": "5.17.0"},
        "allocator_conf": "expandable_segments:True", "code_hash": None,
        "planner_version": "0.1.0", "python_version": "3.11.7", "hostname": "box",
    }  # fmt: skip
    return Environment(**{**given, **changes})


def make_trial(
    batch_size: int = 9, outcome: Outcome = Outcome.FITS, source: Source = Source.MEASURED, **changes: Any
) -> Trial:
    given: dict[str, Any] = {
        "peaks": Peaks(allocated_bytes=14_750_318_592, reserved_bytes=16_703_815_680, device_bytes=17_400_000_000),
        "step_times_s": (0.51, 0.25, 0.26), "num_alloc_retries": 1, "fresh_process": True, "duration_s": 3.5,
        "started_at": datetime(2026, 5, 1, 12, tzinfo=timezone(timedelta(hours=2))), "details": {"compile_s": 1.5},
    }  # fmt: skip
    return Trial(batch_size=batch_size, outcome=outcome, source=source, **{**given, **changes})


def make_plan(spec: Spec, environment: Environment | None = None, variant: Variant = FP32, **changes: Any) -> Plan:
    environment = environment or make_environment()
    given: dict[str, Any] = {
        "spec_name": spec.name, "model": spec.model.name, "capacity_bytes": 16 * GIB, "source": environment.source,
        "max_batch_size": 9, "first_oom_batch_size": 10,
    }  # fmt: skip
    return Plan(spec_hash=spec.hash, variant=variant, environment=environment, **{**given, **changes})


def make_request(**changes: Any) -> JobRequest:
    spec = {"model": {"source": "timm", "name": "resnet50"}}
    given: dict[str, Any] = {"kind": JobKind.PROBE, "spec": spec, "gpu": "h200"}
    return JobRequest(**{**given, **changes})


# What PostgreSQL's text cannot hold (NUL, half surrogate pairs) has a test of its own.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
byte_counts = st.integers(0, 2**63 - 1)
seconds = st.floats(0, 1e6)
zones = st.sampled_from([UTC, timezone(timedelta(hours=-7, minutes=-30))])
times = st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1), timezones=zones)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(st.text(max_size=10), json_values, max_size=4)
hashes = st.text(string.hexdigits.lower(), min_size=64, max_size=64)

variants = st.builds(
    Variant,
    precision=st.sampled_from(Precision),
    checkpointing=st.sampled_from(Checkpointing),
    compile=st.sampled_from(Compile),
)
peaks = st.builds(Peaks, allocated_bytes=byte_counts, reserved_bytes=byte_counts, device_bytes=st.none() | byte_counts)
intervals = st.builds(Interval, low_bytes=byte_counts, high_bytes=byte_counts, basis=texts)
environments = st.builds(
    Environment, source=st.sampled_from(Source), gpu=texts, gpu_name=st.none() | texts, gpu_uuid=st.none() | texts,
    total_bytes=byte_counts, driver_version=st.none() | texts, cuda_version=st.none() | texts, torch_version=texts,
    library_versions=st.dictionaries(texts, texts, max_size=3), allocator_conf=texts, code_hash=st.none() | hashes,
    planner_version=texts, python_version=texts, hostname=texts,
)  # fmt: skip
trials = st.builds(
    Trial, batch_size=byte_counts, outcome=st.sampled_from(Outcome), source=st.sampled_from(Source),
    peaks=st.none() | peaks, num_alloc_retries=byte_counts, step_times_s=st.lists(seconds, max_size=4).map(tuple),
    fresh_process=st.booleans(), reserved_interval=st.none() | intervals, error=st.none() | texts,
    details=json_objects, duration_s=seconds, started_at=st.none() | times,
)  # fmt: skip
plan_fields = st.fixed_dictionaries({
    "spec_name": st.none() | texts, "model": texts, "variant": variants, "environment": environments,
    "capacity_bytes": byte_counts, "status": st.sampled_from(PlanStatus), "source": st.sampled_from(Source),
    "max_batch_size": st.none() | byte_counts, "first_oom_batch_size": st.none() | byte_counts,
    "predicted_max_batch_size": st.none() | byte_counts,
    "batch_size": st.none() | byte_counts, "fits": st.none() | st.booleans(), "certified": st.booleans(),
    "peaks": st.none() | peaks, "reserved_interval": st.none() | intervals, "step_time_s": st.none() | seconds,
    "num_alloc_retries": byte_counts, "trials": st.lists(trials, max_size=3).map(tuple),
    "error": st.none() | json_objects, "notes": st.lists(texts, max_size=3).map(tuple),
    "worker": st.none() | texts, "created_at": times,
})  # fmt: skip
"""Every field of a plan but those that its spec (``spec_hash``) or the store (``id``, ``stored``) gives."""
