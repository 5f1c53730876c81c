"""A card as NVML tells of it, and local devices whose preloaded process is ``tests.runtime_child``."""

import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

from planner.local_gpus import local_gpus
from planner.runtime.device import LocalDevice
from planner.units import GIB
from tests import environment_fakes

UUID = "GPU-1"


class NotFound(environment_fakes.FakeNvmlError):
    pass


@dataclass
class FakeNvml(environment_fakes.FakeNvml):
    """With the calls that tell who uses a card. ``busy`` is taken from its front at every look, the last one stays."""

    busy: list[tuple[list[int], int]] = field(default_factory=lambda: [([], 0)])
    error: Exception | None = None
    NVMLError_GpuIsLost: ClassVar[type[Exception]] = type("GpuIsLost", (environment_fakes.FakeNvmlError,), {})
    NVMLError_NotFound: ClassVar[type[Exception]] = NotFound
    NVMLError_ResetRequired: ClassVar[type[Exception]] = type("Reset", (environment_fakes.FakeNvmlError,), {})

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        for card in self.cards:
            if card.uuid == uuid:
                return card
        raise NotFound("Not Found")

    def nvmlDeviceGetComputeRunningProcesses(self, card):  # noqa: N802
        if self.error:
            raise self.error
        pids, card.used_mib = self.busy.pop(0) if len(self.busy) > 1 else self.busy[0]
        return [SimpleNamespace(pid=pid) for pid in pids]


def fake_nvml(**changes):
    return FakeNvml(cards=[environment_fakes.Card(UUID)], **changes)


@contextlib.contextmanager
def local_devices():
    """A function that makes devices of 16 GiB, which end with the block."""
    made = []

    def make(**changes):
        (local,) = local_gpus({}, fake_nvml())
        given = {"child_module": "tests.runtime_child", "wait_idle": lambda *_: None, "trial_timeout_s": 20}
        made.append(LocalDevice(local, 16 * GIB, **{**given, **changes}))
        return made[-1]

    yield make
    for device in made:
        device.close()
