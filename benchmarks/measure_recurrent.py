"""Measure what cuDNN's recurrent layers take on a GPU beside their results: data for ``planner.virtual.cudnn_rnn``.

    python benchmarks/measure_recurrent.py [--out FOLDER] [--seconds 60]     # FOLDER defaults to $OUT, else .

Needs torch on a CUDA GPU. Two kinds of evidence:

- ``rows``: cuDNN's own answers (``cudnnGetRNNTempSpaceSizes``, ``cudnnGetRNNWeightSpaceSize``) for descriptors as
  PyTorch makes them (aten/src/ATen/native/cudnn/RNN.cpp, aten/src/ATen/cudnn/Descriptors.h), over cells, dtypes,
  algorithms and shapes. No kernel runs, so thousands of shapes take seconds.
- ``traces``: the allocator's events of ``torch.nn.LSTM``, ``GRU`` and ``RNN``, forward and backward, which show the
  algorithm that PyTorch picked and the order of the allocations.

Writes ``recurrent.json.gz``: ``{torch, cudnn, gpu, num_sms, dropout_state_bytes, columns, rows, traces}``.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import itertools
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_float, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch

COLUMNS = [
    *("cell", "dtype", "math", "algorithm", "steps", "batch", "input", "hidden", "projection", "layers", "directions"),
    *("dropout", "packed", "status", "weights", "workspace", "reserve", "inference_workspace"),
]
CELLS = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2, "GRU": 3}
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 9}
DEFAULT_MATH, TENSOR_OP_MATH, FMA_MATH = 0, 1, 3
STANDARD, PERSIST_STATIC, PERSIST_STATIC_SMALL_H = 0, 1, 3
DOUBLE_BIAS, LINEAR_INPUT, PADDED_IO = 2, 0, 1
UNPACKED, PACKED = 0, 1  # 2 in a row: packed sequences of lengths that go down evenly from ``steps`` to 1
EVEN = 2
INFERENCE, TRAINING = 0, 1
SIGNATURES = {
    "cudnnCreate": [POINTER(c_void_p)],
    "cudnnCreateRNNDescriptor": [POINTER(c_void_p)],
    "cudnnCreateRNNDataDescriptor": [POINTER(c_void_p)],
    "cudnnCreateDropoutDescriptor": [POINTER(c_void_p)],
    "cudnnDropoutGetStatesSize": [c_void_p, POINTER(c_size_t)],
    "cudnnSetDropoutDescriptor": [c_void_p, c_void_p, c_float, c_void_p, c_size_t, c_uint64],
    "cudnnSetRNNDescriptor_v8": [c_void_p, *[c_int] * 12, c_void_p, c_uint32],
    "cudnnSetRNNDataDescriptor": [c_void_p, c_int, c_int, c_int, c_int, c_int, POINTER(c_int), c_void_p],
    "cudnnGetRNNTempSpaceSizes": [c_void_p, c_void_p, c_int, c_void_p, POINTER(c_size_t), POINTER(c_size_t)],
    "cudnnGetRNNWeightSpaceSize": [c_void_p, c_void_p, POINTER(c_size_t)],
}


class Cudnn:
    """The few functions of cuDNN that are asked here, in the library that torch has loaded."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")
        torch.backends.cudnn.version()
        self._library = ctypes.CDLL("libcudnn.so.9")
        for name, arguments in SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c_int
        self.handle = self._made("cudnnCreate")
        self.rnn = self._made("cudnnCreateRNNDescriptor")
        self.data = self._made("cudnnCreateRNNDataDescriptor")
        size = c_size_t()
        self.check("cudnnDropoutGetStatesSize", self.handle, byref(size))
        self.dropout_state_bytes = size.value
        self._states = torch.empty(size.value, dtype=torch.uint8, device="cuda")
        self.dropouts = [self._made("cudnnCreateDropoutDescriptor") for _ in range(2)]
        self.check("cudnnSetDropoutDescriptor", self.dropouts[0], self.handle, 0.0, None, 0, 0)
        self.check(
            "cudnnSetDropoutDescriptor", self.dropouts[1], self.handle, 0.1, self._states.data_ptr(), size.value, 1
        )

    def call(self, name: str, *arguments: Any) -> int:
        return int(getattr(self._library, name)(*arguments))

    def check(self, name: str, *arguments: Any) -> None:
        status = self.call(name, *arguments)
        if status:
            raise RuntimeError(f"{name} returned {status}")

    def _made(self, name: str) -> c_void_p:
        made = c_void_p()
        self.check(name, byref(made))
        return made

    def row(
        self, cell: str, dtype: str, math: int, algorithm: int, steps: int, batch: int, inputs: int, hidden: int,
        projection: int, layers: int, directions: int, dropout: int, packed: int,
    ) -> list[Any]:  # fmt: skip
        """One shape and cuDNN's answers; sizes are -1 where it answered with an error."""
        row: list[Any] = [
            *(cell, dtype, math, algorithm, steps, batch, inputs, hidden, projection, layers, directions, dropout),
            packed,
        ]
        accumulate = DTYPES["float32"] if dtype in ("float16", "bfloat16") else DTYPES[dtype]
        status = self.call(
            "cudnnSetRNNDescriptor_v8", self.rnn, algorithm, CELLS[cell], DOUBLE_BIAS, directions - 1, LINEAR_INPUT,
            DTYPES[dtype], accumulate, math, inputs, hidden, projection or hidden, layers, self.dropouts[dropout],
            0 if packed else PADDED_IO,
        )  # fmt: skip
        if status:
            return [*row, status, -1, -1, -1, -1]
        lengths = (c_int * batch)(*packed_lengths(steps, batch, packed))
        layout = PACKED if packed else UNPACKED
        status = self.call(
            "cudnnSetRNNDataDescriptor", self.data, DTYPES[dtype], layout, steps, batch, inputs, lengths, None
        )
        if status:
            return [*row, status, -1, -1, -1, -1]
        weights, workspace, reserve, inference = c_size_t(), c_size_t(), c_size_t(), c_size_t()
        status = (
            self.call("cudnnGetRNNWeightSpaceSize", self.handle, self.rnn, byref(weights))
            or self.call(
                "cudnnGetRNNTempSpaceSizes", self.handle, self.rnn, TRAINING, self.data, byref(workspace),
                byref(reserve),
            )
            or self.call(
                "cudnnGetRNNTempSpaceSizes", self.handle, self.rnn, INFERENCE, self.data, byref(inference), None
            )
        )  # fmt: skip
        if status:
            return [*row, status, -1, -1, -1, -1]
        return [*row, 0, weights.value, workspace.value, reserve.value, inference.value]


def packed_lengths(steps: int, batch: int, packed: int) -> list[int]:
    if packed == EVEN:
        return [max(1, steps - index * steps // batch) for index in range(batch)]
    return [steps] * batch


STEPS = (1, 2, 3, 7, 10, 20, 32, 50, 64, 100, 104, 112, 120, 127, 128, 160, 200, 256, 257, 288, 320, 384, 448, 511,
         512, 1000)  # fmt: skip
BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 16, 17, 18, 20, 22, 23, 24, 32, 33, 40, 48, 64, 80, 96, 97, 98, 99,
           100, 112, 120, 128, 136, 192, 256, 384, 512)  # fmt: skip
WIDTHS = (1, 3, 8, 10, 30, 32, 40, 64, 80, 96, 100, 128, 136, 160, 192, 200, 256, 300, 384, 400, 512, 640, 768, 896,
          1000, 1024, 1152, 1280, 1500, 1536, 2048)  # fmt: skip
BASES = (
    # steps, batch, input, hidden, layers: one dimension at a time is varied around each
    (128, 4, 512, 512, 2),
    (32, 32, 64, 128, 1),
    (64, 16, 256, 1024, 3),
    (50, 64, 300, 200, 2),
    (20, 8, 128, 64, 2),
    (100, 128, 128, 256, 1),
)
KINDS = [
    ("float32", DEFAULT_MATH),
    ("bfloat16", DEFAULT_MATH),
    ("float16", TENSOR_OP_MATH),
    ("float32", FMA_MATH),
    ("float64", DEFAULT_MATH),
]


def shapes() -> Iterator[tuple[Any, ...]]:
    """``(steps, batch, input, hidden, projection, layers, directions, dropout, packed)``, the telling ones first."""
    for steps, batch, inputs, hidden, layers in BASES:
        yield from ((item, batch, inputs, hidden, 0, layers, 1, 0, 0) for item in STEPS)
        yield from ((steps, item, inputs, hidden, 0, layers, 1, 0, 0) for item in BATCHES)
        yield from ((steps, batch, item, hidden, 0, layers, 1, 0, 0) for item in WIDTHS)
        yield from ((steps, batch, inputs, item, 0, layers, 1, 0, 0) for item in WIDTHS)
        yield from ((steps, batch, inputs, hidden, 0, item, 1, 0, 0) for item in (1, 2, 3, 4, 5, 6, 8))
        for options in itertools.product((1, 2, 3), (1, 2), (0, 1), (0, 1, EVEN)):
            yield (steps, batch, inputs, hidden, 0, *options)
        for projection, directions, dropout in itertools.product((1, 32, hidden // 2, hidden - 1), (1, 2), (0, 1)):
            yield steps, batch, inputs, hidden, projection, layers, directions, dropout, 0
    chosen = random.Random(7)  # noqa: S311 - a repeatable choice, not a secret
    while True:
        hidden = chosen.choice(WIDTHS)
        projection = chosen.randrange(1, hidden) if hidden > 1 and chosen.random() < 0.1 else 0
        yield (
            chosen.choice(STEPS), chosen.choice(BATCHES), chosen.choice(WIDTHS), hidden, projection,
            chosen.choice((1, 1, 2, 2, 3, 4)), chosen.choice((1, 1, 2)), chosen.choice((0, 1)),
            chosen.choice((0, 0, 0, 1, EVEN)),
        )  # fmt: skip


def query(cudnn: Cudnn, seconds: float, most: int = 60_000) -> list[list[Any]]:
    rows, start = [], time.monotonic()
    for shape in shapes():
        for (dtype, math), cell in itertools.product(KINDS, CELLS):
            rare = dtype == "float64" or math == FMA_MATH
            if rare and len(rows) > most // 2:
                continue
            for algorithm in (STANDARD, PERSIST_STATIC, PERSIST_STATIC_SMALL_H):
                projected, hidden = shape[4], shape[3]
                if (projected and (cell != "LSTM" or algorithm)) or (algorithm and shape[-1]):
                    continue  # what PyTorch never asks for
                if (algorithm == PERSIST_STATIC and dtype != "float16") or (
                    algorithm == PERSIST_STATIC_SMALL_H and (hidden > 384 or dtype == "float64")
                ):
                    continue
                rows.append(cudnn.row(cell, dtype, math, algorithm, *shape))
        if len(rows) >= most or time.monotonic() - start > seconds:
            return rows
    return rows


class Pass:
    """One forward and backward pass of a module on ``device``, with shapes as ``trace_shapes`` gives them."""

    def __init__(
        self, device: torch.device, cell: str, dtype: str, train: bool, autocast: bool, shape: Sequence[int]
    ) -> None:
        steps, batch, inputs, hidden, projection, layers, directions, dropout, packed, batch_first, bias = shape
        options: dict[str, Any] = {"proj_size": projection} if projection else {}
        if cell.startswith("RNN_"):
            options["nonlinearity"] = cell[4:].lower()
        maker = torch.nn.RNN if cell.startswith("RNN_") else getattr(torch.nn, cell)
        module = maker(
            inputs, hidden, layers, bias=bool(bias), batch_first=bool(batch_first), dropout=0.1 * dropout,
            bidirectional=directions == 2, **options,
        )  # fmt: skip
        self.module = module.to(device, torch.float32 if autocast else getattr(torch, dtype)).train(train)
        size = (batch, steps, inputs) if batch_first else (steps, batch, inputs)
        self.inputs = torch.randn(size, device=device, dtype=next(self.module.parameters()).dtype)
        self.lengths = torch.tensor(packed_lengths(steps, batch, packed)) if packed else None
        self.batch_first, self.train = bool(batch_first), train
        self.context = torch.autocast(device.type, getattr(torch, dtype), enabled=autocast)

    def run(self) -> None:
        x: Any = self.inputs.clone().requires_grad_()
        if self.lengths is not None:
            x = torch.nn.utils.rnn.pack_padded_sequence(x, self.lengths, batch_first=self.batch_first)
        with self.context, torch.set_grad_enabled(self.train):
            out = self.module(x)[0]
        if self.lengths is not None:
            out = torch.nn.utils.rnn.pad_packed_sequence(out, batch_first=self.batch_first)[0]
        if self.train:
            out.sum().backward()
        del out, x
        self.module.zero_grad(set_to_none=True)


def traced(*case: Any) -> list[list[int]]:
    """``[block, bytes]`` of each allocation in one pass after one that warmed up; ``[~block, bytes]`` of each free."""
    measured = Pass(torch.device("cuda"), *case)
    measured.run()
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(max_entries=100_000, stacks="python", context=None)
    start = len(torch.cuda.memory._snapshot()["device_traces"][0])
    measured.run()
    torch.cuda.synchronize()
    live: dict[int, int] = {}
    events: list[list[int]] = []
    for event in torch.cuda.memory._snapshot()["device_traces"][0][start:]:
        if event["action"] == "alloc":
            live[event["addr"]] = sum(number >= 0 for number, _ in events)
            events.append([live[event["addr"]], event["size"]])
        elif event["action"] == "free_completed" and event["addr"] in live:
            events.append([~live.pop(event["addr"]), event["size"]])
    torch.cuda.memory._record_memory_history(None)
    return events


def trace_shapes() -> Iterator[tuple[str, str, bool, bool, tuple[Any, ...]]]:
    """``(cell, dtype, train, autocast, (steps, batch, input, hidden, projection, layers, directions, dropout, packed,
    batch_first, bias))``."""
    yield "LSTM", "float32", True, False, (128, 4, 512, 512, 0, 2, 1, 1, 0, 1, 1)
    for cell, dtype in itertools.product(CELLS, ("float32", "float16", "bfloat16")):
        yield cell, dtype, True, False, (64, 16, 256, 512, 0, 2, 1, 0, 0, 0, 1)
        yield cell, dtype, True, False, (64, 16, 256, 512, 0, 1, 1, 0, 0, 1, 1)  # persistent in float16
        yield cell, dtype, True, False, (40, 12, 100, 128, 0, 2, 1, 1, 0, 0, 1)  # small hidden size
        yield cell, dtype, True, False, (40, 12, 100, 160, 0, 1, 1, 0, 0, 0, 1)  # small in the forward pass alone
        yield cell, dtype, False, False, (64, 16, 256, 512, 0, 2, 1, 0, 0, 1, 1)
        yield cell, dtype, True, False, (64, 16, 256, 320, 0, 2, 2, 1, EVEN, 1, 1)
    for cell, dtype in itertools.product(("LSTM", "GRU"), ("float16", "bfloat16")):
        yield cell, dtype, True, True, (64, 16, 256, 512, 0, 2, 2, 1, 0, 1, 1)
        yield cell, dtype, True, True, (64, 16, 256, 512, 0, 1, 1, 0, 0, 1, 1)
        yield cell, dtype, False, True, (64, 16, 256, 512, 0, 2, 1, 0, 0, 1, 1)
    for dtype in ("float32", "float16"):
        yield "LSTM", dtype, True, False, (64, 16, 256, 512, 128, 2, 2, 1, 0, 1, 1)
        yield "LSTM", dtype, True, False, (64, 16, 256, 512, 0, 2, 1, 0, 0, 1, 0)  # no bias
        yield "LSTM", dtype, True, False, (64, 16, 256, 512, 128, 1, 1, 0, 0, 1, 0)
    yield "GRU", "float16", True, True, (64, 16, 256, 512, 0, 2, 1, 0, PACKED, 1, 0)
    yield "LSTM", "float64", True, False, (64, 16, 256, 512, 0, 2, 1, 1, 0, 1, 1)


def write(document: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "recurrent.json.gz", "wt") as file:
        json.dump(document, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    start = time.monotonic()
    cudnn = Cudnn()
    document: dict[str, Any] = {
        "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "gpu": torch.cuda.get_device_name(),
        "num_sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "dropout_state_bytes": cudnn.dropout_state_bytes, "tf32": torch.backends.cudnn.allow_tf32,
        "command": "python benchmarks/measure_recurrent.py", "columns": COLUMNS,
        "rows": query(cudnn, options.seconds / 2), "traces": [],
    }  # fmt: skip
    answered = sum(row[13] == 0 for row in document["rows"])
    print(f"{time.monotonic() - start:.0f} s: {len(document['rows'])} rows, cuDNN answered {answered}", flush=True)
    write(document, options.out)
    failed = 0
    for cell, dtype, train, autocast, shape in trace_shapes():
        if time.monotonic() - start > options.seconds:
            print("out of time before", cell, dtype, shape)
            break
        try:
            events = traced(cell, dtype, train, autocast, shape)
        except RuntimeError as error:
            print("failed", cell, dtype, shape, str(error).strip()[:300])
            failed += 1
            continue
        document["traces"].append(
            {"cell": cell, "dtype": dtype, "train": train, "autocast": autocast, "shape": shape, "events": events}
        )
    write(document, options.out)
    print(f"{time.monotonic() - start:.0f} s: {len(document['traces'])} traces, {failed} of them failed")


if __name__ == "__main__":
    main()
