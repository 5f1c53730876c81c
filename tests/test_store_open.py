"""Opening a store: where it is, what can go wrong, and several processes at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy
from store_fakes import FP32, make_spec, make_trial

from planner.errors import StoreError
from planner.store import Store
from planner.store.address import parse_address
from planner.store.engine import make_engine
from planner.store.schema import REVISION

SECRET = "s3cr:t/x@"
QUOTED = "s3cr%3At%2Fx%40"


def failure(url: str | None, **options: bool) -> str:
    """What opening ``url`` says; it must be one line."""
    with pytest.raises(StoreError) as caught:
        Store.open(url, **options).close()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("store: ") or message.startswith("the store ")
    return message


def test_the_default_is_a_file_in_the_users_data_folder(tmp_path: Path) -> None:
    with Store.open() as store:
        store.ping()
        assert store.url == f"sqlite:///{tmp_path}/data-home/planner/planner.db"
    assert (tmp_path / "data-home/planner/planner.db").is_file()


def test_sqlite_is_set_up_for_several_processes(sqlite_url: str) -> None:
    address = parse_address(sqlite_url)
    Store.open(sqlite_url).close()
    with make_engine(address).connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "foreign_keys")
        }
        assert pragmas == {"journal_mode": "wal", "foreign_keys": 1}
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000


@pytest.mark.parametrize("bare", ["plans.db", "/tmp/plans.db", ""])
def test_a_bare_path_gets_the_url_to_write(bare: str) -> None:
    assert f"did you mean 'sqlite:///{bare or 'plans.db'}'?" in failure(bare)


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("postgresql://u@h/d", "postgresql+psycopg://u@h/d"),
        ("postgres://u@h/d", "postgresql+psycopg://u@h/d"),
        ("postgresql+psycopg2://u@h/d?sslmode=require", "postgresql+psycopg://u@h/d?sslmode=require"),
        ("sqlite:///a/b.db", "sqlite:///a/b.db"),
        ("sqlite+pysqlite:////a.db", "sqlite:////a.db"),
    ],
)
def test_urls_are_given_the_planners_drivers(url: str, normal: str) -> None:
    assert str(parse_address(url).url) == normal


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://u:pw@h/d", "mysql is not supported"),
        ("u:pw@h://d", "the URL's scheme is not supported"),
        ("sqlite://", "must be a file"),
        ("sqlite:///:memory:", "must be a file"),
        ("sqlite://plans.db", "did you mean 'sqlite:///plans.db'?"),
        ("postgresql://u:pw@h:port/d", "the postgresql URL cannot be read"),
    ],
)
def test_other_urls_are_explained(url: str, says: str) -> None:
    message = failure(url)
    assert says in message
    assert "pw" not in message


def test_places_that_cannot_hold_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"there is no folder {tmp_path}/nowhere" in failure(f"sqlite:///{tmp_path}/nowhere/plans.db")
    assert "it is a folder" in failure(f"sqlite:///{tmp_path}")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    assert "Not a directory" in failure(None)


def test_a_folder_that_cannot_be_written() -> None:
    # Not by permissions, which do not bind root: nobody can make a file here.
    assert "unable to open database file" in failure("sqlite:////proc/plans.db")


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but dear to me\n" * 100)
    assert "file is not a database" in failure(f"sqlite:///{path}")
    assert path.read_text() == "not a database, but dear to me\n" * 100
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_a_server_that_does_not_answer_and_its_password() -> None:
    message = failure(f"postgresql://me:{QUOTED}@127.0.0.1:1/plans?connect_timeout=2")
    assert "the store postgresql://127.0.0.1:1/plans cannot be used" in message
    assert "refused" in message
    assert SECRET not in message
    assert QUOTED not in message


@pytest.mark.parametrize("where", [f"me:{QUOTED}@127.0.0.1/plans", f"127.0.0.1/plans?password={QUOTED}"])
def test_a_driver_that_quotes_the_password_is_redacted(where: str) -> None:
    address = parse_address(f"postgresql://{where}")
    assert address.redact(f"tried {SECRET} in vain") == "tried *** in vain"
    assert "s3cr" not in address.label


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert "needs the module psycopg: install planner with its server extra" in failure("postgresql://h/d")


def test_a_database_of_a_newer_planner_is_left_alone(store_url: str) -> None:
    Store.open(store_url).close()
    with make_engine(parse_address(store_url)).begin() as connection:
        connection.exec_driver_sql("UPDATE planner_alembic_version SET version_num = '9999'")
    for migrate in (True, False):
        assert "was written by a newer version of planner (schema 9999)" in failure(store_url, migrate=migrate)


def test_tables_of_somebody_else_are_left_alone(store_url: str) -> None:
    engine = make_engine(parse_address(store_url))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE jobs (title TEXT)")
    assert "has a table 'jobs' that the planner did not make" in failure(store_url)
    assert sqlalchemy.inspect(engine).get_table_names() == ["jobs"]


def test_without_leave_to_migrate_the_schema_must_be_there(store_url: str) -> None:
    message = failure(store_url, migrate=False)
    assert f"has schema none where this version of planner needs {REVISION}" in message
    Store.open(store_url).close()
    Store.open(store_url, migrate=False).close()


def test_a_server_that_restarts_is_connected_to_again(postgresql_url: str) -> None:
    with Store.open(postgresql_url) as store:
        store.ping()
        with make_engine(parse_address(postgresql_url)).connect() as other:
            other.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        store.ping()


WORKER = """
import json, sys
from store_fakes import make_request
from planner.jobs import JobState
from planner.store import Store

url, worker = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
with Store.open(url) as store:
    for number in range(12):
        store.create_job(make_request(), f"key-{number}")
    taken = []
    while claim := store.claim_job(worker):
        taken.append(claim.job.id)
        store.finish_job(claim, JobState.SUCCEEDED)
print(json.dumps(taken))
"""

KILLED = """
import os, signal, sys
from store_fakes import FP32, GIB, make_environment, make_spec, make_trial
from planner.store import Store

store = Store.open(sys.argv[1])
store.add_trial(make_spec(), FP32, make_environment(), GIB, make_trial())
os.kill(os.getpid(), signal.SIGKILL)
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_open_a_new_store_at_once_share_its_jobs(store_url: str) -> None:
    workers = [start(WORKER, store_url, f"w{number}") for number in range(3)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    taken = [job for worker in workers for job in json.loads(worker.communicate(timeout=60)[0])]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    with Store.open(store_url) as store:
        assert sorted(taken) == sorted(job.id for job in store.list_jobs().items)
    assert len(taken) == 12


def test_a_killed_process_loses_no_finished_trial(store_url: str) -> None:
    killed = start(KILLED, store_url)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    with Store.open(store_url) as store:
        (found,) = store.find_trials(make_spec().hash, FP32)
    assert found.trial == make_trial()
