"""The table of workspaces that cuDNN's heuristics asked for: layers, recipes, and which layers are alike. No torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import nsmallest
from itertools import groupby
from typing import Any, NamedTuple

TAIL = 16  # bytes that every workspace with a copy in it ends with
NEIGHBOURS = 6


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution, but for its batch size and dtype. ``kernel`` to ``input_size`` have an entry a dimension."""

    c: int
    k: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    input_size: tuple[int, ...]

    @property
    def pixels(self) -> int:
        return math.prod(self.input_size)

    @property
    def output_size(self) -> tuple[int, ...]:
        sizes = zip(self.input_size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (r - 1) - 1) // s + 1 for size, r, s, p, d in sizes)

    @property
    def output_pixels(self) -> int:
        return math.prod(self.output_size)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def weights(self) -> int:
        return self.k * (self.c // self.groups) * self.taps

    @property
    def depthwise(self) -> bool:
        """As PyTorch has it: ``is_depthwise`` in aten/src/ATen/native/Convolution.cpp."""
        return self.groups == self.c > 1 and self.k % self.c == 0

    @property
    def family(self) -> str:
        """Layers among which cuDNN's choices are alike."""
        if self.groups > 1:
            kind = "depthwise" if self.depthwise else "grouped"
        elif self.taps == 1:
            kind = "pointwise"
        elif self.c <= 4 and len(self.input_size) > 1:
            kind = "stem"
        else:
            kind = "dense"
        return f"{kind} {len(self.input_size)}d{' strided' * (max(self.stride) > 1)}"


class Tensors(NamedTuple):
    """What the convolution's tensors look like: bytes of an element, and whether their channels are innermost."""

    element_bytes: int
    channels_last: bool

    @property
    def key(self) -> str:
        return ("16" if self.element_bytes == 2 else "32") + ("-nhwc" if self.channels_last else "-nchw")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a workspace is made of.

    ``copies`` are among ``i`` (input), ``o`` (output) and ``w`` (weights), each in NHWC; ``per_sample`` is an fp32 copy
    of the weights for each sample; ``extra`` bytes do not depend on the batch size, or hardly.
    """

    copies: str = ""
    per_sample: bool = False
    extra: int = 0

    def bytes(self, layer: Layer, n: int, tensors: Tensors) -> int:
        total = sum(copied(layer, n, tensors)[name] for name in self.copies) + self.extra
        if self.per_sample:
            total += 4 * n * layer.weights
        return total + TAIL if self.copies else total

    def encode(self) -> str:
        return "+".join((self.copies, "n" if self.per_sample else "", str(self.extra or ""))).rstrip("+")

    @classmethod
    def decode(cls, text: str) -> Recipe:
        copies, per_sample, extra = (*text.split("+"), "", "")[:3]
        return cls(copies, per_sample == "n", int(extra or 0))


def copied(layer: Layer, n: int, tensors: Tensors) -> dict[str, int]:
    """Bytes of the copies of input, output and weights; channels are padded to 8 (16-bit types) or 4.

    Where each channel has a filter of its own, each is padded.
    """
    size = tensors.element_bytes
    multiple = 8 if size == 2 else 4
    if layer.depthwise:
        k = layer.groups * _round_up(layer.k // layer.groups, multiple)
        return {
            "i": n * layer.groups * multiple * layer.pixels * size,
            "o": n * k * layer.output_pixels * size,
            "w": k * multiple * layer.taps * size,
        }
    return {
        "i": n * _round_up(layer.c, multiple) * layer.pixels * size,
        "o": n * _round_up(layer.k, multiple) * layer.output_pixels * size,
        "w": _round_up(layer.c // layer.groups, multiple) * layer.k * layer.taps * size,
    }


def encode_line(recipes: list[Recipe | None]) -> str:
    """A layer's recipes at the table's batch sizes, equal ones in a row written once: ``iow+16*3,io,?*2``."""
    runs = [(text, len(list(run))) for text, run in groupby("?" if r is None else r.encode() for r in recipes)]
    return ",".join(text if count == 1 else f"{text}*{count}" for text, count in runs)


def decode_line(line: str) -> list[Recipe | None]:
    found: list[Recipe | None] = []
    for run in line.split(","):
        text, _, count = run.partition("*")
        found += [None if text == "?" else Recipe.decode(text)] * int(count or 1)
    return found


class Table:
    """Recipes by kind of tensors, direction, layer and batch size, as ``benchmarks/convolutions.py`` writes them."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.batches: list[int] = document["batches"]
        self.layers = [Layer(c, k, g, *(tuple(item) for item in rest)) for c, k, g, *rest in document["layers"]]
        self._lines: Mapping[str, list[str]] = document["recipes"]
        self._numbers = {layer: number for number, layer in enumerate(self.layers)}
        self._families: dict[str, list[tuple[tuple[float, ...], int]]] = {}
        for number, layer in enumerate(self.layers):
            self._families.setdefault(layer.family, []).append((features(layer), number))
        self._near: dict[Layer, list[tuple[float, int]]] = {}

    def recipes(self, key: str, direction: str, layer: Layer) -> dict[int, Recipe]:
        """Of ``layer`` by batch size; empty where it is not in the table."""
        number = self._numbers.get(layer)
        return {} if number is None else self._column(key, direction, number)

    def _column(self, key: str, direction: str, number: int) -> dict[int, Recipe]:
        recipes = decode_line(self._lines[f"{key} {direction}"][number])
        return {n: recipe for n, recipe in zip(self.batches, recipes, strict=True) if recipe is not None}

    def alike(self, key: str, direction: str, layer: Layer, n: int) -> list[tuple[float, Recipe]]:
        """The recipes of the most similar layers at about ``n``, with their distance, the most similar first."""
        found = []
        for distance, number in self._neighbours(layer):
            column = self._column(key, direction, number)
            if column:
                # As much work in all: the same product of batch size and pixels.
                same = n * layer.output_pixels / self.layers[number].output_pixels
                found.append((distance, column[closest(same, list(column))]))
        return found[:NEIGHBOURS]

    def _neighbours(self, layer: Layer) -> list[tuple[float, int]]:
        near = self._near.get(layer)
        if near is None:
            own = features(layer)
            candidates = self._families.get(layer.family, ())
            near = nsmallest(2 * NEIGHBOURS, ((math.dist(own, other), number) for other, number in candidates))
            self._near[layer] = near
        return near


def features(layer: Layer) -> tuple[float, ...]:
    """Where a layer lies among others of its family: logarithms of its sizes as a matrix product, and its alignment.

    The weights are those of a few tried that gave the most layers kept from the table their workspace.
    """
    log = math.log2
    channels = (layer.c, layer.k)
    return (
        2.0 * log(layer.k),
        2.0 * log(layer.c // layer.groups),
        3.0 * log(layer.taps),
        0.35 * log(layer.output_pixels),
        2.0 * log(max(layer.stride)),
        2.0 * log(max(layer.dilation)),
        0.5 * log(layer.groups),
        log(layer.kernel[0] / layer.kernel[-1]),
        0.2 * (layer.pixels % 8 == 0),
        0.3 * (layer.output_pixels % 2 == 0),
        float(sum(each % 8 == 0 for each in channels)),
        *(0.3 * (each % multiple == 0) for each in channels for multiple in (32, 64)),
    )


def closest(n: float, batches: list[int]) -> int:
    """The batch size that differs from ``n`` by the smallest factor; ``batches`` ascend."""
    index = bisect_left(batches, n)
    around = batches[max(0, index - 1) : index + 1]
    return min(around, key=lambda batch: abs(math.log(batch / n)))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
