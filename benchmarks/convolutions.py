"""How well ``planner.virtual.convolutions`` knows workspaces that it was not shown; builds its table.

    python benchmarks/convolutions.py            # cross-validation against measurements/h200/convolutions.json.gz
    python benchmarks/convolutions.py --write    # build planner/virtual/convolutions_sm90.json.gz from it

Each case is predicted from the table without this layer at this batch size (``batch``), without this layer (``layer``),
and without every layer of its network (``network``; networks are told apart by the order in which
``measure_convolutions.py`` met them: each starts with a convolution over 3 channels). Errors are in bytes over the
bytes of the convolution's input and output.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from planner.virtual import convolutions
from planner.virtual.convolutions import DIRECTIONS, SEGMENT, UNSPLIT, Layer, Tensors, Workspace

ROOT = Path(__file__).parents[1]
MEASUREMENTS = ROOT / "measurements" / "h200" / "convolutions.json.gz"
TABLE = ROOT / "planner" / "virtual" / convolutions.TABLE
MIB = 1 << 20


class Row(NamedTuple):
    layer: Layer
    n: int
    tensors: Tensors
    measured: dict[str, int]  # direction -> bytes


def rows() -> list[Row]:
    with gzip.open(MEASUREMENTS, "rt") as file:
        document = json.load(file)
    result = []
    for dtype, channels_last, n, c, k, groups, *sizes, forward, dgrad, wgrad in document["rows"]:
        layer = Layer(c, k, groups, *(tuple(size) for size in sizes))
        if channels_last and len(layer.input_size) == 1:
            continue  # measured as NCHW
        tensors = Tensors(convolutions.ELEMENT_BYTES[dtype], bool(channels_last))
        result.append(Row(layer, n, tensors, {"forward": forward, "dgrad": dgrad, "wgrad": wgrad}))
    return result


def build(measured: list[Row]) -> dict[str, Any]:
    """The table: layers, batch sizes, and for each kind of tensors and direction each one's recipe, null if unknown."""
    layers = list(dict.fromkeys(row.layer for row in measured))
    batches = sorted({row.n for row in measured})
    position = {layer: index for index, layer in enumerate(layers)}
    recipes: dict[str, list[list[str | None]]] = defaultdict(lambda: [[None] * len(batches) for _ in layers])
    for row in measured:
        for direction, measured_bytes in row.measured.items():
            if measured_bytes >= 0:
                recipe = convolutions.explain(row.layer, row.n, row.tensors, measured_bytes)
                column = recipes[f"{row.tensors.key} {direction}"][position[row.layer]]
                column[batches.index(row.n)] = recipe.encode()
    fields = [(a.c, a.k, a.groups, a.kernel, a.stride, a.padding, a.dilation, a.input_size) for a in layers]
    return {"layers": fields, "batches": batches, "recipes": dict(recipes)}


def write(table: dict[str, Any]) -> None:
    text = json.dumps(table, separators=(",", ":"))
    TABLE.write_bytes(gzip.compress(text.encode(), mtime=0))  # no time stamp: the same table gives the same file


def networks(measured: list[Row]) -> dict[Layer, int]:
    """A number for each network's layers; layers met twice belong to the first network that has them."""
    result: dict[Layer, int] = {}
    number = 0
    for row in measured:
        if row.layer not in result:
            number += row.layer.family == "stem" and row.layer.kernel < (14, 14)
            result[row.layer] = number
    return result


def error(measured: int, found: Workspace) -> int:
    """Bytes between the prediction and the measurement, less what the measurement's unsplit blocks explain."""
    rest = measured - found.bytes
    if 0 <= rest <= 3 * convolutions.BLOCK or (measured % SEGMENT == 0 and 0 <= rest <= UNSPLIT):
        return 0
    return abs(rest)


def covered(measured: int, found: Workspace) -> bool:
    slack = UNSPLIT if measured > MIB else 3 * convolutions.BLOCK
    return found.low - 3 * convolutions.BLOCK <= measured <= found.high + slack


def held_out(
    measured: list[Row], direction: str, what: str, network: dict[Layer, int], every: int = 1
) -> Iterator[tuple[Row, Workspace]]:
    groups = convolutions.group(build(measured))
    for row in measured[::every]:
        cases = groups[row.tensors.key, direction, row.layer.family]
        if what == "network":
            cases = [case for case in cases if network[case.layer] != network[row.layer]]
        elif what == "layer":
            cases = [case for case in cases if case.layer != row.layer]
        else:
            cases = [case for case in cases if (case.layer, case.n) != (row.layer, row.n)]
        if cases and row.measured[direction] >= 0:
            yield row, convolutions.estimate(cases, row.layer, row.n, row.tensors)


def report(measured: list[Row]) -> None:
    network = networks(measured)
    figures = f"{'cases':>6} {'exact':>6} {'<= 1%':>6} {'median':>7} {'p95':>7} {'covered':>7}"
    print(f"{'':27} {'all':44} above 1 MiB")
    print(f"{'tensors':8} {'direction':9} {'held out':8} {figures} {figures}   one size, and right")
    for key in ("16-nchw", "16-nhwc", "32-nchw"):
        chosen = [row for row in measured if row.tensors.key == key]
        for direction in DIRECTIONS:
            for what in ("batch", "layer", "network"):
                lines, claims = [], []
                for row, found in held_out(chosen, direction, what, network):
                    truth = row.measured[direction]
                    wrong = error(truth, found)
                    moved = row.n * row.tensors.element_bytes
                    moved *= row.layer.c * row.layer.pixels + row.layer.k * row.layer.output_pixels
                    close = wrong <= 0.01 * max(truth, moved)
                    lines.append((max(truth, found.bytes), wrong, wrong / moved, covered(truth, found), close))
                    claims += [close] * (found.low == found.high)
                large = [line for line in lines if line[0] > MIB]
                claimed = f"{len(claims) / len(lines):6.1%} {sum(claims) / len(claims):6.1%}" if claims else ""
                print(f"{key:8} {direction:9} {what:8} {_figures(lines)} {_figures(large)}   {claimed}", flush=True)


def _figures(lines: list[tuple[int, int, float, bool, bool]]) -> str:
    errors = sorted(line[2] for line in lines)
    median, p95 = errors[len(errors) // 2], errors[math.ceil(len(errors) * 0.95) - 1]
    inside = sum(line[3] for line in lines) / len(lines)
    close = sum(line[4] for line in lines) / len(lines)
    exact = sum(line[1] == 0 for line in lines) / len(lines)
    return f"{len(lines):6} {exact:6.1%} {close:6.1%} {median:7.4f} {p95:7.3f} {inside:7.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="build the table that the package ships")
    options = parser.parse_args()
    measured = rows()
    if options.write:
        write(build(measured))
        print(f"{TABLE.relative_to(ROOT)}: {TABLE.stat().st_size} bytes")
        return
    report(measured)


if __name__ == "__main__":
    main()
