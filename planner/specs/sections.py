"""The sections of a spec document as users write them: their keys, types and ranges (pydantic).

``planner.specs.document`` turns them into the frozen ``planner.specs.model.Spec``. Custom errors carry in their context
``suggestion``, the nearest valid value, and ``at``, the key inside a section that the error is about.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from planner.errors import nearest
from planner.specs.model import Checkpointing, Compile, Precision
from planner.specs.optimizers import OPTIMIZERS, UNSUPPORTED
from planner.specs.plain import exponent_number, number, shown
from planner.specs.tasks import AUTO_CLASSES

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


def _fail(message: str, *, suggestion: str | None = None, at: str | None = None) -> NoReturn:
    raise PydanticCustomError("planner", "{message}", {"message": message, "suggestion": suggestion, "at": at})


def _one_of(value: Any, valid: Iterable[str], noun: str) -> str:
    names = list(valid)
    if not isinstance(value, str) or value not in names:
        near = nearest(value, names) if isinstance(value, str) else None
        _fail(f"{shown(value)} is not {noun}; valid: {', '.join(names)}", suggestion=near)
    return value


def _choice(kind: type[StrEnum], noun: str) -> BeforeValidator:
    return BeforeValidator(lambda value: kind(_one_of(value, [str(item) for item in kind], noun)))


def _switch(value: Any) -> Any:
    """YAML 1.1 reads a bare ``on`` or ``off`` as a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _as_list(value: Any) -> Any:
    return value if value is None or isinstance(value, list | dict) else [value]


def _distinct(values: list[Any]) -> list[Any]:
    if not values:
        _fail("must not be empty; leave it out for the default")
    for index, value in enumerate(values):
        if value in values[:index]:
            _fail(f"{str(value)!r} is listed twice")
    return values


def _label(value: str) -> str:
    return value if value.isprintable() and value.strip() else _fail("must be printable text")


def _model_name(value: str) -> str:
    if not value.strip() or not value.isprintable():
        _fail("must be a name")
    return value


def _model_type(value: str) -> str:
    if "/" in _model_name(value):
        _fail(f"{shown(value)} is a repository; nothing is downloaded: name the model type, for example gpt2 or llama")
    return value


def _target(value: str) -> str:
    module, colon, attribute = value.partition(":")
    names = [*module.split("."), *(attribute.split(".") if colon else ())]
    well_formed = all(name.isidentifier() and not keyword.iskeyword(name) for name in names)
    if not (colon and well_formed):
        near = f"{module.rpartition('.')[0]}:{names[-1]}" if well_formed and "." in module else None
        _fail(f"{shown(value)} is not of the form package.module:name", suggestion=near)
    return value


def _dtype(value: Any) -> str:
    if isinstance(value, str) and value.removeprefix("torch.") in (*DTYPES, *DTYPE_ALIASES):
        bare = value.removeprefix("torch.")
        return DTYPE_ALIASES.get(bare, bare)
    return _one_of(value, DTYPES, "a dtype")


def _optimizer(value: Any) -> str:
    if isinstance(value, str) and value in UNSUPPORTED:
        _fail(f"{value} is not supported: {UNSUPPORTED[value]}")
    return _one_of(value, OPTIMIZERS, "an optimizer")


def _input_names(inputs: dict[str, Any]) -> dict[str, Any]:
    if not inputs:
        _fail("must name at least one input")
    for name in inputs:
        if not name.isidentifier() or keyword.iskeyword(name):
            _fail("an input's name must be a Python keyword argument", at=name)
    return inputs


def _shape(shape: list[int]) -> list[int]:
    elements = 1
    for size in shape:
        elements *= size
    if elements > MAX_ELEMENTS:
        _fail(f"one sample would have {elements} elements; the most is {MAX_ELEMENTS}")
    return shape


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Config = Annotated[dict[str, Any], AfterValidator(exponent_number)] | None
Target = Annotated[str, Field(max_length=300), AfterValidator(_target)]
ModelName = Annotated[str, Field(max_length=200), AfterValidator(_model_name)]


class TransformersModel(Section):
    source: Literal["transformers"]
    model_type: Annotated[str, Field(max_length=200), AfterValidator(_model_type)]
    task: Annotated[str, BeforeValidator(lambda value: _one_of(value, AUTO_CLASSES, "a task"))]
    config: Config = None


class TimmModel(Section):
    source: Literal["timm"]
    name: ModelName = Field(validation_alias=AliasChoices("name", "model_type"))
    args: Config = Field(None, validation_alias=AliasChoices("args", "config"))


class TorchvisionModel(Section):
    source: Literal["torchvision"]
    name: ModelName = Field(validation_alias=AliasChoices("name", "model_type"))
    args: Config = Field(None, validation_alias=AliasChoices("args", "config"))


class PythonModel(Section):
    source: Literal["python"]
    target: Target
    args: Config = None


class TokensData(Section):
    kind: Literal["tokens"]
    sequence_length: Annotated[int, Field(ge=1, le=MAX_SEQUENCE_LENGTH)]


class ImagesData(Section):
    kind: Literal["images"]
    size: Annotated[int, Field(ge=1, le=MAX_IMAGE_SIZE)]
    classes: Annotated[int, Field(ge=1, le=2**31)] | None = None


class TensorInputSection(Section):
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=16), AfterValidator(_shape)]
    """Of one sample; ``[]`` is one number per sample."""
    dtype: Annotated[str, BeforeValidator(_dtype)]
    low: int | None = None
    high: int | None = None

    @model_validator(mode="after")
    def _range(self) -> TensorInputSection:
        given = [key for key in ("low", "high") if getattr(self, key) is not None]
        if self.dtype not in INTEGER_RANGES:
            if given:
                _fail(f"is only for integer inputs, and this one is {self.dtype}", at=given[0])
            return self
        lowest, end = INTEGER_RANGES[self.dtype]
        if self.low is not None and self.high is None:
            _fail("is required beside low", at="high")
        if self.low is not None and self.low < lowest:
            _fail(f"must be at least {lowest} for {self.dtype}, not {self.low}", at="low")
        if self.high is not None and self.high <= (self.low or 0):
            _fail(f"must be more than low ({self.low or 0}), not {self.high}", at="high")
        if self.high is not None and self.high > end:
            _fail(f"must be at most {end} for {self.dtype}, not {self.high}", at="high")
        return self


class TensorsData(Section):
    kind: Literal["tensors"]
    inputs: Annotated[dict[str, TensorInputSection], Field(max_length=64), AfterValidator(_input_names)]


class OptimizerSection(BaseModel):
    """``name``, and any keyword argument of the torch.optim class."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: Annotated[str, BeforeValidator(_optimizer)]

    def args(self) -> dict[str, Any]:
        return {key: number(value) for key, value in (self.model_extra or {}).items()}


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class TrainSection(Section):
    optimizer: Annotated[OptimizerSection, BeforeValidator(_named)] | None = None
    loss: Target | None = None
    step: Target | None = None


_Precision = Annotated[Precision, _choice(Precision, "a precision")]
_Checkpointing = Annotated[Checkpointing, _choice(Checkpointing, "a kind of checkpointing")]
_Compile = Annotated[Compile, _choice(Compile, "a compile setting"), BeforeValidator(_switch)]


class VariantsSection(Section):
    """Every key is one axis; a single value stands for a list of one."""

    precision: Annotated[list[_Precision], AfterValidator(_distinct), BeforeValidator(_as_list)] | None = None
    checkpointing: Annotated[list[_Checkpointing], AfterValidator(_distinct), BeforeValidator(_as_list)] | None = None
    compile: Annotated[list[_Compile], AfterValidator(_distinct), BeforeValidator(_as_list)] | None = None


ModelSection = TransformersModel | TimmModel | TorchvisionModel | PythonModel
DataSection = TokensData | ImagesData | TensorsData


class SpecDocument(Section):
    """The whole document; its JSON schema documents the HTTP interface."""

    name: Annotated[str, Field(max_length=200), AfterValidator(_label)] | None = None
    model: Annotated[ModelSection, Field(discriminator="source")]
    data: Annotated[DataSection, Field(discriminator="kind")]
    train: TrainSection | None = None
    variants: VariantsSection | None = None
