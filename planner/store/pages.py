"""What the store's queries take and give besides the planner's own objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Final, Generic, TypeVar

from planner.errors import InvalidArgument
from planner.store.ids import is_id
from planner.trials import Environment, Trial

Item = TypeVar("Item")

MAX_LIMIT: Final = 200
"""Records on one page, at most."""

_MAX_INTEGER: Final = 2**63 - 1
"""The largest integer that the databases keep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[Item]):
    """A part of a list, newest first."""

    items: tuple[Item, ...]
    next_cursor: str | None
    """Opaque; give it back to get the next page. ``None`` on the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFilter:
    """Which plans to list; ``None`` = any."""

    model: str | None = None
    gpu: str | None = None
    precision: str | None = None
    checkpointing: str | None = None
    compile: str | None = None
    batch_size: int | None = None
    """The batch size that the plan's peaks are of: the one asked about, or the largest that a search found."""
    source: str | None = None
    spec_hash: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, str):
                check_text(value, field=name)
        if self.batch_size is not None and not 0 <= self.batch_size <= _MAX_INTEGER:
            raise InvalidArgument(f"{self.batch_size} is not a batch size", field="batch_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTrial:
    """A trial with what it was run on."""

    id: str
    environment: Environment
    capacity_bytes: int
    trial: Trial
    worker: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlans:
    """How many plans the store holds for one GPU type."""

    gpu: str
    num_measured: int
    num_predicted: int

    @property
    def num_plans(self) -> int:
        return self.num_measured + self.num_predicted


def check_text(value: str, *, field: str, max_length: int | None = None) -> None:
    """Refuse text that a database cannot compare or keep. Raises ``InvalidArgument`` naming ``field``."""
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidArgument("must not contain a NUL character or half a surrogate pair", field=field)
    if max_length is not None and not 0 < len(value) <= max_length:
        raise InvalidArgument(f"must be 1 to {max_length} characters long", field=field)


def check_page(limit: int, cursor: str | None) -> None:
    """Raises ``InvalidArgument`` for a page size or a cursor that the store did not hand out."""
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidArgument(f"{limit} is not between 1 and {MAX_LIMIT}", field="limit")
    if cursor is not None and not is_id(cursor):
        raise InvalidArgument("is not a cursor; use next_cursor of the page before as it is", field="cursor")


def make_page(items: list[Item], limit: int, cursor_of: Callable[[Item], str | None]) -> Page[Item]:
    """The page of a query that asked for ``limit + 1`` records: the extra one only shows that there is a next page."""
    shown = tuple(items[:limit])
    return Page(items=shown, next_cursor=cursor_of(shown[-1]) if len(items) > limit else None)
