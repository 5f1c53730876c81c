"""The command line with nothing faked: real children, the virtual GPU, a real service on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import write_spec

PLANNER = [sys.executable, "-m", "planner.cli"]
SMALL_GPT2 = """\
name: small
model: {source: transformers, model_type: gpt2, task: causal-lm, config: {n_layer: 1, n_embd: 64, n_head: 2}}
data: {kind: tokens, sequence_length: 64}
variants: {checkpointing: [none, full]}
"""
MODELS = """\
import torch
print("a model that talks on standard output")

class Net(torch.nn.Module):
    def __init__(self, features=64):
        super().__init__()
        self.layer = torch.nn.Linear(64, features)

    def forward(self, x):
        print("and in every step")
        return {"loss": self.layer(x).pow(2).mean()}

class Raises(Net):
    def forward(self, x):
        raise RuntimeError("the model's own trouble")

class NoLoss(Net):
    def forward(self, x):
        return self.layer(x)
"""
OWN = """\
model: {{source: python, target: "{target}"}}
data: {{kind: tensors, inputs: {{x: {{shape: [64], dtype: float32}}}}}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own_models.py").write_text(MODELS)
    return tmp_path


def planner(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PLANNER, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=180)


def test_own_code_of_the_current_folder_is_planned_and_keeps_off_standard_output(folder: Path) -> None:
    spec = str(write_spec(folder, OWN.format(target="own_models:Net")))
    done = planner(folder, "probe", spec, "--gpu", "rtx-4090", "--capacity", "64MiB", "--json")
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(done.stdout)["plans"]
    assert plan["source"] == "predicted"
    assert plan["certified"] is False
    assert plan["gpu"] == "rtx-4090"
    assert plan["first_oom_batch_size"] == plan["max_batch_size"] + 1 > 1
    assert plan["peak_reserved_bytes"] <= plan["capacity_bytes"] == 64 << 20
    assert "nothing is measured" in done.stderr
    table = planner(folder, "probe", spec, "--gpu", "rtx-4090", "--capacity", "64MiB")
    assert re.search(r"predicted\s+stored", table.stdout)
    assert "predicted on a virtual rtx-4090: nothing was measured" in table.stdout
    assert "measured on NVIDIA" not in table.stdout


BAD = {
    "an unknown model type": (
        "model: {source: transformers, model_type: gtp2, task: causal-lm}\ndata: {kind: tokens, sequence_length: 8}\n",
        "error: model.model_type: ",
        "gpt2",
    ),
    "an unknown config key": (SMALL_GPT2.replace("n_layer", "n_layerz"), "error: model.config.n_layerz: ", "'n_layer'"),
    "a module that does not exist": (OWN.format(target="own_model:Net"), "error: model.target: ", "own_models"),
    "an attribute that does not exist": (OWN.format(target="own_models:Ney"), "error: model.target: ", "Net"),
    "a model that raises": (OWN.format(target="own_models:Raises"), "error: ", "the model's own trouble"),
    "a model without a loss": (OWN.format(target="own_models:NoLoss"), "error: ", "loss"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_only_the_child_can_know_is_one_line_too(case: str, folder: Path) -> None:
    text, start, words = BAD[case]
    done = planner(folder, "predict", str(write_spec(folder, text)), "--gpu", "h200", "--json", "--quiet")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(start)
    assert words in line
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["message"]


@pytest.mark.parametrize(
    ("batch_size", "capacity", "status", "word"),
    [("4", "8GiB", 0, "fits"), ("100000", "8GiB", 1, "does_not_fit"), ("0", "8GiB", 2, "batch_size")],
)
def test_preflight(batch_size: str, capacity: str, status: int, word: str, folder: Path) -> None:
    spec = str(write_spec(folder, OWN.format(target="own_models:Net").replace("[64]", "[256, 64]")))
    asked = ["preflight", spec, "--gpu", "a100-80gb", "--batch-size", batch_size, "--capacity", capacity]
    done = planner(folder, *asked, "--json")
    assert done.returncode == status, done.stderr
    document = json.loads(done.stdout)
    if status == 2:
        assert document["error"]["field"] == word
    else:
        assert document["verdict"] == word
        assert document["fits"] is (status == 0)
        assert document["variants"][0]["source"] == "predicted"


def test_preflight_without_torch_has_no_evidence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import path without torch: that is no fault of the spec."""
    code = """
import sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda kind, name, *rest: None if name == "torch" else found(name, *rest))
from planner.cli.app import run
sys.exit(run(sys.argv[1:]))
"""
    spec = str(write_spec(folder, SMALL_GPT2))
    asked = ["preflight", spec, "--gpu", "h200", "--batch-size", "4"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 3, done.stderr
    assert "torch is not installed" in done.stderr


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The URL of a service started as a user starts it, with a worker of its own; it must end in order on SIGTERM."""
    process = subprocess.Popen(
        [*PLANNER, "serve", "--port", "0", f"--store=sqlite:///{folder / 'service.db'}"],
        cwd=folder, stderr=subprocess.PIPE, text=True, env={**os.environ, "PLANNER_ALLOWED_TARGETS": "own_models"},
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    address = re.search(r"http://\S+:\d+", line)
    assert address is not None, line
    yield address[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0, process.stderr.read()
    process.stderr.close()


def test_the_service_answers_what_the_command_line_answers(server: str, folder: Path) -> None:
    spec = str(write_spec(folder, SMALL_GPT2))
    asked = ["predict", spec, "--gpu", "h200", "--capacity", "1GiB", "--json"]
    there = planner(folder, *asked, "--server", server)
    assert there.returncode == 0, there.stderr
    here = planner(folder, *asked)
    assert [same(plan) for plan in json.loads(there.stdout)["plans"]] == [
        same(plan) for plan in json.loads(here.stdout)["plans"]
    ]
    assert json.loads(there.stdout)["summary"] == json.loads(here.stdout)["summary"] != []
    assert "job running" in there.stderr
    job = json.loads(there.stdout)["job"]
    shown = planner(folder, "jobs", "show", job, "--server", server)
    assert f"job {job}: succeeded" in shown.stdout
    assert "Largest batch size: " in shown.stdout
    listed = json.loads(planner(folder, "plans", "list", "--server", server, "--json").stdout)["plans"]
    one = planner(folder, "plans", "show", listed[0]["id"], "--server", server, "--json")
    assert json.loads(one.stdout)["id"] == listed[0]["id"]

    asked = ["preflight", spec, "--gpu", "h200", "--batch-size", "2", "--server", server]
    verdict = planner(folder, *asked)
    assert verdict.returncode == 0, verdict.stderr
    assert "fits" in verdict.stdout
    refused = planner(folder, "jobs", "submit", spec, "--gpu", "h2000", "--server", server)
    assert refused.returncode == 2
    assert "did you mean 'h200'" in refused.stderr


def same(plan: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on who worked the plan and when."""
    answer = ("variant", "gpu", "capacity_bytes", "source", "max_batch_size", "first_oom_batch_size", "certified",
              "peak_allocated_bytes", "peak_reserved_bytes", "num_trials", "spec_hash")  # fmt: skip
    return {key: plan[key] for key in answer}


def test_a_worker_takes_the_jobs_of_a_store(folder: Path) -> None:
    store = f"--store=sqlite:///{folder / 'jobs.db'}"
    spec = str(write_spec(folder, SMALL_GPT2))
    job = json.loads(
        planner(folder, "jobs", "submit", spec, "--gpu", "h200", "--capacity", "1GiB", "--json", store).stdout
    )
    worker = subprocess.Popen(
        [*PLANNER, "worker", "--name", "w1", store], cwd=folder, stderr=subprocess.PIPE, text=True
    )
    try:
        watched = planner(folder, "jobs", "watch", job["id"], "--json", store)
    finally:
        worker.send_signal(signal.SIGTERM)
        _, log = worker.communicate(timeout=30)
    assert watched.returncode == 0, watched.stderr
    assert worker.returncode == 0, log
    assert len(json.loads(watched.stdout)["plans"]) == 2
    assert "job running on w1" in watched.stderr
    lines = [line for line in log.splitlines() if line.startswith("{")]
    assert any(json.loads(line)["event"] == "worker started" for line in lines)


def test_a_port_in_use_is_one_error(server: str, folder: Path) -> None:
    port = server.rpartition(":")[2]
    done = planner(folder, "serve", "--port", port, f"--store=sqlite:///{folder / 'other.db'}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: port: cannot listen on 127.0.0.1:{port}")


def test_a_host_that_is_none_names_its_option(folder: Path) -> None:
    done = planner(folder, "serve", "--host", "no such host", f"--store=sqlite:///{folder / 'other.db'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: host: 'no such host' is no address of this machine")


def test_a_wrong_setting_is_one_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANNER_PORT", "http")
    done = planner(folder, "serve")
    assert done.returncode == 2
    assert done.stderr.startswith("error: PLANNER_PORT: 'http'")
