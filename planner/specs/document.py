"""Reading and checking what users write: a spec document in, a ``planner.specs.model.Spec`` out, and back.

``sections`` says which keys there are, ``problems`` picks the one error to report, ``files`` reads YAML, JSON and TOML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from planner.errors import InvalidSpec
from planner.specs.files import read_document
from planner.specs.lengths import Histogram, histogram, inline_file, quantiles
from planner.specs.model import (
    DataKind,
    DataSpec,
    EvaluationSpec,
    ModelSource,
    ModelSpec,
    OptimizerSpec,
    SearchSpec,
    Spec,
    TensorInput,
    TrainSpec,
)
from planner.specs.optimizers import SGD_MOMENTUM
from planner.specs.plain import plain, shown
from planner.specs.problems import first_problem
from planner.specs.sections import (
    DataSection,
    DistributionSection,
    ImagesData,
    ModelSection,
    PythonModel,
    SearchSection,
    SpecDocument,
    TensorInputSection,
    TokensData,
    TrainSection,
    TransformersModel,
    VariantsSection,
)
from planner.specs.tasks import data_kinds
from planner.specs.values import INTEGER_RANGES
from planner.specs.variants import AXES, CONTRACT_AXES, Parallelism, VariantAxes
from planner.units import MAX_BATCH_SIZE


def load_spec(path: Path) -> Spec:
    """The spec in the YAML, JSON or TOML file at ``path``.

    Raises ``InvalidArgument`` for a file that cannot be read, else as ``parse_spec``; malformed text is an
    ``InvalidSpec`` that names the file and the line.
    """
    return parse_spec(inline_file(read_document(path), path.parent))


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
        search=_search(checked.search),
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
    train |= {key: value for key in _TRAIN_KEYS if (value := getattr(spec.train, key)) != _PLAIN_TRAIN[key]}
    if "freeze" in train:
        train["freeze"] = list(spec.train.freeze)
    if spec.train.evaluation is not None:
        size = spec.train.evaluation.batch_size
        train["evaluation"] = {} if size is None else {"batch_size": size}
    variants: dict[str, Any] = {
        axis: [str(item) for item in getattr(spec.variants, axis)]
        for axis in AXES
        if axis in CONTRACT_AXES or getattr(spec.variants, axis) != _PLAIN_AXES[axis]
    }
    if spec.variants.gpus != 1:
        variants["gpus"] = spec.variants.gpus
    document |= {"model": model, "data": _data_document(spec.data), "train": plain(train), "variants": variants}
    search = _search_document(spec.search)
    return document | ({"search": search} if search else {})


def _search_document(search: SearchSpec) -> dict[str, Any]:
    document: dict[str, Any] = {}
    if search.multiple_of != 1:
        document["multiple_of"] = search.multiple_of
    if search.max_batch_size is not None:
        document["max_batch_size"] = search.max_batch_size
    if search.headroom.share:
        document["headroom"] = f"{search.headroom.share * 100!r}%"
    elif search.headroom.bytes:
        document["headroom"] = search.headroom.bytes
    if not search.speed:
        document["speed"] = False
    return document


def _data_document(data: DataSpec) -> dict[str, Any]:
    document: dict[str, Any] = {"kind": str(data.kind)}
    for key in ("sequence_length", "size", "classes"):
        if getattr(data, key) is not None:
            document[key] = getattr(data, key)
    if data.lengths:
        lengths, counts = zip(*data.lengths, strict=True)
        document["lengths"] = {"lengths": list(lengths), "counts": list(counts)}
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
            found = _histogram(section)
            longest = found[-1][0] if found else section.sequence_length
            return DataSpec(kind=kind, sequence_length=longest, lengths=found if len(found) > 1 else ())
        case ImagesData():
            return DataSpec(kind=kind, size=section.size, classes=section.classes)
    return DataSpec(kind=kind, inputs={name: _input(item) for name, item in section.inputs.items()})


def _histogram(section: TokensData) -> Histogram:
    match section.lengths:
        case None:
            return ()
        case DistributionSection() as lengths:
            drawn = quantiles(lengths.distribution, lengths.min, lengths.max, lengths.mean or 0.0, lengths.std or 1.0)
            return histogram(drawn, [1] * len(drawn), section.sequence_length)
        case lengths:
            return histogram(lengths.lengths, lengths.counts, section.sequence_length)


def _input(section: TensorInputSection) -> TensorInput:
    # Without a range an integer is 0 or 1, which is a valid index, class or mask anywhere.
    high = 2 if section.dtype in INTEGER_RANGES and section.high is None else section.high
    return TensorInput(shape=tuple(section.shape), dtype=section.dtype, low=section.low or 0, high=high)


def _train(section: TrainSection | None) -> TrainSpec:
    section = section or TrainSection()
    name, args = ("adamw", {}) if section.optimizer is None else (section.optimizer.name, section.optimizer.args())
    if name == "sgd-momentum":
        name, args = "sgd", {"momentum": SGD_MOMENTUM} | args
    return TrainSpec(
        optimizer=OptimizerSpec(name=name, args=args),
        freeze=tuple(section.freeze or ()),
        evaluation=None if section.evaluation is None else EvaluationSpec(batch_size=section.evaluation.batch_size),
        **{key: getattr(section, key) for key in _TRAIN_KEYS if key != "freeze"},
    )


def _variants(section: VariantsSection | None) -> VariantAxes:
    section = section or VariantsSection()
    given = {axis: tuple(values) for axis in AXES if (values := getattr(section, axis)) is not None}
    return VariantAxes(**given, gpus=section.gpus or 1)


def _search(section: SearchSection | None) -> SearchSpec:
    section = section or SearchSection()
    return SearchSpec(
        multiple_of=section.multiple_of, max_batch_size=section.max_batch_size, headroom=section.headroom,
        speed=section.speed,
    )  # fmt: skip


_TRAIN_KEYS = (
    "loss", "step", "accumulation_steps", "clip_grad_norm", "ema", "freeze", "routing", "global_batch_size"
)  # fmt: skip
"""Keys of ``train`` whose values a document and a ``TrainSpec`` have alike."""
_PLAIN_TRAIN = {item.name: item.default for item in fields(TrainSpec)}
_PLAIN_AXES = {item.name: item.default for item in fields(VariantAxes)}


_NO_EFFECT = "has no effect beside train.step, which replaces the whole step"


def _check_together(spec: Spec) -> None:
    """What no section can say alone. Raises ``InvalidSpec``."""
    model, data, train = spec.model, spec.data, spec.train
    _check_variants(spec)
    _check_global_batch_size(spec)
    if train.loss is not None and train.step is not None:
        raise InvalidSpec(_NO_EFFECT, field="train.loss")
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


def _check_variants(spec: Spec) -> None:
    """What an axis needs beside it. Raises ``InvalidSpec``."""
    variants, train = spec.variants, spec.train
    parallel = [kind for kind in variants.parallelism if kind is not Parallelism.SINGLE]
    if variants.gpus > 1 and not parallel:
        raise InvalidSpec(
            f"{variants.gpus} GPUs need a variant that uses them: parallelism: [ddp] or [fsdp2]", field="variants.gpus"
        )
    if parallel and variants.gpus == 1:
        raise InvalidSpec(f"{parallel[0]} needs more than 1 GPU: say how many", field="variants.gpus", suggestion="2")
    if train.step is not None:
        own = {"accumulation_steps": 1, "clip_grad_norm": None, "ema": None}
        for key, default in own.items():
            if getattr(train, key) != default:
                raise InvalidSpec(_NO_EFFECT, field=f"train.{key}")
    limit, multiple = spec.search.max_batch_size, spec.search.multiple_of
    if limit is not None and limit < multiple:
        raise InvalidSpec(
            f"must be at least search.multiple_of ({multiple}), not {limit}",
            field="search.max_batch_size",
            suggestion=str(multiple),
        )


def _check_global_batch_size(spec: Spec) -> None:
    """That equal micro-batches can make it in every variant, whatever fits. Raises ``InvalidSpec`` with the nearest."""
    size, limit, steps = spec.train.global_batch_size, spec.search.max_batch_size, spec.train.accumulation_steps
    if size is None:
        return
    factors = {
        "search.multiple_of": spec.search.multiple_of,
        "train.accumulation_steps": steps,
        "variants.gpus": max(variant.gpus for variant in spec.variants.product()),
    }
    unit = math.prod(factors.values())
    words = " times ".join(f"{name} ({factor})" for name, factor in factors.items() if factor > 1)
    below = size // unit * unit
    nearest = [multiple for multiple in (below, below + unit) if 0 < multiple <= MAX_BATCH_SIZE]
    if below != size:
        both = f"; the nearest are {below} and {below + unit}" if len(nearest) == 2 else ""
        raise InvalidSpec(
            f"must be a multiple of {words}, not {size}{both}",
            field="train.global_batch_size",
            suggestion=str(min(nearest, key=lambda multiple: abs(multiple - size))) if nearest else None,
        )
    if limit is not None and steps > 1 and size > (most := limit // spec.search.multiple_of * unit):
        raise InvalidSpec(
            f"{size} in {steps} accumulation steps takes micro-batches of more than search.max_batch_size ({limit})",
            field="train.global_batch_size",
            suggestion=str(most),
        )
