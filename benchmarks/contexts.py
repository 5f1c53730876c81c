"""CUDA contexts of several processes on one GPU: what the driver lists for each, and the device shows in all.

    python benchmarks/contexts.py [--out FILE]

Forks of this process start CUDA one beside the other, take memory, load cuBLAS and leave. After each of these the
bytes in use on the device are noted beside those that the driver lists for each process: how much of the device is a
process's own can be told beside others where the two differ by a constant. Run from the repository's root; needs one
idle GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path.cwd())]

import torch

from planner.errors import PlannerError
from planner.forks import Fork
from planner.local_gpus import LocalGpu, local_gpus
from planner.processes import answer
from planner.runtime.card import Card
from planner.runtime.context import Context
from planner.units import GIB

HELD_GIB = 60
TIMEOUT_S = 60.0
_kept: list[Any] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    arguments = parser.parse_args()
    gpu = local_gpus()[0]
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    torch.set_num_threads(1)
    forks = [Fork.start(lambda message: work(gpu, message)) for _ in range(3)]  # before NVML is open here
    rows: list[dict[str, Any]] = []
    with Card.open(gpu.uuid) as card:

        def note(what: str, ask: Callable[[], Any]) -> None:
            start = time.perf_counter()
            ask()
            took_s = round(time.perf_counter() - start, 3)
            time.sleep(0.1)
            used, listed = card.used_bytes(), card.process_bytes()
            names = {fork.pid: name for fork, name in zip(forks, "abc", strict=True)}
            own = {names.get(pid, "other"): count for pid, count in listed.items()}
            others = used - sum(count or 0 for count in own.values())
            rows.append(
                {"what": what, "seconds": took_s, "used_bytes": used, "listed": own, "not_listed_bytes": others}
            )
            print(json.dumps(rows[-1]), flush=True)

        def told(fork: Fork, do: str) -> Callable[[], Any]:
            return lambda: _checked(fork.ask({"do": do}, TIMEOUT_S))

        a, b, c = forks
        note("nobody", lambda: None)
        note("a starts CUDA", told(a, "start"))
        note("a multiplies matrices", told(a, "multiply"))
        note(f"a holds {HELD_GIB} GiB", told(a, "hold"))
        note("b starts CUDA beside it", told(b, "start"))
        note("a gives them back", told(a, "free"))
        note("a ends", a.end)
        note("b multiplies matrices", told(b, "multiply"))
        note("c starts CUDA beside it", told(c, "start"))
        note(f"b holds {HELD_GIB} GiB", told(b, "hold"))
        note("b ends", b.end)
        note("c multiplies matrices", told(c, "multiply"))
        note("c ends", c.end)
    if arguments.out:
        facts = {"gpu": gpu.name, "driver": gpu.driver_version, "torch": torch.__version__}
        facts["measured_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        command = "python benchmarks/contexts.py"
        arguments.out.write_text(json.dumps({"command": command, **facts, "rows": rows}, indent=1) + "\n")


def _checked(reply: dict[str, Any] | None) -> None:
    if reply is None or "ok" not in reply:
        sys.exit(f"error: {reply}")


def work(gpu: LocalGpu, message: dict[str, Any]) -> dict[str, Any]:
    """In a fork."""

    def start() -> dict[str, Any]:
        with Card.open(gpu.uuid) as card:
            Context.start(HELD_GIB * GIB, card)
        return {}

    def multiply() -> dict[str, Any]:
        for dtype in (torch.float32, torch.bfloat16):
            factor = torch.ones(256, 256, device="cuda", dtype=dtype)
            torch.addmm(factor[0], factor, factor)
        torch.cuda.synchronize()
        return {}

    def hold() -> dict[str, Any]:
        torch.cuda.set_per_process_memory_fraction(1.0)
        _kept.extend(torch.empty(GIB, dtype=torch.uint8, device="cuda") for _ in range(HELD_GIB))
        return {}

    def free() -> dict[str, Any]:
        _kept.clear()
        torch.cuda.empty_cache()
        return {}

    return answer({"start": start, "multiply": multiply, "hold": hold, "free": free}, message)


if __name__ == "__main__":
    try:
        main()
    except PlannerError as error:
        sys.exit(f"error: {error}")
