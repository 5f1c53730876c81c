"""The store: one object over SQLite or PostgreSQL, with the planner's own objects in and out."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from sqlalchemy import text

from planner.store.address import parse_address
from planner.store.engine import make_engine, prepare_sqlite, reported
from planner.store.evidence import EvidenceStore
from planner.store.jobs import JobStore
from planner.store.migrate import prepare_schema


class Store(EvidenceStore, JobStore):
    """A database of trials, plans and jobs. Safe to share between threads; open one for each process."""

    @classmethod
    def open(cls, url: str | None = None, *, migrate: bool = True) -> Self:
        """Open the store at ``url``: ``sqlite:///FILE`` or ``postgresql://USER:PASSWORD@HOST/DATABASE``.

        ``None`` is a SQLite file in the user's data folder, made if need be. With ``migrate`` an empty or older
        database is brought to this version's schema, by one process while others wait; without, it must be there
        already (a service whose database user may not alter tables). Raises ``StoreError``.
        """
        address = parse_address(url)
        prepare_sqlite(address, create_folder=url is None)
        with reported(address):
            engine = make_engine(address)
        try:
            prepare_schema(address, engine, migrate=migrate)
        except BaseException:
            engine.dispose()
            raise
        return cls(address, engine)

    def ping(self) -> None:
        """Check that the database answers. Raises ``StoreError``."""
        with self._reading() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close every connection; the store can be used no more."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()
