"""Collect the convolutions of many networks: what ``benchmarks/measure_plans.py`` asks cuDNN about. Needs no GPU.

    python benchmarks/collect_layers.py [--seconds 500]     # 5000 for all networks

Every model of torchvision, up to four of each family of timm, at their own input sizes; those of
``benchmarks/popular_networks.py`` at others too; and layers of U-Nets, patch embeddings, speech models, and at random,
so that unseen layers have neighbours. The models have no data (the meta device). Adds to
``measurements/convolution-layers.json.gz``: what is there stays, the layers of most networks come next.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from popular_networks import SAMPLES, SIDES, SPEECH, TIMM, TORCHVISION, TRANSFORMERS

from planner.training.models import _require

OUT = Path("measurements/convolution-layers.json.gz")
Layer = tuple[int, int, int, list[int], list[int], list[int], list[int], list[int]]
KINDS = tuple(getattr(torch.nn, f"Conv{form}{n}d") for form in ("", "Transpose") for n in (1, 2, 3))
PER_MODEL_S = 20


def watched(model: torch.nn.Module, *inputs: torch.Tensor) -> list[Layer]:
    found: list[Layer] = []

    def note(module: Any, given: Any, out: torch.Tensor) -> None:
        if isinstance(module.padding, str):
            return
        c, k, size = module.in_channels, module.out_channels, given[0].shape[2:]
        if module.transposed:  # the convolution that it transposes runs the other way
            c, k, size = k, c, out.shape[2:]
        sides = (module.kernel_size, module.stride, module.padding, module.dilation, size)
        found.append((c, k, module.groups, *map(list, sides)))  # type: ignore[arg-type]

    for module in model.modules():
        if isinstance(module, KINDS):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(*inputs)
    return found


def of_models() -> Iterator[Callable[[], list[Layer]]]:
    torchvision, timm, transformers = (_require(name) for name in ("torchvision", "timm", "transformers"))

    def vision(name: str, shape: tuple[int, ...]) -> list[Layer]:
        backbone = {"weights_backbone": None} if name in segmenting else {}
        with torch.device("cpu" if name.startswith("regnet") else "meta"):  # a regnet computes its widths
            model = torchvision.models.get_model(name, weights=None, **backbone)
        return watched(model.to("meta").eval(), torch.empty(2, 3, *shape))

    def image(name: str, side: int = 0) -> list[Layer]:
        model = timm.create_model(name, pretrained=False).eval()
        if side and model.default_cfg.get("fixed_input_size"):
            return []
        return watched(model, torch.empty(2, *([3, side, side] if side else model.default_cfg["input_size"])))

    def hub(kind: str, *inputs: int, **changes: int) -> list[Layer]:
        config = transformers.AutoConfig.for_model(kind)
        for name, value in changes.items():
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, value)
        return watched(transformers.AutoModel.from_config(config).eval(), torch.empty(2, *inputs))

    segmenting = torchvision.models.list_models(module=torchvision.models.segmentation)
    for name in torchvision.models.list_models(module=torchvision.models):
        if not re.search(r"vit_|swin|maxvit", name) or name.endswith(("_t", "b_16")):
            side = 299 if "inception" in name else 224
            yield lambda name=name, side=side: vision(name, (side, side))
    for name in segmenting:
        yield lambda name=name: vision(name, (520, 520))
    for name in torchvision.models.list_models(module=torchvision.models.video)[:8]:
        yield lambda name=name: vision(name, (16, 112, 112))
    for name in "resnet50 resnet18 efficientnet_b3 convnext_small mobilenet_v3_large vgg16 densenet121".split():
        for side in (32, 64, 128, 256, 288, 384, 512):
            yield lambda name=name, side=side: vision(name, (side, side))
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(re.split(r"[_\d]", name)[0], []).append(name)
    chosen: dict[str, None] = {}
    for pick in (0.0, 0.5, 1.0, 0.25):
        chosen |= dict.fromkeys(names[int(pick * (len(names) - 1))] for names in families.values())
    for name in chosen:
        if not re.search(r"giant|_so|huge|gigantic|xxlarge|22b|7b|1b", name):
            yield lambda name=name: image(name)
    for side in SIDES:
        yield from (lambda name=name, side=side: vision(name, (side, side)) for name in TORCHVISION)
        if side >= 192:
            yield from (lambda name=name, side=side: image(name, side) for name in TIMM)
            yield from (lambda kind=kind, side=side: hub(kind, 3, side, side, image_size=side) for kind in TRANSFORMERS)
            yield from (lambda name=name, side=side: vision(name, (side, side)) for name in segmenting)
    yield from (lambda kind=kind, length=length: hub(kind, length) for kind in SPEECH for length in SAMPLES)


def square(
    c: int, k: int, kernel: int, stride: int, padding: int, side: int, dilation: int = 1, groups: int = 1
) -> Layer:
    return c, k, groups, [kernel] * 2, [stride] * 2, [padding] * 2, [dilation] * 2, [side] * 2


def of_shapes() -> Iterator[Layer]:
    for width in (32, 48, 64, 96, 128, 320):  # U-Nets
        for side in (32, 64, 96, 128, 256, 512):
            for level in range(5):
                c, s = width << level, side >> level
                if s >= 4 and c <= 2048:
                    for before in (3 if level == 0 else c // 2, c, 2 * c, 3 * c // 2):
                        yield square(before, c, 3, 1, 1, s)
                    yield square(c, 2 * c, 2, 2, 0, s)
                    yield square(c, c, 3, 2, 1, s)
                    yield square(c, c, 1, 1, 0, s)
    for c in (16, 24, 32, 40, 48, 64, 96, 128, 192, 256, 512):  # heads of segmentation, stems
        for side in (14, 28, 32, 56, 64, 96, 112, 128, 192, 224, 256, 320, 384, 512):
            for k in (1, 2, 3, 4, 10, 19, 21, 32, 150):
                yield square(c, k, 1, 1, 0, side)
            yield square(c, 1, 3, 1, 1, side)
            yield square(c, 3, 3, 1, 1, side)
            for few in (1, 3, 4):
                yield square(few, c, 3, 1, 1, side)
                yield square(few, c, 3, 2, 1, side)
                yield square(few, c, 7, 2, 3, side)
    for width in (40, 64, 80, 160, 192, 224, 256, 384):  # U-Nets of other widths and depths
        for side in (24, 40, 48, 80, 112, 160, 192, 224, 320, 384):
            for level in range(4):
                c, s = width << level, side >> level
                if s >= 4 and c <= 2048:
                    for before in (c // 2, c, 2 * c):
                        yield square(before, c, 3, 1, 1, s)
                    yield square(c, 2 * c, 2, 2, 0, s)
                    yield square(c, c, 3, 2, 1, s)
                    yield square(c, c, 1, 1, 0, s)
    for width in (64, 32, 48, 96, 16, 128):  # U-Nets that join, add, shrink or widen in other ways
        for side in (256, 128, 512, 224, 192, 320, 384, 160, 96, 288, 448, 64, 572, 240, 400, 480, 640):
            for level in range(6 if width <= 64 else 5):
                c, s = width << level, side >> level
                if s >= 4 and side % (1 << level) == 0:
                    for b, k in ((c // 2, c), (c, c), (2 * c, c), (3 * c, c), (c, c // 2)):
                        yield square(b, k, 3, 1, 1, s)
                    for b, k in ((c, c), (2 * c, c), (c // 2, c)):
                        yield square(b, k, 1, 1, 0, s)
                    yield square(c, 2 * c, 2, 2, 0, s)
                    yield square(c, 2 * c, 3, 2, 1, s)
                    yield square(c, 2 * c, 4, 2, 1, s)
    for patch in (8, 14, 16, 32):
        for width in (192, 384, 512, 768, 1024, 1280, 1408):
            for side in (224, 256, 336, 384, 448, 518):
                if side % patch == 0:
                    yield square(3, width, patch, patch, 0, side)
    for c in (384, 512, 768, 1024, 1280):  # whisper and wav2vec2
        for mels in (80, 128):
            yield mels, c, 1, [3], [1], [1], [1], [3000]
        yield c, c, 1, [3], [2], [1], [1], [3000]
        for length in (49, 499):
            yield c, c, 16, [128], [1], [64], [1], [length]
    for seconds in (1, 5, 10, 15):
        c, length = 1, 16_000 * seconds
        for kernel, stride in ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)):
            yield c, 512, 1, [kernel], [stride], [0], [1], [length]
            c, length = 512, (length - kernel) // stride + 1


def at_random(count: int = 1500) -> Iterator[Layer]:
    chosen = random.Random(11)  # noqa: S311 - a repeatable choice, not a secret
    widths = [
        *range(16, 80, 8),
        *range(80, 257, 16),
        *range(288, 577, 32),
        *range(640, 1025, 64),
        1152,
        1280,
        1536,
        2048,
    ]
    for _ in range(count):
        c, k = chosen.choice(widths), chosen.choice(widths)
        side = chosen.choice([1, 4, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 224, 256])
        kernel, stride = chosen.choice([(3, 1), (3, 1), (3, 1), (3, 2), (1, 1), (1, 2), (5, 1), (7, 1), (2, 2), (4, 4)])
        yield square(c, k, kernel, stride, kernel // 2 if kernel % 2 else 0, side)
        dilation, groups = chosen.choice([2, 4, 6, 12, 18]), chosen.choice([2, 4, 8, 16, 32])
        kind = chosen.randrange(4)
        if kind == 0:
            yield square(c, k, 3, 1, dilation, side, dilation=dilation)
        elif kind == 1 and c % groups == k % groups == 0:
            yield square(c, k, 3, 1, 1, side, groups=groups)
        elif kind == 2:
            width, length = chosen.choice([1, 2, 3, 5, 7]), chosen.choice([50, 100, 249, 499, 750, 999, 1500, 3000])
            yield c, k, 1, [width], [chosen.choice([1, 1, 2])], [width // 2], [1], [length]


def makes_sense(layer: Layer) -> bool:
    c, k, groups, kernel, stride, padding, dilation, size = layer
    sides = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(s + 2 * p - d * (r - 1) - 1) // t + 1 for s, r, t, p, d in sides]
    return min(out) > 0 and c % groups == 0 == k % groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=500.0)
    options = parser.parse_args()

    def too_long(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    used: Counter[str] = Counter()
    start, models = time.monotonic(), 0
    with torch.device("meta"):
        for model in of_models():
            if time.monotonic() - start > options.seconds:
                break
            signal.alarm(PER_MODEL_S)
            try:
                used.update({json.dumps(layer) for layer in model()})
                models += 1
            except Exception as error:  # noqa: BLE001 - some models need more than a meta tensor
                print(f"left out: {type(error).__name__}: {str(error)[:100]}")
            finally:
                signal.alarm(0)
    known = [json.dumps(layer) for layer in json.loads(gzip.decompress(OUT.read_bytes()))]
    shapes = [json.dumps(layer) for layer in (*of_shapes(), *at_random())]
    found = dict.fromkeys([*known, *(text for text, _ in used.most_common()), *shapes])
    layers = [layer for layer in map(json.loads, found) if makes_sense(layer)]
    OUT.write_bytes(gzip.compress(json.dumps(layers).encode(), mtime=0))
    print(f"{models} models, {len(layers)} layers: {OUT}")


if __name__ == "__main__":
    main()
