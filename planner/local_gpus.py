"""The GPUs of this machine as the driver's management library (NVML) sees them: no CUDA context, no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pynvml

from planner.errors import DeviceUnavailable
from planner.gpus import Gpu, recognise, unlisted_gpu

# Cores per SM by compute capability (CUDA C++ Programming Guide, "Compute Capabilities"): NVML counts cores, not SMs.
_CORES_PER_SM = {(7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64}
_CORES_PER_SM_ELSE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalGpu:
    """One GPU that a process started now could use."""

    index: int
    """Its place among the visible ones: CUDA's ordinal where all GPUs are of one type."""
    uuid: str
    """As ``CUDA_VISIBLE_DEVICES`` takes it, which names the card whatever order CUDA counts in."""
    name: str
    """As the driver says it, e.g. ``NVIDIA H200``."""
    total_bytes: int
    """NVML's total: what nvidia-smi shows."""
    usable_bytes: int
    """The total without what the driver keeps for itself: CUDA's own total (to the byte on an H200)."""
    used_bytes: int
    """In use now by all processes, without what the driver keeps."""
    driver_version: str
    compute_capability: tuple[int, int]
    num_sms: int

    @property
    def gpu(self) -> Gpu:
        """Its type: of the catalogue, or made from what the driver says where the catalogue lacks it."""
        return recognise(self.name, self.total_bytes) or unlisted_gpu(
            self.name,
            total_bytes=self.usable_bytes,
            nvml_total_bytes=self.total_bytes,
            compute_capability=self.compute_capability,
            num_sms=self.num_sms,
        )


def local_gpus(environ: Mapping[str, str] | None = None, nvml: ModuleType | Any = pynvml) -> tuple[LocalGpu, ...]:
    """The visible GPUs in CUDA's order; empty where there is no NVIDIA driver.

    ``CUDA_VISIBLE_DEVICES`` in ``environ`` (by default the process's) is followed as CUDA follows it. Raises
    ``DeviceUnavailable`` when a driver is there but does not answer.
    """
    environ = os.environ if environ is None else environ
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded, nvml.NVMLError_NoPermission):
        return ()
    except nvml.NVMLError as error:
        raise DeviceUnavailable(f"the NVIDIA driver does not answer: {error}") from error
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        uuids = [str(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        order = visible_devices(environ.get("CUDA_VISIBLE_DEVICES"), uuids)
        driver = str(nvml.nvmlSystemGetDriverVersion())
        return tuple(
            _describe(nvml, handles[position], uuid=uuids[position], index=index, driver=driver)
            for index, position in enumerate(order)
        )
    except nvml.NVMLError as error:
        raise DeviceUnavailable(f"the NVIDIA driver does not describe its GPUs: {error}") from error
    finally:
        nvml.nvmlShutdown()


def visible_devices(setting: str | None, uuids: Sequence[str]) -> list[int]:
    """Positions in ``uuids`` that ``CUDA_VISIBLE_DEVICES=setting`` leaves visible, in its order.

    As CUDA reads it (CUDA C++ Programming Guide, "CUDA Environment Variables"; ``torch.cuda._parse_visible_devices``):
    numbers or unambiguous beginnings of UUIDs, up to the first that names no GPU; one named twice leaves none.
    """
    if setting is None:
        return list(range(len(uuids)))
    order: list[int] = []
    for entry in setting.split(","):
        name = entry.strip()
        if name.isdigit():
            found = [int(name)] if int(name) < len(uuids) else []
        else:
            found = [position for position, uuid in enumerate(uuids) if name and uuid.startswith(name)]
        if len(found) != 1:
            break
        if found[0] in order:
            return []
        order += found
    return order


def _describe(nvml: Any, handle: Any, *, uuid: str, index: int, driver: str) -> LocalGpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    cores = nvml.nvmlDeviceGetNumGpuCores(handle)
    return LocalGpu(
        index=index,
        uuid=uuid,
        name=str(nvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        usable_bytes=int(memory.total - memory.reserved),
        used_bytes=int(memory.used),
        driver_version=driver,
        compute_capability=(int(major), int(minor)),
        num_sms=int(cores) // _CORES_PER_SM.get((int(major), int(minor)), _CORES_PER_SM_ELSE),
    )
