"""Hold the rules of recurrent layers against what was measured (``measurements/h200/recurrent.json.gz``).

    python benchmarks/recurrent.py

Prints, for each cell, dtype and algorithm, how many of cuDNN's answers the formulas of ``planner.virtual.cudnn_rnn``
give to the byte, and the worst that are not; then, for each recorded pass, whether the virtual GPU makes the same
allocations and frees in the same order. Run from the repository's root; needs torch and no GPU.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path.cwd())]

import torch
from measure_recurrent import Pass, packed_lengths
from torch._subclasses.fake_tensor import FakeTensorMode

from planner.virtual.architecture import Architecture
from planner.virtual.cudnn_rnn import Algorithm, Cell, Layers, Run, algorithm, reserve_bytes, workspace_bytes_of
from planner.virtual.kernels import Kernels
from planner.virtual.recorder import Recorder
from planner.virtual.tracing import prepare

DATA = Path("measurements/h200/recurrent.json.gz")
H200 = Architecture(compute_capability=(9, 0), num_sms=132, torch_version=(2, 11))


def virtual_events(case: dict[str, Any]) -> list[list[int]]:
    """The events of the same pass on the virtual GPU; blocks of no bytes left out, as they are on a real one."""
    recorder = Recorder(Kernels(H200))
    with FakeTensorMode(allow_non_fake_inputs=True), recorder:
        measured = Pass(
            prepare(H200), case["cell"], case["dtype"], case["train"], case["autocast"], tuple(case["shape"])
        )
        measured.run()
        start = len(recorder.trace.events)
        first = len(recorder.trace.sizes)
        measured.run()
        trace = recorder.trace
        names: dict[int, int] = {}
        events = []
        for event in trace.events[start:]:
            block = event if event >= 0 else ~event
            if block < first or not trace.sizes[block]:
                continue
            number = names.setdefault(block, len(names))
            events.append([number if event >= 0 else ~number, trace.sizes[block]])
        return events


def run_of_row(row: dict[str, Any]) -> Run:
    steps, batch = row["steps"], row["batch"]
    return Run(
        Layers(
            Cell[row["cell"]], row["input"], row["hidden"], row["projection"], row["layers"], row["directions"]
        ),
        row["dtype"], steps, batch, sum(packed_lengths(steps, batch, row["packed"])), bool(row["packed"]),
        bool(row["dropout"]), H200,
    )  # fmt: skip


def formula_errors(document: dict[str, Any]) -> dict[tuple[str, str, str, str], Counter[int]]:
    """How often the formulas are off by how many bytes: by cell, dtype, algorithm and which size. Only what PyTorch
    asks for: a persistent algorithm where it is chosen for the forward or the backward pass."""
    errors: dict[tuple[str, str, str, str], Counter[int]] = defaultdict(Counter)
    for values in document["rows"]:
        row = dict(zip(document["columns"], values, strict=True))
        if row["status"]:
            continue
        run = run_of_row(row)
        chosen = Algorithm(row["algorithm"])
        if chosen not in (Algorithm.STANDARD, algorithm(run, forward=True), algorithm(run, forward=False)):
            continue
        kind = (row["cell"], row["dtype"], chosen.name.lower())
        found = {
            "weights": run.layers.num_weights * run.element_bytes,
            "reserve": reserve_bytes(run),
            "workspace": workspace_bytes_of(run, chosen, training=True),
            "inference_workspace": workspace_bytes_of(run, chosen, training=False),
        }
        for name, size in found.items():
            errors[(*kind, name)][size - row[name]] += 1
    return errors


def main() -> None:
    torch.set_num_threads(1)
    document = json.loads(gzip.decompress(DATA.read_bytes()))
    print(f"{'cell':9} {'dtype':9} {'algorithm':22} {'size':20} {'answers':>8} {'exact':>8} {'worst':>10}")
    for kind, counts in sorted(formula_errors(document).items()):
        worst = max(counts, key=abs)
        print(f"{kind[0]:9} {kind[1]:9} {kind[2]:22} {kind[3]:20} {counts.total():8} {counts[0]:8} {worst:+10}")
    same = 0
    for case in document["traces"]:
        events = virtual_events(case)
        if events == case["events"]:
            same += 1
            continue
        position = next(
            (i for i, (a, b) in enumerate(zip(events, case["events"], strict=False)) if a != b),
            min(len(events), len(case["events"])),
        )
        print(
            case["cell"], case["dtype"], case["train"], case["autocast"], case["shape"], f"differs at {position}:",
            "measured", case["events"][position:position + 3], "virtual", events[position:position + 3],
        )  # fmt: skip
    print(f"{same} of {len(document['traces'])} recorded passes have the same events, block by block")
    sys.stdout.flush()
    os._exit(0)  # torch's interpreter exit is not safe with a Python backend registered


if __name__ == "__main__":
    main()
