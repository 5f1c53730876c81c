"""Ask cuDNN on a GPU for the plan that PyTorch takes first: data for ``planner.virtual.convolutions``.

    python benchmarks/measure_plans.py [--out FOLDER] [--seconds 400] [--processes 16]     # FOLDER defaults to $OUT

About the layers of ``measurements/convolution-layers.json.gz``, at up to 20 batch sizes, forward and both gradients. No
convolution runs (``benchmarks/cudnn_plans.py``). Most informative questions first, then at random, so that a run cut
short is still spread over everything. Writes ``convolution-plans.json.gz``: ``{torch, cudnn, gpu, layers, batches,
plans}``, where ``plans["bfloat16-nchw forward"][layer][batch]`` is ``[engine, bytes]``, or null where it was not asked.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

LAYERS = Path("measurements/convolution-layers.json.gz")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
FURTHER = (3, 6, 12, 24, 48, 96, 192, 256, 384, 512, 768, 1024)
DIRECTIONS = ("forward", "dgrad", "wgrad")
MOST_ELEMENTS = 2**31  # beyond, PyTorch leaves cuDNN: needs_64bit_indexing_no_split in Convolution.cpp
Question = tuple[int, str, str, bool, int]  # layer, direction, dtype, channels last, batch size


def elements(layer: Any) -> int:
    """Of the larger of a sample's input and output."""
    c, k, _, kernel, stride, padding, dilation, size = layer
    sides = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(s + 2 * p - d * (r - 1) - 1) // t + 1 for s, r, t, p, d in sides]
    return int(max(c * math.prod(size), k * math.prod(out)))


def questions(layers: list[Any], dtypes: list[str]) -> list[Question]:
    chosen = random.Random(0)  # noqa: S311 - a repeatable order, not a secret

    def of(kinds: list[tuple[str, bool]], batches: tuple[int, ...]) -> list[Question]:
        found = [
            (index, direction, dtype, last, n)
            for index, layer in enumerate(layers)
            for n in batches
            if n * elements(layer) <= MOST_ELEMENTS
            for dtype, last in kinds
            for direction in DIRECTIONS
        ]
        chosen.shuffle(found)
        return found

    nchw = [(dtype, False) for dtype in dtypes]
    nhwc = [(dtype, True) for dtype in dtypes if dtype != "float16"]  # which is taken as bfloat16
    return [*of(nchw, BATCHES), *of(nchw, FURTHER), *of(nhwc, (*BATCHES, 256))]


_cudnn: Any = None


def start() -> None:
    global _cudnn
    from cudnn_plans import Cudnn

    _cudnn = Cudnn()


def ask(batch: list[tuple[Any, ...]]) -> list[tuple[int, int]]:
    return [_cudnn.first_plan(*question) for question in batch]


def about() -> dict[str, Any]:
    import torch

    return {"torch": torch.__version__, "cudnn": _cudnn.version, "gpu": torch.cuda.get_device_name()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32", "float16"])
    options = parser.parse_args()
    begun = time.monotonic()
    layers = json.loads(gzip.decompress(LAYERS.read_bytes()))
    asked = questions(layers, options.dtypes)
    whole = [(direction, dtype, last, n, *layers[index]) for index, direction, dtype, last, n in asked]
    batches = sorted((*BATCHES, *FURTHER))
    plans: dict[str, list[list[Any]]] = {}
    answered = 0
    with multiprocessing.get_context("spawn").Pool(options.processes, initializer=start) as pool:
        document = pool.apply(about)
        for part in pool.imap(ask, [whole[i : i + 200] for i in range(0, len(whole), 200)]):
            for (index, direction, dtype, last, n), plan in zip(
                asked[answered : answered + len(part)], part, strict=True
            ):
                key = f"{dtype}-{'nhwc' if last else 'nchw'} {direction}"
                if key not in plans:
                    plans[key] = [[None] * len(batches) for _ in layers]
                plans[key][index][batches.index(n)] = plan
            answered += len(part)
            if time.monotonic() - begun > options.seconds:
                break
        pool.terminate()
    document |= {"command": "python benchmarks/measure_plans.py", "layers": layers, "batches": batches, "plans": plans}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "convolution-plans.json.gz"
    path.write_bytes(gzip.compress(json.dumps(document, separators=(",", ":")).encode(), mtime=0))
    print(f"{answered} of {len(asked)} questions in {time.monotonic() - begun:.0f} s: {path}")


if __name__ == "__main__":
    main()
