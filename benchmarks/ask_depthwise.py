"""Ask cuDNN, without a GPU, for the gradient of depthwise weights in float32 and channels-last.

    python benchmarks/ask_depthwise.py        # needs nvidia-cudnn-cu13==9.19.0.56 and nvidia-cublas, no GPU, no torch

By the properties that an H200 gave. The plans that come first there are neither cuBLASLt's nor the driver's to make, so
the answers are those of a GPU: in a trace recorded on one, ConvNeXt's layers took these very bytes. Writes
``measurements/h200/depthwise-plans.json.gz``, as ``benchmarks/measure_plans.py`` has it.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from cudnn_plans import Cudnn

OUT = Path("measurements/h200/depthwise-plans.json.gz")
PROPERTIES = Path("measurements/h200/device-properties.json")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST_ELEMENTS = 2**31
WIDTHS = (
    *range(8, 129, 8), *range(144, 257, 16), *range(288, 577, 32), *range(640, 1025, 64), 1152, 1280, 1408, 1536, 2048
)  # fmt: skip
SIDES = (4, 6, 7, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 48, 56, 64, 72, 80, 96, 112)
KERNELS = ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1))


def main() -> None:
    cudnn = Cudnn(PROPERTIES.read_text())
    layers = [
        (c, c, c, [r, r], [stride, stride], [r // 2, r // 2], [1, 1], [side, side])
        for c in WIDTHS
        for side in SIDES
        if c * side <= 96 * 112
        for r, stride in KERNELS
    ]
    plans = [
        [
            cudnn.first_plan("wgrad", "float32", True, n, *layer)
            if n * layer[0] * layer[-1][0] ** 2 <= MOST_ELEMENTS
            else None
            for n in BATCHES
        ]
        for layer in layers
    ]
    document = {
        "cudnn": cudnn.version, "command": "python benchmarks/ask_depthwise.py", "layers": layers, "batches": BATCHES,
        "plans": {"float32-nhwc wgrad": plans},
    }  # fmt: skip
    OUT.write_bytes(gzip.compress(json.dumps(document, separators=(",", ":")).encode(), mtime=0))
    print(f"{len(layers)} layers: {OUT}, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
