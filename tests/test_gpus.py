"""The catalogue of GPU types, and recognising a real card in it."""

import json
from pathlib import Path

import pytest

from planner.errors import InvalidArgument
from planner.gpus import (
    default_capacity_bytes,
    estimated_context_bytes,
    estimated_library_bytes,
    find_gpu,
    list_gpus,
    recognise,
    unlisted_gpu,
)
from planner.units import GIB, MIB

NAMES = [gpu.name for gpu in list_gpus()]


def test_the_h200_is_as_measured() -> None:
    h200 = find_gpu("h200")
    assert (h200.total_bytes, h200.context_bytes) == (150109880320, 552402944)
    assert (h200.compute_capability, h200.num_sms) == ((9, 0), 132)
    assert h200.is_measured
    # What it leaves is inside the total by at least context and libraries, and in whole pages of 2 MiB.
    capacity = default_capacity_bytes(h200)
    assert capacity == 149300445184
    assert capacity % (2 * MIB) == 0
    assert 0 <= h200.total_bytes - h200.context_bytes - h200.library_bytes - capacity < 2 * MIB


def test_only_the_h200_is_called_measured() -> None:
    assert [gpu.name for gpu in list_gpus() if gpu.is_measured] == ["h200"]
    assert {gpu.name for gpu in list_gpus() if gpu.measured} == {"h200", "h100-80gb"}


@pytest.mark.parametrize("gpu", list_gpus(), ids=NAMES)
def test_every_type_is_sound(gpu) -> None:
    assert gpu.name == gpu.name.lower().strip()
    assert gpu.driver_names
    assert gpu.compute_capability >= (7, 0)
    assert 40 <= gpu.num_sms <= 200
    # The driver keeps less than 2.5% and some 450 MiB or more; a mistyped figure would fall outside.
    assert 0.97 * gpu.nvml_total_bytes < gpu.total_bytes < gpu.nvml_total_bytes
    assert 100 * MIB < gpu.context_bytes < GIB
    assert 200 * MIB < gpu.library_bytes < GIB
    assert 0.95 * gpu.total_bytes < default_capacity_bytes(gpu) < gpu.total_bytes
    assert default_capacity_bytes(gpu) % (2 * MIB) == 0


@pytest.mark.parametrize("gpu", list_gpus(), ids=NAMES)
def test_every_type_is_found_by_each_of_its_names(gpu) -> None:
    for name in (gpu.name, gpu.name.upper(), *gpu.aliases, *gpu.driver_names):
        assert find_gpu(name) is gpu
    for name in gpu.driver_names:
        assert recognise(name, gpu.total_bytes) is gpu
        assert recognise(name, gpu.nvml_total_bytes) is gpu
        assert recognise(name.removeprefix("NVIDIA "), gpu.nvml_total_bytes) is gpu


def test_names_are_unambiguous() -> None:
    everything = [name.lower() for gpu in list_gpus() for name in {gpu.name, *gpu.aliases, *gpu.driver_names}]
    assert len(everything) == len(set(everything))


def test_the_list_starts_with_the_newest_and_largest() -> None:
    assert NAMES.index("b200") < NAMES.index("h200") < NAMES.index("h100-80gb") < NAMES.index("a100-80gb")
    assert NAMES.index("a100-80gb") < NAMES.index("a100-40gb") < NAMES.index("t4") < NAMES.index("v100-16gb")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("a100", "a100-80gb"),
        ("rtx4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("h2000", "h200"),
        ("v100", "v100-32gb"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, suggestion: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        find_gpu(name)
    assert (caught.value.field, caught.value.suggestion) == ("gpu", suggestion)
    assert str(caught.value) == f"gpu: {name!r} is not a GPU type in the catalogue (did you mean {suggestion!r}?)"


@pytest.mark.parametrize("name", ["", "  ", "zzz"])
def test_a_name_like_no_other_lists_all(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        find_gpu(name)
    assert caught.value.suggestion is None
    assert all(known in caught.value.message for known in NAMES)


def test_a_card_with_other_memory_is_another_type() -> None:
    assert recognise("NVIDIA A100-SXM4-40GB", find_gpu("a100-80gb").total_bytes) is None
    assert recognise("NVIDIA H200", 18 * GIB) is None
    assert recognise("NVIDIA H200 MIG 1g.18gb", 18 * GIB) is None
    assert recognise("NVIDIA GeForce RTX 3060", 12 * GIB) is None


def test_a_card_that_the_catalogue_lacks_becomes_a_type_of_its_own() -> None:
    gpu = unlisted_gpu(
        "NVIDIA GeForce RTX 3060",
        total_bytes=12_044 * MIB,
        nvml_total_bytes=12_288 * MIB,
        compute_capability=(8, 6),
        num_sms=28,
    )
    assert gpu.name == "geforce-rtx-3060-12gb"
    assert gpu.driver_names == ("NVIDIA GeForce RTX 3060",)
    assert gpu.measured == {"total_bytes"}
    assert gpu.context_bytes == 112 * MIB  # 28 / 132 of 526.8 MiB, rounded up to 2 MiB
    assert gpu.library_bytes == 244 * MIB
    assert default_capacity_bytes(gpu) == (12_044 - 112 - 244) * MIB


def test_estimates_grow_with_the_sms_and_agree_with_the_measurement() -> None:
    h200 = find_gpu("h200")
    assert 0 <= estimated_context_bytes(132) - h200.context_bytes < 2 * MIB
    assert estimated_library_bytes(132) == estimated_library_bytes(40) == h200.library_bytes
    assert estimated_library_bytes(148) > h200.library_bytes
    assert estimated_context_bytes(40) < estimated_context_bytes(108) < estimated_context_bytes(148)


def test_a_whole_h100_as_the_planner_certified_it() -> None:
    """Predicted without ever having seen one; what lay outside the allocator is no more than the catalogue says."""
    h100 = find_gpu("h100")
    assert (h100.total_bytes, h100.context_bytes) == (85017493504, 552402944)
    folder = Path(__file__).parent.parent / "measurements/h100/probe"
    plans = [plan for path in folder.glob("*.json") for plan in json.loads(path.read_text(encoding="utf-8"))["plans"]]
    assert len(plans) == 7
    for plan in plans:
        assert plan["certified"]
        assert plan["predicted_max_batch_size"] == plan["max_batch_size"]
        outside = plan["peak_device_bytes"] - plan["peak_reserved_bytes"]
        assert 0.97 * (h100.context_bytes + h100.library_bytes) < outside <= h100.context_bytes + h100.library_bytes


@pytest.mark.parametrize(
    ("case", "reserved", "device"),
    [
        ("gpt2 fp32, batch 1", 3472883712, 4260167680),
        ("gpt2 bf16-amp, batch 4", 7939817472, 8743878656),
        ("t5-base bf16-amp, batch 24", 23500685312, 24304746496),
        ("bert-large fp32, batch 4", 8713666560, 9500950528),
        ("resnet50 fp32, batch 24", 2923429888, 3731685376),
        ("resnet50 bf16-amp, batch 24", 1614807040, 2418868224),
    ],
)
def test_what_lay_outside_the_allocator_on_a_real_h200(case: str, reserved: int, device: int) -> None:
    """Bytes measured in fresh processes (driver 580.159.04, torch 2.11.0+cu130): never more than the catalogue says."""
    h200 = find_gpu("h200")
    outside = device - reserved
    assert outside <= h200.context_bytes + h200.library_bytes, case
    assert outside > 0.97 * (h200.context_bytes + h200.library_bytes), case
