"""What torch says of itself, asked in a process that may import it: for ``planner doctor`` and beside each trial."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from planner.processes import serve


def library_facts() -> dict[str, Any]:
    """Versions of the libraries that torch brings, ``None`` for what it lacks; starts no CUDA context."""
    import torch

    return {
        "cudnn": _cudnn_version(),
        "nccl": _nccl_version(),
        "triton": _installed("triton"),
        "kernels": (torch._C._cuda_getArchFlags() or "").split() if torch.version.cuda else [],
    }


def report() -> Mapping[str, Any]:
    import torch

    return {"torch": torch.__version__, "cuda": torch.version.cuda, **library_facts()}


def _cudnn_version() -> str | None:
    """``9.19.0``. Not ``torch.backends.cudnn.version()``, which starts CUDA."""
    import torch

    library = getattr(torch._C, "_cudnn", None)
    if library is None:
        return None
    number = int(library.getVersionInt())  # cudnn_version.h: since cuDNN 9 major * 10000 + minor * 100 + patch
    major = 10_000 if number >= 90_000 else 1000
    return f"{number // major}.{number % major // 100}.{number % 100}"


def _nccl_version() -> str | None:
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    serve({"report": report})
