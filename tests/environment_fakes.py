"""A stand-in for NVML: as much of pynvml as the planner calls, with cards of our choosing."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

from planner.units import MIB


class FakeNvmlError(Exception):
    pass


class FakeLibraryNotFound(FakeNvmlError):
    pass


@dataclass
class Card:
    uuid: str
    name: str = "NVIDIA H200"
    total_mib: int = 143_771
    reserved_mib: int = 615
    used_mib: int = 0
    compute_capability: tuple[int, int] = (9, 0)
    cores: int = 132 * 128


@dataclass
class FakeNvml:
    """Handles are the cards themselves."""

    cards: list[Card] = field(default_factory=list)
    init_error: Exception | None = None
    name_error: Exception | None = None
    open_count: int = 0
    nvmlMemory_v2: ClassVar[int] = 2  # noqa: N815

    NVMLError: ClassVar[type[Exception]] = FakeNvmlError
    NVMLError_LibraryNotFound: ClassVar[type[Exception]] = FakeLibraryNotFound
    NVMLError_DriverNotLoaded: ClassVar[type[Exception]] = FakeLibraryNotFound
    NVMLError_NoPermission: ClassVar[type[Exception]] = FakeLibraryNotFound

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init_error:
            raise self.init_error
        self.open_count += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open_count -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:  # noqa: N802
        return self.cards[index]

    def nvmlDeviceGetUUID(self, card: Card) -> str:  # noqa: N802
        return card.uuid

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.159.04"

    def nvmlDeviceGetName(self, card: Card) -> str:  # noqa: N802
        if self.name_error:
            raise self.name_error
        return card.name

    def nvmlDeviceGetMemoryInfo(self, card: Card, version: int) -> SimpleNamespace:  # noqa: N802
        assert version == self.nvmlMemory_v2
        total, reserved, used = card.total_mib * MIB, card.reserved_mib * MIB, card.used_mib * MIB
        return SimpleNamespace(total=total, reserved=reserved, used=used, free=total - reserved - used)

    def nvmlDeviceGetCudaComputeCapability(self, card: Card) -> list[int]:  # noqa: N802
        return list(card.compute_capability)

    def nvmlDeviceGetNumGpuCores(self, card: Card) -> int:  # noqa: N802
        return card.cores
