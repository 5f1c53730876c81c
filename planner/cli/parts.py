"""What the commands are made of. Each part is imported when a command needs it; a test passes its own ``Parts``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.client import ServiceClient
    from planner.preflight import Verdict
    from planner.progress import Listener
    from planner.selection import Selected
    from planner.specs.model import Spec
    from planner.specs.variants import Variant
    from planner.store import Store
    from planner.trials import Plan


class Parts:
    """The composition root of the command line."""

    def load_spec(self, path: Path) -> Spec:
        from planner.specs.document import load_spec

        return load_spec(path)

    def read_document(self, path: Path) -> dict[str, Any]:
        """The spec as it was written, checked here so that a bad one never travels."""
        from planner.specs.document import parse_spec
        from planner.specs.files import read_document
        from planner.specs.lengths import inline_file

        document = inline_file(read_document(path), path.parent)
        parse_spec(document)
        return document

    def open_store(self, url: str | None) -> Store:
        from planner.store import Store

        return Store.open(url)

    def choose_device(
        self, gpu: str | None, capacity_bytes: int | None, *, predicted_only: bool, on: str | None
    ) -> Selected:
        from planner.selection import choose_device

        return choose_device(gpu, capacity_bytes, predicted_only, on)

    def plan_sweep(
        self, spec: Spec, selected: Selected, *, store: Store, batch_size: int | None, fresh: bool, listener: Listener
    ) -> tuple[Plan, ...]:
        from planner.planning import plan_sweep

        return plan_sweep(
            spec, selected.device, store=store, batch_size=batch_size, fresh=fresh,
            predict_start=selected.predictor, listener=listener,
        )  # fmt: skip

    def write_snapshot(self, spec: Spec, variant: Variant, selected: Selected, batch_size: int, path: Path) -> int:
        from planner.virtual.device import VirtualDevice

        device = VirtualDevice(selected.gpu, selected.device.capacity_bytes)
        with device.open(spec, variant) as runner:
            return runner.write_snapshot(batch_size, path)

    def preflight(self, spec: Spec, gpu: str, batch_size: int, *, capacity_bytes: int | None, store: Store) -> Verdict:
        from planner.preflight import preflight

        return preflight(spec, gpu, batch_size, capacity_bytes=capacity_bytes, store=store)

    def connect(self, url: str) -> ServiceClient:
        from planner.client import ServiceClient

        return ServiceClient(url)


def parts_of(context: Any) -> Parts:
    """The parts that ``planner.cli.app.run`` put into a command's context."""
    assert isinstance(context.obj, Parts)
    return context.obj


Document = Mapping[str, Any]
"""JSON data: a plan, a job, a verdict."""
