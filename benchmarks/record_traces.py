"""Record what PyTorch's caching allocator really does on a GPU: golden data for ``planner.allocator``.

    python benchmarks/record_traces.py [--out FOLDER]        # FOLDER defaults to $OUT, else ./traces

Needs torch and a CUDA GPU, nothing else. Each setting (allocator conf, limit) gives one ``NAME.trace.json.gz`` with two
runs, each in a fresh process with recording on before its first allocation:

- ``synthetic``: seeded random sizes and lifetimes, on three streams, with frees deferred by ``record_stream``;
- ``training``: steps of a small network of convolutions and attention at changing batch sizes, bf16 autocast, AdamW.

A run is ``{conf, fraction, total_memory_bytes, allowed_bytes, stats, events}``; an event is ``[action, address, bytes,
stream]`` with PyTorch's own action names (``alloc`` carries the bytes asked for; the stream is its handle, by whose
value the allocator orders streams).
Limits are derived from the peaks of the first setting (no limit), so that they force retries whatever the GPU.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 1 << 20
# name -> (allocator conf, where between the unlimited peaks of allocated (0.0) and reserved (1.0) bytes the limit lies)
SETTINGS: dict[str, tuple[str, float | None]] = {
    "default": ("", None),
    "limit": ("", 0.35),
    "expandable": ("expandable_segments:True", None),
    "expandable-limit": ("expandable_segments:True", 0.02),
    "max-split": ("max_split_size_mb:64", None),
    "max-split-limit": ("max_split_size_mb:64", 0.35),
    "gc": ("garbage_collection_threshold:0.6", 1.05),
    "roundup": ("roundup_power2_divisions:4", None),
}
WORKLOADS = ("synthetic", "training")
STATS = (
    "allocated_bytes.all.peak", "allocated_bytes.all.current", "reserved_bytes.all.peak", "reserved_bytes.all.current",
    "requested_bytes.all.peak", "requested_bytes.all.current", "active_bytes.all.peak", "inactive_split_bytes.all.peak",
    "segment.all.current", "segment.all.peak", "num_alloc_retries", "num_ooms", "num_device_alloc", "num_device_free",
)  # fmt: skip


def synthetic(seed: int = 7, operations: int = 5000, target_bytes: int = 1 << 30) -> int:
    """Allocate and free at random around ``target_bytes`` live; returns how often the allocator ran out of memory."""
    import torch

    rng = random.Random(seed)  # noqa: S311 - a repeatable workload, not a secret
    streams = [torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(2))]  # type: ignore[no-untyped-call]
    live: list[Any] = []
    live_bytes = ooms = 0

    def size() -> int:
        kind = rng.random()
        if kind < 0.55:
            return int(2 ** rng.uniform(0, 20))
        if kind < 0.85:
            return rng.randrange(MIB, 10 * MIB)
        if kind < 0.97:
            return rng.randrange(10 * MIB, 70 * MIB)
        return rng.randrange(70 * MIB, 260 * MIB)

    for _ in range(operations):
        count = size()
        stream = streams[0] if rng.random() < 0.8 else rng.choice(streams[1:])
        try:
            with torch.cuda.stream(stream):
                tensor = torch.empty(count, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            ooms += 1
        else:
            live.append(tensor)
            live_bytes += count
            del tensor
        while live and (live_bytes > target_bytes or rng.random() < 0.45):
            victim = live.pop(rng.randrange(len(live)))
            live_bytes -= victim.numel()
            if rng.random() < 0.1:
                other = rng.choice(streams)
                with torch.cuda.stream(other):
                    victim.view(-1)[:1].fill_(0)
                victim.record_stream(other)
                del victim
                # The deferred free then completes at the start of the next request, not inside a retry.
                torch.cuda.synchronize()
            else:
                del victim
    return ooms


def training(seed: int = 7, steps: int = 10) -> int:
    """Train at changing batch sizes; returns how many steps ran out of memory (and were skipped)."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    rng = random.Random(seed)  # noqa: S311 - a repeatable workload, not a secret

    class Net(nn.Module):
        def __init__(self, width: int = 384) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
            self.convs = nn.ModuleList(
                nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()) for _ in range(4)
            )
            self.patch = nn.Conv2d(64, width, 8, 8)
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(width, 6, 4 * width, batch_first=True, norm_first=True) for _ in range(6)
            )
            self.head = nn.Linear(width, 1000)

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            for conv in self.convs:
                x = x + conv(x)
            x = self.patch(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    model = Net().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ooms = 0
    for _ in range(steps):
        batch = rng.randrange(16, 97)
        failed = False
        try:
            x = torch.randn(batch, 3, 192, 192, device="cuda")
            y = torch.randint(0, 1000, (batch,), device="cuda")
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        except torch.OutOfMemoryError:
            failed = True
        # Outside the handler: the exception's traceback would keep the failed step's tensors alive.
        ooms += failed
        x = y = loss = None  # type: ignore[assignment]
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return ooms


def record(workload: str, limit_bytes: int | None) -> dict[str, Any]:
    """Run one workload in this process and return its run (see the module's text)."""
    import torch

    torch.cuda.init()  # type: ignore[no-untyped-call]
    total = torch.cuda.get_device_properties(0).total_memory
    fraction = None
    if limit_bytes is not None:
        fraction = limit_bytes / total
        torch.cuda.set_per_process_memory_fraction(fraction)
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=10**6)
    caught = synthetic() if workload == "synthetic" else training()
    stats = torch.cuda.memory_stats()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    events = [[entry["action"], entry.get("addr", 0), entry.get("size", 0), entry.get("stream", 0)] for entry in trace]
    return {
        "workload": workload,
        "conf": os.environ.get("PYTORCH_ALLOC_CONF", ""),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(0),
        "total_memory_bytes": total,
        "fraction": fraction,
        "allowed_bytes": None if fraction is None else int(fraction * total),
        "ooms_caught": caught,
        "stats": {key: stats[key] for key in STATS if key in stats},
        "events": events,
    }


def run_child(workload: str, conf: str, limit_bytes: int | None, timeout_s: float = 150) -> dict[str, Any]:
    """One run in a fresh process. Raises ``RuntimeError`` with the child's last words."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_ALLOC_CONF")}
    if conf:
        environment["PYTORCH_ALLOC_CONF"] = conf
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.json")
        command = [sys.executable, __file__, "--child", workload, "--result", str(path)]
        if limit_bytes is not None:
            command += ["--limit", str(limit_bytes)]
        done = subprocess.run(command, env=environment, timeout=timeout_s, check=False, capture_output=True, text=True)
        if done.returncode or not path.exists():
            raise RuntimeError(f"exit {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}")
        run: dict[str, Any] = json.loads(path.read_text())
        return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT", "traces"))
    parser.add_argument("--child", choices=WORKLOADS, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        Path(arguments.result).write_text(json.dumps(record(arguments.child, arguments.limit)))
        return 0
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[str] = []
    peaks: dict[str, tuple[int, int]] = {}
    failed = False
    for name, (conf, position) in SETTINGS.items():
        runs = []
        for workload in WORKLOADS:
            limit = None
            try:
                if position is not None:
                    low, high = peaks[workload]
                    limit = int(low + position * (high - low))
                run = run_child(workload, conf, limit)
            except (RuntimeError, KeyError, subprocess.TimeoutExpired) as error:
                failed = True
                rows.append(f"{name:17} {workload:10} FAILED {error!r}")
                continue
            stats = run["stats"]
            peak = (stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.peak"])
            peaks.setdefault(workload, peak)  # those of the first setting, which has no limit
            rows.append(
                f"{name:17} {workload:10} {len(run['events']):7} {peak[0] / MIB:10.1f} {peak[1] / MIB:10.1f} "
                f"{(limit or 0) / MIB:10.1f} {stats['num_alloc_retries']:8} {stats['num_ooms']:5}"
            )
            runs.append(run)
        path = out / f"{name}.trace.json.gz"
        path.write_bytes(gzip.compress(json.dumps({"setting": name, "runs": runs}, separators=(",", ":")).encode(), 9))
        rows[-1] += f"   {path.name} {path.stat().st_size / 1024:.0f} KiB"
    figures = f"{'alloc MiB':>10} {'resrv MiB':>10} {'limit MiB':>10} {'retries':>8} {'ooms':>5}"
    print(f"{'setting':17} {'workload':10} {'events':>7} {figures}", *rows, sep="\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
