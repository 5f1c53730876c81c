"""Building the model that a spec names, on the CPU, with random weights: nothing is ever downloaded."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from planner.errors import InvalidSpec, ModelError, PlannerError, first_line, nearest, raised
from planner.specs.model import ModelSource, ModelSpec, Spec
from planner.specs.tasks import AUTO_CLASSES
from planner.training.data import num_classes
from planner.training.targets import import_target


def build_model(spec: Spec) -> torch.nn.Module:
    """The spec's model on the CPU, in training mode.

    Raises ``InvalidSpec`` for a name, config key or argument that the library does not know, ``ModelError`` when the
    library is missing or the model's own code raises.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    builders = {
        ModelSource.TRANSFORMERS: _transformers,
        ModelSource.TIMM: _timm,
        ModelSource.TORCHVISION: _torchvision,
        ModelSource.PYTHON: _python,
    }
    model = builders[spec.model.source](_with_classes(spec))
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{spec.model.name} returned {type(model).__name__}, not a torch.nn.Module", field="model")
    classes, known = spec.data.classes, num_classes(model)
    if classes is not None and known is not None and classes > known:
        raise InvalidSpec(f"must be at most the model's {known} classes, not {classes}", field="data.classes")
    return model.train()


def _with_classes(spec: Spec) -> ModelSpec:
    """The model with as many classes as the data has, where the spec does not give it a number itself.

    Else a transformers model would have two: labels out of its range are an error that a GPU reports as a fault.
    """
    model, classes = spec.model, spec.data.classes
    name = "num_labels" if model.source is ModelSource.TRANSFORMERS else "num_classes"
    if classes is None or model.source is ModelSource.PYTHON or {name, "id2label"} & set(model.config):
        return model
    return replace(model, config={**model.config, name: classes})


def _require(library: str) -> Any:
    try:
        if library in ("torchvision", "timm", "transformers"):
            _mend_torchvision()
        return importlib.import_module(library)
    except ImportError as error:
        raise ModelError(f"{library} is not installed here ({error})", field="model.source") from error


def _mend_torchvision() -> None:
    """Let torchvision be imported beside a torch that its compiled operators were not built for.

    The published torchvision wheel links CUDA; beside a CPU build of torch it cannot load its operators, and importing
    it (or anything that looks at it) raises while it registers shapes for ``nms``, which no classifier calls.
    Declaring the two names is enough.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        _KEPT.append(library)
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        importlib.import_module("torchvision")


_KEPT: list[torch.library.Library] = []  # a torch.library.Library undoes its definitions when it is collected


def _built(name: str, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    try:
        return build()
    except PlannerError:
        raise
    except (Exception, SystemExit) as error:  # the border to the user's code, which may even exit
        message = f"{name} could not be built: {raised(error)}"
        raise ModelError(message, field="model") from error


_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(\w+)'")


def _called(name: str, builder: Callable[..., torch.nn.Module], arguments: dict[str, Any]) -> torch.nn.Module:
    """``builder(**arguments)``, of timm or torchvision: builders that pass on what they are given to a class."""

    def build() -> torch.nn.Module:
        try:
            return builder(**arguments)
        except TypeError as error:
            refused = _UNEXPECTED.search(str(error))
            if refused is None or refused[1] not in arguments:
                raise
            known = _parameters(builder) | _parameters(typing.get_type_hints(builder).get("return"))
            key = refused[1]
            raise InvalidSpec("unknown argument", field=f"model.args.{key}", suggestion=nearest(key, known)) from error

    return _built(name, build)


def _parameters(target: Any) -> set[str]:
    """Names of the keyword arguments of a function or class."""
    parameters = inspect.signature(target).parameters.values() if callable(target) else ()
    return {item.name for item in parameters if item.kind in (item.KEYWORD_ONLY, item.POSITIONAL_OR_KEYWORD)}


_TEXT_TASKS = frozenset(
    {
        "causal-lm", "masked-lm", "multiple-choice", "next-sentence-prediction", "question-answering", "seq2seq-lm",
        "sequence-classification", "text-encoding", "token-classification",
    }
)  # fmt: skip


def _transformers(model: ModelSpec) -> torch.nn.Module:
    transformers = _require("transformers")
    transformers.logging.set_verbosity_error()
    with _hidden_from_transformers(("sklearn", "scipy", "torchaudio") if model.task in _TEXT_TASKS else ("sklearn",)):
        for shared in ("modeling_utils", "processing_utils"):
            importlib.import_module(f"transformers.{shared}")
        config = transformers_config(model)
        auto = getattr(transformers, AUTO_CLASSES[model.task or ""], None)
    if auto is None:
        raise InvalidSpec(f"this version of transformers has no {AUTO_CLASSES[model.task or '']}", field="model.task")
    if type(config) not in auto._model_mapping:
        fitting = [
            task
            for task, name in AUTO_CLASSES.items()
            if hasattr(transformers, name) and type(config) in getattr(transformers, name)._model_mapping
        ]
        listed = f"; it has {', '.join(sorted(fitting))}" if fitting else ""
        raise InvalidSpec(
            f"{model.name!r} has no model for the task {model.task!r}{listed}",
            field="model.task",
            suggestion=nearest(model.task or "", fitting),
        )
    if config.architectures is None:
        # Where a type has several models for a task (deit), transformers 5 walks over the names that a config carries.
        config.architectures = []
    return _built(model.name, lambda: auto.from_config(config))


@contextlib.contextmanager
def _hidden_from_transformers(libraries: Sequence[str]) -> Iterator[None]:
    """Have transformers not find these libraries while it imports what all its models share: text generation
    (scikit-learn), the losses of object detection (scipy), sound (torchaudio).

    They take seconds to import on a slow machine, and no training step of a text model needs them. What the model's own
    module looks for, it finds.
    """
    modules: dict[str, Any] = sys.modules
    known = _require("transformers").utils.import_utils

    def forget(library: str) -> Callable[[], bool]:
        """Whether it is there is looked up anew."""
        is_available: Any = getattr(known, f"is_{library}_available")
        getattr(is_available, "cache_clear", lambda: None)()
        found: Callable[[], bool] = is_available
        return found

    hidden = [library for library in libraries if library not in modules]
    for library in hidden:
        modules[library] = None  # what importlib.util.find_spec takes for "not there"
        if forget(library)():  # it knows better
            del modules[library]
    try:
        yield
    finally:
        for library in hidden:
            if library in modules and modules[library] is None:
                del modules[library]
            forget(library)


def transformers_config(model: ModelSpec) -> Any:
    """The library's config for ``model_type`` with the overrides applied, each checked against the defaults."""
    transformers = _require("transformers")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if model.name not in known:
        raise InvalidSpec(
            f"transformers {transformers.__version__} has no model type {model.name!r}",
            field="model.model_type",
            suggestion=nearest(model.name, list(known.keys())),
        )
    config_class = known[model.name]
    try:
        defaults = config_class()
    except Exception as error:
        raise ModelError(
            f"{model.name!r} has no default config: {first_line(error)}", field="model.model_type"
        ) from error
    _check_config(defaults, model.config, "model.config")
    try:
        return config_class(**model.arguments())
    except Exception as error:
        raise _refused_config(error) from error


_REFUSED_FIELD = re.compile(r"Validation error for field '(\w+)':\s*(?:\w+: )?(.*)")


def _refused_config(error: Exception) -> InvalidSpec:
    """What transformers says of a value of the wrong type names its field in the first line and why in the second."""
    refused = _REFUSED_FIELD.match(str(error))
    if refused is None:
        return InvalidSpec(f"the config was refused: {first_line(error)}", field="model.config")
    return InvalidSpec(f"was refused: {first_line(ValueError(refused[2]))}", field=f"model.config.{refused[1]}")


_COUNTS = re.compile(r"^(n|num)_|_(size|dim|layers|heads)$")


def _check_config(defaults: Any, overrides: Mapping[str, Any], field: str) -> None:
    known = _config_keys(defaults)
    for key, value in overrides.items():
        if key not in known and not _reads(defaults, key):
            raise InvalidSpec("unknown key", field=f"{field}.{key}", suggestion=nearest(key, known))
        if _COUNTS.search(key) and isinstance(value, int) and value < 0:
            # Python builds no layer for range(-1) and says nothing.
            raise InvalidSpec(f"must be at least 0, not {value}", field=f"{field}.{key}")
        nested = getattr(defaults, key, None)
        if isinstance(value, Mapping) and hasattr(nested, "to_dict"):
            _check_config(nested, value, f"{field}.{key}")


def _reads(config: Any, key: str) -> bool:
    """Whether the model looks for a key that its config does not declare: ``getattr(config, "head_dim", ...)``."""
    configuration = inspect.getsourcefile(type(config))
    if configuration is None or not key.isidentifier():
        return False
    looked_for = re.compile(rf'getattr\(\s*(self\.)?config,\s*"{key}"')
    sources = Path(configuration).parent.glob("modeling_*.py")
    return any(looked_for.search(path.read_text(encoding="utf-8")) for path in sources)


_IMPLEMENTATIONS = {"attn_implementation", "experts_implementation"}
"""Keyword arguments of every config (transformers/configuration_utils.py): which code runs attention and experts."""


def _config_keys(config: Any) -> set[str]:
    """Every key that this config or a base class declares, and those of generation, which seq2seq models read too."""
    transformers = _require("transformers")
    declared = {name for kind in type(config).__mro__ for name in getattr(kind, "__annotations__", {})}
    named = set(getattr(config, "attribute_map", {})) | set(inspect.signature(type(config).__init__).parameters)
    generation = set(transformers.GenerationConfig().to_dict())
    known = set(config.to_dict()) | declared | named | generation | {"num_labels", "use_cache"} | _IMPLEMENTATIONS
    return {name for name in known if not name.startswith("_")} - {"self", "kwargs", "args"}


def _timm(model: ModelSpec) -> torch.nn.Module:
    timm = _require("timm")
    _refuse_weights(model, ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"))
    if not timm.is_model(model.name):
        raise InvalidSpec(
            f"timm {timm.__version__} has no model {model.name!r}",
            field="model.name",
            suggestion=nearest(model.name, timm.list_models()),
        )
    architecture, _, _ = model.name.partition(".")  # what follows the dot names pretrained weights
    return _called(model.name, timm.model_entrypoint(architecture), {"pretrained": False, **model.arguments()})


def _refuse_weights(model: ModelSpec, names: Sequence[str]) -> None:
    """A spec describes a model; it never makes the planner read weights: from a file they could run code."""
    for name in names:
        if model.config.get(name):
            message = "weights are never loaded: memory does not depend on their values"
            raise InvalidSpec(message, field=f"model.args.{name}")


def _torchvision(model: ModelSpec) -> torch.nn.Module:
    torchvision = _require("torchvision")
    _refuse_weights(model, ("weights", "weights_backbone"))
    names = torchvision.models.list_models()
    if model.name not in names:
        raise InvalidSpec(
            f"torchvision {torchvision.__version__} has no model {model.name!r}",
            field="model.name",
            suggestion=nearest(model.name, names),
        )
    builder = torchvision.models.get_model_builder(model.name)
    # Both are downloaded unless refused: a detection model takes a trained backbone by default.
    no_weights = dict.fromkeys({"weights", "weights_backbone"} & _parameters(builder))
    return _called(model.name, builder, {**model.arguments(), **no_weights})


def _python(model: ModelSpec) -> torch.nn.Module:
    try:
        return _of_user(model)
    except ModelError as error:
        if _WITHOUT_OPERATORS not in error.message:
            raise
    _mend_torchvision()
    return _of_user(model)


_WITHOUT_OPERATORS = "operator torchvision::nms does not exist"
"""What importing torchvision says that must be mended: only a user's code tells whether it does so."""


def _of_user(model: ModelSpec) -> torch.nn.Module:
    target = import_target(model.name, field="model.target")
    _check_arguments(target, model.config, "model.args")
    return _built(model.name, lambda: target(**model.arguments()))


def _check_arguments(target: Any, arguments: Mapping[str, Any], field: str) -> None:
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return  # a builtin without a signature: the call itself will say
    if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values()):
        return
    for key in arguments:
        if key not in parameters:
            raise InvalidSpec("unknown argument", field=f"{field}.{key}", suggestion=nearest(key, parameters))
