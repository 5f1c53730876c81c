"""The process that predicts: torch, the model's library and the model itself, and a fork of it for each trace.

torch is changed for the whole process here (``planner.virtual.backend``), hence a process of its own for each GPU type
and spec. It computes on one thread and runs no backward pass: threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.allocator import parse_conf
from planner.errors import InvalidArgument, ModelError, PlannerError, place, raised
from planner.forks import adopt_orphans, shared_with_forks
from planner.processes import serve
from planner.specs.model import Spec
from planner.specs.packing import unpacked
from planner.specs.variants import Variant
from planner.virtual.explanation import explain
from planner.virtual.forked import ForkedTracer
from planner.virtual.prediction import predict_trial
from planner.virtual.replays import KeptReplays
from planner.virtual.scaling import TraceFamily
from planner.virtual.snapshot import snapshot_file
from planner.virtual.trace import Trace

_MOST_VARIANTS = 4
"""Traces of a 7B model's variant take some tens of MiB."""

_AHEAD = 3
"""Sizes above the answer that a search asks for next (``planner.planning``): the one that runs out of memory, and two
beyond."""


class Predictor:
    """One spec on one virtual GPU. The traces of the last few variants are kept."""

    def __init__(self) -> None:
        self._spec: Spec | None = None
        self._built: Any = None
        self._architecture: Any = None
        self._families: dict[str, TraceFamily] = {}
        self._replays = KeptReplays()

    def open(self, *, spec: str, compute_capability: list[int], num_sms: int) -> Mapping[str, Any]:
        """Import torch and the model's library and build the model. Nothing is traced yet."""
        adopt_orphans()
        with shared_with_forks():
            self._build(unpacked(spec), (compute_capability[0], compute_capability[1]), num_sms)
        return {}

    def _build(self, spec: Spec, compute_capability: tuple[int, int], num_sms: int) -> None:
        import torch

        from planner.virtual.architecture import Architecture
        from planner.virtual.tracing import build

        torch.set_num_threads(1)
        major, minor = torch.__version__.split(".")[:2]
        self._architecture = Architecture(
            compute_capability=compute_capability, num_sms=num_sms, torch_version=(int(major), int(minor))
        )
        self._spec = spec
        self._built = build(spec, self._architecture)

    def trial(
        self,
        *,
        variant: Mapping[str, Any],
        batch_size: int,
        fresh: bool,
        multiple_of: int,
        capacity_bytes: int,
        device_total_bytes: int,
        allocator_conf: str,
    ) -> Mapping[str, Any]:
        """Predict one batch size; the model's own failure becomes a ``ModelError`` that quotes it."""
        return predict_trial(
            self._traces(variant),
            batch_size,
            fresh=fresh,
            ahead=[batch_size + number * multiple_of for number in range(1, 1 + _AHEAD)],
            kept=self._replays,
            may_fork=True,
            config=parse_conf(allocator_conf),
            capacity_bytes=capacity_bytes,
            device_total_bytes=device_total_bytes,
            compute_capability=self._architecture.compute_capability,
        )

    def explain(
        self,
        *,
        variant: Mapping[str, Any],
        batch_size: int,
        outside_bytes: int,
        capacity_bytes: int,
        device_total_bytes: int,
        allocator_conf: str,
    ) -> Mapping[str, Any]:
        """What takes the memory at one batch size; fails as ``trial`` does."""
        return explain(
            self._traces(variant).scaled(batch_size),
            batch_size,
            config=parse_conf(allocator_conf),
            capacity_bytes=capacity_bytes,
            device_total_bytes=device_total_bytes,
            outside_bytes=outside_bytes,
        )

    def snapshot(
        self,
        *,
        variant: Mapping[str, Any],
        batch_size: int,
        path: str,
        capacity_bytes: int,
        device_total_bytes: int,
        allocator_conf: str,
    ) -> Mapping[str, Any]:
        """Write a file for PyTorch's memory viewer; fails as ``trial`` does."""
        data = snapshot_file(
            self._traces(variant).scaled(batch_size),
            batch_size,
            config=parse_conf(allocator_conf),
            capacity_bytes=capacity_bytes,
            device_total_bytes=device_total_bytes,
        )
        try:
            Path(path).write_bytes(data)
        except OSError as error:
            raise InvalidArgument(f"cannot be written: {error.strerror}", field="snapshot") from error
        return {"bytes": len(data)}

    def _traces(self, variant: Mapping[str, Any]) -> TraceFamily:
        name = json.dumps(variant, sort_keys=True)
        family = self._families.pop(name, None)
        if family is None:
            chosen = Variant.from_dict(variant)
            tracer = ForkedTracer(lambda batch_size: self._trace(chosen, batch_size))
            family = TraceFamily(tracer, tracer.start, tracer.is_done)
        self._families[name] = family
        if len(self._families) > _MOST_VARIANTS:
            del self._families[next(iter(self._families))]
        return family

    def _trace(self, variant: Variant, batch_size: int) -> Trace:
        from planner.virtual.tracing import trace_steps

        assert self._spec is not None, "open comes first"
        try:
            return trace_steps(self._spec, variant, batch_size, self._architecture, built=self._built)
        except ModelError as error:
            raise ModelError(f"{error.message}{place(error)}", field=error.field) from error
        except PlannerError:
            raise
        except (Exception, SystemExit) as error:  # the border to the user's model: it can raise anything
            hint = _NO_CUDA if any(words in str(error) for words in _WITHOUT_CUDA) else ""
            raise ModelError(f"the training step raised {raised(error)}{hint}", field="model") from error


_WITHOUT_CUDA = ("CUDA enabled", "CUDA support", "support for cuda", "CUDA GPUs", "NVIDIA driver", "vgpu:0")
"""Of what torch says to those who name CUDA where there is none, and models that insist on it."""
_NO_CUDA = "; the virtual GPU is not named cuda: a model that takes its inputs' device runs here and on a GPU"


def main() -> None:
    # Weights are never loaded here, and a hub must not be asked for anything.
    os.environ["HF_HUB_OFFLINE"] = "1"
    predictor = Predictor()
    handlers = (predictor.open, predictor.trial, predictor.explain, predictor.snapshot)
    serve({handler.__name__: handler for handler in handlers})


if __name__ == "__main__":
    main()
