"""The sections of a spec document as users write them: their keys, types and ranges (pydantic).

``planner.specs.document`` turns them into the frozen ``planner.specs.model.Spec``; ``planner.specs.values`` says what
single values may be.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from planner.specs.lengths import DISTRIBUTIONS
from planner.specs.model import Headroom, Routing
from planner.specs.plain import exponent_number, number
from planner.specs.tasks import AUTO_CLASSES
from planner.specs.values import (
    INTEGER_RANGES,
    MAX_IMAGE_SIZE,
    MAX_SEQUENCE_LENGTH,
    allocator_settings,
    as_list,
    bytes_or_share,
    choice,
    distinct,
    dtype_name,
    fail,
    input_names,
    model_name,
    model_type,
    one_of,
    optimizer_name,
    printable,
    sample_shape,
    switch,
    target,
)
from planner.specs.variants import (
    Checkpointing,
    Compile,
    Loss,
    MemoryFormat,
    OptimizerImplementation,
    Parallelism,
    Precision,
    Sdpa,
)
from planner.units import MAX_BATCH_SIZE


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Config = Annotated[dict[str, Any], AfterValidator(exponent_number)] | None
Target = Annotated[str, Field(max_length=300), AfterValidator(target)]
ModelName = Annotated[str, Field(max_length=200), AfterValidator(model_name)]


class TransformersModel(Section):
    source: Literal["transformers"]
    model_type: Annotated[str, Field(max_length=200), AfterValidator(model_type)]
    task: Annotated[str, BeforeValidator(lambda value: one_of(value, AUTO_CLASSES, "a task"))]
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


_Length = Annotated[int, Field(ge=1, le=MAX_SEQUENCE_LENGTH)]


class DistributionSection(Section):
    """Lengths of samples as a distribution; ``min`` and ``max`` bound every kind."""

    distribution: Annotated[str, BeforeValidator(lambda value: one_of(value, DISTRIBUTIONS, "a distribution"))]
    min: _Length = 1
    max: _Length
    mean: Annotated[float, Field(gt=0)] | None = None
    std: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> DistributionSection:
        if self.min > self.max:
            fail(f"must be at most max ({self.max}), not {self.min}", at="min")
        for key in ("mean", "std"):
            given = getattr(self, key) is not None
            if given and self.distribution == "uniform":
                fail("is not for a uniform distribution, which min and max describe", at=key)
            if not given and self.distribution != "uniform":
                fail(f"is required for a {self.distribution} distribution", at=key)
        return self


class HistogramSection(Section):
    """How many samples have which length; ``planner.specs.files`` makes one of a file of lengths."""

    lengths: Annotated[list[_Length], Field(min_length=1)]
    counts: list[Annotated[int, Field(ge=1)]]

    @model_validator(mode="after")
    def _as_many(self) -> HistogramSection:
        if len(self.counts) != len(self.lengths):
            fail(f"must have as many numbers as lengths ({len(self.lengths)}), not {len(self.counts)}", at="counts")
        return self


def _lengths(value: Any) -> Any:
    if isinstance(value, dict) and "file" in value:
        fail("is read by the command line only; here give the lengths themselves", at="file")
    return {"lengths": value, "counts": [1] * len(value)} if isinstance(value, list) else value


def _lengths_kind(value: Any) -> str:
    known = value if isinstance(value, dict) else {}
    return "distribution" if "distribution" in known else "histogram"


LengthsSection = Annotated[
    Annotated[DistributionSection, Tag("distribution")] | Annotated[HistogramSection, Tag("histogram")],
    Discriminator(_lengths_kind),
]


class TokensData(Section):
    kind: Literal["tokens"]
    sequence_length: _Length | None = None
    """Tokens of a sample; with ``lengths`` the most, longer samples being cut."""
    lengths: Annotated[LengthsSection, BeforeValidator(_lengths)] | None = None

    @model_validator(mode="after")
    def _some_length(self) -> TokensData:
        if self.sequence_length is None and self.lengths is None:
            fail("is required (or lengths, where samples differ)", at="sequence_length")
        return self


class ImagesData(Section):
    kind: Literal["images"]
    size: Annotated[int, Field(ge=1, le=MAX_IMAGE_SIZE)]
    classes: Annotated[int, Field(ge=1, le=2**31)] | None = None


class TensorInputSection(Section):
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=16), AfterValidator(sample_shape)]
    """Of one sample; ``[]`` is one number per sample."""
    dtype: Annotated[str, BeforeValidator(dtype_name)]
    low: int | None = None
    high: int | None = None

    @model_validator(mode="after")
    def _range(self) -> TensorInputSection:
        given = [key for key in ("low", "high") if getattr(self, key) is not None]
        if self.dtype not in INTEGER_RANGES:
            if given:
                fail(f"is only for integer inputs, and this one is {self.dtype}", at=given[0])
            return self
        lowest, end = INTEGER_RANGES[self.dtype]
        if self.low is not None and self.high is None:
            fail("is required beside low", at="high")
        if self.low is not None and self.low < lowest:
            fail(f"must be at least {lowest} for {self.dtype}, not {self.low}", at="low")
        if self.high is not None and self.high <= (self.low or 0):
            fail(f"must be more than low ({self.low or 0}), not {self.high}", at="high")
        if self.high is not None and self.high > end:
            fail(f"must be at most {end} for {self.dtype}, not {self.high}", at="high")
        return self


class TensorsData(Section):
    kind: Literal["tensors"]
    inputs: Annotated[dict[str, TensorInputSection], Field(max_length=64), AfterValidator(input_names)]


class OptimizerSection(BaseModel):
    """``name``, and any keyword argument of the torch.optim class."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: Annotated[str, BeforeValidator(optimizer_name)]

    def args(self) -> dict[str, Any]:
        return {key: number(value) for key, value in (self.model_extra or {}).items()}


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class EvaluationSection(Section):
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] | None = None


_EMA_DECAY = 0.999


def _ema(value: Any) -> Any:
    return {True: _EMA_DECAY, False: None}[value] if isinstance(value, bool) else value


def _evaluation(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class TrainSection(Section):
    optimizer: Annotated[OptimizerSection, BeforeValidator(_named)] | None = None
    loss: Target | None = None
    step: Target | None = None
    accumulation_steps: Annotated[int, Field(ge=1, le=2**16)] = 1
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, BeforeValidator(_ema)] = None
    """``true``, or its decay."""
    freeze: Annotated[list[Annotated[str, Field(min_length=1, max_length=300)]], BeforeValidator(as_list)] | None = None
    evaluation: Annotated[EvaluationSection | None, BeforeValidator(_evaluation)] = None
    """``true``, or its own batch size."""
    routing: Annotated[Routing, choice(Routing, "a routing")] = Routing.BALANCED
    global_batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] | None = None


_Precision = Annotated[Precision, choice(Precision, "a precision")]
_Checkpointing = Annotated[Checkpointing, choice(Checkpointing, "a kind of checkpointing")]
_Compile = Annotated[Compile, choice(Compile, "a compile setting"), BeforeValidator(switch)]


_Sdpa = Annotated[Sdpa, choice(Sdpa, "a back end of scaled_dot_product_attention")]
_Implementation = Annotated[OptimizerImplementation, choice(OptimizerImplementation, "an optimizer implementation")]
_MemoryFormat = Annotated[MemoryFormat, choice(MemoryFormat, "a memory format")]
_Loss = Annotated[Loss, choice(Loss, "a way to work the loss out")]
_Parallelism = Annotated[Parallelism, choice(Parallelism, "a kind of parallelism")]


_Axis = (AfterValidator(distinct), BeforeValidator(as_list))


class VariantsSection(Section):
    """Every key is one axis; a single value stands for a list of one."""

    precision: Annotated[list[_Precision], *_Axis] | None = None
    checkpointing: Annotated[list[_Checkpointing], *_Axis] | None = None
    compile: Annotated[list[_Compile], *_Axis] | None = None
    sdpa: Annotated[list[_Sdpa], *_Axis] | None = None
    optimizer_implementation: Annotated[list[_Implementation], *_Axis] | None = None
    memory_format: Annotated[list[_MemoryFormat], *_Axis] | None = None
    loss: Annotated[list[_Loss], *_Axis] | None = None
    allocator: Annotated[list[Annotated[str, BeforeValidator(allocator_settings)]], *_Axis] | None = None
    parallelism: Annotated[list[_Parallelism], *_Axis] | None = None
    gpus: Annotated[int, Field(ge=1, le=1024)] | None = None


class SearchSection(Section):
    """Which answers are wanted."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    multiple_of: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] = 1
    max_batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] | None = None
    headroom: Annotated[Headroom, BeforeValidator(bytes_or_share)] = Headroom()
    speed: bool = True


ModelSection = TransformersModel | TimmModel | TorchvisionModel | PythonModel
DataSection = TokensData | ImagesData | TensorsData


class SpecDocument(Section):
    """The whole document; its JSON schema documents the HTTP interface."""

    name: Annotated[str, Field(max_length=200), AfterValidator(printable)] | None = None
    model: Annotated[ModelSection, Field(discriminator="source")]
    data: Annotated[DataSection, Field(discriminator="kind")]
    train: TrainSection | None = None
    variants: VariantsSection | None = None
    search: SearchSection | None = None
