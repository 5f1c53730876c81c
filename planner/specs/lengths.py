"""How long the samples of a data set are: histograms of ``(tokens, how many samples)``, made of lists, files and
distributions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import exp, log, log1p, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

from planner.errors import InvalidArgument, InvalidSpec

DISTRIBUTIONS = ("uniform", "normal", "lognormal")
NUM_QUANTILES = 200
"""Equal shares that stand for a distribution: its own draws would differ from run to run."""
MAX_FILE_BYTES = 256 << 20
MAX_DISTINCT = 2000
"""Lengths that a histogram tells apart; more are rounded up to a coarser grid, so that none becomes shorter."""

Histogram = tuple[tuple[int, int], ...]
"""``(tokens, samples)`` by ascending tokens."""


def histogram(lengths: Iterable[int], counts: Iterable[int], longest: int | None = None) -> Histogram:
    """Equal lengths together, those above ``longest`` cut to it."""
    found: Counter[int] = Counter()
    for length, count in zip(lengths, counts, strict=True):
        found[length if longest is None else min(length, longest)] += count
    return tuple(sorted(found.items()))


def quantiles(kind: str, low: int, high: int, mean: float = 0.0, std: float = 1.0) -> list[int]:
    """``NUM_QUANTILES`` lengths of equal weight, each from ``low`` to ``high``; the last is ``high``, since a long run
    meets the longest sample.

    ``mean`` and ``std`` are those of the lengths themselves, before they are bounded.
    """
    shares = [(index + 0.5) / NUM_QUANTILES for index in range(NUM_QUANTILES)]
    if kind == "uniform":
        values = [low + share * (high - low) for share in shares]
    elif kind == "normal":
        values = [NormalDist(mean, std).inv_cdf(share) for share in shares]
    else:
        variance = log1p((std / mean) ** 2)
        of_log = NormalDist(log(mean) - variance / 2, sqrt(variance))
        values = [exp(of_log.inv_cdf(share)) for share in shares]
    bounded = [min(max(round(value), low), high) for value in values]
    return [*bounded[:-1], high]


def inline_file(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``document`` with the file that ``data.lengths`` names read into it, so that it says all by itself.

    One whole number on each line. Raises ``InvalidArgument`` for a file that cannot be read, ``InvalidSpec`` (field
    ``data.lengths.file``) for a line that is no length.
    """
    data = document.get("data")
    lengths = data.get("lengths") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(lengths, Mapping) or set(lengths) != {"file"}:
        return dict(document)
    path = folder / str(lengths["file"])
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidSpec(f"{path} is larger than {MAX_FILE_BYTES} bytes", field="data.lengths.file")
        found = Counter(_read(path))
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror or error}", field="data.lengths.file") from error
    if not found:
        raise InvalidSpec(f"{path} holds no lengths", field="data.lengths.file")
    rows = _coarser(found)
    return {
        **document,
        "data": {**data, "lengths": {"lengths": [row[0] for row in rows], "counts": [row[1] for row in rows]}},
    }


def _read(path: Path) -> Iterable[int]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            text = line.strip()
            if not text:
                continue
            if not text.isascii() or not text.isdigit() or int(text) < 1:
                raise InvalidSpec(
                    f"line {number} of {path} is no length: {text[:40]!r}; write one whole number on each line",
                    field="data.lengths.file",
                )
            yield int(text)


def _coarser(found: Counter[int]) -> Histogram:
    step = 1
    while len(found) > MAX_DISTINCT:
        step *= 2
        coarse: Counter[int] = Counter()
        longest = max(found)
        for length, count in found.items():
            coarse[min(-(-length // step) * step, longest)] += count
        found = coarse
    return tuple(sorted(found.items()))
