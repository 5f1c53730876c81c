"""The catalogue of GPU types (``gpus.toml``): memory, architecture, and what CUDA itself takes of the memory."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from planner.errors import InvalidArgument, nearest
from planner.units import GIB, MIB

_PAGE_BYTES = 2 * MIB
"""The allocator takes memory from the driver in multiples of this (c10/cuda/CUDACachingAllocator.cpp, kSmallBuffer)."""
COMMUNICATOR_BYTES = 848 * MIB
"""What NCCL and its kernels take of one GPU beside a lone process's context and libraries.

*Measured* on two H200s with NCCL 2.28.9 (``measurements/h200/probe/gpt2-ddp-fsdp2-16.json``): 846 MiB with DDP, 842
with FSDP2, of which 366 when the ranks connect. With other links or more ranks it may differ.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU type. All quantities in bytes are of one card."""

    name: str
    """Catalogue name: ``h200``, ``a100-80gb``, ``rtx-4090``."""
    driver_names: tuple[str, ...]
    """What NVML and CUDA call it; the first is for people."""
    compute_capability: tuple[int, int]
    num_sms: int
    total_bytes: int
    """What CUDA can use (``torch.cuda.get_device_properties(0).total_memory``)."""
    nvml_total_bytes: int
    """What nvidia-smi shows: larger, since the driver keeps some for itself."""
    context_bytes: int
    """In use on the device by one process before its first tensor: the CUDA context."""
    library_bytes: int
    """What one process adds to that, outside the allocator, once a step's kernels and libraries are loaded."""
    measured: frozenset[str] = frozenset()
    """Which of the byte counts were read on a real card of this type; the others are estimates."""
    aliases: tuple[str, ...] = ()

    @property
    def is_measured(self) -> bool:
        """Whether the default capacity rests on measurements alone."""
        return {"total_bytes", "context_bytes", "library_bytes"} <= self.measured


def estimated_context_bytes(num_sms: int) -> int:
    """The CUDA context of a GPU that was never measured: the H200's (527 MiB, measured) in proportion to its 132 SMs.

    A context reserves local memory for every thread that each SM can hold, hence the proportion; one measured type
    fixes one constant. Rounded up to 2 MiB.
    """
    measured = _table()["h200"]
    return _round_up(measured["context_bytes"] * num_sms // measured["num_sms"])


def estimated_library_bytes(num_sms: int) -> int:
    """What kernels and libraries take on a GPU that was never measured: at least the H200's 244 MiB (measured).

    More in proportion where there are more SMs, never less: the code of the kernels, which is most of it, does not
    shrink with the GPU. Rounded up to 2 MiB.
    """
    measured = _table()["h200"]
    return _round_up(measured["library_bytes"] * max(num_sms, measured["num_sms"]) // measured["num_sms"])


def default_capacity_bytes(gpu: Gpu, num_ranks: int = 1) -> int:
    """The most that the caching allocator can reserve on a card with nothing else on it, in whole pages of 2 MiB; for
    one of ``num_ranks`` that train together, beside NCCL."""
    outside_bytes = gpu.context_bytes + gpu.library_bytes + (COMMUNICATOR_BYTES if num_ranks > 1 else 0)
    return (gpu.total_bytes - outside_bytes) // _PAGE_BYTES * _PAGE_BYTES


def list_gpus() -> tuple[Gpu, ...]:
    """Every type of the catalogue, newest architecture and most memory first."""
    return tuple(sorted(_catalogue().values(), key=lambda gpu: (gpu.compute_capability, gpu.total_bytes), reverse=True))


def find_gpu(name: str, *, field: str = "gpu") -> Gpu:
    """The type of that catalogue name, alias or driver name, in any case.

    Raises ``InvalidArgument`` naming ``field``, with the nearest catalogue name.
    """
    wanted = name.strip().lower()
    for gpu in _catalogue().values():
        if wanted in (gpu.name, *gpu.aliases) or _bare(wanted) in map(_bare, gpu.driver_names):
            return gpu
    names = [known for gpu in list_gpus() for known in (gpu.name, *gpu.aliases)]
    near = next((known for known in names if known.startswith(wanted)), None) if wanted else None
    near = near or nearest(wanted.replace(" ", "-").replace("_", "-"), names)
    listed = "" if near else f"; known: {', '.join(gpu.name for gpu in list_gpus())}"
    raise InvalidArgument(f"{name!r} is not a GPU type in the catalogue{listed}", field=field, suggestion=near)


def recognise(driver_name: str, total_bytes: int) -> Gpu | None:
    """The type of a real card, from its driver name and its total (NVML's or CUDA's); ``None`` for a type not listed.

    A total that is off by more than 5% of both known ones (a MIG slice, a variant with other memory) is another type.
    """
    for gpu in _catalogue().values():
        if _bare(driver_name) in map(_bare, gpu.driver_names):
            known = (gpu.total_bytes, gpu.nvml_total_bytes)
            if any(abs(total_bytes - total) <= total // 20 for total in known):
                return gpu
    return None


def unlisted_gpu(
    driver_name: str, *, total_bytes: int, nvml_total_bytes: int, compute_capability: tuple[int, int], num_sms: int
) -> Gpu:
    """A type for a real card that the catalogue lacks: its own memory, the rest estimated from the number of SMs.

    It is named after the driver name and its GiB: ``NVIDIA GeForce RTX 3060`` -> ``geforce-rtx-3060-12gb``.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", _bare(driver_name)).strip("-")
    size = f"{round(nvml_total_bytes / GIB)}gb"
    return Gpu(
        name=slug if slug.endswith(size) else f"{slug}-{size}",
        driver_names=(driver_name,),
        compute_capability=compute_capability,
        num_sms=num_sms,
        total_bytes=total_bytes,
        nvml_total_bytes=nvml_total_bytes,
        context_bytes=estimated_context_bytes(num_sms),
        library_bytes=estimated_library_bytes(num_sms),
        measured=frozenset({"total_bytes"}),
    )


def _bare(driver_name: str) -> str:
    """Drivers before 2021 left the maker's name out."""
    return driver_name.strip().lower().removeprefix("nvidia ")


def _round_up(count: int) -> int:
    return -(-count // _PAGE_BYTES) * _PAGE_BYTES


@cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    return tomllib.loads(files("planner").joinpath("gpus.toml").read_text(encoding="utf-8"))


@cache
def _catalogue() -> Mapping[str, Gpu]:
    return MappingProxyType({name: _gpu(name, entry) for name, entry in _table().items()})


def _gpu(name: str, entry: Mapping[str, Any]) -> Gpu:
    major, minor = entry["compute_capability"]
    return Gpu(
        name=name,
        driver_names=tuple(entry["driver_names"]),
        compute_capability=(major, minor),
        num_sms=entry["num_sms"],
        total_bytes=entry["total_bytes"] if "total_bytes" in entry else entry["total_mib"] * MIB,
        nvml_total_bytes=entry["nvml_mib"] * MIB,
        context_bytes=entry.get("context_bytes") or estimated_context_bytes(entry["num_sms"]),
        library_bytes=entry.get("library_bytes") or estimated_library_bytes(entry["num_sms"]),
        measured=frozenset(entry.get("measured", ())),
        aliases=tuple(entry.get("aliases", ())),
    )
