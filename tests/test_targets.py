"""Which user code the operator allows."""

from __future__ import annotations

import pytest

from planner.errors import InvalidSpec, TargetNotAllowed
from planner.specs.document import parse_spec
from planner.targets import check_targets, is_allowed, parse_prefixes

SPEC = parse_spec(
    {
        "model": {"source": "python", "target": "my_project.models:UNet"},
        "data": {"kind": "tensors", "inputs": {"x": {"shape": [3], "dtype": "float32"}}},
        "train": {"loss": "other.losses:dice"},
    }
)


def test_prefixes_end_at_a_dot() -> None:
    assert is_allowed("my_project:UNet", ["my_project"])
    assert is_allowed("my_project.models:UNet", ["my_project"])
    assert not is_allowed("my_project_two.models:UNet", ["my_project"])
    assert not is_allowed("my_project:UNet", ["my_project.models"])
    assert not is_allowed("my_project:UNet", [])


def test_prefixes_are_read_from_one_line() -> None:
    assert parse_prefixes(" my_project, other.losses ,,") == ("my_project", "other.losses")
    assert parse_prefixes("") == ()


def test_every_target_must_be_allowed() -> None:
    check_targets(SPEC, ["my_project", "other"])
    with pytest.raises(TargetNotAllowed) as caught:
        check_targets(SPEC, ["my_project"])
    assert caught.value.field == "train.loss"
    assert isinstance(caught.value, InvalidSpec)
