"""Where trials run: the interface that the real GPU, the virtual GPU and a test's threshold share."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.trials import Environment, Trial


class TrialRunner(Protocol):
    """One variant of one spec, ready for trials of any batch size; a context manager: closing ends its processes."""

    def run(self, batch_size: int, *, fresh: bool = False) -> Trial:
        """Run one trial. An OOM or a dead process is an outcome, not an exception.

        ``fresh`` asks for a process whose GPU was used for nothing else (a prediction ignores it).
        Raises ``PlannerError`` only for what no other batch size would cure: a bad config key (``InvalidSpec``), a
        model that raises (``ModelError``), a GPU that is gone (``DeviceLost``).
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Device(Protocol):
    """A GPU, real or virtual, under one capacity."""

    capacity_bytes: int
    """The most that PyTorch's caching allocator may reserve."""

    def environment(self, spec: Spec) -> Environment:
        """What the evidence of this spec's trials here is recorded with; cheap, imports no torch."""
        ...

    def prepare(self, spec: Spec, variants: Sequence[Variant]) -> None:
        """Start what trials of these variants will need and return at once: it gets ready beside the caller's work.

        What is wrong shows when a trial is run.
        """
        ...

    def open(self, spec: Spec, variant: Variant) -> TrialRunner: ...
