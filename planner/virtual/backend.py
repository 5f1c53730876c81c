"""A device that acts as a CUDA GPU for shapes, dtypes and autograd, and holds no bytes.

PyTorch lets one out-of-tree backend be written in Python (the dispatch key ``PrivateUse1``). ``install`` registers it
under the name ``vgpu``; tensors on it are fake (``torch._subclasses.FakeTensorMode``), so no kernel ever runs. It works
in CPU and CUDA builds of torch and needs no compiler. It changes torch for the whole process and is therefore only
installed in a child process that traces (``planner.virtual.child``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "vgpu"
DISPATCH_KEY = "PrivateUse1"


class _DeviceModule:
    """What torch looks up as ``torch.vgpu``: the few functions that checkpointing, autocast and random state call."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(16, dtype=torch.uint8)  # CUDA's too lives on the CPU: checkpointing saves no device bytes

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass

    def device(self, device: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self, device: Any = None) -> None:
        pass


@functools.cache
def install() -> torch.device:
    """Register the backend in this process (once) and return its only device."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_DeviceModule())
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]
    FakeTensor.__deepcopy__ = _deepcopy  # type: ignore[assignment, method-assign]
    # A parameter of fake tensors is a FakeTensor to ``type``; on CUDA the same parameter gets the foreach kernels.
    for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        importlib.import_module(module)._foreach_supported_types.append(FakeTensor)
    FakeTensor.is_cuda = property(_is_cuda)  # type: ignore[assignment]
    FakeTensor.__format__ = _format  # type: ignore[assignment, method-assign]
    _claim_kernels()
    return torch.device(NAME, 0)


_libraries: list[Any] = []


def library(key: str, namespace: str = "aten") -> Any:
    """A ``torch.library.Library`` for kernels under the dispatch key ``key``, kept for the life of the process.

    One that is collected undoes its registrations.
    """
    opened: Any = torch.library.Library(namespace, "IMPL", key)  # type: ignore[no-untyped-call]
    _libraries.append(opened)
    return opened


_ON_CUDA_ALONE = frozenset({"aten::_fused_rms_norm"})
"""Those whose kernel a CPU build of torch does not have."""


@functools.cache
def kernels_beside_decompositions() -> frozenset[str]:
    """Operators that CUDA runs as one kernel although they have a decomposition too; ``silu_backward`` is one."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    return frozenset(registered("CompositeImplicitAutograd")) & frozenset(registered("CPU")) | _ON_CUDA_ALONE


def _claim_kernels() -> None:
    """Keep those operators whole: autograd decomposes them for a backend that has registered no kernel of its own."""

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the fake mode answers before any kernel of the virtual device")

    kernels = library(DISPATCH_KEY)
    for name in sorted(kernels_beside_decompositions() - _ON_CUDA_ALONE):
        kernels.impl(name.removeprefix("aten::"), unreachable)


def _deepcopy(self: FakeTensor, memo: dict[int, Any]) -> torch.Tensor:
    """``copy.deepcopy`` of a tensor, which torch makes by copying bytes (torch/_tensor.py, torch/nn/parameter.py)."""
    if id(self) in memo:
        found: torch.Tensor = memo[id(self)]
        return found
    with torch.no_grad():
        data = self.detach().clone(memory_format=torch.preserve_format)
    is_parameter = isinstance(self, torch.nn.Parameter)
    copied = torch.nn.Parameter(data, self.requires_grad) if is_parameter else data.requires_grad_(self.requires_grad)
    memo[id(self)] = copied
    return copied


def _format(self: FakeTensor, spec: str) -> str:
    """As ``torch.Tensor.__format__``, which looks into a scalar only if it is no subclass: ``f"expert_{index}"``."""
    return self.item().__format__(spec) if self.dim() == 0 and not self.is_meta else object.__format__(self, spec)


def _is_cuda(self: FakeTensor) -> bool:
    """Models choose between kernels by it."""
    return self.fake_device.type == NAME


def _apply(self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
    """``torch.nn.Module._apply`` (torch/nn/modules/module.py) for parameters that cannot be moved in place.

    torch moves a module from the CPU to CUDA by ``param.data = moved``, in this order: children, own parameters, own
    buffers. Between other kinds of tensor it makes new parameters instead and unties those that were shared. Here each
    moved parameter keeps its identity to every module that shares it: what was tied stays tied.
    """
    if recurse:
        for child in self.children():
            child._apply(fn)  # type: ignore[no-untyped-call]
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        moved: torch.nn.Parameter | None = parameter.__dict__.get("_moved_to")
        if moved is None:
            with torch.no_grad():
                data = fn(parameter)
            if data is parameter:
                continue
            moved = torch.nn.Parameter(data, parameter.requires_grad)
            parameter._moved_to = moved  # type: ignore[attr-defined]
        self._parameters[name] = moved
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self
