"""A device with a known threshold, stored plans to look at, and a real server on loopback, for the service's tests."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

import uvicorn
from fastapi import FastAPI

from planner.errors import ModelError
from planner.gpus import find_gpu
from planner.selection import Selected
from planner.specs.document import parse_spec
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.store import Store
from planner.trials import Environment, Interval, Outcome, Peaks, Plan, Source, Trial
from planner.units import GIB, MIB

GPT2: dict[str, Any] = {
    "name": "gpt2-pretrain",
    "model": {"source": "transformers", "model_type": "gpt2", "task": "causal-lm"},
    "data": {"kind": "tokens", "sequence_length": 1024},
    "variants": {"precision": ["fp32", "bf16-amp"], "checkpointing": ["none", "full"]},
}
ONE_VARIANT: dict[str, Any] = {key: value for key, value in GPT2.items() if key != "variants"}
USER_CODE: dict[str, Any] = {
    "model": {"source": "python", "target": "my_project.models:UNet", "args": {"c": 64}},
    "data": {"kind": "tensors", "inputs": {"x": {"shape": [3, 64, 64], "dtype": "float32"}}},
}


def environment(gpu: str = "h200", source: Source = Source.PREDICTED) -> Environment:
    kind = find_gpu(gpu)
    measured = source is Source.MEASURED
    return Environment(
        source=source,
        gpu=kind.name,
        gpu_name=kind.driver_names[0] if measured else None,
        gpu_uuid="GPU-0" if measured else None,
        total_bytes=kind.total_bytes,
        driver_version="580.1" if measured else None,
        cuda_version="13.0" if measured else None,
        torch_version="2.13.0",
    )


class ThresholdDevice:
    """Every batch size up to ``largest`` fits. ``before`` runs before each trial: a test waits or raises there."""

    def __init__(
        self,
        largest: int = 9,
        *,
        gpu: str = "h200",
        capacity_bytes: int = 16 * GIB,
        before: Callable[[int], None] | None = None,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.batch_sizes: list[int] = []
        self._largest = largest
        self._gpu = gpu
        self._before = before

    def environment(self, spec: Spec) -> Environment:
        return environment(self._gpu)

    limit = None

    def prepare(self, spec: Spec, variants: Sequence[Variant]) -> None: ...

    def rest(self) -> None: ...

    def open(self, spec: Spec, variant: Variant, *, capacity_bytes: int | None = None) -> ThresholdRunner:
        return ThresholdRunner(self)

    def trial(self, batch_size: int) -> Trial:
        self.batch_sizes.append(batch_size)
        if self._before is not None:
            self._before(batch_size)
        reserved = min(batch_size * self.capacity_bytes // (self._largest + 1), self.capacity_bytes)
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if batch_size <= self._largest else Outcome.OOM,
            source=Source.PREDICTED,
            peaks=Peaks(allocated_bytes=reserved - reserved // 20, reserved_bytes=reserved),
            fresh_process=True,
        )


class ThresholdRunner:
    def __init__(self, device: ThresholdDevice) -> None:
        self._device = device

    def run(self, batch_size: int, *, fresh: bool = False) -> Trial:
        return self._device.trial(batch_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def choosing(device: ThresholdDevice) -> Callable[[str | None, int | None, bool, str | None], Selected]:
    """A ``choose_device`` that always answers ``device``."""

    def choose(gpu: str | None, capacity_bytes: int | None, predicted_only: bool, on: str | None) -> Selected:
        note = f"predicted on a virtual {gpu}, nothing is measured"
        return Selected(device=device, gpu=find_gpu(gpu or "h200"), predictor=None, notes=(note,))

    return choose


def raising(error: Exception) -> Callable[..., Any]:
    """A function that raises ``error`` whatever it is given."""

    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


MODEL_ERROR = ModelError("the model raised ValueError: no such layer", field="model.config.n_layer")


def store_plan(
    store: Store,
    *,
    gpu: str = "h200",
    source: Source = Source.PREDICTED,
    variant: int = 0,
    largest: int = 9,
    document: dict[str, Any] = GPT2,
    **changes: Any,
) -> Plan:
    """Store a search's plan for the ``variant``-th variant of ``document``, and answer it as the store has it."""
    spec = parse_spec(document)
    kind = spec.variants.product()[variant]
    reserved = 15 * GIB + variant * 100 * MIB
    peaks = Peaks(allocated_bytes=reserved - GIB, reserved_bytes=reserved)
    plan = Plan(
        spec_hash=spec.hash,
        spec_name=spec.name,
        model=spec.model.name,
        variant=kind,
        environment=environment(gpu, source),
        capacity_bytes=16 * GIB,
        source=source,
        max_batch_size=largest,
        first_oom_batch_size=largest + 1,
        peaks=peaks,
    )
    if source is Source.MEASURED:
        measured = replace(peaks, device_bytes=reserved + 900 * MIB)
        plan = replace(plan, certified=True, step_time_s=0.271, peaks=measured)
    else:
        interval = Interval(low_bytes=reserved - 200 * MIB, high_bytes=reserved + 200 * MIB, basis="a test")
        plan = replace(plan, reserved_interval=interval)
    plan = replace(plan, **changes)
    return store.get_plan(store.add_plan(spec, plan, ()))


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """A real uvicorn server of ``app`` on a free loopback port; its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server did not start in 10 s"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
