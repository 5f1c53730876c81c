"""Which device answers a question: the rules, without a GPU."""

from __future__ import annotations

import pytest

from planner.devices import Limit
from planner.errors import InvalidArgument
from planner.gpus import default_capacity_bytes, find_gpu
from planner.local_gpus import LocalGpu
from planner.selection import DEFAULT_GPU, choose, choose_device
from planner.units import GIB


def card(type_name: str, index: int = 0) -> LocalGpu:
    gpu = find_gpu(type_name)
    return LocalGpu(
        index=index, uuid=f"GPU-{index}", name=gpu.driver_names[0], total_bytes=gpu.nvml_total_bytes,
        usable_bytes=gpu.total_bytes, used_bytes=0, driver_version="580.1", compute_capability=gpu.compute_capability,
        num_sms=gpu.num_sms,
    )  # fmt: skip


def test_measures_where_a_gpu_of_that_type_is() -> None:
    here = [card("a100-80gb"), card("h200", 1)]
    choice = choose("h200", None, False, here)
    assert (choice.gpu.name, choice.local, choice.notes) == ("h200", here[1], ())
    assert choice.capacity_bytes == default_capacity_bytes(find_gpu("h200"))


def test_without_a_name_it_is_this_machines_gpu() -> None:
    choice = choose(None, 16 * GIB, False, [card("a100-80gb")])
    assert (choice.gpu.name, choice.capacity_bytes, choice.notes) == ("a100-80gb", 16 * GIB, ())
    assert choice.local is not None


@pytest.mark.parametrize("here", [[], [card("a100-80gb")]])
def test_another_type_is_predicted_and_says_so(here: list[LocalGpu]) -> None:
    choice = choose("h200", None, False, here)
    assert (choice.gpu.name, choice.local) == ("h200", None)
    assert choice.notes == ("no h200 is here: predicted on a virtual h200, nothing is measured",)


def test_without_a_gpu_or_a_name_the_default_is_stated() -> None:
    choice = choose(None, None, False, [])
    assert choice.gpu.name == DEFAULT_GPU
    assert DEFAULT_GPU in choice.notes[0]
    assert "nothing is measured" in choice.notes[1]


def test_predict_never_measures() -> None:
    choice = choose("h200", None, True, [card("h200")])
    assert choice.local is None
    assert choice.notes == ("predicted on a virtual h200, nothing is measured",)


def test_a_card_that_the_catalogue_lacks_can_be_named() -> None:
    odd = LocalGpu(
        index=0, uuid="GPU-0", name="NVIDIA Odd 9000", total_bytes=24 * GIB, usable_bytes=23 * GIB, used_bytes=0,
        driver_version="580.1", compute_capability=(8, 9), num_sms=60,
    )  # fmt: skip
    choice = choose(odd.gpu.name, None, False, [odd])
    assert choice.local is odd


def test_no_capacity_beyond_the_card() -> None:
    with pytest.raises(InvalidArgument) as caught:
        choose("rtx-4090", 80 * GIB, True, [])
    assert caught.value.field == "capacity"


def test_the_virtual_gpu_does_not_promise_what_the_context_takes() -> None:
    gpu = find_gpu("h200")
    choice = choose("h200", gpu.total_bytes, True, [])
    assert choice.capacity_bytes == default_capacity_bytes(gpu)
    assert "CUDA context" in choice.notes[-1]
    assert choose("h200", gpu.total_bytes, False, [card("h200")]).capacity_bytes == gpu.total_bytes


def test_an_unknown_type_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(InvalidArgument) as caught:
        choose("h2000", None, False, [card("h200")])
    assert caught.value.suggestion == "h200"


def test_another_type_is_measured_under_its_capacity_where_that_is_asked_for() -> None:
    here = [card("a100-80gb"), card("h200", 1)]
    choice = choose("a10g", None, False, here, "h200")
    assert (choice.gpu.name, choice.local, choice.notes) == ("h200", here[1], ())
    assert choice.stands_for == find_gpu("a10g")
    assert choice.capacity_bytes == default_capacity_bytes(find_gpu("a10g"))
    assert choose("a10g", 16 * GIB, False, here, "h200").capacity_bytes == 16 * GIB
    for same in (choose("h200", None, False, here, "h200"), choose(None, None, False, here, "h200")):
        assert (same.gpu.name, same.stands_for) == ("h200", None)
        assert same.capacity_bytes == default_capacity_bytes(find_gpu("h200"))


@pytest.mark.parametrize(
    ("name", "on", "capacity", "predicted_only", "field", "words", "suggestion"),
    [
        ("a10g", "h100", None, False, "on", "no h100 is here: only a100-80gb", "a100-80gb"),
        ("a10g", "h2000", None, False, "on", "'h2000' is not a GPU type", "h200"),
        ("a10gg", "a100-80gb", None, False, "gpu", "'a10gg' is not a GPU type", "a10g"),
        ("h200", "a100-80gb", None, False, "on", "one a100-80gb leaves the allocator 78.", None),
        ("a10g", "a100-80gb", 40 * GIB, False, "capacity", "40.00 GiB is more than the 21.99", None),
        ("a10g", "a100-80gb", None, True, "on", "a prediction runs on no GPU", None),
    ],
)
def test_what_cannot_be_measured_on_another_type(
    name: str, on: str, capacity: int | None, predicted_only: bool, field: str, words: str, suggestion: str | None
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        choose(name, capacity, predicted_only, [card("a100-80gb")], on)
    assert words in str(caught.value)
    assert (caught.value.field, caught.value.suggestion) == (field, suggestion)


def test_no_gpu_measures_nothing() -> None:
    with pytest.raises(InvalidArgument, match="on: no h200 is here: no GPU"):
        choose("a10g", None, False, [], "h200")


def test_a_device_knows_that_it_is_held_to_less_than_it_has() -> None:
    def limit_of(*question: object) -> Limit | None:
        return choose_device(*question, find_local=lambda: [card("h200")]).device.limit  # type: ignore[arg-type]

    assert limit_of("h200", None, False) is None
    assert limit_of("a100-80gb", None, False) is None  # a prediction measures nothing
    own = limit_of("h200", 16 * GIB, False)
    assert own is not None
    assert own.note.startswith("measured under a limit: 16.00 GiB of the 139.")
    other = limit_of("a10g", None, False, "h200")
    assert other is not None
    assert (other.gpu, other.stands_for) == ("h200", "a10g")
    assert other.note.startswith("measured under a limit: on h200, held to the 21.")
    assert "speed are those of h200" in other.note
