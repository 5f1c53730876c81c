"""The workspace that cuDNN's convolutions take from the caching allocator.

PyTorch asks cuDNN's heuristics for plans, allocates the workspace that the first one names, and frees it when the
kernel was launched (``run_single_conv`` in aten/src/ATen/native/cudnn/Conv_v8.cpp). Which plan it is, is not
documented; asked on a GPU, workspaces are sums of such terms as these, which ``Recipe`` holds:

- copies in NHWC of the input, the output and the weights, channels padded to 16 bytes, since the tensor-core kernels
  want that layout; batch size and spatial size multiply the first two;
- for the gradient of 1x1 weights by cuBLASLt, one fp32 product for each sample;
- partial sums of a reduction divided among thread blocks, bounded by the number of SMs, thus by some tens of MiB;
- 16 bytes.

The plan is looked up in a table of what the heuristics answered on H200s (``convolutions_sm90.zip``, built by
``benchmarks/convolutions.py``); a layer that is not in the table takes the recipe of the most similar ones in it, and
the spread among those is its interval. Pure Python: no torch.
"""

from __future__ import annotations

import json
import lzma
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from io import BytesIO
from typing import Literal, get_args
from zipfile import ZipFile

from planner.errors import InvalidArgument, nearest
from planner.virtual.plans import ELEMENT_BYTES, Layer, Recipe, Table, Tensors, closest

Direction = Literal["forward", "dgrad", "wgrad"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
TABLE = "convolutions_sm90.zip"
LAYERS = "layers"  # its member with the layers; the others have the recipes of a kind of tensors, in a direction
MEASURED_ON = (9, 0)
PARTIAL_SUMS = 20 << 20  # more than 99% of the measured divided reductions take less
FAR = 2.5


@dataclass(frozen=True, slots=True)
class Workspace:
    """Bytes asked of the allocator, with an interval; ``exact`` when this very case was asked on the GPU, or the same
    was answered on both sides of it.

    How often the interval holds what was kept from the table, ``benchmarks/convolutions.py`` prints.
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
    ``float64``. Says what the H200 answered: for another compute capability and for ``float64``, of which no table was
    made, never ``exact`` and with a wide interval.

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
    tensors = Tensors(dtype, channels_last and len(layer.input_size) > 1)
    known = tensors._replace(dtype="float32") if dtype == "float64" else tensors
    found = _workspace(direction, known, tensors, layer, n)
    if compute_capability != MEASURED_ON or tensors != known:
        return _widened(found, layer, n, tensors)
    return found


@lru_cache(maxsize=65536)
def _workspace(direction: str, known: Tensors, tensors: Tensors, layer: Layer, n: int) -> Workspace:
    """The recipe is that of the ``known`` kind of tensors, its sizes are those of ``tensors``."""
    if is_tabled(direction, tensors, layer):
        return estimate(_table(), direction, known, tensors, layer, n)
    return _depthwise(direction, tensors, layer, n)


def is_tabled(direction: str, tensors: Tensors, layer: Layer) -> bool:
    """Whether the table is asked, and not the rule for depthwise layers."""
    if not layer.depthwise or tensors == Tensors("float16", False):
        return True
    return (direction, tensors) == ("wgrad", Tensors("float32", True))


def estimate(table: Table, direction: str, known: Tensors, tensors: Tensors, layer: Layer, n: int) -> Workspace:
    """By the layer at the closest batch size, else by the most similar layers.

    Of the similar layers, the most similar one among those that agree decides, the closer ones counting more. The
    interval is that of the layer at the batch sizes on either side, or of the similar layers; where even the most
    similar one is far, that of every set of copies.
    """
    own = table.recipes(known, direction, layer)
    if own:
        batches = list(own)
        asked = table.asked(known, direction, layer)
        around = {own[batch] for batch in (n, *(() if asked and n in own else _around(n, batches))) if batch in own}
        sizes = [recipe.bytes(layer, n, tensors) for recipe in around]
        first = own[closest(n, batches)].bytes(layer, n, tensors)
        return Workspace(first, min(sizes), max(sizes), asked and len(around) == 1 and n <= batches[-1])
    alike = table.alike(known, direction, layer, n)
    sizes = [recipe.bytes(layer, n, tensors) for _, recipe in alike]
    if not alike:
        return _widened(Workspace(0, 0, 0, False), layer, n, tensors)
    votes: dict[tuple[str, bool], float] = defaultdict(float)
    for distance, recipe in alike:
        votes[recipe.copies, recipe.per_sample] += 1 / (0.1 + distance) ** 2
    kind = max(votes, key=votes.__getitem__)
    first = next(size for size, (_, r) in zip(sizes, alike, strict=True) if (r.copies, r.per_sample) == kind)
    found = Workspace(first, min(sizes), max(sizes), False)
    return _widened(found, layer, n, tensors) if alike[0][0] > FAR else found


def _depthwise(direction: str, tensors: Tensors, layer: Layer, n: int) -> Workspace:
    """One filter for each channel.

    In NCHW PyTorch runs kernels of its own, which take none (``use_cudnn_depthwise`` in
    aten/src/ATen/native/Convolution.cpp); in NHWC cuDNN's take none but for the gradient of the weights: in float32 the
    table has it; in 16 bits it was 32 bytes for each of square odd weights and sample, channels padded to 32, in all
    846 cases where there was one.
    """
    kernel = layer.kernel
    if direction == "wgrad" and tensors.channels_last and kernel[0] == kernel[-1] in (1, 3, 5, 7):
        size = 32 * n * -(-layer.k // 32) * 32 * layer.taps
        if n * layer.output_pixels > _FEW_PIXELS:
            return Workspace(size, 0, size, False)
        return Workspace(0, 0, size, False)
    return Workspace(0, 0, 0, False)


_FEW_PIXELS = 512  # up to so many there is none: so it was in 96% of 1,030 cases


def _widened(found: Workspace, layer: Layer, n: int, tensors: Tensors) -> Workspace:
    """The same size in an interval that holds every set of copies and partial sums."""
    if layer.depthwise and not tensors.channels_last:
        return replace(found, exact=False)
    everything = Recipe("" if layer.depthwise else "iow", extra=PARTIAL_SUMS)
    return Workspace(found.bytes, 0, max(found.high, everything.bytes(layer, n, tensors)), False)


@cache
def _table() -> Table:
    archive = ZipFile(BytesIO(files("planner.virtual").joinpath(TABLE).read_bytes()))
    return Table(json.loads(member(archive, LAYERS)), Members(archive))


class Members(Mapping[str, str]):
    """An archive's texts by name, each read when it is asked for."""

    def __init__(self, archive: ZipFile) -> None:
        self._archive = archive

    def __getitem__(self, name: str) -> str:
        return member(self._archive, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._archive.namelist())

    def __len__(self) -> int:
        return len(self._archive.namelist())


def member(archive: ZipFile, name: str) -> str:
    return lzma.decompress(archive.read(name)).decode()


def _around(n: int, batches: Sequence[int]) -> tuple[int, ...]:
    """The closest of ``batches`` below and above ``n``."""
    below, above = [b for b in batches if b < n], [b for b in batches if b > n]
    return (*below[-1:], *above[:1])


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
