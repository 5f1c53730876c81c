"""Ask cuDNN on a GPU for the plan that PyTorch takes first: data for ``planner.virtual.convolutions``.

    python benchmarks/measure_plans.py [--out FOLDER] [--seconds 400] [--processes 16]     # FOLDER defaults to $OUT
    python benchmarks/measure_plans.py --unanswered

About the layers of ``measurements/convolution-layers.json.gz``, at up to 20 batch sizes, forward and both gradients. No
convolution runs (``benchmarks/cudnn_plans.py``). Most informative questions first, then at random, so that a run cut
short is still spread over everything; with ``--unanswered`` those alone that no file in ``measurements/h200`` answers,
in the order of the layers, which is that of use. Alone on a GPU about 15,000 are answered a second, beside other work
80. Writes ``convolution-plans.json.gz``: ``{torch, cudnn, gpu, layers, batches, plans}``, where ``plans["bfloat16-nchw
forward"][layer][batch]`` is ``[engine, bytes]``, or null where it was not asked.
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
ANSWERS = Path("measurements/h200")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
FURTHER = (3, 6, 12, 24, 48, 96, 192, 256, 384, 512, 768, 1024)
DIRECTIONS = ("forward", "dgrad", "wgrad")
MOST_ELEMENTS = 2**31  # beyond, cuDNN takes a part of the batch at a time (planner.virtual.plans.copied)
Question = tuple[int, str, str, bool, int]  # layer, direction, dtype, channels last, batch size


def elements(layer: Any) -> int:
    """Of the larger of a sample's input and output."""
    c, k, _, kernel, stride, padding, dilation, size = layer
    sides = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(s + 2 * p - d * (r - 1) - 1) // t + 1 for s, r, t, p, d in sides]
    return int(max(c * math.prod(size), k * math.prod(out)))


def questions(layers: list[Any], dtypes: list[str], shuffled: bool = True) -> list[Question]:
    chosen = random.Random(0)  # noqa: S311 - a repeatable order, not a secret

    def of(kinds: list[tuple[str, bool]], batches: tuple[int, ...]) -> list[Question]:
        found = [
            (index, direction, dtype, last, n)
            for index, layer in enumerate(layers)
            for n in batches
            if n * elements(layer) <= MOST_ELEMENTS
            for dtype, last in kinds
            for direction in DIRECTIONS
            if matters(layer, direction, dtype, last)
        ]
        if shuffled:
            chosen.shuffle(found)
        return found

    nchw = [(dtype, False) for dtype in dtypes]
    nhwc = [(dtype, True) for dtype in dtypes if dtype != "float16"]  # which is taken as bfloat16
    return [*of(nchw, BATCHES), *of(nchw, FURTHER), *of(nhwc, (*BATCHES, 256))]


def matters(layer: Any, direction: str, dtype: str, channels_last: bool) -> bool:
    """Where each channel has a filter of its own, PyTorch asks cuDNN in float16 or NHWC alone; there only the gradient
    of the weights takes a workspace."""
    if not layer[2] == layer[0] > 1:
        return True
    return direction == "wgrad" if channels_last else dtype == "float16"


def answered() -> set[str]:
    """The questions that the files in ``measurements/h200`` answer, as ``told`` writes them."""
    found = set()
    for path in ANSWERS.glob("convolution-plans*.json.gz"):
        document = json.loads(gzip.decompress(path.read_bytes()))
        for key, columns in document["plans"].items():
            for layer, column in zip(document["layers"], columns, strict=True):
                asked = zip(document["batches"], column, strict=True)
                found |= {told(key, n, layer) for n, plan in asked if plan is not None}
    return found


def told(key: str, n: int, layer: Any) -> str:
    return f"{key} {n} {json.dumps(layer)}"


def key_of(direction: str, dtype: str, channels_last: bool) -> str:
    return f"{dtype}-{'nhwc' if channels_last else 'nchw'} {direction}"


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
    parser.add_argument("--unanswered", action="store_true")
    options = parser.parse_args()
    begun = time.monotonic()
    layers = json.loads(gzip.decompress(LAYERS.read_bytes()))
    asked = questions(layers, options.dtypes, shuffled=not options.unanswered)
    known = answered() if options.unanswered else set()
    asked = [(i, *rest, n) for i, *rest, n in asked if told(key_of(*rest), n, layers[i]) not in known]
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
                key = key_of(direction, dtype, last)
                if key not in plans:
                    plans[key] = [[None] * len(batches) for _ in layers]
                plans[key][index][batches.index(n)] = plan
            answered += len(part)
            if time.monotonic() - begun > options.seconds:
                break
        pool.terminate()
    command = "python benchmarks/measure_plans.py" + " --unanswered" * options.unanswered
    document |= {"command": command, "layers": layers, "batches": batches, "plans": plans}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "convolution-plans.json.gz"
    path.write_bytes(gzip.compress(json.dumps(document, separators=(",", ":")).encode(), mtime=0))
    print(f"{answered} of {len(asked)} questions in {time.monotonic() - begun:.0f} s: {path}")


if __name__ == "__main__":
    main()
