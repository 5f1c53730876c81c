"""What the doctor finds and what it advises, on machines of our choosing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from planner.doctor import Finding, ask_torch, examine
from planner.processes import ChildDied
from planner.runtime.inventory import kernels_for
from tests import environment_fakes
from tests.environment_fakes import Card
from tests.runtime_fakes import FakeNvml

H200 = {
    "torch": "2.11.0+cu130", "cuda": "13.0", "cudnn": "9.19.0", "nccl": "2.28.9", "triton": "3.6.0",
    "kernels": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
}  # fmt: skip
"""As torch reported it on an H200."""


@dataclass
class Nvml(FakeNvml):
    cuda: int = 13_000
    ecc: tuple[int, int] = (1, 1)
    errors: int = 0
    mig: tuple[int, int] | None = (0, 0)
    mode: int = 0
    persistent: int = 1
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED: ClassVar[int] = 1
    NVML_VOLATILE_ECC: ClassVar[int] = 0

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return self.cuda

    def nvmlDeviceGetEccMode(self, card: Card) -> tuple[int, int]:  # noqa: N802
        return self.ecc

    def nvmlDeviceGetTotalEccErrors(self, card: Card, kind: int, counter: int) -> int:  # noqa: N802
        assert (kind, counter) == (1, 0)
        return self.errors

    def nvmlDeviceGetMigMode(self, card: Card) -> tuple[int, int]:  # noqa: N802
        if self.mig is None:
            raise environment_fakes.FakeNvmlError("Not Supported")
        return self.mig

    def nvmlDeviceGetComputeMode(self, card: Card) -> int:  # noqa: N802
        return self.mode

    def nvmlDeviceGetPersistenceMode(self, card: Card) -> int:  # noqa: N802
        return self.persistent

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.processes]


def look(
    nvml: Nvml | None = None, torch: dict[str, Any] | None = None, environ: dict[str, str] | None = None
) -> dict[str, Finding]:
    nvml = nvml or Nvml(cards=[Card("GPU-1")])
    found = examine(environ=environ or {}, nvml=nvml, ask_torch=lambda: torch or H200)
    by_name = {finding.name: finding for finding in found}
    assert nvml.open_count == 0
    return by_name


@pytest.fixture(autouse=True)
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    build = SimpleNamespace(version="2.11.0+cu130", cuda="13.0")
    monkeypatch.setattr("planner.doctor.torch_build", lambda: build)


def test_a_machine_that_lacks_nothing(tmp_path: Path) -> None:
    found = look(environ={"HOME": str(tmp_path), "CC": "sh"})
    assert [finding for finding in found.values() if finding.advice] == []
    assert {name: finding.value for name, finding in found.items() if not name.startswith(("shared", "C comp"))} == {
        "torch": "2.11.0+cu130", "cuda of torch": "13.0", "cuDNN": "9.19.0", "NCCL": "2.28.9",
        "driver": "580.159.04, for CUDA up to 13.0",
        "gpu 0": "NVIDIA H200 (h200), compute capability 9.0, 0 B of 140.40 GiB in use",
        "gpu 0 kernels": "sm_90", "gpu 0 ECC": "on", "gpu 0 MIG": "off",
        "allocator settings": "default", "visible devices": "all", "Triton": "3.6.0",
        "Triton cache": found["Triton cache"].value,
    }  # fmt: skip
    assert found["Triton cache"].value.startswith(str(tmp_path / ".triton" / "cache"))


@pytest.mark.parametrize(
    ("changes", "name", "state", "value", "advice"),
    [
        ({"cuda": 12_080}, "driver", "broken", "580.159.04, for CUDA up to 12.8", "update the driver, or install a"),
        ({"cuda": 13_010}, "driver", "ok", "580.159.04, for CUDA up to 13.1", None),
        ({"errors": 2}, "gpu 0 ECC", "warning", "on, 2 uncorrected errors", "reset the GPU"),
        ({"ecc": (0, 0)}, "gpu 0 ECC", "ok", "off", None),
        ({"mig": (1, 1)}, "gpu 0 MIG", "warning", "on", "nvidia-smi --multi-instance-gpu=0"),
        ({"mode": 2}, "gpu 0 compute mode", "broken", "prohibited", "nvidia-smi --compute-mode=DEFAULT"),
        ({"mode": 3}, "gpu 0 compute mode", "ok", "exclusive process", None),
        ({"persistent": 0}, "gpu 0 persistence mode", "warning", "off", "nvidia-smi --persistence-mode=1"),
        (
            {"processes": [(7, 1 << 30), (8, None)]},
            "gpu 0 processes",
            "warning",
            "others compute on it: 7 (1.00 GiB), 8 (?)",
            "end them, or choose another GPU with CUDA_VISIBLE_DEVICES",
        ),
    ],
)
def test_a_card_that_is_set_up_otherwise(
    changes: dict[str, Any], name: str, state: str, value: str, advice: str | None
) -> None:
    finding = look(Nvml(cards=[Card("GPU-1")], **changes))[name]
    assert (finding.state, finding.value) == (state, value)
    assert (finding.advice is None) == (advice is None) == (finding.reason is None)
    assert (finding.advice or "").startswith(advice or "")


def test_what_the_driver_does_not_tell_is_left_out() -> None:
    assert "gpu 0 MIG" not in look(Nvml(cards=[Card("GPU-1")], mig=None))


def test_a_gpu_that_this_torch_has_no_kernels_for() -> None:
    volta = Nvml(cards=[Card("GPU-1", name="Tesla V100-SXM2-16GB", total_mib=16_384, compute_capability=(7, 0))])
    finding = look(volta)["gpu 0 kernels"]
    assert (finding.state, finding.advice) == ("broken", "install a torch that was built for sm_70")
    assert finding.value == "none for sm_70 among sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"


@pytest.mark.parametrize(
    ("capability", "built_for", "code"),
    [
        ((9, 0), ["sm_80", "sm_90"], "sm_90"),
        ((8, 9), ["sm_80", "sm_86", "sm_90"], "sm_86"),
        ((8, 0), ["sm_86"], None),
        ((7, 0), ["sm_75", "sm_80"], None),
        ((10, 0), ["sm_90", "compute_90"], "compute_90, compiled by the driver when first used"),
        ((9, 0), ["sm_80", "sm_90a"], "sm_90a"),
        ((12, 0), ["sm_90a", "sm_120"], "sm_120"),
        ((9, 0), [], None),
    ],
)
def test_code_that_a_gpu_runs(capability: tuple[int, int], built_for: list[str], code: str | None) -> None:
    assert kernels_for(capability, built_for) == code


@pytest.mark.parametrize(
    ("environ", "name", "state", "advice"),
    [
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:1"}, "allocator settings", "broken", "unset PYTORCH_ALLOC_CONF"),
        (
            {"PYTORCH_ALLOC_CONF": "", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            "allocator settings",
            "ok",
            None,
        ),
        (
            {"PYTORCH_ALLOC_CONF": "a:b", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            "allocator variables",
            "warning",
            "unset PYTORCH_ALLOC_CONF",
        ),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "CUDA_LAUNCH_BLOCKING", "warning", "unset CUDA_LAUNCH_BLOCKING"),
        ({"TRITON_CACHE_DIR": "/proc/nowhere"}, "Triton cache", "warning", "set TRITON_CACHE_DIR to a folder"),
        ({"CC": "no-such-compiler", "PATH": ""}, "visible devices", "ok", None),
    ],
)
def test_settings(environ: dict[str, str], name: str, state: str, advice: str | None) -> None:
    finding = look(environ=environ)[name]
    assert finding.state == state
    assert (advice or "") in (finding.advice or "")


def test_little_shared_memory_and_none(tmp_path: Path) -> None:
    nvml = Nvml(cards=[Card("GPU-1")])
    found = list(examine(environ={}, nvml=nvml, ask_torch=lambda: H200, shared_memory=tmp_path / "none"))
    (finding,) = [finding for finding in found if finding.name == "shared memory"]
    assert finding.state == "absent"
    assert "--shm-size" in (finding.advice or "")


def test_a_torch_that_cannot_be_imported_is_broken_and_the_rest_is_reported() -> None:
    def ask() -> dict[str, Any]:
        raise ChildDied("the process ended", tail="Traceback ...\nImportError: libcudart.so.13: cannot open\n")

    found = {finding.name: finding for finding in examine(environ={}, nvml=Nvml(cards=[Card("G")]), ask_torch=ask)}
    assert found["torch"].state == "broken"
    assert found["torch"].value.endswith("ImportError: libcudart.so.13: cannot open")
    assert "gpu 0" in found
    assert "gpu 0 kernels" not in found


def test_torch_answers_from_a_process_of_its_own() -> None:
    import torch

    report = ask_torch()
    assert (report["torch"], report["cuda"]) == (torch.__version__, torch.version.cuda)
    assert report["cudnn"] is None or report["cudnn"].count(".") == 2
