"""What the evidence of a trial is recorded with: versions, driver, allocator settings, user code.

Read without importing torch or any modelling library, so that a stored answer is found in milliseconds.
"""

from __future__ import annotations

import ast
import os
import platform
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import planner
from planner.errors import DeviceUnavailable
from planner.gpus import Gpu
from planner.local_gpus import LocalGpu, local_gpus
from planner.specs.model import ModelSource, Spec
from planner.trials import Environment, Source
from planner.user_code import UserCode, code_hash, find_user_code

__all__ = [
    "LocalGpu",
    "TorchBuild",
    "allocator_conf",
    "code_hash",
    "library_versions",
    "local_gpus",
    "measured_environment",
    "predicted_environment",
    "torch_build",
]

# Libraries whose version decides which kernels a model runs: import name -> distribution. Of a user's own code those
# count that it imports.
_LIBRARIES = {
    "accelerate": "accelerate",
    "diffusers": "diffusers",
    "einops": "einops",
    "flash_attn": "flash-attn",
    "lightning": "lightning",
    "monai": "monai",
    "peft": "peft",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "timm": "timm",
    "torch_geometric": "torch-geometric",
    "torchaudio": "torchaudio",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "x_transformers": "x-transformers",
    "xformers": "xformers",
}
_SOURCE_LIBRARIES = {
    ModelSource.TRANSFORMERS: ("transformers",),
    ModelSource.TIMM: ("timm",),
    ModelSource.TORCHVISION: ("torchvision",),
    ModelSource.PYTHON: (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """The installed torch."""

    version: str
    """As ``torch.__version__``: ``2.13.0+cpu``."""
    cuda: str | None
    """As ``torch.version.cuda``: ``13.0``; ``None`` for a CPU build."""

    @property
    def release(self) -> tuple[int, int]:
        """``(2, 13)`` of ``2.13.0+cpu``."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


def predicted_environment(spec: Spec, gpu: Gpu, folder: Path | None = None) -> Environment:
    """The environment of a prediction for the GPU type ``gpu``.

    ``folder`` is where the user's own code is looked for first (by default the current folder). Raises
    ``DeviceUnavailable`` without torch, ``ModelError`` for a target whose module does not exist.
    """
    return _environment(spec, gpu, None, find_user_code(spec, folder))


def measured_environment(spec: Spec, gpu: Gpu, local: LocalGpu, folder: Path | None = None) -> Environment:
    """The environment of a measurement on ``local``, a card of the type ``gpu``; arguments and errors as above."""
    return _environment(spec, gpu, local, find_user_code(spec, folder))


def _environment(spec: Spec, gpu: Gpu, local: LocalGpu | None, code: UserCode | None) -> Environment:
    torch = torch_build()
    return Environment(
        source=Source.MEASURED if local else Source.PREDICTED,
        gpu=gpu.name,
        gpu_name=local.name if local else None,
        gpu_uuid=local.uuid if local else None,
        total_bytes=local.total_bytes if local else gpu.total_bytes,
        driver_version=local.driver_version if local else None,
        cuda_version=torch.cuda,
        torch_version=torch.version,
        library_versions=_library_versions(spec, code),
        allocator_conf=allocator_conf(),
        code_hash=code.hash if code else None,
        planner_version=planner.__version__,
        python_version=platform.python_version(),
        hostname=socket.gethostname(),
    )


def torch_build() -> TorchBuild:
    """The version and CUDA of the torch that ``import torch`` would load, read from its ``version.py``.

    Raises ``DeviceUnavailable`` when torch is not installed.
    """
    found = PathFinder.find_spec("torch")
    if found is None or found.origin is None:
        raise DeviceUnavailable("torch is not installed here; install it with: pip install 'planner[torch]'")
    return _read_torch_build(Path(found.origin).with_name("version.py"))


@cache
def _read_torch_build(file: Path) -> TorchBuild:
    values: dict[str, object] = {}
    try:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                values[target.id] = value.value
        cuda = values.get("cuda")
        return TorchBuild(version=str(values["__version__"]), cuda=str(cuda) if cuda else None)
    except (OSError, SyntaxError, KeyError) as error:
        raise DeviceUnavailable(f"the installed torch is incomplete: {file.name} cannot be read") from error


def library_versions(spec: Spec, folder: Path | None = None) -> dict[str, str]:
    """The installed versions of the modelling libraries that ``spec`` uses, by import name."""
    return _library_versions(spec, find_user_code(spec, folder))


def _library_versions(spec: Spec, code: UserCode | None) -> dict[str, str]:
    used = {*_SOURCE_LIBRARIES[spec.model.source], *(code.imports & _LIBRARIES.keys() if code else ())}
    versions: dict[str, str] = {}
    for name in sorted(used):
        try:
            versions[name] = version(_LIBRARIES[name])
        except PackageNotFoundError:
            continue  # building the model will say that it is missing
    return versions


def allocator_conf(environ: Mapping[str, str] | None = None) -> str:
    """The allocator's settings, sorted and without spaces: ``"expandable_segments:True,max_split_size_mb:64"``.

    ``PYTORCH_CUDA_ALLOC_CONF`` wins where both variables are set (c10/cuda/CUDAAllocatorConfig.h, torch 2.13); of a
    setting given twice the last counts, as PyTorch reads them one after the other.
    """
    environ = os.environ if environ is None else environ
    text = environ.get("PYTORCH_CUDA_ALLOC_CONF", environ.get("PYTORCH_ALLOC_CONF", ""))
    text = re.sub(r"\s", "", text)
    # A comma inside brackets belongs to the value: roundup_power2_divisions:[256:1,512:2].
    entries = [entry.partition(":") for entry in re.split(r",(?![^\[]*\])", text) if entry]
    settings = {key: value for key, _, value in entries}
    return ",".join(f"{key}:{value}" if value else key for key, value in sorted(settings.items()))
