"""Indices that a GPU would refuse are refused by the virtual one too: it has no data, but it knows small integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from planner.errors import InvalidSpec, ModelError, PlannerError
from tests.virtual_child import Process

GPT2 = {
    "source": "transformers",
    "model_type": "gpt2",
    "task": "causal-lm",
    "config": {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32},
}


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


def _trace(process: Process, model: dict[str, Any], data: dict[str, Any]) -> Any:
    return process.do("traced", spec={"model": model, "data": data}, variant={}, batch_size=2)


def _tensors(ids_high: int, labels_high: int) -> dict[str, Any]:
    highs = {"input_ids": ids_high, "labels": labels_high}
    inputs = {name: {"shape": [8], "dtype": "int64", "high": high} for name, high in highs.items()}
    return {"kind": "tensors", "inputs": inputs}


def test_more_tokens_than_positions_name_the_longest_that_works(process: Process) -> None:
    with pytest.raises(InvalidSpec, match="more than the model has positions for") as caught:
        _trace(process, GPT2, {"kind": "tokens", "sequence_length": 40})
    assert (caught.value.field, caught.value.suggestion) == ("data.sequence_length", "32")
    assert _trace(process, GPT2, {"kind": "tokens", "sequence_length": 32})["sizes"]


def test_lengths_beyond_the_positions_name_their_own_field(process: Process) -> None:
    with pytest.raises(InvalidSpec, match=r"40 tokens are more than .*; data\.sequence_length: 32 cuts") as caught:
        _trace(process, GPT2, {"kind": "tokens", "lengths": [8, 40]})
    assert caught.value.field == "data.lengths"
    assert _trace(process, GPT2, {"kind": "tokens", "lengths": [8, 40], "sequence_length": 32})["sizes"]


def test_positions_that_are_offset_are_counted_from_their_start(process: Process) -> None:
    config = {
        "num_hidden_layers": 1, "hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "vocab_size": 50,
        "word_embed_proj_dim": 16, "max_position_embeddings": 24,
    }  # fmt: skip
    opt = {"source": "transformers", "model_type": "opt", "task": "causal-lm", "config": config}
    with pytest.raises(InvalidSpec) as caught:
        _trace(process, opt, {"kind": "tokens", "sequence_length": 30})
    assert caught.value.suggestion == "24"
    assert _trace(process, opt, {"kind": "tokens", "sequence_length": 24})["sizes"]


def test_integers_are_checked_over_the_whole_range_that_the_spec_names(process: Process) -> None:
    assert _trace(process, GPT2, _tensors(50, 50))["sizes"]
    with pytest.raises(ModelError, match="embedding looks up index 50 of 50"):
        _trace(process, GPT2, _tensors(51, 50))
    with pytest.raises(ModelError, match="nll_loss_forward looks up class 50 of 50"):
        _trace(process, GPT2, _tensors(50, 51))


def test_a_model_without_a_classifier_needs_the_number_of_classes(process: Process) -> None:
    model = {"source": "timm", "name": "resnet10t", "args": {"num_classes": 0}}
    with pytest.raises(InvalidSpec, match=r"data\.classes: is needed: the model has 512 outputs"):
        _trace(process, model, {"kind": "images", "size": 32})


@pytest.mark.parametrize(
    "lookup",
    [
        "torch.nn.functional.embedding(known, rows)",
        "rows[known]",
        "rows.index_select(0, known)",
        "rows[:, 0].gather(0, known)",
        "rows[:, 0].scatter_add(0, known, torch.ones(2, device=device))",
        "torch.nn.functional.cross_entropy(rows[:2].T[:2], known)",
    ],
)
def test_every_kind_of_lookup_is_checked(process: Process, lookup: str) -> None:
    code = (
        "rows = torch.randn(6, 4, device=device); known = torch.tensor({}, device=device); " + f"{lookup}; result = 1"
    )
    valid = "[1, -100]" if "cross" in lookup else "[1, -6]" if lookup == "rows[known]" else "[0, 1]"
    assert process.run(code.format(valid)) == 1
    with pytest.raises(PlannerError, match=r"IndexOutOfRange: .* 6 of "):
        process.run(code.format("[1, 6]"))


def test_indices_that_depend_on_weights_are_not_known_and_not_refused(process: Process) -> None:
    code = """
slots = torch.full((4,), -1, device=device)
slots[1:3].copy_(torch.randn(2, 6, device=device).argmax(-1))
result = list(torch.nn.functional.embedding(slots, torch.randn(6, 4, device=device)).shape)
"""
    assert process.run(code) == [4, 4]


def test_a_large_tensor_of_constants_takes_no_host_memory(process: Process) -> None:
    code = "big = torch.ones(1 << 40, device=device); result = big.untyped_storage().nbytes()"
    assert process.run(code) == 1 << 42
