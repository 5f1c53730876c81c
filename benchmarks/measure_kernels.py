"""Record what single CUDA operators allocate: their results, their temporaries and the order of both.

    python benchmarks/measure_kernels.py [--out FILE] [--seconds S] [--group NAME...]

Each call is run once to load its kernels, then recorded: a list of events, ``bytes`` for an allocation and ``-(i + 1)``
for the freeing of the ``i``-th. What is allocated once for the life of a process (workspaces of cuBLAS) is recorded in
a fresh process for each call. Writes JSON. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_calls import GROUPS, Answer, Thunk


def record(make: Callable[[], Thunk], *, warm: bool = True) -> list[int]:
    """The events of one call: bytes of an allocation, ``-(i + 1)`` where the ``i``-th is freed."""
    call = make()
    if warm:
        kept = call()
        del kept
        call = make()
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(max_entries=100_000, stacks="python", context=None)
    kept = call()
    torch.cuda.synchronize()
    events = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    del kept, call
    found: list[int] = []
    numbers: dict[int, int] = {}
    count = 0
    for event in events:
        if event["action"] == "alloc":
            numbers[event["addr"]] = count
            count += 1
            found.append(event["size"])
        elif event["action"] == "free_requested" and event["addr"] in numbers:
            found.append(-numbers.pop(event["addr"]) - 1)
    return found


def run(group: str, seconds: float) -> list[dict[str, Any]]:
    """Every case of ``group``: in this process, but for products, which get a fresh one each."""
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    for number, (name, about, make) in enumerate(GROUPS[group]()):
        row: dict[str, Any] = {"name": name, **about}
        rows.append(row)
        if time.monotonic() - start > seconds:
            row["error"] = "out of time"
            continue
        try:
            if group == "products":
                from measure_peaks import in_fork

                row.update(in_fork(lambda make=make: {"events": record(make, warm=False)}))
            else:
                row["events"] = record(make)
        except Answer as answer:
            row["value"] = answer.args[0]
        except Exception as error:  # noqa: BLE001 - kept as the result of this case
            row["error"] = f"{type(error).__name__}: {error}"[:160]
            if "CUDA error" in str(error) or "device-side" in str(error):
                row["error"] += traceback.format_exc()[-300:]
                break
        if number % 50 == 0 and group != "products":
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kernels.json.gz"))
    parser.add_argument("--group", nargs="*", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    pids = {}
    for group in options.group:  # at the same time: none disturbs another's allocator
        part = options.out.with_suffix(f".{group}")
        pid = os.fork()
        if pid == 0:
            part.write_text(json.dumps(run(group, options.seconds)))
            os._exit(0)
        pids[group] = pid, part
    rows: list[dict[str, Any]] = []
    for group, (pid, part) in pids.items():
        os.waitpid(pid, 0)
        found = json.loads(part.read_text()) if part.exists() else []
        part.unlink(missing_ok=True)
        failed = sum(1 for row in found if "error" in row)
        print(f"{group}: {len(found)} calls, {failed} failed")
        rows += [{"group": group, **row} for row in found]
    with gzip.open(options.out, "wt") as file:
        json.dump({"torch": torch.__version__, "command": "python benchmarks/measure_kernels.py", "calls": rows}, file)


if __name__ == "__main__":
    main()
