"""Allocator events of training steps, and the operators that they come from: recorded on a GPU, and predicted.

    python benchmarks/step_events.py record CASE... [--out FOLDER] [--jobs N] [--seconds S]    # needs a GPU
    python benchmarks/step_events.py compare [FILE...] [--show N]                              # anywhere

A ``CASE`` is ``SPEC,PRECISION,CHECKPOINTING,GIB,SIZE...``: a file's name in ``measurements/specs`` or ``examples``, a
limit in GiB or 0, and batch sizes; each is three steps in a fresh process forked before CUDA was touched. A file has
the peaks after each step, and of each event its action, address, bytes and the innermost functions that led to it.
``compare`` predicts the same steps and prints the peaks and where the two sequences of allocations and frees differ; it
should run under the torch that recorded, whose Python code decides when tensors die. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_SYMBOLIZE_MODE", "dladdr")  # names of functions, without minutes of debugging symbols
sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "examples"), str(Path.cwd() / "benchmarks")]

from planner.specs.document import load_spec
from planner.specs.model import Spec
from planner.specs.variants import Variant

FOLDER = Path("measurements/h200/steps")
TOTAL_BYTES = 150_109_880_320
TRIAL_TIMEOUT_S = 40.0
BLOCK_BYTES = 512
_PLUMBING = re.compile(
    r"Allocator|Traceback|unwind|redispatch|wrap_kernel|Boxed|empty_cuda|empty_strided|^at::detail|^torch::detail|"
    r"^_?Py|PyObject|cfunction|vectorcall|autograd::Engine|PythonEngine|^std::|^c10::|^<unknown|^\?\?|start_thread|^clone"
)


def name_of(spec: str, variant: dict[str, str], limit: int, size: int) -> str:
    return f"{spec}.{variant['precision']}.{variant['checkpointing']}.{limit}.{size}"


def spec_of(name: str) -> Spec:
    path = Path("measurements/specs", f"{name}.yaml")
    return load_spec(path if path.exists() else Path("examples", f"{name}.yaml"))


def record(case: str, out: Path, deadline: float) -> None:
    """Each batch size of one case, in this process's forks."""
    import torch
    from measure_peaks import in_fork

    from planner.training import build_model

    torch.set_num_threads(1)
    spec_name, precision, checkpointing, limit, *sizes = case.split(",")
    axes = {"precision": precision, "checkpointing": checkpointing}
    spec, variant = spec_of(spec_name), Variant.from_dict(axes)
    model = build_model(spec)
    for size in map(int, sizes):
        if time.monotonic() > deadline:
            return
        found = in_fork(lambda: _steps(spec, variant, model, size, int(limit)), TRIAL_TIMEOUT_S)  # noqa: B023
        found = {"spec": spec_name, "variant": axes, "limit": int(limit), "size": size, **found}
        name = name_of(spec_name, axes, int(limit), size)
        out.joinpath(f"{name}.json.xz").write_bytes(lzma.compress(json.dumps(found, separators=(",", ":")).encode()))
        print(name, found.get("steps") or found.get("error"), flush=True)


def _steps(spec: Spec, variant: Variant, model: Any, size: int, limit: int) -> dict[str, Any]:
    import torch

    from planner.training import Training, phases

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="all", context="alloc")
    if limit:
        torch.cuda.set_per_process_memory_fraction((limit << 30) / total)
    training = Training(spec, variant, model, torch.device("cuda", 0))
    steps, marks = [], []
    for phase in phases(spec):
        marks.append(torch.cuda.memory_stats()["allocation.all.allocated"])
        training.run(phase, size)
        torch.cuda.synchronize()
        scale = training.scaler.get_scale() if training.scaler.is_enabled() else None
        steps.append([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), scale])
    return {
        "torch": torch.__version__, "gpu": torch.cuda.get_device_name(0), "steps": steps, "marks": marks,
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "events": columns(torch.cuda.memory._snapshot()["device_traces"][0]),
    }  # fmt: skip


def columns(history: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """PyTorch's history as columns: numbers of actions and of stacks, which are listed once."""
    actions: dict[str, int] = {}
    stacks: dict[str, int] = {}
    found: dict[str, list[Any]] = {"action": [], "addr": [], "size": [], "stack": []}
    for event in history:
        if event["action"] == "free_completed":
            continue
        found["action"].append(actions.setdefault(event["action"], len(actions)))
        found["addr"].append(event["addr"])
        found["size"].append(event["size"])
        found["stack"].append(stacks.setdefault(json.dumps(_functions(event.get("frames", ()))), len(stacks)))
    return {"actions": list(actions), "stacks": [json.loads(stack) for stack in stacks], **found}


def _functions(frames: Any) -> list[list[str]]:
    """The innermost functions: up to seven of torch's library, and five of Python's with their lines."""
    native: list[str] = []
    python: list[str] = []
    for frame in frames:
        if frame["filename"].endswith(".py"):
            python.append("/".join(frame["filename"].split("/")[-2:]) + f":{frame['line']}:{frame['name']}")
        elif (
            not _PLUMBING.search(name := frame["name"].split("(")[0].removeprefix("void ")) and name not in native[-1:]
        ):
            native.append(name[:110])
    return [native[:7], [line for line in python if "nn/modules/module.py" not in line][:5]]


def events_of(recorded: dict[str, Any]) -> list[tuple[str, str]]:
    """``("+512", what led to it)`` for each allocation, ``("-512", "")`` for each free, in rounded bytes; and where
    steps begin."""
    events, live, found = recorded["events"], {}, []
    count = 0
    for number, address, size, stack in zip(*(events[key] for key in ("action", "addr", "size", "stack")), strict=True):
        action = events["actions"][number]
        if action == "alloc":
            if count in recorded["marks"]:
                found.append((f"step {recorded['marks'].index(count) + 1}", ""))
            count += 1
            live[address] = _rounded(size)
            native, python = events["stacks"][stack] or [[], []]
            found.append((f"+{live[address]}", " < ".join([*native[:4], *python[:3]])))
        elif action == "free_requested":
            found.append((f"-{live.pop(address)}", ""))
    return found


def predicted_events(trace: Any) -> list[tuple[str, str]]:
    """The same of a prediction's trace; blocks of no bytes are never seen by the allocator."""
    found: list[tuple[str, str]] = []
    starts = [start for start, _ in trace.steps]
    for index, event in enumerate(trace.events):
        if index in starts:
            found.append((f"step {starts.index(index) + 1}", ""))
        block = event if event >= 0 else ~event
        if trace.sizes[block]:
            what = f"{trace.operators[block]} {'.'.join(filter(None, trace.owners[trace.block_owners[block]]))}"
            found.append((f"{'+' if event >= 0 else '-'}{_rounded(trace.sizes[block])}", what))
    return found


def _rounded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def predict(recorded: dict[str, Any]) -> Any:
    """The trace of the same steps, with the updates skipped that were skipped there."""
    from accuracy import TORCH_MEASURED, skipped_steps, skipping

    from planner.virtual.architecture import Architecture
    from planner.virtual.tracing import trace_steps

    architecture = Architecture(compute_capability=(9, 0), num_sms=132, torch_version=TORCH_MEASURED)
    variant = Variant.from_dict(recorded["variant"])
    with skipping(skipped_steps(recorded)):
        trace = trace_steps(spec_of(recorded["spec"]), variant, recorded["size"], architecture)
    trace.successors = None
    return trace


def compare(path: Path, show: int) -> None:
    """Print how the prediction of one recording differs from it."""
    from planner.allocator import AllocatorConfig, replay
    from planner.virtual import scaling

    recorded = json.loads(lzma.decompress(path.read_bytes()))
    trace = predict(recorded)
    limit = recorded["limit"] << 30 or None
    result = replay(scaling.events_of(trace, trace.sizes), AllocatorConfig(), limit, device_total_bytes=TOTAL_BYTES)
    mine, theirs = predicted_events(trace), events_of(recorded)
    allocated, reserved, _ = recorded["steps"][-1]
    with tempfile.TemporaryDirectory() as folder:
        sides = [Path(folder, name) for name in ("predicted", "recorded")]
        for side, events in zip(sides, (mine, theirs), strict=True):
            side.write_text("".join(f"{token}\n" for token, _ in events))
        changes = _output_of("diff", "-d", *map(str, sides))
    hunks = re.findall(r"^(\d+)(?:,(\d+))?[acd](\d+)(?:,(\d+))?$", changes, re.MULTILINE)
    print(
        f"{path.name}: allocated {result.peak_allocated_bytes - allocated:+}, reserved "
        f"{result.peak_reserved_bytes - reserved:+} bytes of {allocated} and {reserved}; {len(mine)} events for "
        f"{len(theirs)}, {len(hunks)} places differ",
        flush=True,
    )
    for first, last, other_first, other_last in hunks[:show]:
        for name, events, start, end in (
            ("predicted", mine, first, last or first), ("recorded", theirs, other_first, other_last or other_first),
        ):  # fmt: skip
            for token, what in events[int(start) - 1 : int(end)][:12]:
                print(f"   {name:9} {token:>14} {what[:200]}")


def _output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("items", nargs="*")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--show", type=int, default=5)
    options = parser.parse_args()
    if options.what == "record":
        options.out.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + options.seconds
        if len(options.items) == 1:
            record(options.items[0], options.out, deadline)
            return
        command = [sys.executable, __file__, "record", "--out", str(options.out)]
        with ThreadPoolExecutor(options.jobs) as pool:
            for item in options.items:
                left = max(1.0, deadline - time.monotonic())
                pool.submit(subprocess.run, [*command, "--seconds", str(left), item], check=False)
        return
    for path in map(Path, options.items or sorted(map(str, FOLDER.glob("*.json.xz")))):
        if options.items[1:] or not options.items:  # tracing changes torch for good: a process for each
            subprocess.run([sys.executable, __file__, "compare", str(path), "--show", str(options.show)], check=False)
        else:
            compare(path, options.show)


if __name__ == "__main__":
    main()
