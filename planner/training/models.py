"""Building the model that a spec names, on the CPU, with random weights: nothing is ever downloaded."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from planner.errors import InvalidSpec, ModelError, PlannerError, nearest
from planner.specs.model import ModelSource, ModelSpec, Spec
from planner.specs.tasks import AUTO_CLASSES
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
    model = builders[spec.model.source](spec.model)
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{spec.model.name} returned {type(model).__name__}, not a torch.nn.Module", field="model")
    return model.train()


def _require(library: str) -> Any:
    try:
        if library in ("torchvision", "timm", "transformers"):
            _mend_torchvision()
        return importlib.import_module(library)
    except ImportError as error:
        raise ModelError(f"{library} is not installed here ({error})", field="model.source") from error


def _mend_torchvision() -> None:
    """Let torchvision be imported beside a torch that its compiled operators were not built for.

    The published torchvision wheel links CUDA; beside a CPU build of torch it cannot load its operators, and importing it
    (or anything that looks at it) raises while it registers shapes for ``nms``, which no classifier calls. Declaring
    the two names is enough.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        _KEPT.append(library)
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


_KEPT: list[torch.library.Library] = []  # a torch.library.Library undoes its definitions when it is collected


def _built(name: str, build: Any) -> torch.nn.Module:
    try:
        model: torch.nn.Module = build()
    except PlannerError:
        raise
    except Exception as error:
        raise ModelError(f"{name} could not be built: {type(error).__name__}: {_first_line(error)}", field="model") from error
    return model


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "(no message)"


def _transformers(model: ModelSpec) -> torch.nn.Module:
    transformers = _require("transformers")
    transformers.logging.set_verbosity_error()
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
    return _built(model.name, lambda: auto.from_config(config))


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
    defaults = config_class()
    _check_config(defaults, model.config, "model.config")
    try:
        return config_class(**model.arguments())
    except Exception as error:
        raise InvalidSpec(f"the config was refused: {_first_line(error)}", field="model.config") from error


def _check_config(defaults: Any, overrides: Mapping[str, Any], field: str) -> None:
    known = _config_keys(defaults)
    for key, value in overrides.items():
        if key not in known:
            raise InvalidSpec("unknown key", field=f"{field}.{key}", suggestion=nearest(key, known))
        nested = getattr(defaults, key, None)
        if isinstance(value, Mapping) and hasattr(nested, "to_dict"):
            _check_config(nested, value, f"{field}.{key}")


def _config_keys(config: Any) -> set[str]:
    """Every key that this config or its base classes declare, and those of generation, which seq2seq models read too."""
    transformers = _require("transformers")
    declared = {name for kind in type(config).__mro__ for name in getattr(kind, "__annotations__", {})}
    named = set(getattr(config, "attribute_map", {})) | set(inspect.signature(type(config).__init__).parameters)
    generation = set(transformers.GenerationConfig().to_dict())
    known = set(config.to_dict()) | declared | named | generation | {"num_labels", "use_cache"}
    return {name for name in known if not name.startswith("_")} - {"self", "kwargs", "args"}


def _timm(model: ModelSpec) -> torch.nn.Module:
    timm = _require("timm")
    _refuse_weights(model.config, ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"))
    if not timm.is_model(model.name):
        raise InvalidSpec(
            f"timm {timm.__version__} has no model {model.name!r}",
            field="model.name",
            suggestion=nearest(model.name, timm.list_models()),
        )
    return _built(model.name, lambda: timm.create_model(model.name, pretrained=False, **model.arguments()))


def _refuse_weights(arguments: Mapping[str, Any], names: Sequence[str]) -> None:
    """A spec describes a model; it never makes the planner read weights, from a hub or from a file (an unpickled one runs code)."""
    for name in names:
        if arguments.get(name):
            raise InvalidSpec("weights are never loaded: memory does not depend on their values", field=f"model.args.{name}")


def _torchvision(model: ModelSpec) -> torch.nn.Module:
    torchvision = _require("torchvision")
    _refuse_weights(model.config, ("weights", "weights_backbone"))
    names = torchvision.models.list_models()
    if model.name not in names:
        raise InvalidSpec(
            f"torchvision {torchvision.__version__} has no model {model.name!r}",
            field="model.name",
            suggestion=nearest(model.name, names),
        )
    arguments = {"weights": None, **model.arguments()}
    if "detection" in model.name or "segmentation" in model.name:
        arguments.setdefault("weights_backbone", None)
    return _built(model.name, lambda: torchvision.models.get_model(model.name, **arguments))


def _python(model: ModelSpec) -> torch.nn.Module:
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
