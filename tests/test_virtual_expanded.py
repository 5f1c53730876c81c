"""Values kept without the dimensions along which they do not change: masks of millions of elements are known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from planner.errors import ModelError
from planner.virtual.expanded import computed, is_elementwise, is_shared, num_stored
from tests.virtual_child import Process

aten = torch.ops.aten


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


def test_only_what_changes_is_computed() -> None:
    rows, columns = torch.arange(4)[None, :, None] >= 0, torch.tensor([[[True, True, False]]])
    mask = computed(aten.bitwise_and.Tensor, 11, rows, columns)
    assert torch.equal(mask, rows & columns)
    assert (num_stored(mask), is_shared(mask)) == (3, True)
    added = computed(aten.where.self, 11, mask, torch.tensor(0.0), torch.tensor(-1.0))
    assert torch.equal(added, torch.where(mask, 0.0, -1.0))
    assert num_stored(added) == 3


@pytest.mark.parametrize("most", [5, 6])
def test_what_is_small_or_changes_everywhere_is_as_it_was(most: int) -> None:
    left, right = torch.randn(2, 3), torch.randn(3)
    total = computed(aten.add.Tensor, most, left, right, alpha=2)
    assert torch.equal(total, left + 2 * right)
    assert (num_stored(total), is_shared(total)) == (6, False)
    assert num_stored(computed(aten.relu.default, 6, torch.zeros(2, 3))) == 6


def test_elementwise_operators() -> None:
    assert is_elementwise(aten.where.self)
    assert not is_elementwise(aten.add_.Tensor)
    assert not is_elementwise(aten.sum.default)


MASK = """
length = {length}
valid = torch.ones(4, length, dtype=torch.long, device=device)
valid[:, 1:] = 0
causal = torch.arange(length, device=device)[None, None, :, None] >= 0
mask = causal & valid.bool()[:, None, None, :]
added = torch.where(mask, 0.0, -1.0)
first = added[:, 0, 0, :]
"""


def test_a_mask_of_millions_of_elements_is_known(process: Process) -> None:
    code = MASK.format(length=4096) + "result = [list(added.shape), int((first < 0).sum()), bool((first > 0).any())]"
    assert process.run(code) == [[4, 1, 4096, 4096], 4 * 4095, False]


def test_what_is_written_to_is_known_and_what_shared_its_value_is_not(process: Process) -> None:
    """Rows share the memory of their value, and do not share their own."""
    code = MASK.format(length=4096) + "first[valid == 1] = 7.0\nresult = first[0, :3].tolist()"
    assert process.run(code) == [7.0, -1.0, -1.0]
    with pytest.raises(ModelError, match="a very large one"):
        process.run(code + "\nresult = added[0, 0, 1, 0].item()")
