"""One GPU of this machine through NVML: bytes in use on the whole device, and who uses them. No CUDA, no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import pynvml

from planner.errors import DeviceBusy, DeviceError, DeviceLost, DeviceUnavailable
from planner.units import MIB, format_bytes

IDLE_BYTES = 256 * MIB
"""More than an idle card shows (4 MiB on an H200, tens with a display), less than any CUDA context (300 MiB and up)."""
_WAIT_S = 30.0


_COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}  # nvml.h


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSettings:
    """How a card was set up; ``None``: the driver does not tell."""

    ecc: bool | None = None
    uncorrected_ecc_errors: int | None = None
    """Since the driver was loaded."""
    mig: bool | None = None
    """Divided into Multi-Instance GPUs."""
    compute_mode: str | None = None
    persistence_mode: bool | None = None


@dataclass(slots=True)
class Card:
    """A context manager around NVML's handle of one card."""

    handle: Any
    nvml: Any

    @classmethod
    def open(cls, uuid: str, nvml: Any = pynvml) -> Self:
        """Raises ``DeviceLost`` when the card is not there any more, ``DeviceUnavailable`` without a driver."""
        with _reported(nvml):
            nvml.nvmlInit()
            return cls(nvml.nvmlDeviceGetHandleByUUID(uuid), nvml)

    def used_bytes(self) -> int:
        """In use by all processes, without what the driver keeps for itself."""
        with _reported(self.nvml):
            return int(self.nvml.nvmlDeviceGetMemoryInfo(self.handle, version=self.nvml.nvmlMemory_v2).used)

    def free_bytes(self) -> int:
        with _reported(self.nvml):
            return int(self.nvml.nvmlDeviceGetMemoryInfo(self.handle, version=self.nvml.nvmlMemory_v2).free)

    def compute_processes(self) -> list[int]:
        """Ids of the processes that have a CUDA context here; empty where the driver does not tell (in a container)."""
        return list(self.process_bytes())

    def process_bytes(self) -> dict[int, int | None]:
        """The processes that compute here, by id, with the bytes that each holds where the driver tells."""
        try:
            with _reported(self.nvml):
                found = self.nvml.nvmlDeviceGetComputeRunningProcesses(self.handle)
        except DeviceUnavailable:
            return {}
        return {int(process.pid): getattr(process, "usedGpuMemory", None) for process in found}

    def settings(self) -> CardSettings:
        """Those that the driver tells; a card of another kind or a container may tell few."""
        ecc = self._asked("nvmlDeviceGetEccMode")
        errors = self._asked(
            "nvmlDeviceGetTotalEccErrors",
            getattr(self.nvml, "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", 1),
            getattr(self.nvml, "NVML_VOLATILE_ECC", 0),
        )
        mig, mode = self._asked("nvmlDeviceGetMigMode"), self._asked("nvmlDeviceGetComputeMode")
        persistent = self._asked("nvmlDeviceGetPersistenceMode")
        return CardSettings(
            ecc=None if ecc is None else bool(ecc[0]),
            uncorrected_ecc_errors=errors,
            mig=None if mig is None else bool(mig[0]),
            compute_mode=None if mode is None else _COMPUTE_MODES.get(int(mode), str(mode)),
            persistence_mode=None if persistent is None else bool(persistent),
        )

    def _asked(self, name: str, *arguments: Any) -> Any:
        """What the driver answers; ``None`` where it does not know."""
        ask = getattr(self.nvml, name, None)
        if ask is None:
            return None
        try:
            return ask(self.handle, *arguments)
        except self.nvml.NVMLError:
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _reported(self.nvml):
            self.nvml.nvmlShutdown()


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a process of ours holds on the card on purpose."""

    pids: tuple[int, ...] = ()
    """All ids that it goes by."""
    bytes: int = 0


def wait_until_idle(
    uuid: str, needed_bytes: int, held: Held | None = None, *, wait_s: float = _WAIT_S, nvml: Any = pynvml
) -> None:
    """Return once nothing else computes on the card and ``needed_bytes`` of it are free, what is ``held`` included.

    The process of the last trial takes a moment to go, and so may somebody else's: after ``wait_s`` ``DeviceBusy`` is
    raised, for a busy card is never silently measured. A display may keep some memory as long as enough is left.
    """
    deadline = time.monotonic() + wait_s
    with Card.open(uuid, nvml) as card:
        pause_s = 0.005
        while (why := _busy(card, needed_bytes, held or Held())) is not None:
            if time.monotonic() >= deadline:
                raise DeviceBusy(f"{why}; waited {wait_s:g} s for it")
            time.sleep(min(pause_s, wait_s))
            pause_s = min(2 * pause_s, 0.25)  # the last trial's process is gone in milliseconds, a stranger's is not


def _busy(card: Card, needed_bytes: int, held: Held) -> str | None:
    others = {*card.compute_processes()} - {os.getpid(), *held.pids}
    used = card.used_bytes() - held.bytes
    if others:
        listed = ", ".join(map(str, sorted(others)))
        return f"other processes compute on this GPU ({listed}) and hold {format_bytes(used)} of it"
    if used > IDLE_BYTES and card.free_bytes() + held.bytes < needed_bytes:
        return f"other processes hold {format_bytes(used)} of this GPU and {format_bytes(needed_bytes)} are needed"
    return None


@contextmanager
def _reported(nvml: Any) -> Iterator[None]:
    """NVML's errors as the planner's."""
    try:
        yield
    except DeviceError:
        raise
    except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_NotFound, nvml.NVMLError_ResetRequired) as error:
        raise DeviceLost(f"the GPU is gone: {error}") from error
    except nvml.NVMLError as error:
        raise DeviceUnavailable(f"the NVIDIA driver does not answer: {error}") from error
