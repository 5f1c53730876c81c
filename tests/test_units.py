"""Bytes in and out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import InvalidArgument
from planner.units import GIB, MIB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("16GiB", 17179869184),
        ("16 gib", 17179869184),
        (" 1.5GiB ", 1610612736),
        ("40GB", 40_000_000_000),
        ("512MiB", 512 * MIB),
        ("1TiB", 1024 * GIB),
        ("1 kb", 1000),
        ("17179869184", 17179869184),
        ("17179869184B", 17179869184),
        (17179869184, 17179869184),
    ],
)
def test_sizes(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "16G",
        "16 GiBs",
        "-1GiB",
        "1e3MiB",
        "16,5GiB",
        "0x10",
        True,
        "nan",
        "٣GiB",
        "9" * 5000,
        "1." + "9" * 5000 + "GiB",
    ],
)
def test_what_is_no_size_says_how_to_write_one(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_bytes(text, field="capacity")
    assert caught.value.field == "capacity"
    assert "is not a size; write for example 16GiB" in caught.value.message


@pytest.mark.parametrize("text", ["0", "0GiB", "0.0GiB", 0, -5])
def test_a_size_is_more_than_nothing(text: str | int) -> None:
    with pytest.raises(InvalidArgument, match="must be more than 0 bytes"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["8192TiB", 2**53, "99999999999999999999TiB"])
def test_a_size_fits_in_every_database_and_json_reader(text: str | int) -> None:
    with pytest.raises(InvalidArgument, match="is more than any GPU or computer has"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (3 * MIB // 2, "1.5 MiB"),
        (17179869184, "16.00 GiB"),
        (150109880320, "139.80 GiB"),
        (-GIB, "-1.00 GiB"),
    ],
)
def test_bytes_for_people(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(1, 2**43 - 1))
def test_a_number_of_bytes_reads_back_exactly(count: int) -> None:
    assert parse_bytes(str(count)) == parse_bytes(f"{count}B") == parse_bytes(count) == count
    assert parse_bytes(f"{count}KiB") == count * 1024
