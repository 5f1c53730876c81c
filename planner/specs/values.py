"""What single values of a spec document may be, as validators for its sections (``planner.specs.sections``).

Custom errors carry in their context ``suggestion``, the nearest valid value, and ``at``, the key inside a section that
the error is about.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, NoReturn

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from planner.allocator import normalised_conf
from planner.errors import InvalidArgument, nearest
from planner.specs.model import Headroom
from planner.specs.optimizers import OPTIMIZERS, UNSUPPORTED
from planner.specs.plain import shown
from planner.specs.variants import DEFAULT
from planner.units import parse_bytes

MAX_SEQUENCE_LENGTH = 2**24
MAX_IMAGE_SIZE = 2**15
MAX_ELEMENTS = 2**40
"""Of one input of one sample: no GPU holds a thousandth of it."""

INTEGER_RANGES = {
    "uint8": (0, 2**8), "int8": (-(2**7), 2**7), "int16": (-(2**15), 2**15), "int32": (-(2**31), 2**31),
    "int64": (-(2**63), 2**63 - 1),
}  # fmt: skip
"""Integer dtypes that ``torch.randint`` can fill on a GPU: lowest value, end of the range (exclusive)."""
DTYPES = (*INTEGER_RANGES, "float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool")
DTYPE_ALIASES = {
    "half": "float16", "float": "float32", "double": "float64", "short": "int16", "int": "int32", "long": "int64",
    "cfloat": "complex64", "cdouble": "complex128",
}  # fmt: skip
"""Second names that torch itself has for the same dtype."""


def fail(message: str, *, suggestion: str | None = None, at: str | None = None) -> NoReturn:
    raise PydanticCustomError("planner", "{message}", {"message": message, "suggestion": suggestion, "at": at})


def one_of(value: Any, valid: Iterable[str], noun: str) -> str:
    names = list(valid)
    if not isinstance(value, str) or value not in names:
        near = nearest(value, names) if isinstance(value, str) else None
        fail(f"{shown(value)} is not {noun}; valid: {', '.join(names)}", suggestion=near)
    return value


def choice(kind: type[StrEnum], noun: str) -> BeforeValidator:
    return BeforeValidator(lambda value: kind(one_of(value, [str(item) for item in kind], noun)))


def switch(value: Any) -> Any:
    """YAML 1.1 reads a bare ``on`` or ``off`` as a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def as_list(value: Any) -> Any:
    return value if value is None or isinstance(value, list | dict) else [value]


def distinct(values: list[Any]) -> list[Any]:
    if not values:
        fail("must not be empty; leave it out for the default")
    for index, value in enumerate(values):
        if value in values[:index]:
            fail(f"{str(value)!r} is listed twice")
    return values


def printable(value: str) -> str:
    return value if value.isprintable() and value.strip() else fail("must be printable text")


def model_name(value: str) -> str:
    if not value.strip() or not value.isprintable():
        fail("must be a name")
    return value


def model_type(value: str) -> str:
    if "/" in model_name(value):
        fail(f"{shown(value)} is a repository; nothing is downloaded: name the model type, for example gpt2 or llama")
    return value


def target(value: str) -> str:
    module, colon, attribute = value.partition(":")
    names = [*module.split("."), *(attribute.split(".") if colon else ())]
    well_formed = all(name.isidentifier() and not keyword.iskeyword(name) for name in names)
    if not (colon and well_formed):
        near = f"{module.rpartition('.')[0]}:{names[-1]}" if well_formed and "." in module else None
        fail(f"{shown(value)} is not of the form package.module:name", suggestion=near)
    return value


def dtype_name(value: Any) -> str:
    if isinstance(value, str) and value.removeprefix("torch.") in (*DTYPES, *DTYPE_ALIASES):
        bare = value.removeprefix("torch.")
        return DTYPE_ALIASES.get(bare, bare)
    return one_of(value, DTYPES, "a dtype")


def optimizer_name(value: Any) -> str:
    if isinstance(value, str) and value in UNSUPPORTED:
        fail(f"{value} is not supported: {UNSUPPORTED[value]}")
    return one_of(value, OPTIMIZERS, "an optimizer")


def input_names(inputs: dict[str, Any]) -> dict[str, Any]:
    if not inputs:
        fail("must name at least one input")
    for name in inputs:
        if not name.isidentifier() or keyword.iskeyword(name):
            fail("an input's name must be a Python keyword argument", at=name)
    return inputs


def sample_shape(shape: list[int]) -> list[int]:
    elements = 1
    for size in shape:
        elements *= size
    if elements > MAX_ELEMENTS:
        fail(f"one sample would have {elements} elements; the most is {MAX_ELEMENTS}")
    return shape


def allocator_settings(value: Any) -> Any:
    """Settings as torch reads them, in one normal form."""
    if not isinstance(value, str) or value == DEFAULT:
        return value
    try:
        return normalised_conf(value)
    except InvalidArgument as error:
        fail(str(error.message), suggestion=error.suggestion)


def bytes_or_share(value: Any) -> Any:
    """Bytes (``2GiB``) or a share of the capacity (``5%``)."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            share = float(value.strip()[:-1]) / 100
        except ValueError:
            share = -1.0
        return Headroom(share=share) if 0 <= share < 1 else fail(f"{shown(value)} is not from 0% to below 100%")
    if isinstance(value, bool) or not isinstance(value, int | str):
        fail(f"{shown(value)} is neither bytes, such as 2GiB, nor a share, such as 5%")
    try:
        return Headroom(bytes=parse_bytes(str(value)))
    except InvalidArgument as error:
        fail(str(error.message), suggestion=error.suggestion)
