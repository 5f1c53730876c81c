"""Closing the virtual GPU while another thread waits for its answer."""

import threading
import time

import pytest

from planner.gpus import find_gpu
from planner.processes import Child, ChildDied
from planner.units import GIB
from planner.virtual.device import VirtualDevice
from tests.planning_fakes import FP32, make_spec


@pytest.fixture
def device(monkeypatch):
    start = Child.start.__func__
    monkeypatch.setattr(
        Child, "start", classmethod(lambda cls, module, **given: start(cls, "tests.virtual_slow_child"))
    )
    device = VirtualDevice(find_gpu("h200"), GIB, timeout_s=60)
    yield device
    device.close()


def test_whoever_waits_for_an_answer_is_told_at_once(device, tmp_path, monkeypatch):
    begun, ended, children = tmp_path / "begun", [], []
    kill = Child.kill

    def watched_kill(child):
        children.append(threading.current_thread().name)
        kill(child)

    monkeypatch.setattr(Child, "kill", watched_kill)

    def ask():
        try:
            device.open(make_spec(), FP32).run(str(begun))
        except ChildDied as error:
            ended.append(error)

    thread = threading.Thread(target=ask, name="asks")
    thread.start()
    deadline = time.monotonic() + 30
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    device.close()
    thread.join(10)
    assert not thread.is_alive()
    assert "SIGKILL" in str(ended[0])
    assert children[0] == "asks", "the one that reads from a process clears it away: two would close its pipes twice"


def test_a_closed_device_starts_again(device):
    spec = make_spec()
    device.wait(spec)
    device.close()
    device.wait(spec)
