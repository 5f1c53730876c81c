"""Ask cuDNN on a GPU at which batch sizes its first plan changes: data for ``planner.virtual.convolutions``.

    python benchmarks/measure_changes.py LAYERS [--out FOLDER] [--seconds 170] [--processes 16]

``LAYERS`` (JSON, gzip) lists parts in the order in which they are asked: ``{name, layers, kinds, batches, checks,
within_bytes}``. Where the package's table, or an answer to one of ``batches``, has recipes at neighbouring batch sizes
that are ``within_bytes`` and a 64th or more apart, the sizes between them are halved until each change is known to the
sample. About ``checks`` sizes at random it is asked, too: where an answer is another than those of equal neighbours,
the gap is halved as well, and how often that is so is printed. Writes ``convolution-changes.json.xz``: for
each kind of tensors and direction, a line a layer of ``batch size:recipe`` (``planner.virtual.plans.Recipe``, from
which the bytes follow), without those answers that are as good as the same on both sides.

Of parts ``{name, layers, kinds, random}`` so many questions are asked, at batch sizes at random. The table is made of
none of them: ``convolution-random.json.xz``, against which ``benchmarks/convolutions.py`` holds it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import multiprocessing
import os
import random
import sys
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from planner.virtual.convolutions import DIRECTIONS, TABLE
from planner.virtual.plans import Layer, Recipe, Tensors

MOST_ELEMENTS = 2**31  # beyond, cuDNN takes a part of the batch at a time (planner.virtual.plans.copied)
SHARE = 1 / 64  # of a workspace; partial sums of a MiB come and go with the number of tiles
PER_GAP = 4  # questions for each halving of a gap: more than one change may be inside
PER_COLUMN_S = 3.0  # a few kinds of layer take seconds for an answer
MOST_AT_RANDOM = 400
Job = tuple[int, str, str, str, list[int], int, int]  # part, layer, tensors, direction, batch sizes, checks, bytes

_cudnn: Any = None
_table: Any = None
_until = 0.0


def start(until: float) -> None:
    global _cudnn, _table, _until
    from cudnn_plans import Cudnn

    from planner.virtual import convolutions

    _cudnn, _table, _until = Cudnn(), convolutions._table(), until


def about(_: int) -> dict[str, Any]:
    import torch

    return {"torch": torch.__version__, "cudnn": _cudnn.version, "gpu": torch.cuda.get_device_name()}


def at_random(parts: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, str, int]]:
    """Part, layer, kind of tensors, direction and a batch size of which each order of magnitude is as likely."""
    chosen = random.Random(7)  # noqa: S311 - a repeatable choice, not a secret
    for part in parts:
        for _ in range(part["random"]):
            layer = Layer.parse(chosen.choice(part["layers"]))
            kind, direction = chosen.choice(part["kinds"]), chosen.choice(DIRECTIONS)
            each = max(layer.c * layer.pixels, layer.k * layer.output_pixels)
            most = min(MOST_AT_RANDOM, MOST_ELEMENTS // each)
            if layer.depthwise or most < 1 or (kind.endswith("nhwc") and len(layer.kernel) == 1):
                continue
            n = round(math.exp(chosen.uniform(0, math.log(most))))
            yield part["name"], layer.text, kind, direction, n


def answer(question: tuple[str, str, str, str, int]) -> tuple[Any, ...]:
    _, text, kind, direction, n = question
    dtype, _, last = kind.partition("-")
    return *question, *first_plan(Layer.parse(text), Tensors(dtype, last == "nhwc"), direction, n)


def first_plan(layer: Layer, tensors: Tensors, direction: str, n: int) -> tuple[int, int]:
    sides = (layer.kernel, layer.stride, layer.padding, layer.dilation, layer.input_size)
    found: tuple[int, int] = _cudnn.first_plan(
        direction, tensors.dtype, tensors.channels_last, n, layer.c, layer.k, layer.groups, *sides
    )
    return found


class Column:
    """The answers about one layer, kind of tensors and direction by batch size; None where there is no plan."""

    def __init__(self, layer: Layer, tensors: Tensors, direction: str, within_bytes: int) -> None:
        self.layer, self.tensors, self.direction, self.within_bytes = layer, tensors, direction, within_bytes
        asked = _table.asked(tensors, direction, layer)  # else float16's are bfloat16's
        known = _table.recipes(tensors, direction, layer) if asked else {}
        self.known: dict[int, Recipe | None] = dict(known)
        self.asked: list[int] = []
        self.checks = self.missed = self.again = self.changed = 0
        self._until = min(_until, time.time() + PER_COLUMN_S)

    def ask(self, n: int) -> Recipe | None:
        from convolutions import Row, explain

        engine, size = first_plan(self.layer, self.tensors, self.direction, n)
        row = Row(self.layer, n, self.tensors, self.direction, size, engine)
        self.asked.append(n)
        self.known[n] = explain(row) if size >= 0 else None
        return self.known[n]

    def same(self, n: int, one: Recipe | None, other: Recipe | None) -> bool:
        """Whether a recipe is as good as another."""
        if one is None or other is None or one == other or not self.within_bytes:
            return one == other
        sizes = [recipe.bytes(self.layer, n, self.tensors) for recipe in (one, other)]
        return abs(sizes[0] - sizes[1]) < max(self.within_bytes, SHARE * min(sizes))

    @property
    def late(self) -> bool:
        return time.time() > self._until

    def fill(self, batches: list[int]) -> None:
        for n in batches:
            if n not in self.known and not self.late:
                self.ask(n)

    def halve(self) -> None:
        """Asks between neighbours that differ until the changes are known."""
        sizes = sorted(self.known)
        for low, high in pairwise(sizes):
            left = PER_GAP * math.ceil(math.log2(high - low))
            todo = [(low, high)]
            while todo and left > 0 and not self.late:
                a, b = todo.pop()
                middle = (a + b) // 2
                if b - a > 1 and not self.same(middle, self.known[a], self.known[b]):
                    self.ask(middle)
                    left -= 1
                    todo += [(a, middle), (middle, b)]

    def repeat(self, chosen: random.Random) -> None:
        """Asks about one size that the table has: whether this GPU says the same."""
        sizes = [n for n, recipe in self.known.items() if recipe is not None]
        if sizes:
            n = chosen.choice(sizes)
            before = self.known[n]
            self.again += 1
            self.changed += self.ask(n) != before

    def check(self, chosen: random.Random, count: int) -> None:
        """Sizes at random between equal neighbours."""
        if not self.known:
            return
        most = math.log(min(max(self.known), MOST_AT_RANDOM))
        for n in {round(math.exp(chosen.uniform(0, most))) for _ in range(count)} - set(self.known):
            sizes = sorted(self.known)
            place = bisect_left(sizes, n)
            ends = [self.known[size] for size in sizes[max(0, place - 1) : place + 1]]
            if self.same(n, ends[0], ends[-1]) and not self.late:
                self.checks += 1
                self.missed += not self.same(n, self.ask(n), ends[0])

    def told(self) -> list[tuple[int, str]]:
        """The new answers, without those in the middle of a run of equal ones."""
        sizes = sorted(self.known)
        around = dict(zip(sizes, zip([0, *sizes], [*sizes[1:], 0], strict=False), strict=False))
        return [
            (n, "!" if self.known[n] is None else self.known[n].encode())  # type: ignore[union-attr]
            for n in sorted(self.asked)
            if not self.within_bytes
            or not all(other and self.same(n, self.known[other], self.known[n]) for other in around[n])
        ]


def refine(job: Job) -> tuple[Job, list[tuple[int, str]], dict[str, int]] | None:
    part, text, kind, direction, batches, checks, within_bytes = job
    if time.time() > _until:
        return None
    dtype, _, last = kind.partition("-")
    column = Column(Layer.parse(text), Tensors(dtype, last == "nhwc"), direction, within_bytes)
    chosen = random.Random(f"{part} {text} {kind} {direction}")  # noqa: S311 - a repeatable choice, not a secret
    if checks:
        column.repeat(chosen)
    column.fill(batches)
    column.halve()
    if checks:
        column.check(chosen, checks)
        if column.missed:
            column.halve()
    counts = {"asked": len(column.asked), "checks": column.checks, "missed": column.missed}
    return job, column.told(), counts | {"again": column.again, "changed": column.changed}


def jobs(parts: list[dict[str, Any]], until: float) -> Iterator[Job]:
    for number, part in enumerate(parts):
        for text in part["layers"]:
            if time.time() > until:
                return
            layer = Layer.parse(text)
            each = max(layer.c * layer.pixels, layer.k * layer.output_pixels)
            batches = [n for n in part["batches"] if n * each <= MOST_ELEMENTS]
            for kind in part["kinds"]:
                if kind.endswith("nhwc") and len(layer.kernel) == 1:
                    continue  # PyTorch runs it in NCHW
                for direction in DIRECTIONS:
                    if not layer.depthwise or (kind, direction) == ("float32-nhwc", "wgrad"):
                        yield number, text, kind, direction, batches, part["checks"], part["within_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", type=Path)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=170.0)
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    options = parser.parse_args()
    begun = time.monotonic()
    everything = json.loads(gzip.decompress(options.layers.read_bytes()))
    surveys = [part for part in everything if "random" in part]
    parts = [part for part in everything if "random" not in part]
    found: dict[str, dict[str, list[tuple[int, str]]]] = defaultdict(dict)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    document: dict[str, Any] = {}

    def save() -> None:
        lines = {
            key: "\n".join(
                f"{layer} | " + " ".join(f"{n}:{recipe}" for n, recipe in told) for layer, told in rows.items()
            )
            for key, rows in sorted(found.items())
        }
        text = json.dumps({**document, "table": TABLE, "counts": counts, "recipes": lines}, indent=0)
        path = options.out / "convolution-changes.json.xz"
        path.write_bytes(lzma.compress(text.encode(), preset=6))
        print(f"{time.monotonic() - begun:.0f} s: {path}, {path.stat().st_size} bytes", flush=True)

    options.out.mkdir(parents=True, exist_ok=True)
    until = time.time() + options.seconds
    with multiprocessing.get_context("spawn").Pool(options.processes, start, (until,)) as pool:
        document |= pool.apply(about, (0,))
        if surveys:
            rows = pool.map(answer, at_random(surveys), chunksize=50)
            compressed = lzma.compress(json.dumps({**document, "rows": rows}).encode())
            (options.out / "convolution-random.json.xz").write_bytes(compressed)
        print(document, f"{time.monotonic() - begun:.1f} s", flush=True)
        due = options.seconds / 2
        for done in pool.imap_unordered(refine, jobs(parts, until), chunksize=8):
            if done is None:
                continue
            (part, text, kind, direction, *_), told, count = done
            if told:
                found[f"{kind} {direction}"].setdefault(text, []).extend(told)
            name = f"{parts[part]['name']}, {kind} {direction}"
            counts[name].update(count | {"columns": 1, "kept": len(told)})
            if time.monotonic() - begun > due:
                save()
                due = math.inf
    document["command"] = "python benchmarks/measure_changes.py"
    save()
    for name, total in counts.items():
        print(name, dict(total))


if __name__ == "__main__":
    main()
