"""Real child processes, and every way in which one can fail."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from planner.errors import InvalidSpec
from planner.processes import (
    TAIL_BYTES,
    Child,
    ChildDied,
    ChildGarbled,
    ChildTimeout,
    InternalError,
    describe_exit,
    kill_all,
)

MODULE = "tests.processes_child"


@pytest.fixture
def child():
    with Child.start(MODULE) as started:
        yield started


def gone(pid, within_s=5.0):
    """Whether the process has ended (or is a zombie that only waits for its parent)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            with Path(f"/proc/{pid}/stat").open() as file:
                if file.read().rpartition(")")[2].split()[0] in "ZX":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_answers_one_request_after_another(child):
    assert [child.request({"do": "double", "number": n}, 20) for n in (1, 21)] == [{"double": 2}, {"double": 42}]
    assert child.alive


def test_a_request_that_is_only_sent_is_worked_beside_the_caller(child, tmp_path):
    child.send({"do": "double", "x" * 200_000: 1})  # more than a pipe takes at once
    with pytest.raises(InternalError, match="unexpected keyword"):
        child.receive(20)
    child.send({"do": "where"})
    assert child.receive(20)["path"]


def test_what_is_sent_to_a_dead_child_is_told_when_its_reply_is_waited_for(child):
    child.kill()
    child.send({"do": "where"})
    with pytest.raises(ChildDied):
        child.receive(20)


def test_is_a_session_of_its_own_with_an_empty_standard_input(child):
    there = child.request({"do": "where"}, 20)
    assert there["stdin"] == ""
    assert os.getsid(there["pid"]) == there["pid"] == child.pid != os.getsid(0)


def test_current_folder_is_importable_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Child.start(MODULE) as child:
        assert str(tmp_path) not in child.request({"do": "where"}, 20)["path"]
    with Child.start(MODULE, import_cwd=True) as child:
        assert child.request({"do": "where"}, 20)["path"][0] == str(tmp_path)


def test_environment_is_laid_over_ours():
    with Child.start(MODULE, env={"SETTING": "on"}) as child:
        assert child.request({"do": "where"}, 20)["setting"] == "on"


def test_large_messages_pass_both_ways(child):
    assert len(child.request({"do": "big", "count": 5_000_000}, 20)["text"]) == 5_000_000
    with pytest.raises(InternalError, match="unexpected keyword"):
        child.request({"do": "double", "x" * 1_000_000: 1}, 20)


@pytest.mark.parametrize("how", ["hang", "ignore_signals_and_hang"])
def test_a_hang_is_killed_at_the_timeout(child, how):
    child.request({"do": "double", "number": 1}, 20)
    started = time.monotonic()
    with pytest.raises(ChildTimeout, match=r"within 0.3 s"):
        child.request({"do": how}, 0.3)
    assert time.monotonic() - started < 3
    assert not child.alive
    assert gone(child.pid)


def test_a_segfault_is_a_death_with_its_traceback(child):
    with pytest.raises(ChildDied, match="SIGSEGV") as caught:
        child.request({"do": "segfault"}, 20)
    assert caught.value.returncode == -signal.SIGSEGV
    assert "in segfault" in caught.value.tail  # faulthandler names the line


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_death_by_signal(child, number):
    with pytest.raises(ChildDied, match=number.name) as caught:
        child.request({"do": "signal_self", "number": int(number)}, 20)
    assert caught.value.returncode == -number


def test_early_exit_and_every_request_after_it(child):
    for _ in range(2):
        with pytest.raises(ChildDied, match="exit status 5") as caught:
            child.request({"do": "leave", "status": 5}, 20)
        assert caught.value.returncode == 5


def test_death_is_seen_although_a_grandchild_holds_the_pipes(child):
    started = time.monotonic()
    with pytest.raises(ChildDied, match="exit status 7"):
        child.request({"do": "die_leaving_grandchild"}, 20)
    assert time.monotonic() - started < 5


def test_death_while_starting():
    with (
        Child.start(MODULE, env={"DIE_AT_START": "1"}) as child,
        pytest.raises(ChildDied, match="exit status 1") as caught,
    ):
        child.request({"do": "double", "number": 1}, 20)
    assert "cannot start" in caught.value.tail


def test_a_hundred_megabytes_of_output_neither_block_nor_pile_up(child):
    assert child.request({"do": "chatter", "megabytes": 100}, 60) == {"printed": 100}
    deadline = time.monotonic() + 5
    while "the last words" not in child.tail() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.tail().endswith("the last words\n")
    assert len(child.tail()) <= TAIL_BYTES


def test_a_planner_error_crosses_with_all_its_fields(child):
    with pytest.raises(InvalidSpec) as caught:
        child.request({"do": "complain"}, 20)
    assert (caught.value.field, caught.value.suggestion) == ("model.config.n_layerz", "n_layer")
    assert child.request({"do": "double", "number": 1}, 20) == {"double": 2}


@pytest.mark.parametrize(
    ("how", "text"),
    [("crash", "RuntimeError: not expected"), ("unsendable", "TypeError"), ("sys_exit", "SystemExit: 3")],
)
def test_anything_else_is_internal_with_the_childs_traceback_as_a_note(child, how, text):
    with pytest.raises(InternalError, match=text) as caught:
        child.request({"do": how}, 20)
    assert "Traceback" in caught.value.__notes__[0]
    assert "Traceback" not in str(caught.value)
    assert child.request({"do": "double", "number": 1}, 20) == {"double": 2}


def test_garbage_on_the_reply_pipe(child):
    with pytest.raises(ChildGarbled, match="hello"):
        child.request({"do": "garbage"}, 20)
    assert not child.alive


def test_killing_twice_and_leaving_no_process(child):
    child.request({"do": "double", "number": 1}, 20)
    child.kill()
    child.kill()
    assert gone(child.pid)
    with pytest.raises(ChildDied):
        child.request({"do": "double", "number": 1}, 20)


def test_killing_all_leaves_none():
    children = {"a": Child.start(MODULE), "b": Child.start(MODULE)}
    pids = [each.pid for each in children.values()]
    kill_all(children)
    assert not children
    assert all(gone(pid) for pid in pids)


def test_the_child_outlives_the_thread_that_started_it():
    started = []
    thread = threading.Thread(target=lambda: started.append(Child.start(MODULE)))
    thread.start()
    thread.join()
    with started[0] as child:
        assert child.request({"do": "double", "number": 4}, 20) == {"double": 8}
        time.sleep(0.1)
        assert child.request({"do": "double", "number": 5}, 20) == {"double": 10}


@pytest.mark.parametrize("busy", [False, True])
def test_the_child_is_gone_when_its_parent_is_killed(busy):
    script = f"""
import json, sys
from planner.processes import Child
child = Child.start({MODULE!r})
child.request({{"do": "double", "number": 1}}, 20)
print(child.pid, flush=True)
{'child.request({"do": "hang"}, 600)' if busy else "sys.stdin.read()"}
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    ) as parent:
        pid = json.loads(parent.stdout.readline())
        time.sleep(0.2)
        parent.kill()
    assert gone(pid)


def test_exit_statuses_in_words():
    assert describe_exit(3) == "ended with exit status 3"
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(-200) == "was killed by signal 200"
