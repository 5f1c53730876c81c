"""The sizes of cuDNN's recurrent layers, against what cuDNN answered on an H200."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from planner.virtual.architecture import Architecture
from planner.virtual.cudnn_rnn import (
    Algorithm,
    Cell,
    Layers,
    Run,
    algorithm,
    reserve_bytes,
    workspace_bytes,
    workspace_bytes_of,
    workspace_doubt_bytes,
)

DATA = Path(__file__).parent.parent / "measurements/h200/recurrent.json.gz"
H200 = Architecture(compute_capability=(9, 0), num_sms=132, torch_version=(2, 11))
LSTM_LM = Run(
    Layers(Cell.LSTM, 512, 512, 0, 2, 1), "float32", 128, 4, 512, packed=False, dropout=True, architecture=H200
)
BLOCK = 512


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(DATA.read_bytes()))
    return found


def _run(row: dict[str, Any]) -> Run:
    steps, batch = row["steps"], row["batch"]
    even = [max(1, steps - index * steps // batch) for index in range(batch)]
    layers = Layers(Cell[row["cell"]], row["input"], row["hidden"], row["projection"], row["layers"], row["directions"])
    tokens = sum(even) if row["packed"] == 2 else steps * batch
    return Run(layers, row["dtype"], steps, batch, tokens, bool(row["packed"]), bool(row["dropout"]), H200)


def test_the_sizes_in_the_recorded_trace_of_lstm_lm() -> None:
    half = replace(LSTM_LM, dtype="float16")
    assert (reserve_bytes(LSTM_LM), reserve_bytes(half)) == (11_567_360, 5_800_192)
    for forward in (True, False):
        assert workspace_bytes(LSTM_LM, training=True, forward=forward) == 41_058_592
        assert workspace_bytes(half, training=True, forward=forward) == 28_918_048
    assert 4 * LSTM_LM.layers.num_weights == 16_809_984


def test_what_cudnn_answered(document: dict[str, Any]) -> None:
    """A seventh of its answers: the reserve and the weights to the byte, a workspace within the allocator's block."""
    errors: dict[str, Counter[int]] = {name: Counter() for name in ("weights", "reserve", "workspace", "inference")}
    for values in document["rows"][::7]:
        row = dict(zip(document["columns"], values, strict=True))
        run, asked = _run(row), Algorithm(row["algorithm"])
        if row["status"] or asked not in (Algorithm.STANDARD, algorithm(run, forward=True)):
            continue
        errors["weights"][run.layers.num_weights * run.element_bytes - row["weights"]] += 1
        errors["reserve"][reserve_bytes(run) - row["reserve"]] += 1
        errors["workspace"][workspace_bytes_of(run, asked, training=True) - row["workspace"]] += 1
        errors["inference"][workspace_bytes_of(run, asked, training=False) - row["inference_workspace"]] += 1
    assert errors["weights"].total() > 5000
    assert set(errors["weights"]) == set(errors["reserve"]) == {0}
    for name in ("workspace", "inference"):
        assert errors[name][0] > 0.985 * errors[name].total()
        assert max(abs(error) for error in errors[name]) < BLOCK


def test_the_random_state_of_dropout(document: dict[str, Any]) -> None:
    assert document["num_sms"] == H200.num_sms
    assert document["dropout_state_bytes"] == H200.cudnn_dropout_state_bytes == 6_488_064


@pytest.mark.parametrize("has_biases", [True, False])
@pytest.mark.parametrize("projection", [0, 5])
def test_weights_lie_side_by_side(has_biases: bool, projection: int) -> None:
    layers = Layers(Cell.LSTM, 7, 11, projection, 3, 2)
    places = layers.places(has_biases)
    assert len(places) == layers.cells * (2 + 2 * has_biases + bool(projection))
    taken = sorted((offset, offset + size) for offset, size in places)
    assert taken[0][0] == 0
    assert all(end == start for (_, end), (start, _) in pairwise(taken))
    biases = 0 if has_biases else 2 * 4 * 11 * layers.cells
    assert taken[-1][1] == layers.num_weights - biases


@pytest.mark.parametrize(
    ("changes", "cell", "hidden", "forward", "backward"),
    [
        ({}, Cell.LSTM, 512, 0, 0),
        ({}, Cell.LSTM, 160, 3, 0),
        ({}, Cell.GRU, 128, 3, 3),
        ({}, Cell.RNN_TANH, 320, 3, 0),
        ({"packed": True}, Cell.GRU, 128, 0, 0),
        ({"dtype": "float64"}, Cell.GRU, 128, 0, 0),
        ({"dtype": "float16", "batch": 16}, Cell.LSTM, 512, 1, 1),
        ({"dtype": "float16", "batch": 12}, Cell.LSTM, 512, 0, 0),
        ({"dtype": "float16", "batch": 136}, Cell.LSTM, 512, 0, 0),
        ({"dtype": "float16", "batch": 16}, Cell.GRU, 512, 0, 0),
        ({"dtype": "bfloat16", "batch": 16}, Cell.LSTM, 512, 0, 0),
    ],
)
def test_which_algorithm_pytorch_asks_for(
    changes: dict[str, Any], cell: Cell, hidden: int, forward: int, backward: int
) -> None:
    run = replace(LSTM_LM, layers=Layers(cell, 512, hidden, 0, 1, 1), **changes)
    assert (algorithm(run, forward=True), algorithm(run, forward=False)) == (forward, backward)


def test_a_projection_takes_the_standard_algorithm() -> None:
    run = replace(LSTM_LM, layers=Layers(Cell.LSTM, 64, 64, 32, 1, 1))
    assert algorithm(run, forward=True) is Algorithm.STANDARD


@pytest.mark.parametrize(
    ("compute_capability", "num_sms", "batch", "persistent"),
    [((7, 0), 80, 16, True), ((7, 0), 80, 80, False), ((7, 5), 40, 16, False), ((8, 0), 108, 24, True),
     ((8, 0), 56, 24, False), ((8, 6), 128, 24, False)],
)  # fmt: skip
def test_which_gpus_run_persistent_kernels(
    compute_capability: tuple[int, int], num_sms: int, batch: int, persistent: bool
) -> None:
    gpu = Architecture(compute_capability=compute_capability, num_sms=num_sms, torch_version=(2, 11))
    layers = Layers(Cell.LSTM, 512, 512, 0, 1, 1)
    run = replace(LSTM_LM, layers=layers, dtype="float16", batch=batch, architecture=gpu)
    assert (algorithm(run, forward=True) is Algorithm.PERSIST_STATIC) == persistent


def test_an_architecture_that_was_not_asked_is_doubted() -> None:
    assert workspace_doubt_bytes(LSTM_LM, training=True) == 0
    elsewhere = replace(LSTM_LM, architecture=replace(H200, compute_capability=(8, 0)))
    assert workspace_doubt_bytes(elsewhere, training=True) == workspace_bytes(elsewhere, training=True)
