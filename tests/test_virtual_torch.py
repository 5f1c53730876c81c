"""The virtual GPU under a torch that is too old for it."""

import json
import os
import subprocess
import sys

import pytest

from planner.errors import DeviceUnavailable
from planner.gpus import find_gpu
from planner.units import GIB
from planner.virtual.device import VirtualDevice
from tests.planning_fakes import make_spec

SAID = "predictions need torch 2.10 or newer; torch 2.9.1+cu128 is installed here"


@pytest.fixture
def _old_torch(monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cu128'\ncuda = '12.8'\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_old_torch")
def test_no_process_is_started_for_it():
    device = VirtualDevice(find_gpu("h200"), GIB)
    with pytest.raises(DeviceUnavailable, match=r"need torch 2\.10 or newer"):
        device.prepare(make_spec(), [])


@pytest.mark.usefixtures("_old_torch")
def test_the_command_says_so(tmp_path):
    spec = tmp_path / "spec.json"
    model = {"source": "torchvision", "name": "resnet18"}
    spec.write_text(json.dumps({"model": model, "data": {"kind": "images", "size": 64}}))
    done = subprocess.run(
        [sys.executable, "-m", "planner", "predict", spec, "--gpu", "h200", "--store", f"sqlite:///{tmp_path}/a.db"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert SAID in " ".join((done.stdout + done.stderr).split())
