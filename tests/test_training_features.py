"""Accumulation, clipping, averages, frozen parameters, evaluation and lengths, on the CPU: each does what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from planner.errors import InvalidSpec
from planner.specs.document import parse_spec
from planner.specs.model import Routing, Spec
from planner.specs.variants import Parallelism, Precision, Variant
from planner.training import Training, build_model, phases
from tests import training_targets
from tests.test_training import SMALL, TARGETS, XY, _training, _transformers

SGD = {"name": "sgd", "lr": 0.1}


def _blocks(**train: Any) -> Spec:
    model = {"source": "python", "target": f"{TARGETS}:Regression", "args": {"returns": "scalar"}}
    return parse_spec({"model": model, "data": XY, "train": {"optimizer": SGD, **train}})


def _weights(training: Training) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in training.model.parameters()]


def test_micro_batches_add_up_to_one_batch() -> None:
    """The mean of three means of 5 samples is the mean of the 15."""
    training = _training(_blocks(accumulation_steps=3))
    mine = training_targets.Regression("scalar")
    mine.load_state_dict(training.model.state_dict())
    torch.manual_seed(1)
    training.step(5)
    torch.manual_seed(1)
    drawn = [(torch.randn(5, 4), torch.randn(5, 2)) for _ in range(3)]
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    torch.autograd.backward(mine(torch.cat([x for x, _ in drawn]), torch.cat([y for _, y in drawn])))
    optimizer.step()
    for expected, found in zip(mine.parameters(), training.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16_AMP])
def test_clipped_gradients_have_the_norm_that_was_asked_for(precision: Precision) -> None:
    """Of the gradients themselves: fp16-amp's are scaled by 65,536 until then."""
    training = _training(_blocks(clip_grad_norm=0.01), precision=precision)
    training.step(8)
    norm = torch.nn.utils.get_total_norm([p.grad for p in training.model.parameters() if p.grad is not None])
    torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0.0)


def test_the_moving_average_follows_the_weights() -> None:
    training = _training(_blocks(ema=0.9))
    training.step(4)
    average = _weights(training)  # the first update copies
    for _ in range(2):
        training.step(4)
        average = [torch.lerp(old, new, 0.1) for old, new in zip(average, _weights(training), strict=True)]
    assert training.ema is not None
    for expected, found in zip(average, training.ema.module.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    assert all(parameter.grad is None for parameter in training.ema.module.parameters())


def test_frozen_parameters_keep_their_values_and_have_no_gradient_or_state() -> None:
    training = _training(_blocks(freeze=["*.weight"], optimizer="adamw"))
    before = _weights(training)
    training.step(4)
    moved = [not torch.equal(old, new) for old, new in zip(before, _weights(training), strict=True)]
    assert moved == [False, True]
    assert [parameter.grad is None for parameter in training.model.parameters()] == [True, False]
    assert len(training.optimizer.state) == 1


def test_a_tied_parameter_is_frozen_by_either_name() -> None:
    spec = {"model": {"source": "python", "target": "tests.virtual_models:Tied"}, "data": XY}
    for name in ("embed.weight", "project.weight"):
        parsed = parse_spec({**spec, "train": {"freeze": name}})
        with pytest.raises(InvalidSpec, match="no parameter that requires a gradient") as caught:
            Training(parsed, Variant(), build_model(parsed), torch.device("cpu"))
        assert caught.value.field == "train.freeze"


@pytest.mark.parametrize(("pattern", "nearest"), [("linaer.weight", "linear.weight"), ("linaer.*", "linear.*")])
def test_a_pattern_that_matches_nothing_names_the_nearest(pattern: str, nearest: str) -> None:
    with pytest.raises(InvalidSpec, match="no parameter's name matches") as caught:
        _training(_blocks(freeze=["*.bias", pattern]))
    assert (caught.value.field, caught.value.suggestion) == ("train.freeze[1]", nearest)


def test_an_evaluation_step_has_its_own_mode_and_size() -> None:
    model = {"source": "python", "target": f"{TARGETS}:Blocks"}
    spec = parse_spec({"model": model, "data": XY, "train": {"evaluation": {"batch_size": 7}}})
    training = _training(spec)
    schedule = phases(spec)
    assert [(phase.name, phase.size(2)) for phase in schedule] == [
        ("step 1", 2), ("step 2", 2), ("step 3", 2), ("evaluation", 7), ("step 4", 2),
    ]  # fmt: skip
    for phase in schedule:
        training.run(phase, 2)
    train, evaluate = (True, True), (False, False)
    assert training.model.calls == [train, train, train, evaluate, train]


def test_the_longest_batch_comes_first_and_again_after_others() -> None:
    lengths = {"lengths": [4, 8, 16], "counts": [5, 3, 1]}
    spec = _transformers("bert", "masked-lm", {"kind": "tokens", "lengths": lengths}, **SMALL)
    found = [phase.sequence_length for phase in phases(spec)]
    assert found[:2] == [16, 16]
    assert found[-1] == 16
    assert len(found) == 7
    assert set(found) <= {4, 8, 16}
    assert found == [phase.sequence_length for phase in phases(spec)], "the same in every process"
    assert not phases(spec)[0].repeats(phases(spec)[2])
    assert phases(spec)[0].repeats(phases(spec)[1])


def test_a_batch_is_padded_to_its_longest_sample() -> None:
    lengths = {"lengths": [4, 8, 16], "counts": [5, 3, 1]}
    training = _training(_transformers("bert", "masked-lm", {"kind": "tokens", "lengths": lengths}, **SMALL))
    batch = training.batch(6, 8)
    assert {name: tuple(item.shape) for name, item in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (6, 8)
    )
    sums = batch["attention_mask"].sum(1).tolist()
    assert sums[0] == 8
    assert sums[-1] == 4
    assert set(sums) <= {4, 8}
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    for phase in phases(training.spec):
        training.run(phase, 3)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_in_the_worst_case_every_token_goes_to_the_same_experts(implementation: str) -> None:
    def chosen(routing: str) -> set[int]:
        config = {"num_key_value_heads": 2, "num_local_experts": 8, "experts_implementation": implementation}
        data = {"kind": "tokens", "sequence_length": 32}
        plain = _transformers("mixtral", "causal-lm", data, **SMALL, **config)
        spec = replace(plain, train=replace(plain.train, routing=Routing(routing)))
        training, found = _training(spec), set[int]()
        experts = training.model.model.layers[0].mlp.experts
        experts.register_forward_pre_hook(lambda _, args: found.update(args[1].flatten().tolist()))
        training.run(phases(spec)[0], 4)
        assert bool(training.report()) == (routing == "worst")
        return found

    assert chosen("worst") == {0, 1}
    assert len(chosen("balanced")) > 2


def test_parallel_variants_are_refused_here() -> None:
    with pytest.raises(InvalidSpec, match="fsdp2 is measured on 2 GPUs of one host") as caught:
        _training(_blocks(), parallelism=Parallelism.FSDP2, gpus=2)
    assert caught.value.field == "variants.parallelism"
