"""The GPUs of this machine through NVML."""

import pytest

from planner.environment import local_gpus
from planner.errors import DeviceUnavailable
from planner.gpus import find_gpu
from planner.local_gpus import visible_devices
from planner.units import MIB
from tests.environment_fakes import Card, FakeLibraryNotFound, FakeNvml, FakeNvmlError

UUIDS = ["GPU-aaaa1", "GPU-aabb2", "GPU-cccc3"]


@pytest.mark.parametrize(
    ("setting", "visible"),
    [
        (None, [0, 1, 2]),
        ("0,1,2", [0, 1, 2]),
        ("2, 0", [2, 0]),
        ("1", [1]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [0]),
        ("0,7,1", [0]),
        ("0,x,1", [0]),
        ("1,1", []),
        ("GPU-cccc3,0", [2, 0]),
        ("GPU-c", [2]),
        ("GPU-aa", []),
        ("GPU-aabb2,1", []),
        ("MIG-1234", []),
    ],
)
def test_cuda_visible_devices(setting: str | None, visible: list[int]) -> None:
    assert visible_devices(setting, UUIDS) == visible


def test_a_real_card_is_described_and_recognised() -> None:
    nvml = FakeNvml([Card("GPU-aaaa1", used_mib=4)])
    (gpu,) = local_gpus({}, nvml)
    assert (gpu.index, gpu.uuid, gpu.name, gpu.driver_version) == (0, "GPU-aaaa1", "NVIDIA H200", "580.159.04")
    assert (gpu.total_bytes, gpu.usable_bytes, gpu.used_bytes) == (143_771 * MIB, 143_156 * MIB, 4 * MIB)
    assert (gpu.compute_capability, gpu.num_sms) == ((9, 0), 132)
    assert gpu.gpu is find_gpu("h200")
    assert nvml.open_count == 0


def test_the_index_counts_the_visible_ones() -> None:
    nvml = FakeNvml([Card(uuid) for uuid in UUIDS])
    assert [(gpu.index, gpu.uuid) for gpu in local_gpus({"CUDA_VISIBLE_DEVICES": "2,0"}, nvml)] == [
        (0, "GPU-cccc3"),
        (1, "GPU-aaaa1"),
    ]
    assert local_gpus({"CUDA_VISIBLE_DEVICES": ""}, nvml) == ()


def test_a_card_that_the_catalogue_lacks_still_has_a_type() -> None:
    card = Card("GPU-1", "NVIDIA TITAN V", 12_288, 200, compute_capability=(7, 0), cores=80 * 64)
    (gpu,) = local_gpus({}, FakeNvml([card]))
    assert gpu.num_sms == 80
    assert (gpu.gpu.name, gpu.gpu.total_bytes, gpu.gpu.num_sms) == ("titan-v-12gb", 12_088 * MIB, 80)


def test_no_driver_is_no_gpu() -> None:
    assert local_gpus({}, FakeNvml(init_error=FakeLibraryNotFound("NVML Shared Library Not Found"))) == ()


def test_a_driver_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(DeviceUnavailable, match="the NVIDIA driver does not answer: Driver/library version mismatch"):
        local_gpus({}, FakeNvml(init_error=FakeNvmlError("Driver/library version mismatch")))


def test_a_card_that_fell_off_the_bus_is_an_error_and_nvml_is_closed() -> None:
    nvml = FakeNvml([Card("GPU-1")], name_error=FakeNvmlError("GPU is lost"))
    with pytest.raises(DeviceUnavailable, match="does not describe its GPUs: GPU is lost"):
        local_gpus({}, nvml)
    assert nvml.open_count == 0
