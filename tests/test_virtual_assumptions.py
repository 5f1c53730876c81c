"""Mixtures of experts, values that a step of the user's own reads, and large indices: what is assumed, and said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from planner.errors import InvalidSpec, ModelError
from planner.gpus import find_gpu
from planner.planning import plan_sweep
from planner.specs.document import parse_spec
from planner.trials import PlanStatus
from planner.units import GIB
from planner.virtual.device import VirtualDevice
from tests.test_virtual_models import SMALL, TOKENS, _transformers
from tests.virtual_child import Process

EXPERTS = {
    "mixtral": _transformers("mixtral", "causal-lm", num_key_value_heads=2, num_local_experts=8, **SMALL),
    "qwen2_moe": _transformers(
        "qwen2_moe", "causal-lm", num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
        shared_expert_intermediate_size=64, **SMALL,
    ),
    "olmoe": _transformers(
        "olmoe", "causal-lm", num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, **SMALL
    ),
    "switch_transformers": _transformers(
        "switch_transformers", "seq2seq-lm", d_model=64, d_kv=16, d_ff=128, num_layers=1, num_decoder_layers=1,
        num_heads=4, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    ),
}  # fmt: skip
BALANCED = "every one is assumed to get as many tokens as any other"
WORST = "every token is assumed to go to the same ones"


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


def _traced(process: Process, model: dict[str, Any], implementation: str | None, **train: Any) -> dict[str, Any]:
    config = {**model["config"], **({"experts_implementation": implementation} if implementation else {})}
    spec = {"model": {**model, "config": config}, "data": TOKENS, "train": train}
    found: dict[str, Any] = process.do("traced", spec=spec, variant={"precision": "bf16-amp"}, batch_size=2)
    return found


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe"])
def test_experts_run_under_a_stated_assumption(process: Process, name: str, implementation: str) -> None:
    """One kernel for all experts hardly depends on who gets what; a loop over experts does, and says so."""
    balanced = _traced(process, EXPERTS[name], implementation)
    assert [BALANCED in note for note in balanced["notes"]] == [True] * (implementation == "eager")
    worst = _traced(process, EXPERTS[name], implementation, routing="worst")
    assert [WORST in note for note in worst["notes"]] == [True]


def test_switch_transformers_choose_by_the_maximum(process: Process) -> None:
    for routing, words in (("balanced", BALANCED), ("worst", WORST)):
        trace = _traced(process, EXPERTS["switch_transformers"], None, routing=routing)
        assert any(words in note for note in trace["notes"])


def test_balanced_experts_get_equal_shares_and_the_worst_two_get_everything(process: Process) -> None:
    """128 tokens, 2 experts each: 32 rows for each of 8, or 128 for 2."""
    rows = {"balanced": 32, "worst": 128}
    for routing, count in rows.items():
        trace = _traced(process, EXPERTS["mixtral"], "eager", routing=routing)
        gathered = [
            size for size, operator in zip(trace["sizes"], trace["operators"], strict=True) if operator == "aten::index"
        ]
        assert count * 64 * 4 in gathered
        assert {size for size in gathered if size > 16_384} == ({count * 64 * 4} if count * 64 * 4 > 16_384 else set())


def test_traces_of_experts_scale(process: Process) -> None:
    config = {**EXPERTS["mixtral"]["config"], "experts_implementation": "eager"}
    spec = {"model": {**EXPERTS["mixtral"], "config": config}, "data": TOKENS}
    found = process.do("scaled_and_traced", spec=spec, variant={}, batch_sizes=[3, 16])
    assert [(item["same_order"], item["differing"]) for item in found] == [(True, 0), (True, 0)]


def test_the_plan_says_what_was_assumed() -> None:
    config = {**EXPERTS["olmoe"]["config"], "experts_implementation": "eager"}
    spec = parse_spec({"model": {**EXPERTS["olmoe"], "config": config}, "data": TOKENS})
    (plan,) = plan_sweep(spec, VirtualDevice(find_gpu("h200"), GIB), batch_size=2)
    assert plan.status is PlanStatus.PLANNED
    assert any(BALANCED in note for note in plan.notes)


def test_a_model_without_experts_has_no_worst_case(process: Process) -> None:
    with pytest.raises(InvalidSpec, match="chooses no experts") as caught:
        _traced(process, _transformers("gpt2", "causal-lm", n_layer=1), None, routing="worst")
    assert caught.value.field == "train.routing"


# A step of the user's own


def _linear(process: Process, train: dict[str, Any], **args: Any) -> dict[str, Any]:
    inputs = {
        "features": {"shape": [8], "dtype": "float32"},
        "labels": {"shape": [], "dtype": "int64", "high": 4},
    }
    model = {"source": "python", "target": "tests.virtual_models:Classifier", "args": args}
    spec = {"model": model, "data": {"kind": "tensors", "inputs": inputs}, "train": train}
    found: dict[str, Any] = process.do("traced", spec=spec, variant={}, batch_size=2)
    return found


def test_a_step_of_the_users_own_may_read_its_loss(process: Process) -> None:
    """As most do, to log it."""
    trace = _linear(process, {"step": "tests.virtual_models:reading_step"})
    assert ["train.step reads values" in note for note in trace["notes"]] == [True]


def test_a_model_that_branches_on_its_weights_is_refused_in_any_step(process: Process) -> None:
    for train in ({}, {"step": "tests.virtual_models:reading_step"}):
        with pytest.raises(ModelError, match="reads the value of a tensor that depends on its weights"):
            _linear(process, train, branch=True)


# Large indices


def test_indices_of_which_only_the_range_is_known_are_checked(process: Process) -> None:
    """Four million tokens: their values are not kept, and an embedding that is too small is found all the same."""
    code = """
def embed(rows):
    tokens = torch.randint(0, 1000, (4, 1 << 20), device=device)
    table = torch.nn.Embedding(rows, 4).to(device)
    return list(table(tokens.view(2, -1).contiguous()[:, 1:]).shape)

result = [embed(1000)]
try:
    embed(999)
except Exception as error:
    result.append(str(error))
"""
    shape, words = process.run(code)
    assert shape == [2, (2 << 20) - 1, 4]
    assert "embedding looks up index 999 of 999" in words


@pytest.mark.parametrize(("precision", "assumed"), [("fp16-amp", True), ("bf16-amp", False)])
def test_fp16_is_assumed_not_to_overflow(process: Process, precision: str, assumed: bool) -> None:
    inputs = {"features": {"shape": [8], "dtype": "float32"}, "labels": {"shape": [], "dtype": "int64", "high": 4}}
    spec = {
        "model": {"source": "python", "target": "tests.virtual_models:Classifier"},
        "data": {"kind": "tensors", "inputs": inputs},
    }
    trace = process.do("traced", spec=spec, variant={"precision": precision}, batch_size=2)
    assert any("every step is assumed to update the weights" in note for note in trace["notes"]) == assumed
