"""What this machine offers to the planner, what stands in the way, what to change and why.

Nothing here imports torch: what torch knows is asked of a child process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from planner.allocator.config import ENVIRONMENT_VARIABLES, parse_conf
from planner.environment import allocator_conf, torch_build
from planner.errors import DeviceUnavailable, InvalidArgument, PlannerError
from planner.local_gpus import LocalGpu, local_gpus
from planner.processes import Child, ChildError
from planner.runtime.card import Card
from planner.runtime.inventory import kernels_for
from planner.units import GIB, format_bytes

TORCH_TIMEOUT_S = 300.0
"""For importing torch from a cold disk."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - its size is what is asked for

# Variables that change what a trial measures, and how.
_DISTORTING = {
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "without caching, reserved bytes and step times are not those of training",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for: step times are too long",
    "NVIDIA_TF32_OVERRIDE": "it overrules the precision of a variant: fp32 may run as tf32, or tf32 as fp32",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "it overrules the precision of a variant: fp32 runs as tf32",
    "CUBLAS_WORKSPACE_CONFIG": "cuBLAS takes workspaces of another size than on other machines",
    "TORCH_CUDNN_V8_API_DISABLED": "convolutions take other algorithms and workspaces than on other machines",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    state: str = "ok"
    """``ok``; ``absent``: fine, but something is not possible; ``warning``: figures or runs suffer; ``broken``: what is
    there does not work."""
    advice: str | None = None
    """What to change."""
    reason: str | None = None
    """Why."""


def ask_torch() -> Mapping[str, Any]:
    """What ``planner.runtime.inventory`` reports. Raises ``ChildError`` for a torch that cannot be imported."""
    with Child.start("planner.runtime.inventory") as child:
        return child.request({"do": "report"}, TORCH_TIMEOUT_S)


def examine(
    *,
    environ: Mapping[str, str] = os.environ,
    nvml: Any = pynvml,
    ask_torch: Callable[[], Mapping[str, Any]] = ask_torch,
    shared_memory: Path = SHARED_MEMORY,
) -> Iterator[Finding]:
    """Every finding about torch, GPUs and settings, in the order in which one depends on another."""
    torch = yield from _torch(ask_torch)
    yield from _gpus(environ, nvml, torch)
    yield from _allocator(environ)
    yield Finding(name="visible devices", value=environ.get("CUDA_VISIBLE_DEVICES", "all"))
    for name, reason in _DISTORTING.items():
        if environ.get(name):
            yield Finding(
                name=name, value=environ[name], state="warning", advice=f"unset {name} where you measure", reason=reason
            )
    yield from _shared_memory(shared_memory)
    yield from _compiling(environ, torch)


def _torch(ask: Callable[[], Mapping[str, Any]]) -> Generator[Finding, None, Mapping[str, Any]]:
    """Findings; returns what torch reported, nothing of a torch that is not there or cannot be imported."""
    try:
        build = torch_build()
    except DeviceUnavailable as error:
        yield Finding(name="torch", value="not installed", state="absent", advice=error.message)
        return {}
    try:
        report = ask()
    except ChildError as error:
        last = error.tail.strip().splitlines()[-1:] or [error.message]
        yield Finding(
            name="torch",
            value=f"{build.version} is installed and cannot be imported: {last[0][:200]}",
            state="broken",
            advice="reinstall torch, and torchvision of the release that belongs to it",
        )
        return {}
    yield Finding(name="torch", value=build.version)
    yield Finding(
        name="cuda of torch",
        value=build.cuda or "none: a CPU build",
        state="ok" if build.cuda else "absent",
        advice=None if build.cuda else "install a CUDA build of torch",
        reason=None if build.cuda else "this one is enough for predictions and cannot measure",
    )
    for name, key in (("cuDNN", "cudnn"), ("NCCL", "nccl")):
        if build.cuda:
            yield Finding(name=name, value=report.get(key) or "none", state="ok" if report.get(key) else "absent")
    return report


def _gpus(environ: Mapping[str, str], nvml: Any, torch: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        found = local_gpus(environ, nvml)
    except PlannerError as error:
        advice = "look at nvidia-smi: the driver's kernel module and its library must be of one version"
        yield Finding(name="gpu", value=str(error), state="broken", advice=advice)
        return
    if not found:
        advice, reason = "name a GPU type with --gpu", "probe runs on a virtual GPU here"
        yield Finding(name="gpu", value="none visible", state="absent", advice=advice, reason=reason)
        return
    yield from _driver(found[0].driver_version, nvml, torch.get("cuda"))
    for gpu in found:
        yield from _gpu(gpu, nvml, torch)


def _driver(driver_version: str, nvml: Any, cuda: str | None) -> Iterator[Finding]:
    """A driver runs programs of its own CUDA's major version and of older ones (CUDA Compatibility, "Minor Version
    Compatibility")."""
    nvml.nvmlInit()
    try:
        number = int(nvml.nvmlSystemGetCudaDriverVersion())  # nvml.h: major * 1000 + minor * 10
    except nvml.NVMLError:
        number = 0
    finally:
        nvml.nvmlShutdown()
    newest = f"{number // 1000}.{number % 1000 // 10}"
    too_old = bool(number and cuda and int(cuda.partition(".")[0]) > number // 1000)
    yield Finding(
        name="driver",
        value=f"{driver_version}, for CUDA up to {newest}" if number else driver_version,
        state="broken" if too_old else "ok",
        advice=f"update the driver, or install a torch for CUDA {number // 1000}" if too_old else None,
        reason=f"torch was built for CUDA {cuda}" if too_old else None,
    )


def _gpu(gpu: LocalGpu, nvml: Any, torch: Mapping[str, Any]) -> Iterator[Finding]:
    name, (major, minor) = f"gpu {gpu.index}", gpu.compute_capability
    used = f"{format_bytes(gpu.used_bytes)} of {format_bytes(gpu.total_bytes)} in use"
    yield Finding(name=name, value=f"{gpu.name} ({gpu.gpu.name}), compute capability {major}.{minor}, {used}")
    if torch.get("kernels"):
        code = kernels_for(gpu.compute_capability, torch["kernels"])
        yield Finding(
            name=f"{name} kernels",
            value=code or f"none for sm_{major}{minor} among {' '.join(torch['kernels'])}",
            state="ok" if code else "broken",
            advice=None if code else f"install a torch that was built for sm_{major}{minor}",
            reason=None if code else "without machine code or PTX for it no kernel runs on this GPU",
        )
    try:
        with Card.open(gpu.uuid, nvml) as card:
            settings, processes = card.settings(), card.process_bytes()
    except PlannerError as error:
        yield Finding(name=f"{name} state", value=str(error), state="broken", advice="look at nvidia-smi")
        return
    if processes:
        listed = ", ".join(
            f"{pid} ({'?' if held is None else format_bytes(held)})" for pid, held in sorted(processes.items())
        )
        advice = "end them, or choose another GPU with CUDA_VISIBLE_DEVICES"
        reason = "a GPU that others use is not measured"
        yield Finding(
            name=f"{name} processes", value=f"others compute on it: {listed}", state="warning", advice=advice,
            reason=reason,
        )  # fmt: skip
    if settings.ecc is not None:
        errors = settings.uncorrected_ecc_errors or 0
        yield Finding(
            name=f"{name} ECC",
            value=("on" if settings.ecc else "off") + (f", {errors} uncorrected errors" if errors else ""),
            state="warning" if errors else "ok",
            advice="reset the GPU (nvidia-smi --gpu-reset), and replace it if they come back" if errors else None,
            reason="memory that fails ends a training run or falsifies it" if errors else None,
        )
    if settings.mig is not None:
        yield Finding(
            name=f"{name} MIG",
            value="on" if settings.mig else "off",
            state="warning" if settings.mig else "ok",
            advice="nvidia-smi --multi-instance-gpu=0" if settings.mig else None,
            reason="torch sees one slice where the planner counts on the whole GPU" if settings.mig else None,
        )
    if settings.compute_mode not in (None, "default"):
        prohibited = settings.compute_mode == "prohibited"
        yield Finding(
            name=f"{name} compute mode",
            value=str(settings.compute_mode),
            state="broken" if prohibited else "ok",
            advice="nvidia-smi --compute-mode=DEFAULT" if prohibited else None,
            reason="no process may compute on it" if prohibited else None,
        )
    if settings.persistence_mode is False:
        yield Finding(
            name=f"{name} persistence mode",
            value="off",
            state="warning",
            advice="nvidia-smi --persistence-mode=1",
            reason="the driver starts the GPU anew for each trial, which takes about a second",
        )


def _allocator(environ: Mapping[str, str]) -> Iterator[Finding]:
    conf = allocator_conf(environ)
    try:
        parse_conf(conf)
    except InvalidArgument as error:
        advice = f"mend or unset {next((name for name in ENVIRONMENT_VARIABLES if environ.get(name)), '')}"
        yield Finding(name="allocator settings", value=str(error), state="broken", advice=advice)
    else:
        yield Finding(name="allocator settings", value=conf or "default")
    given = [name for name in ENVIRONMENT_VARIABLES if environ.get(name)]
    if len(given) > 1:
        yield Finding(
            name="allocator variables", value=" and ".join(given), state="warning", advice=f"unset {given[1]}",
            reason=f"torch reads {given[0]} alone",
        )  # fmt: skip


def _shared_memory(folder: Path) -> Iterator[Finding]:
    advice = "start the container with --ipc=host or --shm-size=8g"
    reason = "data loaders pass batches through it and NCCL its messages between GPUs"
    try:
        room = os.statvfs(folder)
    except OSError:
        yield Finding(
            name="shared memory", value=f"no {folder}", state="absent", advice=advice, reason=reason,
        )  # fmt: skip
        return
    total = room.f_frsize * room.f_blocks
    small = total < GIB
    yield Finding(
        name="shared memory",
        value=f"{format_bytes(total)}, {format_bytes(room.f_frsize * room.f_bavail)} free",
        state="warning" if small else "ok",
        advice=advice if small else None,
        reason=reason if small else None,
    )


def _compiling(environ: Mapping[str, str], torch: Mapping[str, Any]) -> Iterator[Finding]:
    """What ``torch.compile`` needs: Triton, a C compiler for its launchers, and room for what it builds."""
    if not torch.get("cuda"):
        return
    if not torch.get("triton"):
        yield Finding(
            name="Triton", value="not installed", state="absent", advice="pip install triton",
            reason="torch.compile builds its GPU kernels with it",
        )  # fmt: skip
        return
    yield Finding(name="Triton", value=str(torch["triton"]))
    compiler = next(
        (found for name in (environ.get("CC"), "gcc", "clang") if name and (found := shutil.which(name))), None
    )
    yield Finding(
        name="C compiler",
        value=compiler or "none",
        state="ok" if compiler else "absent",
        advice=None if compiler else "install gcc",
        reason=None if compiler else "Triton compiles the launcher of each kernel with it: torch.compile fails",
    )
    home = Path(environ.get("TRITON_HOME") or environ.get("HOME") or "/")
    yield from _cache("Triton cache", Path(environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"))
    inductor = environ.get("TORCHINDUCTOR_CACHE_DIR")
    if inductor:
        yield from _cache("Inductor cache", Path(inductor))


def _cache(name: str, folder: Path) -> Iterator[Finding]:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    writable = there.is_dir() and os.access(there, os.W_OK)
    free = shutil.disk_usage(there).free
    value = f"{folder}, {format_bytes(free)} free"
    variable = "TRITON_CACHE_DIR" if name.startswith("Triton") else "TORCHINDUCTOR_CACHE_DIR"
    if writable and free >= GIB:
        yield Finding(name=name, value=value)
    else:
        yield Finding(
            name=name,
            value=value if writable else f"{folder} cannot be written",
            state="warning",
            advice=f"set {variable} to a folder with room",
            reason="what torch.compile built is lost and built again by every process, or cannot be built",
        )
