"""The error tree: stable codes, one line each, and the same error on the other side of a process or the network."""

import json
import re
from pathlib import Path

import pytest

import planner.errors
from planner.errors import InvalidSpec, PlannerError, error_from_dict, nearest


def kinds(root: type[PlannerError] = PlannerError) -> list[type[PlannerError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in kinds(child))]


def own_kinds() -> list[type[PlannerError]]:
    return [kind for kind in kinds() if kind.__module__ == planner.errors.__name__]


def test_every_kind_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in own_kinds()]
    assert len(codes) == len(set(codes)) > 10
    for kind in own_kinds():
        spelt = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()
        assert kind.code == spelt


def test_the_tree_at_the_top_of_the_file_is_the_tree() -> None:
    drawn = re.findall(r"[├└]── (\w+)", planner.errors.__doc__ or "")
    assert sorted(drawn) == sorted(kind.__name__ for kind in own_kinds() if kind is not PlannerError)


@pytest.mark.parametrize("kind", own_kinds(), ids=lambda kind: kind.code)
def test_an_error_survives_json(kind: type[PlannerError]) -> None:
    error = kind("went wrong", field="model.name", suggestion="gpt2")
    again = error_from_dict(json.loads(json.dumps(error.as_dict())))
    assert type(again) is kind
    assert (again.message, again.field, again.suggestion) == ("went wrong", "model.name", "gpt2")
    assert str(again) == str(error) == "model.name: went wrong (did you mean 'gpt2'?)"


def test_text_without_a_field_or_suggestion() -> None:
    assert str(PlannerError("went wrong")) == "went wrong"
    assert str(InvalidSpec("is required", field="data")) == "data: is required"


def test_an_unknown_code_is_still_an_error() -> None:
    error = error_from_dict({"code": "from_the_future", "message": "new"})
    assert type(error) is PlannerError
    assert (error.message, error.field) == ("new", None)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("n_layerz", "n_layer"),
        ("N_Layer", "n_layer"),
        ("nlayer", "n_layer"),
        ("hidden", "hidden_size"),
        ("qqq", None),
        ("", None),
    ],
)
def test_nearest(name: str, meant: str | None) -> None:
    assert nearest(name, ["n_layer", "hidden_size", "vocab_size"]) == meant


def test_nearest_keeps_the_case_of_the_valid_name() -> None:
    assert nearest("unet", ["UNet", "ResNet"]) == "UNet"


def test_errors_know_no_http_and_import_nothing_of_the_planner() -> None:
    source = Path(planner.errors.__file__).read_text()
    assert not re.search(r"^(from|import) (planner|http|fastapi|starlette)", source, re.MULTILINE)
