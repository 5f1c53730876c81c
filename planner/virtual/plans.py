"""The table of workspaces that cuDNN's heuristics asked for: layers, recipes, and which layers are alike. No torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import nsmallest
from itertools import chain
from typing import NamedTuple

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


Column = dict[int, Recipe]  # a layer's recipes by batch size, ascending


def runs(column: Column) -> Column:
    """The ends of each run of equal recipes: what lies between two equal ones is taken as they are."""
    sizes = list(column)
    around = zip(sizes, [0, *sizes], [*sizes[1:], 0], strict=False)
    return {n: column[n] for n, low, high in around if not column.get(low) == column[n] == column.get(high)}


def encode_line(column: Column) -> tuple[str, str]:
    """Batch sizes and recipes, apart, which compresses better: ``1-64,-70,96`` and ``iow+16,io,``.

    iow+16 from 1 to 64, io from 65 to 70, nothing at 96; 71 to 95 are not known.
    """
    ends = list(runs(column).items())
    sizes, recipes, last = [], [], 0
    while ends:
        first, recipe = ends.pop(0)
        begin = "" if first == last + 1 else str(first)
        last = ends.pop(0)[0] if ends and ends[0][1] == recipe else first
        sizes.append(f"{begin}-{last}" if last > first or not begin else begin)
        recipes.append(recipe.encode())
    return ",".join(sizes), ",".join(recipes)


def decode_line(sizes: str, recipes: str) -> Column:
    """The ends of its runs."""
    found: Column = {}
    last = 0
    for run, text in zip(sizes.split(","), recipes.split(","), strict=True) if sizes else ():
        first, _, end = run.partition("-")
        begin = int(first) if first else last + 1
        last = int(end or first)
        found[begin] = found[last] = Recipe.decode(text)
    return found


def together(own: Column, other: Column) -> Column:
    """``own``, and of ``other`` what lies where both agree at the closest batch size of ``own``."""
    if not own or not other:
        return own or other
    mine, others = list(own), list(other)
    alike = {n: own[n] == other[closest(n, others)] for n in mine}
    taken = {n: recipe for n, recipe in other.items() if alike[closest(n, mine)]}
    return dict(sorted({**taken, **own}.items()))


class Table:
    """Recipes by kind of tensors, direction, layer and batch size, as ``benchmarks/convolutions.py`` writes them.

    A layer's number is its place among the lines of all families, and that of its line of recipes. Most of the table
    stays text, or unread: a prediction asks for a few layers, of one kind of tensors.
    """

    def __init__(self, layers: Mapping[str, str], texts: Mapping[str, str]) -> None:
        """Layers by family, a line each; ``texts`` has their lines: ``float32-nchw wgrad sizes``, ``... recipes``."""
        self.layers, self.texts = layers, texts
        self._families = {name: text.split("\n") for name, text in layers.items()}
        self._numbers = {text: number for number, text in enumerate(chain(*self._families.values()))}
        self._lines: dict[str, list[str]] = {}
        self._members: dict[str, list[tuple[tuple[float, ...], int, int]]] = {}
        self._near: dict[Layer, list[tuple[float, int, int]]] = {}

    def recipes(self, tensors: Tensors, direction: str, layer: Layer) -> Column:
        """Of ``layer`` at the ends of runs of batch sizes; empty where cuDNN was not asked.

        Of float16 those in bfloat16 too, where float16's at the closest batch size is the same.
        """
        number = self._numbers.get(layer.text)
        return {} if number is None else self._column(tensors, direction, number)

    def asked(self, tensors: Tensors, direction: str, layer: Layer) -> bool:
        """Whether cuDNN was asked about this very kind of tensors."""
        number = self._numbers.get(layer.text)
        return number is not None and self._line(f"{tensors.key} {direction} sizes", number) != ""

    def _column(self, tensors: Tensors, direction: str, number: int) -> Column:
        sizes, recipes = (self._line(f"{tensors.key} {direction} {what}", number) for what in ("sizes", "recipes"))
        if tensors.dtype == "float16" and sizes in ("", "="):  # as bfloat16's
            return self._column(tensors._replace(dtype="bfloat16"), direction, number)
        return decode_line(sizes, recipes)

    def _line(self, name: str, number: int) -> str:
        if name not in self._lines:
            text = self.texts.get(name)
            self._lines[name] = [] if text is None else text.split("\n")
        return self._lines[name][number] if self._lines[name] else ""

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
    widths = (layer.c // layer.groups, layer.k // layer.groups)
    padded = 1 << (max(widths) - 1).bit_length()  # how cuDNN pads groups (``copied``)
    grouped = 2.0 * (layer.groups > 1)
    return (
        2.0 * log(layer.k),
        2.0 * log(widths[0]),
        3.0 * log(layer.taps),
        0.35 * log(layer.output_pixels),
        2.0 * log(max(layer.stride)),
        2.0 * log(max(layer.dilation)),
        0.5 * log(layer.groups),
        grouped * log(widths[1]),
        grouped * log(padded),
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
