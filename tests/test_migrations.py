"""The migrations build exactly the models' tables, can be undone, and are whole or not at all, on both databases."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect

from planner.errors import StoreError
from planner.store import Store
from planner.store.address import parse_address
from planner.store.engine import make_engine
from planner.store.migrate import current_revision, downgrade, known_revisions, migration_connection, upgrade
from planner.store.schema import REVISION, VERSION_TABLE, Base

ROOT = Path(__file__).parents[1]


def differences(connection: Connection) -> list[object]:
    options = {"version_table": VERSION_TABLE, "compare_server_default": True}
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata))


def tables(url: str) -> set[str]:
    return set(inspect(make_engine(parse_address(url))).get_table_names()) - {VERSION_TABLE}


def test_the_models_belong_to_the_newest_revision() -> None:
    assert known_revisions()[0] == REVISION


def test_up_compared_down_and_up_again(store_url: str) -> None:
    address = parse_address(store_url)
    for _ in range(2):
        with migration_connection(address) as connection:
            upgrade(connection)
        with make_engine(address).connect() as connection:
            assert current_revision(connection) == REVISION
            assert differences(connection) == []
        assert tables(store_url) == set(Base.metadata.tables)
        with migration_connection(address) as connection:
            downgrade(connection, "base")
        assert tables(store_url) == set()
    Store.open(store_url).close()
    assert tables(store_url) == set(Base.metadata.tables)


def test_the_comparison_sees_a_difference(store_url: str) -> None:
    address = parse_address(store_url)
    with migration_connection(address) as connection:
        upgrade(connection)
        connection.exec_driver_sql("DROP INDEX ix_plans_gpu_id")
        connection.exec_driver_sql("ALTER TABLE jobs ADD COLUMN colour TEXT")
        kinds = {difference[0] for difference in differences(connection) if isinstance(difference, tuple)}
    assert kinds == {"add_index", "remove_column"}


def test_a_migration_that_fails_half_way_leaves_nothing(store_url: str) -> None:
    engine = make_engine(parse_address(store_url))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE ix_jobs_state_id (in_the_way TEXT)")
    with pytest.raises(StoreError, match="ix_jobs_state_id"):
        Store.open(store_url)
    assert inspect(engine).get_table_names() == ["ix_jobs_state_id"]
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE ix_jobs_state_id")
    Store.open(store_url).close()


def test_a_store_opened_during_a_migration_waits_for_it(store_url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        with migration_connection(parse_address(store_url)) as connection:
            opening = pool.submit(Store.open, store_url)
            with pytest.raises(TimeoutError):
                opening.result(timeout=0.5)
            upgrade(connection)
        store = opening.result(timeout=30)
    store.ping()
    store.close()


def alembic(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-c", str(ROOT / "alembic.ini"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_alembic_by_hand_from_any_folder(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    alembic("upgrade", "head", PLANNER_STORE=store_url)
    Store.open(store_url, migrate=False).close()
    assert f"{REVISION} (head)" in alembic("-x", f"url={store_url}", "current")
    alembic("-x", f"url={store_url}", "downgrade", "base")
    assert tables(store_url) == set()


def test_alembic_writes_sql_for_a_database_administrator() -> None:
    sql = alembic("-x", "url=postgresql://nowhere/plans", "upgrade", "head", "--sql")
    for name in Base.metadata.tables:
        assert f"CREATE TABLE {name} (" in sql
    assert f"INSERT INTO {VERSION_TABLE}" in sql
