"""Random weights whose values repeat."""

import pytest
import torch

from planner.specs.document import parse_spec
from planner.training import build_model
from planner.training.repeated_draws import BLOCK_VALUES, repeated_draws

SIDE = 300  # squared more than a block


def test_large_weights_repeat_their_values_and_no_row_is_another():
    assert SIDE * SIDE > BLOCK_VALUES
    with repeated_draws():
        weight = torch.nn.Linear(SIDE, SIDE).weight.detach()
    assert torch.equal(weight.view(-1)[BLOCK_VALUES:], weight.view(-1)[: SIDE * SIDE - BLOCK_VALUES])
    assert len(weight.unique(dim=0)) == SIDE
    bound = SIDE**-0.5  # of kaiming_uniform_, as torch.nn.Linear calls it
    assert weight.min() >= -bound
    assert weight.max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


@pytest.mark.parametrize("draw", [torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.trunc_normal_])
def test_torchs_initializations_draw_a_block(draw):
    with repeated_draws():
        values = draw(torch.empty(2 * BLOCK_VALUES))
    assert torch.equal(values[:BLOCK_VALUES], values[BLOCK_VALUES:])
    assert len(values[:BLOCK_VALUES].unique()) > BLOCK_VALUES / 2


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(lambda: torch.empty(BLOCK_VALUES).normal_(), id="small"),
        pytest.param(lambda: torch.empty(SIDE, SIDE).normal_(generator=torch.default_generator), id="generator"),
        pytest.param(lambda: torch.empty(SIDE, 2 * SIDE)[:, ::2].normal_(), id="not contiguous"),
    ],
)
def test_others_are_drawn_as_ever(values):
    torch.manual_seed(3)
    expected = values()
    torch.manual_seed(3)
    with repeated_draws():
        assert torch.equal(values(), expected)


def test_torch_still_refuses_to_draw_over_a_weight_that_is_trained():
    weight = torch.nn.Parameter(torch.empty(SIDE, SIDE))
    with repeated_draws(), pytest.raises(RuntimeError, match="requires grad"):
        weight.normal_()


def test_afterwards_every_value_is_drawn():
    with pytest.raises(ZeroDivisionError), repeated_draws():
        raise ZeroDivisionError
    values = torch.empty(2 * BLOCK_VALUES).normal_()
    assert not torch.equal(values[:BLOCK_VALUES], values[BLOCK_VALUES:])


def test_a_model_of_the_library_is_built_with_them():
    spec = parse_spec(
        {
            "model": {"source": "transformers", "model_type": "gpt2", "task": "causal-lm", "config": {"n_layer": 1}},
            "data": {"kind": "tokens", "sequence_length": 16},
            "train": {"optimizer": "adamw"},
        }
    )
    with repeated_draws():
        model = build_model(spec)
    values = model.transformer.wte.weight.detach().view(-1)
    assert torch.equal(values[:BLOCK_VALUES], values[BLOCK_VALUES : 2 * BLOCK_VALUES])
    assert values.std().item() == pytest.approx(model.config.initializer_range, rel=0.02)
