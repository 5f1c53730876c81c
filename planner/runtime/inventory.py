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


def kernels_for(capability: tuple[int, int], built_for: list[str]) -> str | None:
    """What a GPU of ``capability`` runs of a build for ``built_for`` (``sm_80``, ``sm_90a``, ``compute_90``): the
    newest machine code of its own major version, else PTX, which the driver compiles; ``None``: nothing.

    CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    codes = [(kind, int(number[:-1]), int(number[-1])) for kind, number in map(_split, built_for) if number.isdigit()]
    exact = f"sm_{capability[0]}{capability[1]}a"  # runs on this one GPU architecture only
    usable = [code[1:] for code in codes if code[0] == "sm" and code[1] == capability[0] and code[2] <= capability[1]]
    if exact in built_for and capability not in usable:
        return exact
    if usable:
        major, minor = max(usable)
        return f"sm_{major}{minor}"
    intermediate = [code[1:] for code in codes if code[0] == "compute" and code[1:] <= capability]
    if not intermediate:
        return None
    major, minor = max(intermediate)
    return f"compute_{major}{minor}, compiled by the driver when first used"


def _split(code: str) -> tuple[str, str]:
    kind, _, number = code.partition("_")
    return kind, number


if __name__ == "__main__":
    serve({"report": report})
