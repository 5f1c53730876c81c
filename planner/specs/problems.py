"""From pydantic's list of everything that is wrong with a document to the one error that helps its author most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import AliasChoices, BaseModel, ValidationError

from planner.errors import InvalidSpec, nearest
from planner.specs.plain import join, shown
from planner.specs.sections import (
    DistributionSection,
    EvaluationSection,
    HistogramSection,
    ImagesData,
    PythonModel,
    SearchSection,
    SpecDocument,
    TensorInputSection,
    TensorsData,
    TimmModel,
    TokensData,
    TorchvisionModel,
    TrainSection,
    TransformersModel,
    VariantsSection,
)

_Loc = tuple[int | str, ...]

# Sections whose keys depend on the value of one of them, as (that key, its value -> section).
_UNIONS: Mapping[str, tuple[str, Mapping[str, type[BaseModel]]]] = {
    "model": (
        "source",
        {
            "transformers": TransformersModel,
            "timm": TimmModel,
            "torchvision": TorchvisionModel,
            "python": PythonModel,
        },
    ),
    "data": ("kind", {"tokens": TokensData, "images": ImagesData, "tensors": TensorsData}),
}

_LENGTHS: Mapping[str, type[BaseModel]] = {"distribution": DistributionSection, "histogram": HistogramSection}

# What the same thing is called by another source: said instead of the nearest spelling.
_OTHER_NAMES = {
    ("transformers", "name"): "model_type",
    ("transformers", "args"): "config",
    ("timm", "target"): "name",
    ("torchvision", "target"): "name",
    ("python", "name"): "target",
    ("python", "model_type"): "target",
    ("python", "config"): "args",
}

_HOMES: Mapping[str, Iterable[type[BaseModel]]] = {
    **{name: sections.values() for name, (_, sections) in _UNIONS.items()},
    "train": (TrainSection,),
    "variants": (VariantsSection,),
    "search": (SearchSection,),
}
"""Where a key belongs that stands in the wrong section."""

_BESIDE = {"batch_size": "--batch-size N", "gpu": "--gpu NAME", "capacity": "--capacity SIZE"}
"""What belongs to the question, not to the work."""

_OPTIMIZER_ARGUMENTS = {"learning_rate": "lr"} | {key: key for key in ("lr", "weight_decay", "momentum", "betas")}

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def first_problem(error: ValidationError, document: Mapping[str, Any]) -> InvalidSpec:
    """The most useful of ``error``'s problems with ``document``, with the field's path as the user would write it.

    The first in the document's order; but where a key is missing and an unknown one stands beside it, the unknown one,
    since it is usually the missing one misspelt.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    if first["type"] == "missing":
        beside = [
            item for item in problems if item["type"] == "extra_forbidden" and item["loc"][:-1] == first["loc"][:-1]
        ]
        missing = str(first["loc"][-1])
        likely = [item for item in beside if nearest(str(item["loc"][-1]), [missing])]
        first = (likely or beside or [first])[0]
    return _translate(first, document)


def _translate(problem: Any, document: Mapping[str, Any]) -> InvalidSpec:
    kind: str = problem["type"]
    loc: _Loc = problem["loc"]
    context: Mapping[str, Any] = problem.get("ctx", {})
    value = problem["input"]
    path = _path(loc, document)
    if kind == "extra_forbidden":
        return _unknown_key(loc, path)
    if kind.startswith("union_tag"):
        return _wrong_kind(str(loc[0]), value)
    if kind == "planner":
        field = join(path, context["at"]) if context["at"] else path
        return InvalidSpec(context["message"], field=field, suggestion=context["suggestion"])
    if kind == "missing":
        sibling = _misspelt(value, str(loc[-1])) if isinstance(value, Mapping) else None
        if sibling:
            return InvalidSpec("unknown key", field=join(_path(loc[:-1], document), sibling), suggestion=str(loc[-1]))
        return InvalidSpec("is required", field=path)
    if kind in _EXPECTED:
        quote = "; put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
        return InvalidSpec(f"must be {_EXPECTED[kind]}, not {shown(value)}{quote}", field=path)
    if kind == "greater_than_equal":
        return InvalidSpec(f"must be at least {context['ge']}, not {shown(value)}", field=path)
    if kind == "less_than_equal":
        return InvalidSpec(f"must be at most {context['le']}, not {shown(value)}", field=path)
    if kind == "greater_than":
        return InvalidSpec(f"must be more than {context['gt']:g}, not {shown(value)}", field=path)
    if kind == "less_than":
        return InvalidSpec(f"must be less than {context['lt']:g}, not {shown(value)}", field=path)
    if kind in ("too_long", "string_too_long"):
        return InvalidSpec(f"is longer than {context['max_length']}", field=path)
    return InvalidSpec(f"{problem['msg'][:1].lower()}{problem['msg'][1:]}", field=path)


def _path(loc: _Loc, document: Mapping[str, Any]) -> str:
    """The dotted path, without pydantic's union tags and without what lies inside a scalar shorthand.

    ``precision: fp8`` stands for a list, ``optimizer: adamm`` for a mapping: the path is that of the scalar.
    """
    path = ""
    value: Any = document
    for position, part in enumerate(loc):
        if position == 1 and loc[0] in _UNIONS and part in _UNIONS[str(loc[0])][1]:
            continue
        if position == 3 and loc[2] == "lengths" and part in _LENGTHS:
            continue
        if isinstance(value, Mapping):
            value = value.get(str(part))
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            break
        path = join(path, part)
    return path


def keys_of(section: type[BaseModel]) -> list[str]:
    """The keys that a user may write in ``section``, second names included."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        alias = field.validation_alias
        keys += [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [name]
    return keys


def _section(parent: _Loc) -> type[BaseModel]:
    match parent:
        case ():
            return SpecDocument
        case ("model" | "data" as name, str(tag)):
            return _UNIONS[name][1][tag]
        case ("data", "tensors", "inputs", _):
            return TensorInputSection
        case ("data", "tokens", "lengths", str(tag)):
            return _LENGTHS[tag]
        case ("train",):
            return TrainSection
        case ("train", "evaluation"):
            return EvaluationSection
        case ("search",):
            return SearchSection
        case ("variants",):
            return VariantsSection
    raise AssertionError(f"a section without known keys: {parent}")


def _unknown_key(loc: _Loc, path: str) -> InvalidSpec:
    parent, key = loc[:-1], str(loc[-1])
    keys = keys_of(_section(parent))
    if len(parent) == 2 and parent[0] in _UNIONS:
        name, tag = str(parent[0]), str(parent[1])
        discriminator, sections = _UNIONS[name]
        if key in keys:
            return InvalidSpec("says the same as another key here; keep one of them", field=path)
        owners = [other for other, section in sections.items() if key in keys_of(section)]
        if owners:
            return InvalidSpec(
                f"is a key of {discriminator}: {' and '.join(owners)}, not of {discriminator}: {tag}",
                field=path,
                suggestion=_OTHER_NAMES.get((tag, key)),
            )
    return _misplaced(parent, path, key) or _unknown(path, key, keys)


def _misplaced(parent: _Loc, path: str, key: str) -> InvalidSpec | None:
    """The error for a key of a section that is known, though not there."""
    if len(parent) > 2:
        return None
    if key in _BESIDE and parent != ("variants",):  # where gpu is rather gpus
        return InvalidSpec(f"is said beside a spec, not in it: {_BESIDE[key]}, or {key} over HTTP", field=path)
    if key in _OPTIMIZER_ARGUMENTS:
        message = f"is an argument of the optimizer: optimizer: {{name: ..., {_OPTIMIZER_ARGUMENTS[key]}: ...}}"
        return InvalidSpec(message, field=path, suggestion=f"train.optimizer.{_OPTIMIZER_ARGUMENTS[key]}")
    homes = [home for home, sections in _HOMES.items() if any(key in keys_of(section) for section in sections)]
    if len(homes) != 1:
        return None
    return InvalidSpec(f"is a key of {homes[0]}", field=path, suggestion=f"{homes[0]}.{key}")


def _unknown(path: str, key: str, keys: Iterable[str]) -> InvalidSpec:
    near = nearest(key, keys)
    listed = "" if near else f"; valid: {', '.join(keys)}"
    return InvalidSpec(f"unknown key{listed}", field=path, suggestion=near)


def _misspelt(section: Mapping[str, Any], key: str) -> str | None:
    """The key of ``section`` that was probably meant to be ``key``, where any keys are allowed beside it."""
    return next((other for other in section if key != other and nearest(other, [key])), None)


def _wrong_kind(name: str, section: Any) -> InvalidSpec:
    """The key that decides which other keys there are (``model.source``, ``data.kind``) is missing or wrong."""
    discriminator, sections = _UNIONS[name]
    field = join(name, discriminator)
    value = section.get(discriminator)
    if value is None:
        known = {key for other in sections.values() for key in keys_of(other)}
        for key in section:
            if key not in known and nearest(key, [discriminator]):
                return InvalidSpec("unknown key", field=join(name, key), suggestion=discriminator)
        return InvalidSpec(f"is required; one of {', '.join(sections)}", field=field)
    return InvalidSpec(
        f"{shown(value)} is not a {discriminator} of {name}; valid: {', '.join(sections)}",
        field=field,
        suggestion=nearest(value, sections) if isinstance(value, str) else None,
    )
