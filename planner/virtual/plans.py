"""The table of workspaces that cuDNN's heuristics asked for: layers, recipes, and which layers are alike. No torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import nsmallest
from itertools import chain, groupby
from typing import Any, NamedTuple

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
TAIL = 16  # bytes that every workspace with a copy in it ends with
NEIGHBOURS = 6
MOST_ELEMENTS = 2**31
WIDEST_PADDED_GROUP = 256


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

    @classmethod
    def parse(cls, text: str) -> Layer:
        """The layer that ``text`` is of: ``64 128 1 3,3 1,1 1,1 1,1 56,56``."""
        c, k, groups, *sides = text.split(" ")
        return cls(int(c), int(k), int(groups), *(tuple(map(int, side.split(","))) for side in sides))

    @property
    def text(self) -> str:
        sides = (self.kernel, self.stride, self.padding, self.dilation, self.input_size)
        return " ".join([f"{self.c} {self.k} {self.groups}", *(",".join(map(str, side)) for side in sides)])

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
    """What the convolution's tensors look like: their dtype, and whether their channels are innermost."""

    dtype: str
    channels_last: bool

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def key(self) -> str:
        return self.dtype + ("-nhwc" if self.channels_last else "-nchw")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a workspace is made of.

    ``copies`` are among those of ``copied``; ``per_sample`` is an fp32 copy of the weights for each sample; ``extra``
    bytes do not depend on the batch size, or hardly.
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
    """Bytes of the copies in NHWC that cuDNN makes of the input (``i``), the output (``o``) and the weights (``w``).

    Channels are padded to 8 (16-bit types) or 4 (float32). There is another way (``I``, ``O``, ``W``), in which they
    are padded to 4 (16-bit types) or not at all (float32), and narrow groups of channels to one power of two, that of
    the wider side; where each channel has a filter of its own, each is padded or, in the other way, none. Of tensors of
    more than 2^31 elements cuDNN takes so many samples at a time that neither input nor output has more.
    """
    size = tensors.element_bytes
    multiple = 8 if size == 2 else 4
    n = min(n, max(1, MOST_ELEMENTS // max(layer.c * layer.pixels, layer.k * layer.output_pixels)))
    inputs, outputs = n * layer.pixels * size, n * layer.output_pixels * size
    c, k = layer.c // layer.groups, layer.k // layer.groups
    found = {
        "i": _round_up(layer.c, multiple) * inputs,
        "o": _round_up(layer.k, multiple) * outputs,
        "w": _round_up(c, multiple) * layer.k * layer.taps * size,
    }
    if layer.depthwise:
        k = layer.groups * _round_up(k, multiple)
        padded = {"i": layer.groups * multiple * inputs, "o": k * outputs, "w": k * multiple * layer.taps * size}
        return padded | {"I": found["i"], "O": found["o"], "W": layer.weights * size}
    if layer.groups > 1 and max(c, k) <= WIDEST_PADDED_GROUP:
        width = max(multiple, 1 << (max(c, k) - 1).bit_length())
        every = layer.groups * width
        return found | {"I": every * inputs, "O": every * outputs, "W": every * width * layer.taps * size}
    multiple = 4 if size == 2 else 1
    return found | {
        "I": _round_up(layer.c, multiple) * inputs,
        "O": _round_up(layer.k, multiple) * outputs,
        "W": _round_up(c, multiple) * layer.k * layer.taps * size,
    }


def encode_line(recipes: list[Recipe | None], like: list[Recipe | None] | None = None) -> str:
    """A layer's recipes at the table's batch sizes, equal ones in a row written once: ``iow+16*3,io,?*2``.

    ``=`` stands for what is in ``like`` at that batch size.
    """
    others = like or [None] * len(recipes)
    texts = ("?" if r is None else "=" if r == other else r.encode() for r, other in zip(recipes, others, strict=True))
    runs = [(text, len(list(run))) for text, run in groupby(texts)]
    return ",".join(text if count == 1 else f"{text}*{count}" for text, count in runs)


def decode_line(line: str, like: list[Recipe | None] | None = None) -> list[Recipe | None]:
    found: list[Recipe | None] = []
    for run in line.split(","):
        text, _, count = run.partition("*")
        times = int(count or 1)
        if text == "=" and like is not None:
            found += like[len(found) : len(found) + times]
        else:
            found += [None if text == "?" else Recipe.decode(text)] * times
    return found


class Table:
    """Recipes by kind of tensors, direction, layer and batch size, as ``benchmarks/convolutions.py`` writes them.

    A layer's number is its place among the lines of all families, and that of its line of recipes. Most of the table
    stays text: a prediction asks for a few layers.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.batches: list[int] = document["batches"]
        self._families: dict[str, list[str]] = {name: text.split("\n") for name, text in document["layers"].items()}
        self._numbers = {text: number for number, text in enumerate(chain(*self._families.values()))}
        self._texts: Mapping[str, str] = document["recipes"]
        self._lines: dict[str, list[str]] = {}
        self._members: dict[str, list[tuple[tuple[float, ...], int, int]]] = {}
        self._near: dict[Layer, list[tuple[float, int, int]]] = {}

    def answers(self, tensors: Tensors, direction: str, layer: Layer) -> dict[int, Recipe]:
        """Of ``layer`` by batch size, as cuDNN was asked; empty where it was not."""
        number = self._numbers.get(layer.text)
        return {} if number is None else self._asked(tensors, direction, number)

    def recipes(self, tensors: Tensors, direction: str, layer: Layer) -> dict[int, Recipe]:
        """``answers``, and for float16 those in bfloat16 where float16's at the closest batch size is the same.

        Of 39,909 answers kept from the table 95.7% came back within 1 MiB so, 89.5% by float16's own at the closest.
        """
        number = self._numbers.get(layer.text)
        return {} if number is None else self._column(tensors, direction, number)

    def _column(self, tensors: Tensors, direction: str, number: int) -> dict[int, Recipe]:
        own = self._asked(tensors, direction, number)
        if tensors.dtype != "float16":
            return own
        other = self._asked(tensors._replace(dtype="bfloat16"), direction, number)
        both = [n for n in own if n in other]
        if own and not both:
            return own
        taken = {n: r for n, r in other.items() if not own or own[closest(n, both)] == other[closest(n, both)]}
        return dict(sorted({**taken, **own}.items()))

    def _asked(self, tensors: Tensors, direction: str, number: int) -> dict[int, Recipe]:
        line, other = (self._line(f"{key} {direction}", number) for key in (tensors.key, f"b{tensors.key}"))
        if line is None:
            return {}
        # float16's lines are written against bfloat16's.
        recipes = decode_line(line, None if other is None else decode_line(other))
        return {n: recipe for n, recipe in zip(self.batches, recipes, strict=True) if recipe is not None}

    def _line(self, key: str, number: int) -> str | None:
        if key not in self._texts:
            return None
        if key not in self._lines:
            self._lines[key] = self._texts[key].split("\n")
        return self._lines[key][number]

    def alike(self, tensors: Tensors, direction: str, layer: Layer, n: int) -> list[tuple[float, Recipe]]:
        """The recipes of the most similar layers at about ``n``, with their distance, the most similar first."""
        found: list[tuple[float, Recipe]] = []
        for distance, number, output_pixels in self._nearest(layer):
            column = self._column(tensors, direction, number)
            if column:
                # As much work in all: the same product of batch size and pixels.
                same = n * layer.output_pixels / output_pixels
                found.append((distance, column[closest(same, list(column))]))
                if len(found) == NEIGHBOURS:
                    break
        return found

    def _nearest(self, layer: Layer) -> Iterator[tuple[float, int, int]]:
        """Layers of the same family, the most similar first: distance, number, output pixels."""
        members = self._family(layer.family)
        own = features(layer)

        def distances() -> Iterator[tuple[float, int, int]]:
            return ((math.dist(own, other), number, pixels) for other, number, pixels in members)

        if layer not in self._near:
            self._near[layer] = nsmallest(4 * NEIGHBOURS, distances())
        yield from self._near[layer]
        if len(self._near[layer]) < len(members):  # few of the nearest were asked about
            yield from sorted(distances())[len(self._near[layer]) :]

    def _family(self, name: str) -> list[tuple[tuple[float, ...], int, int]]:
        if name not in self._members:
            texts = self._families.get(name, [])
            layers = [(Layer.parse(text), self._numbers[text]) for text in texts]
            self._members[name] = [(features(layer), number, layer.output_pixels) for layer, number in layers]
        return self._members[name]


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
