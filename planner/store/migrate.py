"""Bringing a database to the schema of ``planner.store.schema``, safely when several processes do it at once.

The migrations are the package ``planner_migrations``, found by its name, so that a checkout, an editable install and a
wheel work alike. Alembic is imported only when there is something to do: it would double the time that opening a store
takes.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, Engine, column, func, inspect, select, table

from planner.errors import StoreError
from planner.store.address import Address
from planner.store.engine import WRITING, make_engine, reported
from planner.store.schema import REVISION, VERSION_TABLE, Base

if TYPE_CHECKING:
    from alembic.config import Config

_ADVISORY_LOCK: Final = 0x706C616E6E6572
"""PostgreSQL's advisory lock of whoever migrates: the letters "planner"."""

_alembic = threading.Lock()
"""Alembic's ``op`` and ``context`` are global to the process."""


def prepare_schema(address: Address, engine: Engine, *, migrate: bool) -> None:
    """Bring the database to ``REVISION``, or with ``migrate=False`` only check that it is there.

    Raises ``StoreError`` when the database belongs to a newer planner, holds tables that are not the planner's, or is
    behind and must not be touched. A migration that fails leaves the database as it was.
    """
    with reported(address):
        with engine.connect() as connection:
            found = current_revision(connection)
            if found == REVISION:
                return
            _refuse_foreign(address, connection, found)
        if not migrate:
            raise StoreError(
                f"the store {address.label} has schema {found or 'none'} where this version of planner needs"
                f" {REVISION}; run `alembic upgrade head`",
                field="store",
            )
        with migration_connection(address) as connection:
            # Again, now that nobody else can be migrating.
            found = current_revision(connection)
            if found != REVISION:
                _refuse_foreign(address, connection, found)
                upgrade(connection)


def _refuse_foreign(address: Address, connection: Connection, found: str | None) -> None:
    """Raise ``StoreError`` for a database that this version of planner must not touch."""
    if found is not None and found not in known_revisions():
        raise StoreError(
            f"the store {address.label} was written by a newer version of planner (schema {found}): upgrade planner,"
            " or name another store",
            field="store",
        )
    if found is None and (foreign := set(inspect(connection).get_table_names()) & set(Base.metadata.tables)):
        raise StoreError(
            f"the store {address.label} has a table {min(foreign)!r} that the planner did not make", field="store"
        )


@contextmanager
def migration_connection(address: Address) -> Iterator[Connection]:
    """A connection in one transaction, committed at the end, that every other process's migration waits for."""
    engine = make_engine(address, migrating=True)
    try:
        with engine.connect().execution_options(**WRITING) as connection, connection.begin():
            if not address.is_sqlite:
                connection.execute(select(func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
            yield connection
    finally:
        engine.dispose()


def current_revision(connection: Connection) -> str | None:
    """The revision that the database is at; ``None`` where the planner has not been."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    version: str | None = connection.scalar(select(column("version_num")).select_from(table(VERSION_TABLE)))
    return version


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's configuration without a file, on ``connection``. Raises ``StoreError`` on a broken installation."""
    from alembic.config import Config

    try:
        package = importlib.import_module("planner_migrations")
    except ModuleNotFoundError as error:
        raise StoreError("this installation lacks the package planner_migrations; install planner again") from error
    config = Config()
    config.set_main_option("script_location", package.__path__[0].replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def known_revisions() -> tuple[str, ...]:
    """Every revision of this version of planner, newest first."""
    from alembic.script import ScriptDirectory

    return tuple(script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions())


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Run the migrations up to ``revision`` inside the transaction of a ``migration_connection``."""
    from alembic import command

    with _alembic:
        command.upgrade(alembic_config(connection), revision)


def downgrade(connection: Connection, revision: str) -> None:
    """Undo the migrations down to ``revision`` (``base`` = all); the data of what they made is lost."""
    from alembic import command

    with _alembic:
        command.downgrade(alembic_config(connection), revision)
