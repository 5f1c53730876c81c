"""What breaks a careless planner: each ends in one short error that names its field, with the process alive."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from planner.cli.options import check_batch_size
from planner.errors import MAX_QUOTED, InvalidArgument, InvalidSpec, ModelError, described, first_line
from planner.gpus import find_gpu
from planner.processes import TAIL_BYTES, ChildTimeout
from planner.selection import usable_capacity
from planner.specs.document import parse_spec
from planner.specs.variants import Variant
from planner.units import GIB, MAX_BATCH_SIZE
from planner.virtual.device import VirtualDevice
from tests.test_processes import gone

MODULE = """
import os, signal, sys, time
import torch

class Net(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.linear, self.how = torch.nn.Linear(8, 8), how
        if how == "exit while built":
            sys.exit(3)

    def forward(self, x):
        if self.how == "exit":
            sys.exit(4)
        if self.how == "os._exit":
            os._exit(0)
        if self.how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.how == "hang":
            open("hanging", "w").write(str(os.getpid()))
            time.sleep(1000)
        if self.how == "long":
            raise ValueError("tensor" * 1_000_000)
        if self.how == "names cuda":
            x = x + torch.ones(8, device="cuda")
        if self.how == "reads" and self.linear(x).sum().item() > 0:
            x = x + 1
        if self.how == "is_cuda":
            assert x.is_cuda and self.linear.weight.is_cuda and not torch.ones(1).is_cuda
        return {"loss": self.linear(x).sum()}
"""


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VirtualDevice:
    (tmp_path / "odd_net.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return VirtualDevice(find_gpu("h200"), 16 * GIB)


def _predict(device: VirtualDevice, model: dict[str, Any], data: dict[str, Any]) -> None:
    with device.open(parse_spec({"model": model, "data": data}), Variant()) as runner:
        runner.run(2)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("exit while built", "odd_net:Net could not be built: SystemExit: 3"),
        ("exit", "the training step raised SystemExit: 4"),
        ("os._exit", "the model ended the process that it ran in, which ended with exit status 0"),
        ("crash", "the model ended the process that it ran in, which was killed by SIGSEGV"),
    ],
)
def test_a_model_that_ends_its_process_is_the_models_error(device: VirtualDevice, how: str, said: str) -> None:
    model = {"source": "python", "target": "odd_net:Net", "args": {"how": how}}
    with pytest.raises(ModelError) as caught:
        _predict(device, model, {"kind": "tensors", "inputs": {"x": {"shape": [8], "dtype": "float32"}}})
    assert re.fullmatch(rf"model: {re.escape(said)}( \(odd_net, line \d+\))?", str(caught.value))


@pytest.mark.parametrize(
    ("how", "said", "line"),
    [
        ("names cuda", "the virtual GPU is not named cuda", "device='cuda'"),
        ("reads", "the model reads the value of a tensor that depends on its weights", ".item()"),
    ],
)
def test_an_error_names_the_line_of_the_model(device: VirtualDevice, how: str, said: str, line: str) -> None:
    model = {"source": "python", "target": "odd_net:Net", "args": {"how": how}}
    with pytest.raises(ModelError, match=said) as caught:
        _predict(device, model, {"kind": "tensors", "inputs": {"x": {"shape": [8], "dtype": "float32"}}})
    number = next(number for number, text in enumerate(MODULE.splitlines(), 1) if line.replace("'", '"') in text)
    assert f"(odd_net, line {number})" in str(caught.value)


def test_a_model_that_chooses_by_is_cuda_takes_the_path_of_a_gpu(device: VirtualDevice) -> None:
    model = {"source": "python", "target": "odd_net:Net", "args": {"how": "is_cuda"}}
    _predict(device, model, {"kind": "tensors", "inputs": {"x": {"shape": [8], "dtype": "float32"}}})


def test_a_model_that_hangs_is_killed_with_its_processes_and_the_device_serves_the_next(device: VirtualDevice) -> None:
    device.timeout_s = 20.0
    data = {"kind": "tensors", "inputs": {"x": {"shape": [8], "dtype": "float32"}}}
    model = {"source": "python", "target": "odd_net:Net", "args": {"how": "hang"}}
    with pytest.raises(ChildTimeout, match="did not answer within 20 s and was killed"):
        _predict(device, model, data)
    assert gone(int(Path("hanging").read_text()))
    _predict(device, {**model, "args": {"how": "well"}}, data)
    device.close()


def test_a_models_message_is_quoted_in_part(device: VirtualDevice) -> None:
    model = {"source": "python", "target": "odd_net:Net", "args": {"how": "long"}}
    with pytest.raises(ModelError) as caught:
        _predict(device, model, {"kind": "tensors", "inputs": {"x": {"shape": [8], "dtype": "float32"}}})
    quoted = f"model: the training step raised ValueError: {('tensor' * 100)[:MAX_QUOTED]}..."
    assert re.fullmatch(rf"{re.escape(quoted)} \(odd_net, line \d+\)", str(caught.value))
    assert len(caught.value.__notes__[0]) < 2 * TAIL_BYTES


@pytest.mark.parametrize(
    ("value", "said"), [("twelve", "expected int, got str"), (None, "got NoneType"), (-1, "must be at least 0, not -1")]
)
def test_a_config_value_of_the_wrong_kind_names_its_key(device: VirtualDevice, value: Any, said: str) -> None:
    model = {"source": "transformers", "model_type": "gpt2", "task": "causal-lm", "config": {"n_layer": value}}
    with pytest.raises(InvalidSpec, match=said) as caught:
        _predict(device, model, {"kind": "tokens", "sequence_length": 8})
    assert caught.value.field == "model.config.n_layer"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("  \n"), "(no message)"),
        (ValueError("\x1b[31mred\x00"), " [31mred "),
        (ValueError("é" * 10_000), "é" * MAX_QUOTED + "..."),
    ],
)
def test_the_first_line_of_an_error_is_short_and_printable(error: Exception, said: str) -> None:
    assert first_line(error) == said
    assert described(error) == f"ValueError: {said}"


def test_a_batch_size_that_no_integer_column_holds_is_refused() -> None:
    check_batch_size(MAX_BATCH_SIZE)
    with pytest.raises(InvalidArgument, match=r"must be at most 2147483647, not 1e\+23") as caught:
        check_batch_size(10**23)
    assert caught.value.field == "batch_size"


def test_a_capacity_without_its_unit_says_what_was_meant() -> None:
    with pytest.raises(InvalidArgument, match="16 B is less than") as caught:
        usable_capacity(find_gpu("h200"), 16, real=False)
    assert (caught.value.field, caught.value.suggestion) == ("capacity", "16GiB")
