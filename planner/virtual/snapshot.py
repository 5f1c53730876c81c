"""A predicted step as a file that PyTorch's own memory viewer opens."""

from __future__ import annotations

import functools
import pickle
from typing import Any

from planner.allocator import AllocatorConfig, memory_snapshot
from planner.allocator.export import Frame
from planner.virtual.explanation import Lifetimes
from planner.virtual.scaling import Scaled
from planner.virtual.steady import until_steady

_PROTOCOL = 4
"""Of pickle: the viewer reads 2 to 4 (``unpickle`` in torch/utils/viz/MemoryViz.js)."""


def snapshot_file(
    scaled: Scaled, batch_size: int, *, config: AllocatorConfig, capacity_bytes: int, device_total_bytes: int
) -> bytes:
    """The pickled dictionary of ``torch.cuda.memory._dump_snapshot`` for a predicted batch size.

    Where it does not fit under ``capacity_bytes``, of a replay with no limit. A block's stack is the operator, the
    tensor's name where it has one, the modules from the inside out, and the phase; its category is its kind.
    """
    settings: dict[str, Any] = {"config": config, "device_total_bytes": device_total_bytes}
    scaled, fits = until_steady(scaled, capacity_bytes=capacity_bytes, **settings)
    lifetimes = Lifetimes(scaled.trace)
    trace = scaled.trace

    @functools.cache
    def frames(operator: str, module: str, tensor: str, when: str) -> list[Frame]:
        # Equal stacks are one object, which the pickle holds once.
        step, _, phase = when.partition(", ")
        parts = module.split(".") if module else []
        modules = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        return [
            _frame("operator", operator),
            *([_frame("tensor", tensor)] if tensor else []),
            *(_frame("module", name) for name in modules),
            _frame("phase", f"{step} {phase}".strip()),
        ]

    def stack(block: int) -> list[Frame]:
        module, tensor = trace.owners[trace.block_owners[block]]
        return frames(trace.operators[block], module, tensor, lifetimes.when(lifetimes.born[block]))

    document = memory_snapshot(
        scaled.events,
        capacity_bytes=capacity_bytes if fits else None,
        **settings,
        stack=stack,
        category=lambda block: lifetimes.kind(block).replace("_", " "),
    )
    document["planner"] = {"source": "predicted", "batch_size": batch_size, "fits": fits}
    return pickle.dumps(document, protocol=_PROTOCOL)


def _frame(what: str, name: str) -> Frame:
    return {"filename": what, "line": 0, "name": name}
