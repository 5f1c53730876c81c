"""How well ``planner.virtual.convolutions`` knows workspaces that it was not shown; builds its table.

    python benchmarks/convolutions.py            # cross-validation
    python benchmarks/convolutions.py --write    # build planner/virtual/convolutions_sm90.zip

The table is made of the ``*-plans*.json.gz`` and ``convolution-changes*.json.xz`` in ``measurements/h200``: what cuDNN
answered on a GPU, and in ``depthwise-plans.json.gz`` what it answered without one. Printed are

- how far the table is from ``measurements/h200/convolutions.json.gz``: what PyTorch's convolutions were seen to
  allocate on that GPU, nothing of which is in the table;
- how far it is from what cuDNN answered at batch sizes at random (``random``, by part: ``convolution-random.json.xz``,
  of which nothing is in the table);
- how far it is from the answers that are kept from it: for a share of the layers, all of them (``layer``: the most
  similar ones decide), or those at every second batch size (``batch``).

Errors are in bytes over the bytes of the convolution's input and output.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile, ZipInfo

from planner.virtual import convolutions
from planner.virtual.convolutions import DIRECTIONS, Workspace
from planner.virtual.plans import TAIL, Column, Layer, Recipe, Table, Tensors, copied, encode_line, runs, together

ROOT = Path(__file__).parents[1]
PLANS = sorted((ROOT / "measurements" / "h200").glob("*-plans*.json.gz"))
CHANGES = sorted((ROOT / "measurements" / "h200").glob("convolution-changes*.json.xz"))
RANDOM = ROOT / "measurements" / "h200" / "convolution-random.json.xz"
MEASURED = ROOT / "measurements" / "h200" / "convolutions.json.gz"
TABLE = ROOT / "planner" / "virtual" / convolutions.TABLE
TABLE_OF = {
    "bfloat16-nchw": Tensors("bfloat16", False),
    "bfloat16-nhwc": Tensors("bfloat16", True),
    "float16-nchw": Tensors("float16", False),
    "float16-nhwc": Tensors("float16", True),
    "float32-nchw": Tensors("float32", False),
    "float32-nhwc": Tensors("float32", True),
}
SETS = ("iow", "io", "iw", "ow", "i", "o", "w", "IOW", "IO", "IW", "OW", "I", "O")
BLOCK = 512  # the allocator's unit, thus the resolution of a measurement
UNSPLIT = 1 << 20  # a rest of at most this much stays part of a large block
MIB = 1 << 20
CUBLASLT_WGRAD = 62  # cuDNN's engine that leaves the gradient of 1x1 weights to cuBLASLt
FEW_BYTES = 4096
MOST_EXTRA = 34 << 20  # more than this beside the copies was never seen


class Row(NamedTuple):
    layer: Layer
    n: int
    tensors: Tensors
    direction: str
    bytes: int
    engine: int = -1


def answers() -> list[Row]:
    """What cuDNN said, as far as the table needs it."""
    return [row for path in PLANS for row in _answers(path)]


def _answers(path: Path) -> list[Row]:
    document = json.loads(gzip.decompress(path.read_bytes()))
    layers = [Layer(c, k, groups, *map(tuple, sides)) for c, k, groups, *sides in document["layers"]]
    return [
        Row(layers[index], n, TABLE_OF[kind], direction, plan[1], plan[0])
        for key, columns in document["plans"].items()
        for kind, direction in (key.split(" "),)
        if kind in TABLE_OF
        for index, column in enumerate(columns)
        for n, plan in zip(document["batches"], column, strict=True)
        if plan is not None and plan[1] >= 0 and not (TABLE_OF[kind].channels_last and len(layers[index].kernel) == 1)
        if convolutions.is_tabled(direction, TABLE_OF[kind], layers[index])
    ]


def measured() -> list[Row]:
    """What PyTorch's convolutions were seen to allocate, in multiples of 512 bytes."""
    document = json.loads(gzip.decompress(MEASURED.read_bytes()))
    return [
        Row(layer, n, Tensors(dtype, bool(last)), direction, size)
        for dtype, last, n, c, k, groups, *sides, forward, dgrad, wgrad in document["rows"]
        for layer in (Layer(c, k, groups, *map(tuple, sides)),)
        if not (last and len(layer.kernel) == 1)  # those run in NCHW
        for direction, size in zip(DIRECTIONS, (forward, dgrad, wgrad), strict=True)
        if size >= 0
    ]


def at_random() -> dict[str, list[Row]]:
    """What cuDNN answered at batch sizes at random, by part (``benchmarks/measure_changes.py``)."""
    found: dict[str, list[Row]] = defaultdict(list)
    for part, text, kind, direction, n, engine, size in json.loads(lzma.decompress(RANDOM.read_bytes()))["rows"]:
        if size >= 0:
            found[part].append(Row(Layer.parse(text), n, TABLE_OF[kind], direction, size, engine))
    return found


def explain(row: Row) -> Recipe:
    """The recipe behind a workspace: the set of copies that leaves the least unexplained."""
    layer, tensors = row.layer, row.tensors
    if row.bytes <= 2 * BLOCK:
        return Recipe(extra=row.bytes)
    if (row.direction, row.engine, layer.taps) == ("wgrad", CUBLASLT_WGRAD, 1) and not tensors.channels_last:
        return Recipe(per_sample=True, extra=max(0, row.bytes - 4 * row.n * layer.weights))
    parts = copied(layer, row.n, tensors)
    multiple = 16 // tensors.element_bytes
    laid_out = tensors.channels_last and layer.groups == 1 and layer.c % multiple == 0 == layer.k % multiple
    most = FEW_BYTES if laid_out and row.bytes <= MOST_EXTRA else MOST_EXTRA  # copies are rare there
    found = Recipe(extra=row.bytes)
    for copies in SETS:
        rest = row.bytes - sum(parts[name] for name in copies) - TAIL
        if 0 <= rest <= most and rest < found.extra:
            found = Recipe(copies, extra=rest)
    return found


def build(rows: Iterable[Row], further: Mapping[tuple[str, Layer], Column] | None = None) -> Table:
    """Layers, and a line of recipes for each layer, kind of tensors and direction."""
    cells: dict[tuple[str, Layer], Column] = defaultdict(dict)
    for key, column in (further or {}).items():
        cells[key] |= column
    for row in rows:
        cells[f"{row.tensors.key} {row.direction}", row.layer][row.n] = explain(row)
    alike = attrgetter("family", "kernel", "stride", "groups", "c", "k", "input_size")  # such an order compresses best
    ordered = sorted({layer for _, layer in cells}, key=alike)
    families = groupby(ordered, key=attrgetter("family"))
    texts = {}
    for key in sorted({key for key, _ in cells}):
        sizes, recipes = zip(*(_line(key, layer, cells) for layer in ordered), strict=True)
        texts |= {f"{key} sizes": "\n".join(sizes), f"{key} recipes": "\n".join(recipes)}
    return Table({name: "\n".join(layer.text for layer in members) for name, members in families}, texts)


def _line(key: str, layer: Layer, cells: Mapping[tuple[str, Layer], Column]) -> tuple[str, str]:
    column, other = (dict(sorted(cells.get((each, layer), {}).items())) for each in (key, f"b{key}"))
    if not key.startswith("float16") or not column:
        return encode_line(column)
    column = together(column, other)
    return ("=", "") if runs(column) == runs(other) else encode_line(column)


def changes() -> dict[tuple[str, Layer], Column]:
    """At which batch sizes cuDNN's answers change, as far as it was asked."""
    found: dict[tuple[str, Layer], Column] = defaultdict(dict)
    for path in CHANGES:
        for key, lines in json.loads(lzma.decompress(path.read_bytes()))["recipes"].items():
            for line in lines.split("\n"):
                layer, _, told = line.partition(" | ")
                pairs = (pair.split(":") for pair in told.split(" "))
                found[key, Layer.parse(layer)] |= {int(n): Recipe.decode(text) for n, text in pairs if text != "!"}
    return found


def write(table: Table, path: Path) -> None:
    with ZipFile(path, "w") as archive:
        for name, text in ((convolutions.LAYERS, json.dumps(table.layers)), *table.texts.items()):
            archive.writestr(ZipInfo(name), lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def error(seen: int, found: Workspace, rounded: bool) -> int:
    """Bytes between what was seen and what is said; ``rounded`` where an unsplit block may be part of what was seen."""
    rest = seen - found.bytes
    return 0 if rounded and 0 <= rest <= (UNSPLIT if seen > MIB else 3 * BLOCK) else abs(rest)


def held_out(rows: list[Row], what: str, every: int = 30) -> Iterator[tuple[Row, Workspace]]:
    """Each row of every 30th layer, and what the table says without the layer or without every second batch size."""
    chosen = set(list(dict.fromkeys(row.layer for row in rows))[::every])
    asked: dict[tuple[Tensors, Layer], set[int]] = defaultdict(set)
    for row in rows:
        if row.layer in chosen:
            asked[row.tensors, row.layer].add(row.n)
    second = {key: sorted(batches)[1::2] for key, batches in asked.items()}

    def hidden(row: Row) -> bool:
        return row.layer in chosen and (what == "layer" or row.n in second[row.tensors, row.layer])

    table = build(row for row in rows if not hidden(row))
    for row in rows:
        if hidden(row):
            yield row, convolutions.estimate(table, row.direction, row.tensors, row.tensors, row.layer, row.n)


def told(rows: Iterable[Row]) -> Iterator[tuple[Row, Workspace]]:
    """What the package says of each."""
    for row in rows:
        yield row, convolutions._workspace(row.direction, row.tensors, row.tensors, row.layer, row.n)


def report(name: str, found: Iterable[tuple[Row, Workspace]], rounded: bool) -> None:
    groups: dict[tuple[str, str], list[tuple[float, bool, bool, bool]]] = defaultdict(list)
    for row, workspace in found:
        layer = row.layer
        moved = row.n * row.tensors.element_bytes * (layer.c * layer.pixels + layer.k * layer.output_pixels)
        wrong = error(row.bytes, workspace, rounded)
        slack = UNSPLIT if rounded else 0
        inside = workspace.low <= row.bytes <= workspace.high + slack or wrong == 0
        groups[row.tensors.key, row.direction].append(
            (wrong / moved, inside, wrong <= max(MIB, 0.01 * moved), wrong == 0)
        )
    for key, lines in sorted(groups.items()):
        errors = sorted(line[0] for line in lines)
        p95 = errors[math.ceil(0.95 * len(errors)) - 1]
        inside, close, exact = (sum(line[index] for line in lines) / len(lines) for index in (1, 2, 3))
        print(f"{name:9} {key[0]:8} {key[1]:9} {len(lines):7} {exact:7.1%} {close:7.1%} {p95:8.3f} {inside:7.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="build the table that the package ships")
    options = parser.parse_args()
    rows = answers()
    if options.write:
        write(build(rows, changes()), TABLE)
        print(f"{TABLE.relative_to(ROOT)}: {TABLE.stat().st_size} bytes")
        return
    print(f"{'':28} {'cases':>7} {'exact':>7} {'1 MiB/%':>7} {'p95':>8} {'inside':>7}")
    report("measured", told(measured()), rounded=True)
    for part, asked in at_random().items():
        print(part)
        report("random", told(asked), rounded=False)
    for what in ("batch", "layer"):
        report(what, held_out(rows, what), rounded=False)


if __name__ == "__main__":
    main()
