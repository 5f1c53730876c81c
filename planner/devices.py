"""Where trials run: the interface that the real GPU, the virtual GPU and a test's threshold share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.trials import Environment, Trial
from planner.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A real GPU held to less than it has: what is measured there is *measured under a limit*."""

    gpu: str
    """The type that runs the trials."""
    capacity_bytes: int
    unlimited_capacity_bytes: int
    """What that type leaves the caching allocator."""
    stands_for: str | None = None
    """The type whose capacity it is, where another one is meant."""
    capacity_of_rank_bytes: int | None = None
    """Of each of several cards that train together, where that is less."""

    def of(self, variant: Variant) -> Limit:
        """The limit that ``variant`` is held to."""
        if variant.gpus == 1 or self.capacity_of_rank_bytes is None:
            return self
        return replace(self, capacity_bytes=self.capacity_of_rank_bytes)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def note(self) -> str:
        """What must be said beside the figures."""
        most, room = format_bytes(self.unlimited_capacity_bytes), format_bytes(self.capacity_bytes)
        if self.stands_for is None:
            return f"{_UNDER_A_LIMIT} {room} of the {most} that one {self.gpu} leaves the allocator"
        nccl = " beside NCCL" if self.capacity_bytes == self.capacity_of_rank_bytes else ""
        return (
            f"{_UNDER_A_LIMIT} on {self.gpu}, held to the {room} that one {self.stands_for} leaves the allocator{nccl}"
            f": the choice of kernels, their workspaces and the speed are those of {self.gpu}"
        )

    @staticmethod
    def is_note(note: str) -> bool:
        return note.startswith(_UNDER_A_LIMIT)


_UNDER_A_LIMIT = "measured under a limit:"


class TrialRunner(Protocol):
    """One variant of one spec, ready for trials of any batch size; a context manager: closing ends its processes."""

    def run(self, batch_size: int, *, fresh: bool = False) -> Trial:
        """Run one trial. An OOM or a dead process is an outcome, not an exception.

        ``fresh`` asks for a trial to rely on: measured in a process whose GPU was used for nothing else, predicted with
        an interval and from events that a trace has checked.
        Raises ``PlannerError`` only for what no other batch size would cure: a bad config key (``InvalidSpec``), a
        model that raises (``ModelError``), a GPU that is gone (``DeviceLost``).
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


@runtime_checkable
class Explainer(Protocol):
    """A runner that can also say what takes the memory."""

    def explain(self, batch_size: int) -> Mapping[str, Any]:
        """JSON data, predicted: bytes by kind and by module at the peak, the largest tensors, the timeline.

        Raises what ``TrialRunner.run`` raises.
        """
        ...


class Device(Protocol):
    """A GPU, real or virtual, under one capacity."""

    capacity_bytes: int
    """The most that PyTorch's caching allocator may reserve."""

    @property
    def limit(self) -> Limit | None:
        """Of a real GPU that is held to less than it has."""
        ...

    def environment(self, spec: Spec) -> Environment:
        """What the evidence of this spec's trials here is recorded with; cheap, imports no torch."""
        ...

    def prepare(self, spec: Spec, variants: Sequence[Variant]) -> None:
        """Start what trials of these variants will need and return at once: it gets ready beside the caller's work.

        What is wrong shows when a trial is run.
        """
        ...

    def rest(self) -> None:
        """No trial is coming: give back what is held for one."""
        ...

    def open(self, spec: Spec, variant: Variant, *, capacity_bytes: int | None = None) -> TrialRunner:
        """``capacity_bytes``: less than that of the device, for the trials of this runner."""
        ...
