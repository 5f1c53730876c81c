"""Measure what cuDNN's convolutions allocate on a GPU beside their results: data for ``planner.virtual.convolutions``.

    python benchmarks/measure_convolutions.py [--out FOLDER] [--seconds 400]     # FOLDER defaults to $OUT, else .

Needs torch, torchvision, timm and transformers on a CUDA GPU. The shapes are those of real networks, at several batch
sizes, dtypes and memory formats; the workspace is the peak of allocated bytes during the operator less its results.
Writes ``convolutions.json.gz``: ``{torch, cudnn, gpu, columns, rows}``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch

COLUMNS = [
    *("dtype", "channels_last", "n", "c", "k", "groups", "kernel", "stride", "padding", "dilation", "input"),
    *("forward", "dgrad", "wgrad"),
]
IMAGE_MODELS = {
    "resnet50": 224, "vgg16": 224, "densenet121": 224, "convnext_tiny": 224, "efficientnet_b0": 224,
    "mobilenet_v3_large": 224, "resnext50_32x4d": 224, "inception_v3": 299, "squeezenet1_1": 224,
}  # fmt: skip


def layers() -> list[tuple[Any, ...]]:
    """``(c, k, groups, kernel, stride, padding, dilation, input size)`` of each distinct layer of the networks."""
    import torchvision

    found: dict[tuple[Any, ...], None] = {}

    def note(module: Any, inputs: Any, _: Any) -> None:
        found[
            (module.in_channels, module.out_channels, module.groups, tuple(module.kernel_size), tuple(module.stride),
             tuple(module.padding), tuple(module.dilation), tuple(inputs[0].shape[2:]))
        ] = None  # fmt: skip

    def watch(model: torch.nn.Module, *inputs: torch.Tensor) -> None:
        for module in model.modules():
            if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
                module.register_forward_hook(note)
        with torch.no_grad():
            model(*inputs)

    with torch.device("meta"):
        for name, size in IMAGE_MODELS.items():
            watch(torchvision.models.get_model(name, weights=None).eval(), torch.empty(2, 3, size, size))
        for channels in ((64, 256), (32, 128)):  # a plain U-Net, at two widths and sizes
            width, size = channels
            for level in range(5):
                c, s = width << level, size >> level
                for pair in ((3 if level == 0 else c // 2, c), (c, c), (2 * c, c)):
                    found[(*pair, 1, (3, 3), (1, 1), (1, 1), (1, 1), (s, s))] = None
        for patch, width in ((16, 768), (16, 1024), (14, 1280), (32, 768)):
            found[(3, width, 1, (patch, patch), (patch, patch), (0, 0), (1, 1), (224, 224))] = None
        for c, k, kernel, stride, padding, length in (
            (80, 512, 3, 1, 1, 3000), (512, 512, 3, 2, 1, 3000), (1, 512, 10, 5, 0, 16000), (512, 512, 3, 2, 0, 3199),
            (512, 512, 3, 2, 0, 1599), (512, 512, 2, 2, 0, 399), (80, 768, 3, 1, 1, 3000), (768, 768, 3, 2, 1, 3000),
        ):  # fmt: skip
            found[(c, k, 1, (kernel,), (stride,), (padding,), (1,), (length,))] = None
        found[(768, 768, 16, (128,), (1,), (64,), (1,), (49,))] = None
    return list(found)


def workspace(run: Any, results: int) -> int:
    """Bytes beyond ``results`` that were allocated at the peak of ``run``; -1 where it ran out of memory or failed."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        kept = run()
    except RuntimeError:
        return -1
    after = torch.cuda.memory_allocated()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - after if results is None else peak - before - results


def measure(layer: tuple[Any, ...], n: int, dtype: torch.dtype, channels_last: bool) -> list[Any]:
    c, k, groups, kernel, stride, padding, dilation, size = layer
    x = torch.randn(n, c, *size, device="cuda", dtype=dtype)
    weight = torch.randn(k, c // groups, *kernel, device="cuda", dtype=dtype)
    if channels_last and len(size) == 2:
        x, weight = x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last)
    convolution = torch.ops.aten.convolution
    out = convolution(x, weight, None, stride, padding, dilation, False, [0] * len(size), groups)
    grad = torch.randn_like(out)
    forward = workspace(
        lambda: convolution(x, weight, None, stride, padding, dilation, False, [0] * len(size), groups), None
    )  # type: ignore[arg-type]

    def backward(mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0] * len(size), groups, mask
        )

    dgrad = workspace(lambda: backward([True, False, False]), None)  # type: ignore[arg-type]
    wgrad = workspace(lambda: backward([False, True, False]), None)  # type: ignore[arg-type]
    return [
        str(dtype)[6:],
        int(channels_last),
        n,
        c,
        k,
        groups,
        kernel,
        stride,
        padding,
        dilation,
        size,
        forward,
        dgrad,
        wgrad,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=400.0)
    options = parser.parse_args()
    found = layers()
    cases = [
        (layer, n, dtype, last)
        for n in (4, 16, 64, 1, 8, 32, 2, 128, 6, 48)
        for dtype, last in ((torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True))
        for layer in found
        if n * layer[0] * torch.tensor(layer[-1]).prod().item() < 2**30
    ]
    # Most informative first, then at random, so that a run cut short is still spread over everything.
    head = [case for case in cases if case[1] in (4, 16, 64) and not case[3]]
    tail = [case for case in cases if case not in head]
    random.Random(1).shuffle(tail)  # noqa: S311 - a repeatable order, not a secret
    rows, start = [], time.monotonic()
    for case in head + tail:
        if time.monotonic() - start > options.seconds:
            break
        try:
            rows.append(measure(*case))
        except RuntimeError as error:
            print("skipped", case, str(error).splitlines()[0])
            torch.cuda.empty_cache()
    document = {
        "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "gpu": torch.cuda.get_device_name(),
        "command": "python benchmarks/measure_convolutions.py", "columns": COLUMNS, "rows": rows,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    with gzip.open(options.out / "convolutions.json.gz", "wt") as file:
        json.dump(document, file)
    print(f"{len(found)} layers, {len(rows)} of {len(cases)} cases in {time.monotonic() - start:.0f} s")
    print(f"{'dtype':10} {'direction':9} {'zero':>6} {'median MiB':>11} {'worst MiB':>10}")
    for dtype in ("bfloat16", "float32"):
        for index, name in ((11, "forward"), (12, "dgrad"), (13, "wgrad")):
            sizes = sorted(row[index] for row in rows if row[0] == dtype and row[index] >= 0)
            if sizes:
                print(
                    f"{dtype:10} {name:9} {sum(s == 0 for s in sizes):6} "
                    f"{sizes[len(sizes) // 2] / 2**20:11.1f} {sizes[-1] / 2**20:10.1f}"
                )


if __name__ == "__main__":
    main()
