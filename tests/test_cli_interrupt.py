"""Real signals to real processes: what is finished is stored, the user is told, no child is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_fakes import LARGEST, CardParts, write_spec

from planner.cli.app import run

FAKES = Path(__file__).with_name("cli_fakes.py")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a session of its own, so that signals reach it alone."""
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], words: str, timeout_s: float = 60) -> None:
    assert process.stderr is not None
    give_up_at = time.monotonic() + timeout_s
    seen = []
    while time.monotonic() < give_up_at and (line := process.stderr.readline()):
        seen.append(line)
        if words in line:
            return
    process.kill()
    pytest.fail(f"{words!r} was not printed:\n{''.join(seen)}")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_finished_plans_outlive_a_signal(
    number: signal.Signals, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, store = str(write_spec(tmp_path)), f"--store=sqlite:///{tmp_path / 'plans.db'}"
    process = start(tmp_path, str(FAKES), "5", "probe", spec, store, "--json")
    read_until(process, "[3/4] bf16-amp: tries batch")
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == status
    answer = json.loads(out)
    assert [plan["max_batch_size"] for plan in answer["plans"]] == list(LARGEST.values())[:2]
    assert answer["interrupted"] == {"num_finished": 2, "num_variants": 4}
    assert "interrupted: 2 of 4 plans are stored in sqlite:///" in err
    assert "run the same command again to continue" in err
    assert "Traceback" not in err

    parts = CardParts()
    assert run(["probe", spec, store, "--json"], parts) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [bool(plan.get("stored")) for plan in plans] == [True, True, False, False]
    assert [plan["max_batch_size"] for plan in plans] == list(LARGEST.values())


def test_two_signals_at_once_are_one(tmp_path: Path) -> None:
    """``make`` and a terminal both send one: the second must not cut the first one's message off."""
    spec = str(write_spec(tmp_path))
    process = start(tmp_path, str(FAKES), "5", "probe", spec, f"--store=sqlite:///{tmp_path / 'plans.db'}")
    read_until(process, "[3/4] bf16-amp: tries batch")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "certified" in out
    assert "interrupted: 2 of 4" in err


SLOW_MODEL = """\
import pathlib, os, time, torch

class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
        pathlib.Path("child.pid").write_text(str(os.getpid()))
        time.sleep(600)

    def forward(self, x):
        return self.layer(x).sum()
"""
SLOW_SPEC = """\
model: {source: python, target: "slow_models:Slow"}
data: {kind: tensors, inputs: {x: {shape: [8], dtype: float32}}}
"""


def test_a_model_that_hangs_dies_with_the_command(tmp_path: Path) -> None:
    """The real virtual GPU and a real child, with user code from the current folder."""
    (tmp_path / "slow_models.py").write_text(SLOW_MODEL)
    spec = str(write_spec(tmp_path, SLOW_SPEC))
    process = start(tmp_path, "-m", "planner.cli", "predict", spec, f"--store=sqlite:///{tmp_path / 'plans.db'}")
    pid_file = tmp_path / "child.pid"
    give_up_at = time.monotonic() + 90
    while not pid_file.exists() or not pid_file.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""
    assert "interrupted: 0 of 1 plans are stored" in err
    child = int(pid_file.read_text())
    assert child != process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
