"""The process that traces: it imports torch and the user's model, and answers with predictions.

torch is changed for the whole process here (``planner.virtual.backend``), hence a process of its own for each variant.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.allocator import AllocatorConfig, parse_conf
from planner.errors import InvalidArgument, ModelError, PlannerError, described
from planner.processes import serve
from planner.specs.document import parse_spec
from planner.specs.variants import DEFAULT, Variant
from planner.virtual.explanation import explain
from planner.virtual.prediction import predict_trial
from planner.virtual.scaling import TraceFamily
from planner.virtual.snapshot import snapshot_file


class Predictor:
    """One variant of one spec on one virtual GPU."""

    def __init__(self) -> None:
        self._family: TraceFamily | None = None
        self._config = AllocatorConfig()
        self._capacity_bytes = self._device_total_bytes = 0
        self._compute_capability = (0, 0)

    def open(
        self,
        *,
        spec: Mapping[str, Any],
        variant: Mapping[str, Any],
        compute_capability: list[int],
        num_sms: int,
        capacity_bytes: int,
        device_total_bytes: int,
        allocator_conf: str,
    ) -> Mapping[str, Any]:
        """Get ready: import torch and the model's library. Nothing is traced yet."""
        import torch

        from planner.virtual.architecture import Architecture
        from planner.virtual.tracing import trace_steps

        torch.set_num_threads(1)
        major, minor = torch.__version__.split(".")[:2]
        self._compute_capability = (compute_capability[0], compute_capability[1])
        architecture = Architecture(
            compute_capability=self._compute_capability,
            num_sms=num_sms,
            torch_version=(int(major), int(minor)),
        )
        parsed = parse_spec(spec)
        chosen = Variant.from_dict(variant)
        self._config = parse_conf(allocator_conf if chosen.allocator == DEFAULT else chosen.allocator)
        self._capacity_bytes, self._device_total_bytes = capacity_bytes, device_total_bytes
        self._family = TraceFamily(lambda size: trace_steps(parsed, chosen, size, architecture))
        return {}

    def trial(self, *, batch_size: int) -> Mapping[str, Any]:
        """Predict one batch size; the model's own failure becomes a ``ModelError`` that quotes it."""
        with _errors_of_the_model():
            return predict_trial(
                self._traces(),
                batch_size,
                config=self._config,
                capacity_bytes=self._capacity_bytes,
                device_total_bytes=self._device_total_bytes,
                compute_capability=self._compute_capability,
            )

    def explain(self, *, batch_size: int, outside_bytes: int) -> Mapping[str, Any]:
        """What takes the memory at one batch size; fails as ``trial`` does."""
        with _errors_of_the_model():
            return explain(
                self._traces().scaled(batch_size),
                batch_size,
                config=self._config,
                capacity_bytes=self._capacity_bytes,
                device_total_bytes=self._device_total_bytes,
                outside_bytes=outside_bytes,
            )

    def snapshot(self, *, batch_size: int, path: str) -> Mapping[str, Any]:
        """Write a file for PyTorch's memory viewer; fails as ``trial`` does."""
        with _errors_of_the_model():
            data = snapshot_file(
                self._traces().scaled(batch_size),
                batch_size,
                config=self._config,
                capacity_bytes=self._capacity_bytes,
                device_total_bytes=self._device_total_bytes,
            )
        try:
            Path(path).write_bytes(data)
        except OSError as error:
            raise InvalidArgument(f"cannot be written: {error.strerror}", field="snapshot") from error
        return {"bytes": len(data)}

    def _traces(self) -> TraceFamily:
        assert self._family is not None, "open comes first"
        return self._family


@contextlib.contextmanager
def _errors_of_the_model() -> Iterator[None]:
    try:
        yield
    except PlannerError:
        raise
    except (Exception, SystemExit) as error:  # the border to the user's model: it can raise anything
        raise ModelError(f"the training step raised {described(error)}", field="model") from error


def main() -> None:
    # Weights are never loaded here, and a hub must not be asked for anything.
    os.environ["HF_HUB_OFFLINE"] = "1"
    predictor = Predictor()
    serve(
        {"open": predictor.open, "trial": predictor.trial, "explain": predictor.explain, "snapshot": predictor.snapshot}
    )


if __name__ == "__main__":
    main()
