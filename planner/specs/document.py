"""Reading and checking what users write: a spec document in, a ``planner.specs.model.Spec`` out, and back.

``sections`` says which keys there are, ``problems`` picks the one error to report, ``files`` reads YAML, JSON and TOML.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from planner.errors import InvalidSpec
from planner.specs.files import read_document
from planner.specs.model import (
    Checkpointing,
    Compile,
    DataKind,
    DataSpec,
    ModelSource,
    ModelSpec,
    OptimizerSpec,
    Precision,
    Spec,
    TensorInput,
    TrainSpec,
    VariantAxes,
)
from planner.specs.optimizers import SGD_MOMENTUM
from planner.specs.plain import plain, shown
from planner.specs.problems import first_problem
from planner.specs.sections import (
    INTEGER_RANGES,
    DataSection,
    ImagesData,
    ModelSection,
    PythonModel,
    SpecDocument,
    TensorInputSection,
    TokensData,
    TrainSection,
    TransformersModel,
    VariantsSection,
)
from planner.specs.tasks import data_kinds


def load_spec(path: Path) -> Spec:
    """The spec in the YAML, JSON or TOML file at ``path``.

    Raises ``InvalidArgument`` for a file that cannot be read, else as ``parse_spec``; malformed text is an
    ``InvalidSpec`` that names the file and the line.
    """
    return parse_spec(read_document(path))


def parse_spec(document: Mapping[str, Any]) -> Spec:
    """The spec that ``document`` says, complete with defaults; nothing in it is shared with ``document``.

    Raises ``InvalidSpec`` for the first thing that is wrong: the field's dotted path, why, and the nearest valid name.
    """
    if not isinstance(document, Mapping):
        raise InvalidSpec(f"a spec must be a mapping with the keys model and data, not {shown(plain(document))}")
    data = plain(document)
    try:
        checked = SpecDocument.model_validate(data)
    except ValidationError as error:
        raise first_problem(error, data) from error
    spec = Spec(
        name=checked.name,
        model=_model(checked.model),
        data=_data(checked.data),
        train=_train(checked.train),
        variants=_variants(checked.variants),
    )
    _check_together(spec)
    return spec


def spec_document(spec: Spec) -> dict[str, Any]:
    """``spec`` as a document of JSON data: ``parse_spec`` makes an equal spec of it."""
    document: dict[str, Any] = {} if spec.name is None else {"name": spec.name}
    name_key, config_key = {
        ModelSource.TRANSFORMERS: ("model_type", "config"),
        ModelSource.PYTHON: ("target", "args"),
    }.get(spec.model.source, ("name", "args"))
    model: dict[str, Any] = {"source": str(spec.model.source), name_key: spec.model.name}
    if spec.model.task is not None:
        model["task"] = spec.model.task
    if spec.model.config:
        model[config_key] = plain(spec.model.config)
    optimizer = spec.train.optimizer
    train: dict[str, Any] = {
        "optimizer": {"name": optimizer.name, **plain(optimizer.args)} if optimizer.args else optimizer.name
    }
    train |= {key: value for key in ("loss", "step") if (value := getattr(spec.train, key)) is not None}
    variants = {
        "precision": [str(item) for item in spec.variants.precision],
        "checkpointing": [str(item) for item in spec.variants.checkpointing],
        "compile": [str(item) for item in spec.variants.compile],
    }
    return document | {"model": model, "data": _data_document(spec.data), "train": train, "variants": variants}


def _data_document(data: DataSpec) -> dict[str, Any]:
    document: dict[str, Any] = {"kind": str(data.kind)}
    for key in ("sequence_length", "size", "classes"):
        if getattr(data, key) is not None:
            document[key] = getattr(data, key)
    if data.kind is DataKind.TENSORS:
        document["inputs"] = {
            name: {"shape": list(item.shape), "dtype": item.dtype}
            | ({"low": item.low, "high": item.high} if item.high is not None else {})
            for name, item in data.inputs.items()
        }
    return document


def _model(section: ModelSection) -> ModelSpec:
    source = ModelSource(section.source)
    match section:
        case TransformersModel():
            return ModelSpec(source=source, name=section.model_type, task=section.task, config=section.config or {})
        case PythonModel():
            return ModelSpec(source=source, name=section.target, config=section.args or {})
    return ModelSpec(source=source, name=section.name, config=section.args or {})


def _data(section: DataSection) -> DataSpec:
    kind = DataKind(section.kind)
    match section:
        case TokensData():
            return DataSpec(kind=kind, sequence_length=section.sequence_length)
        case ImagesData():
            return DataSpec(kind=kind, size=section.size, classes=section.classes)
    return DataSpec(kind=kind, inputs={name: _input(item) for name, item in section.inputs.items()})


def _input(section: TensorInputSection) -> TensorInput:
    # Without a range an integer is 0 or 1, which is a valid index, class or mask anywhere.
    high = 2 if section.dtype in INTEGER_RANGES and section.high is None else section.high
    return TensorInput(shape=tuple(section.shape), dtype=section.dtype, low=section.low or 0, high=high)


def _train(section: TrainSection | None) -> TrainSpec:
    section = section or TrainSection()
    if section.optimizer is None:
        return TrainSpec(optimizer=OptimizerSpec(name="adamw"), loss=section.loss, step=section.step)
    name, args = section.optimizer.name, section.optimizer.args()
    if name == "sgd-momentum":
        name, args = "sgd", {"momentum": SGD_MOMENTUM} | args
    return TrainSpec(optimizer=OptimizerSpec(name=name, args=args), loss=section.loss, step=section.step)


def _variants(section: VariantsSection | None) -> VariantAxes:
    section = section or VariantsSection()
    return VariantAxes(
        precision=tuple(section.precision or (Precision.FP32,)),
        checkpointing=tuple(section.checkpointing or (Checkpointing.NONE,)),
        compile=tuple(section.compile or (Compile.OFF,)),
    )


def _check_together(spec: Spec) -> None:
    """What no section can say alone. Raises ``InvalidSpec``."""
    model, data, train = spec.model, spec.data, spec.train
    if train.loss is not None and train.step is not None:
        raise InvalidSpec("has no effect beside train.step, which replaces the whole step", field="train.loss")
    if data.kind is DataKind.TOKENS and model.source is not ModelSource.TRANSFORMERS:
        raise InvalidSpec(
            "tokens is only for source: transformers, whose config says how many there are; use kind: tensors",
            field="data.kind",
            suggestion="tensors",
        )
    if data.kind is DataKind.IMAGES and model.source is ModelSource.PYTHON and data.classes is None:
        raise InvalidSpec("is required with source: python", field="data.classes")
    own_loss = train.loss is not None or train.step is not None
    if model.task is not None and not own_loss and data.kind not in data_kinds(model.task):
        kinds = " or ".join(data_kinds(model.task))
        raise InvalidSpec(
            f"{data.kind} cannot say all that the task {model.task} needs; use kind: {kinds}",
            field="data.kind",
            suggestion=str(data_kinds(model.task)[0]),
        )
    labels = model.config.get("num_labels", model.config.get("num_classes"))
    if data.classes is not None and isinstance(labels, int) and data.classes > labels:
        raise InvalidSpec(f"must be at most the model's {labels} classes, not {data.classes}", field="data.classes")
