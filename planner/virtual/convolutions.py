"""The workspace that cuDNN's convolutions take from the caching allocator.

PyTorch asks cuDNN's heuristics for an engine, allocates the workspace that the engine names, and frees it when the
kernel was launched (aten/src/ATen/native/cudnn/Conv_v8.cpp). The workspace is not documented; measured, it is a sum of
such terms as these, which ``Recipe`` holds:

- copies in NHWC of the input, the output and the weights, channels padded to 16 bytes, since the tensor-core kernels
  want that layout; batch size and spatial size multiply the first two;
- in fp32, the tiles of Winograd's algorithm in their stead;
- for the gradient of 1x1 weights, one fp32 product for each sample;
- partial sums of a reduction divided among thread blocks, bounded by the number of SMs, thus by some tens of MiB;
- 16 bytes.

Which recipe applies is the engine's choice. It is looked up in a table measured on one H200
(``convolutions_sm90.json.gz``, built by ``benchmarks/convolutions.py``); a layer that is not in the table takes the
recipe of the most similar ones in it, and the spread among those is its interval. Pure Python: no torch.
"""

from __future__ import annotations

import gzip
import heapq
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple, cast, get_args

from planner.errors import InvalidArgument, nearest

Direction = Literal["forward", "dgrad", "wgrad"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
TABLE = "convolutions_sm90.json.gz"
MEASURED_ON = (9, 0)
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
BLOCK = 512  # the allocator's unit, thus the resolution of a measurement
SEGMENT = 2 << 20  # large requests come from segments that are multiples of it
UNSPLIT = 1 << 20  # a rest of at most this much stays part of a large block
LEAST = 272  # what a workspace of one block was in every recorded trace
TAIL = 16  # bytes that every workspace with a copy in it ends with
WINOGRAD_TILE, WINOGRAD_TAPS = 4, 36  # F(4x4, 3x3): 6x6 products for each 4x4 outputs
PARTIAL_SUMS = 20 << 20  # no measured divided reduction takes more
NEIGHBOURS = 12
FAR = 1.5


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
    def family(self) -> str:
        """Layers among which cuDNN's choices are alike."""
        if self.groups == self.c > 1:
            return "depthwise"
        if self.taps == 1:
            return "pointwise strided" if max(self.stride) > 1 else "pointwise"
        return "stem" if self.c <= 4 and len(self.input_size) > 1 else "dense"


class Tensors(NamedTuple):
    """What the convolution's tensors look like: bytes of an element, and whether their channels are innermost."""

    element_bytes: int
    channels_last: bool

    @property
    def key(self) -> str:
        return ("16" if self.element_bytes == 2 else "32") + ("-nhwc" if self.channels_last else "-nchw")


MEASURED_TENSORS = (Tensors(2, False), Tensors(2, True), Tensors(4, False))


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a workspace is made of.

    ``copies`` are among ``i`` (input), ``o`` (output) and ``w`` (weights), each in NHWC, or ``v``, the fp32 tiles that
    Winograd's algorithm makes of all three; ``per_sample`` is an fp32 copy of the weights for each sample; ``extra``
    bytes do not depend on the batch size.
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


@dataclass(frozen=True, slots=True)
class Workspace:
    """Bytes asked of the allocator, with an interval; ``exact`` when this very case was measured.

    The interval held 95% or more of the measurements that cross-validation kept from it, a little less for some kinds:
    ``benchmarks/convolutions.py`` prints the figures.
    """

    bytes: int
    low: int
    high: int
    exact: bool


def workspace_bytes(
    *,
    direction: Direction,
    dtype: str,
    channels_last: bool,
    n: int,
    c: int,
    k: int,
    groups: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    input_size: tuple[int, ...],
    compute_capability: tuple[int, int] = MEASURED_ON,
) -> Workspace:
    """The workspace of one convolution over ``[n, c, *input_size]`` with weights ``[k, c // groups, *kernel]``.

    ``direction`` is ``forward``, ``dgrad`` (the gradient of the input) or ``wgrad`` (of the weights); a transposed
    convolution's forward pass is the ``dgrad`` of the convolution that it transposes. ``dtype`` is that of the kernel,
    after autocast: ``bfloat16``, ``float16``, ``float32`` (with TF32 allowed, PyTorch's default for convolutions) or
    ``float64``. Says what the H200 was measured to do: for another compute capability, for ``float64`` and for
    ``float32`` with ``channels_last``, none of which was measured, never ``exact`` and with a wide interval.

    Raises ``InvalidArgument`` for an unknown direction or dtype and for shapes that make no convolution.
    """
    if direction not in DIRECTIONS:
        raise InvalidArgument(
            f"{direction!r} is no direction", field="direction", suggestion=nearest(direction, DIRECTIONS)
        )
    if dtype not in ELEMENT_BYTES:
        raise InvalidArgument(
            f"cuDNN has no convolution in {dtype!r}", field="dtype", suggestion=nearest(dtype, ELEMENT_BYTES)
        )
    layer = Layer(c, k, groups, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), tuple(input_size))
    _check(layer, n)
    if n == 0 or min(layer.output_size) <= 0:
        return Workspace(0, 0, 0, True)
    # PyTorch gives cuDNN a 1d convolution as contiguous NCHW, whatever its strides.
    tensors = Tensors(ELEMENT_BYTES[dtype], channels_last and len(layer.input_size) > 1)
    known = (
        tensors if tensors in MEASURED_TENSORS else Tensors(2 if tensors.channels_last else 4, tensors.channels_last)
    )
    found = _workspace(direction, known, tensors, layer, n)
    if compute_capability != MEASURED_ON or tensors != known:
        return _widened(found, layer, n, tensors)
    return found


def copied(layer: Layer, n: int, tensors: Tensors) -> dict[str, int]:
    """Bytes of the copies of input, output and weights; channels are padded to 8 (16-bit types) or 4."""
    size = tensors.element_bytes
    multiple = 8 if size == 2 else 4
    return {
        "i": n * _round_up(layer.c, multiple) * layer.pixels * size,
        "o": n * _round_up(layer.k, multiple) * layer.output_pixels * size,
        "w": _round_up(layer.c // layer.groups, multiple) * layer.k * layer.taps * size,
        "v": 4 * WINOGRAD_TAPS * (n * _tiles(layer) * (layer.c + layer.k) + layer.c * layer.k),
    }


def _tiles(layer: Layer) -> int:
    return math.prod(-(-size // WINOGRAD_TILE) for size in layer.output_size)


def explain(layer: Layer, n: int, tensors: Tensors, measured: int) -> Recipe:
    """The recipe behind a measured workspace (a multiple of 512 bytes, rests of unsplit blocks included)."""
    if measured <= 3 * BLOCK:
        return Recipe(extra=LEAST if measured == BLOCK else measured)
    choices = [Recipe(copies) for copies in _possible_copies(layer, tensors)]
    if layer.family == "dense" and layer.kernel == (3, 3) and layer.stride == (1, 1) and tensors.element_bytes == 4:
        choices.append(Recipe("v"))
    choices += [Recipe(copies, per_sample=True) for copies in ("", "io", "iow")]
    rests = [(measured - choice.bytes(layer, n, tensors), choice) for choice in choices if choice != Recipe()]
    for rest, choice in rests:
        if 0 <= rest <= 3 * BLOCK:
            return choice
    if measured % SEGMENT == 0:  # a whole segment, so the rest is what was too little to split off
        for rest, choice in rests:
            if 0 <= rest <= UNSPLIT:
                return choice
    for rest, choice in rests:
        if 0 <= rest <= PARTIAL_SUMS and not choice.per_sample and choice.copies != "v":
            return replace(choice, extra=rest)
    return Recipe(extra=measured)


def _possible_copies(layer: Layer, tensors: Tensors) -> tuple[str, ...]:
    """The sets of copies that were seen, the likely ones first."""
    if layer.family == "depthwise":
        return ()
    if tensors.channels_last and layer.c % 8 == 0 == layer.k % 8:
        return ()
    if tensors.channels_last:
        return ("iw", "ow", "io", "iow", "i", "o", "w")
    if layer.taps == 1:
        return ("io", "iow", "iw", "ow", "i", "o", "w")
    return ("iow", "iw", "io", "ow", "i", "o", "w")


class Case(NamedTuple):
    features: tuple[float, ...]
    layer: Layer
    n: int
    recipe: Recipe


Groups = Mapping[tuple[str, str, str], list[Case]]  # (tensors' key, direction, family) -> measured cases


def features(layer: Layer, n: int) -> tuple[float, ...]:
    """Where a convolution lies among others: logarithms of its sizes as a matrix product, and its alignment.

    The weights are plain on purpose: halving or doubling any one of them hardly changed the cross-validated error.
    """
    log = math.log2
    reduced = layer.c // layer.groups * layer.taps
    return (
        log(layer.k),
        log(reduced),
        log(n * layer.output_pixels),
        log(layer.taps),
        log(layer.output_pixels),
        0.5 * log(n),
        log(max(layer.stride)),
        0.5 * log(layer.groups),
        0.25 * log(layer.kernel[0] / layer.kernel[-1]),
        2.0 * log(max(layer.dilation)),  # this and the next were not measured, so such layers are far from all
        2.0 * (len(layer.input_size) > 2),
        float(layer.pixels % 8 == 0),
        float(layer.c % 8 == 0) + float(layer.k % 8 == 0),
    )


def estimate(cases: Sequence[Case], layer: Layer, n: int, tensors: Tensors) -> Workspace:
    """The workspace by ``cases``: by the very one, else by the layer at the batch sizes on either side if these agree.

    Else by the most similar case, with the interval that the ``NEIGHBOURS`` most similar ones span.

    Where even the most similar one is far, the interval is that of every set of copies.
    """
    measured = {case.n: case.recipe for case in cases if case.layer == layer}
    around = [measured[batch] for batch in _around(n, measured)]
    sizes = [recipe.bytes(layer, n, tensors) for recipe in around]
    if n in measured or (len(around) == 2 and around[0] == around[1]):
        return Workspace(sizes[0], sizes[0], sizes[0], n in measured)
    own = features(layer, n)
    near = heapq.nsmallest(NEIGHBOURS, cases, key=lambda case: math.dist(own, case.features))
    first, *others = (case.recipe.bytes(layer, n, tensors) for case in near)
    low, high = min(first, *others, *sizes), max(first, *others, *sizes)
    found = Workspace(first, low, high, False)
    return _widened(found, layer, n, tensors) if math.dist(own, near[0].features) > FAR else found


def _widened(found: Workspace, layer: Layer, n: int, tensors: Tensors) -> Workspace:
    """The same size in an interval that holds every set of copies and partial sums."""
    if layer.family == "depthwise" and not tensors.channels_last:
        return replace(found, exact=False)  # PyTorch's own kernels, which take no workspace
    everything = Recipe("" if layer.family == "depthwise" else "iow", extra=PARTIAL_SUMS)
    return Workspace(found.bytes, 0, max(found.high, everything.bytes(layer, n, tensors)), False)


def group(table: Mapping[str, Any]) -> Groups:
    """The cases of a table as ``benchmarks/convolutions.py`` writes it."""
    layers = [Layer(c, k, g, *(tuple(item) for item in rest)) for c, k, g, *rest in table["layers"]]
    groups: dict[tuple[str, str, str], list[Case]] = {}
    for name, columns in table["recipes"].items():
        key, direction = name.split(" ")
        for layer, column in zip(layers, columns, strict=True):
            for n, text in zip(table["batches"], column, strict=True):
                if text is not None:
                    case = Case(features(layer, n), layer, n, Recipe.decode(text))
                    groups.setdefault((key, direction, layer.family), []).append(case)
    return groups


@cache
def _groups() -> Groups:
    content = files("planner.virtual").joinpath(TABLE).read_bytes()
    return group(cast(dict[str, Any], json.loads(gzip.decompress(content))))


@lru_cache(maxsize=65536)
def _workspace(direction: str, known: Tensors, tensors: Tensors, layer: Layer, n: int) -> Workspace:
    """The recipe is that of the ``known`` kind of tensors, its sizes are those of ``tensors``."""
    return estimate(_groups()[known.key, direction, layer.family], layer, n, tensors)


def _around(n: int, batches: Iterable[int]) -> list[int]:
    """``n`` itself where it was measured, else the closest measured on either side; past the end the last two."""
    ordered = sorted(batches)
    if n in ordered:
        return [n]
    below, above = [b for b in ordered if b < n], [b for b in ordered if b > n]
    return below[-1:] + above[:1] if below and above else below[-2:] or above[:2]


def _check(layer: Layer, n: int) -> None:
    dimensions = len(layer.input_size)
    for name in ("kernel", "stride", "padding", "dilation"):
        if len(getattr(layer, name)) != dimensions:
            raise InvalidArgument(f"has {len(getattr(layer, name))} entries for {dimensions} spatial sizes", field=name)
    for name, values in (("kernel", layer.kernel), ("stride", layer.stride), ("dilation", layer.dilation)):
        if min(values, default=1) < 1:
            raise InvalidArgument("must be at least 1", field=name, suggestion="1")
    for name in ("c", "k", "groups"):
        if getattr(layer, name) < 1:
            raise InvalidArgument("must be at least 1", field=name, suggestion="1")
    if n < 0:
        raise InvalidArgument("must not be negative", field="n", suggestion="0")
    if layer.c % layer.groups or layer.k % layer.groups:
        raise InvalidArgument("must divide c and k", field="groups", suggestion=str(math.gcd(layer.c, layer.k)))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
