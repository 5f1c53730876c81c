"""Connections and transactions: how each database is set up, and how its failures become ``StoreError``."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy
from sqlalchemy import Connection, Engine, event, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from planner.errors import StoreError
from planner.store.address import Address

BUSY_TIMEOUT_S: Final = 30.0
"""How long a writer waits for another process's transaction on SQLite; transactions here take milliseconds."""

CONNECT_TIMEOUT_S: Final = 10
"""How long to wait for a PostgreSQL server that does not answer."""

WRITING: Final = {"sqlite_begin": "IMMEDIATE"}
"""Execution option of every transaction that may write. SQLite refuses at once, without waiting, a transaction that
read first and finds the database changed when it comes to write; one that takes the write lock at its beginning waits
its turn."""


@contextmanager
def reported(address: Address) -> Iterator[None]:
    """Turn a database's failure into a ``StoreError`` of one sentence without passwords."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise StoreError(
            f"the store {address.label} needs the module {error.name}: install planner with its server extra",
            field="store",
        ) from error
    except (SQLAlchemyError, sqlite3.Error, OSError, OverflowError) as error:
        cause = getattr(error, "orig", None) or error
        reason = " ".join(address.redact(str(cause)).split()) or type(cause).__name__
        raise StoreError(f"the store {address.label} cannot be used: {reason[:400]}") from error


def make_engine(address: Address, *, migrating: bool = False) -> Engine:
    """An engine for ``address``; nothing is connected yet. ``migrating``: one connection, SQLite's foreign keys off, as
    rebuilding a referenced table there needs."""
    if not address.is_sqlite:
        connect_args = {} if "connect_timeout" in address.url.query else {"connect_timeout": CONNECT_TIMEOUT_S}
        pool: dict[str, Any] = {"poolclass": NullPool} if migrating else {"pool_pre_ping": True}
        return sqlalchemy.create_engine(address.url, connect_args=connect_args, **pool)

    pool = {"poolclass": NullPool} if migrating else {}
    engine = sqlalchemy.create_engine(address.url, connect_args={"timeout": BUSY_TIMEOUT_S}, **pool)

    @event.listens_for(engine, "connect")
    def set_up(connection: sqlite3.Connection, _record: object) -> None:
        # sqlite3 would begin transactions by itself, only before writes and never before DDL; "begin" below does
        # instead.
        connection.isolation_level = None
        connection.execute(f"PRAGMA foreign_keys = {'OFF' if migrating else 'ON'}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('sqlite_begin', 'DEFERRED')}")

    return engine


def prepare_sqlite(address: Address, *, create_folder: bool) -> None:
    """Check the file's place and switch the file to write-ahead logging, under which readers never wait for the writer.

    Raises ``StoreError``.
    """
    path = address.path
    if path is None:
        return
    with reported(address):
        if create_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.is_dir():
            raise StoreError(
                f"the store {address.label} cannot be opened: there is no folder {path.parent}", field="store"
            )
        if path.is_dir():
            raise StoreError(f"the store {address.label} cannot be opened: it is a folder", field="store")
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)
        try:
            _use_write_ahead_log(connection)
        finally:
            connection.close()


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    # SQLite does not wait for its busy timeout here: changing the mode while another process does the same fails at
    # once. A file system without shared memory answers with the old mode, which works too, only with readers that
    # wait.
    give_up_at = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_at:
                raise
            time.sleep(0.01)


class Database:
    """What the parts of ``Store`` share: an engine and its transactions."""

    def __init__(self, address: Address, engine: Engine) -> None:
        self._address = address
        self._engine = engine
        self._write_engine = engine.execution_options(**WRITING)

    @property
    def url(self) -> str:
        """The store as messages may name it: without user, password and options."""
        return self._address.label

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with reported(self._address), Session(self._engine) as session:
            yield session

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        """One transaction: committed as a whole at the end, rolled back by any exception."""
        with reported(self._address), Session(self._write_engine) as session, session.begin():
            yield session

    def _now(self, session: Session) -> datetime:
        """The time by which leases run out: the server's where several machines share it, else this machine's."""
        if self._address.is_sqlite:
            return datetime.now(UTC)
        now: datetime = session.scalars(select(func.clock_timestamp())).one()
        return now.astimezone(UTC)
