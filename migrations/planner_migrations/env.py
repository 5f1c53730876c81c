"""Alembic's environment: run by the store itself, or by hand with ``alembic upgrade head``.

By hand the database is ``-x url=URL``, else the environment variable ``PLANNER_STORE``, else the SQLite file in the
user's data folder.
"""

from __future__ import annotations

import os
from logging.config import fileConfig
from typing import Any, Literal

from alembic import context
from sqlalchemy import Connection

from planner.store.address import parse_address
from planner.store.engine import prepare_sqlite
from planner.store.migrate import migration_connection
from planner.store.schema import VERSION_TABLE, Base, UtcDateTime


def render_item(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    """How a new revision names our own column type: as what it is in the database, so that no revision imports
    models."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UtcDateTime) else False


SETTINGS: dict[str, Any] = {
    "target_metadata": Base.metadata,
    "version_table": VERSION_TABLE,
    "compare_server_default": True,
    "render_item": render_item,
}


def run(connection: Connection) -> None:
    # SQLite rebuilds a table to alter it: "batch".
    context.configure(connection=connection, render_as_batch=connection.dialect.name == "sqlite", **SETTINGS)
    with context.begin_transaction():
        context.run_migrations()


def run_by_hand() -> None:
    if context.config.config_file_name is not None:
        fileConfig(context.config.config_file_name, disable_existing_loggers=False)
    url = context.get_x_argument(as_dictionary=True).get("url") or os.environ.get("PLANNER_STORE") or None
    address = parse_address(url)
    if context.is_offline_mode():
        context.configure(dialect_name=address.url.get_backend_name(), literal_binds=True, **SETTINGS)
        with context.begin_transaction():
            context.run_migrations()
        return
    prepare_sqlite(address, create_folder=url is None)
    with migration_connection(address) as connection:
        run(connection)


if context.config.attributes.get("connection") is not None:
    run(context.config.attributes["connection"])
else:
    run_by_hand()
