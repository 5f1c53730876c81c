"""What takes the memory: a replayed step taken apart at its peak, by kind, by module and by tensor.

Every byte is counted once: the kinds and the rounding sum to the allocated bytes, with the cached ones to the reserved
bytes, with the CUDA context and libraries to those of the device.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from planner.allocator import AllocatorConfig, Moment, moments, replay
from planner.virtual.scaling import Scaled
from planner.virtual.steady import until_steady
from planner.virtual.trace import Phase, Purpose, Trace

NUM_LARGEST = 10
NUM_MODULES = 16
"""Rows of modules; what the others hold is summed up in a last one."""
NUM_POINTS = 160
MAX_PHASES = 40
"""Phases of a timeline; a step of many micro-batches has more, and then only its steps are marked."""


class Kind(StrEnum):
    """What a block is there for."""

    PARAMETERS = "parameters"
    BUFFERS = "buffers"
    GRADIENTS = "gradients"
    """What has become a parameter's ``.grad``."""
    OPTIMIZER_STATE = "optimizer_state"
    AVERAGED_PARAMETERS = "averaged_parameters"
    """The copy of an exponential moving average."""
    CAST_PARAMETERS = "cast_parameters"
    """Autocast's copies of parameters in lower precision."""
    ACTIVATIONS = "activations"
    """Made in the forward pass and needed by the backward pass."""
    RECOMPUTED_ACTIVATIONS = "recomputed_activations"
    """The same, made again by checkpointing within the backward pass."""
    INPUTS = "inputs"
    """The batch."""
    GRADIENTS_IN_FLIGHT = "gradients_in_flight"
    """Gradients of activations, and what else the backward pass makes on its way."""
    TEMPORARIES = "temporaries"
    """Results that are gone before the forward pass or the update that made them ends."""
    WORKSPACES = "workspaces"
    """What kernels and libraries take for themselves: no tensor of the program."""
    KEPT = "kept"
    """Results of an earlier forward pass that the model holds on to."""


_BY_PURPOSE = {
    Purpose.WORKSPACE: Kind.WORKSPACES,
    Purpose.PARAMETER: Kind.PARAMETERS,
    Purpose.BUFFER: Kind.BUFFERS,
    Purpose.GRADIENT: Kind.GRADIENTS,
    Purpose.OPTIMIZER_STATE: Kind.OPTIMIZER_STATE,
    Purpose.AVERAGED_PARAMETER: Kind.AVERAGED_PARAMETERS,
    Purpose.INPUT: Kind.INPUTS,
    Purpose.CAST_PARAMETER: Kind.CAST_PARAMETERS,
}


@dataclass(slots=True)
class Lifetimes:
    """When the blocks of a trace are made and freed, and what follows from it about their kind."""

    trace: Trace
    born: dict[int, int] = field(default_factory=dict)
    died: dict[int, int] = field(default_factory=dict)
    _starts: list[int] = field(default_factory=list)
    _steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, event in enumerate(self.trace.events):
            if event >= 0:
                self.born[event] = index
            else:
                self.died[~event] = index
        self._starts = [index for index, _ in self.trace.phases]
        self._steps = [index for index, _ in self.trace.marks]

    def kind(self, block: int) -> Kind:
        purpose = Purpose(self.trace.purposes[block])
        if purpose is not Purpose.TENSOR:
            return _BY_PURPOSE[purpose]
        made, freed = self.born[block], self.died.get(block, len(self.trace.events))
        phase = self.phase(made)
        if phase is Phase.BACKWARD:
            return Kind.GRADIENTS_IN_FLIGHT
        if phase in (Phase.MOVE, Phase.UPDATE) or self._position(made) == self._position(freed):
            return Kind.TEMPORARIES
        if self.step(made) != self.step(freed):
            return Kind.KEPT
        return Kind.RECOMPUTED_ACTIVATIONS if phase is Phase.RECOMPUTATION else Kind.ACTIVATIONS

    def phase(self, index: int) -> Phase:
        position = self._position(index)
        return Phase(self.trace.phases[position][1]) if position >= 0 else Phase.MOVE

    def step(self, index: int) -> str:
        """The mark that event ``index`` is under, e.g. ``step 2``."""
        position = bisect_right(self._steps, index) - 1
        return self.trace.marks[position][1] if position >= 0 else "build"

    def when(self, index: int) -> str:
        """For people: ``step 2, backward``."""
        phase = self.phase(index)
        return self.step(index) if phase is Phase.MOVE else f"{self.step(index)}, {phase.name.lower()}"

    def _position(self, index: int) -> int:
        return bisect_right(self._starts, index) - 1


def explain(
    scaled: Scaled,
    batch_size: int,
    *,
    config: AllocatorConfig,
    capacity_bytes: int,
    device_total_bytes: int,
    outside_bytes: int,
) -> dict[str, Any]:
    """The explanation of one predicted batch size, as JSON data of a few KiB; all figures in bytes.

    Where the batch does not fit under ``capacity_bytes``, it is of a replay with no limit: what it would take.
    ``outside_bytes`` is what the device holds outside the allocator: the CUDA context and libraries.
    """
    settings: dict[str, Any] = {"config": config, "device_total_bytes": device_total_bytes}
    scaled, fits = until_steady(scaled, capacity_bytes=capacity_bytes, **settings)
    limit = capacity_bytes if fits else None
    result = replay(scaled.events, capacity_bytes=limit, timeline=True, **settings)
    allocated, reserved = result.allocated_timeline, result.reserved_timeline
    assert allocated is not None
    assert reserved is not None
    lifetimes = Lifetimes(scaled.trace)
    at = {"allocated": result.peak_allocated_index, "reserved": reserved.index(result.peak_reserved_bytes)}
    found = moments(scaled.events, at.values(), capacity_bytes=limit, **settings)
    peak = found[at["allocated"]]
    sizes = scaled.events.sizes
    return {
        "source": "predicted",
        "batch_size": batch_size,
        "fits": fits,
        "capacity_bytes": limit,
        "peaks": {name: _taken_apart(found[index], sizes, lifetimes, outside_bytes) for name, index in at.items()},
        "activations": _by_module(peak, sizes, lifetimes),
        "largest": _largest(peak, sizes, lifetimes),
        "timeline": _timeline(allocated, reserved, lifetimes),
    }


def _taken_apart(moment: Moment, sizes: Sequence[int], lifetimes: Lifetimes, outside_bytes: int) -> dict[str, Any]:
    kinds: Counter[Kind] = Counter()
    for block in moment.blocks:
        kinds[lifetimes.kind(block)] += sizes[block]
    return {
        "when": lifetimes.when(moment.index),
        "event": moment.index,
        "kinds": {str(kind): kinds[kind] for kind in Kind if kinds[kind]},
        "rounding_bytes": moment.allocated_bytes - kinds.total(),
        "allocated_bytes": moment.allocated_bytes,
        "cached_bytes": moment.reserved_bytes - moment.allocated_bytes,
        "reserved_bytes": moment.reserved_bytes,
        "outside_bytes": outside_bytes,
        "device_bytes": moment.reserved_bytes + outside_bytes,
    }


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def _by_module(moment: Moment, sizes: Sequence[int], lifetimes: Lifetimes) -> list[dict[str, Any]]:
    """Activations by the module that made them, the numbered layers of a list taken together: ``h.*.mlp.act``."""
    trace = lifetimes.trace
    held: Counter[str] = Counter()
    members: dict[str, set[str]] = {}
    for block in moment.blocks:
        if lifetimes.kind(block) in (Kind.ACTIVATIONS, Kind.RECOMPUTED_ACTIVATIONS):
            module = trace.owners[trace.block_owners[block]][0]
            pattern = _NUMBER.sub("*", module)
            held[pattern] += sizes[block]
            members.setdefault(pattern, set()).add(module)
    ranked = held.most_common()
    rows = [
        {"module": pattern, "num_modules": len(members[pattern]), "bytes": count}
        for pattern, count in ranked[:NUM_MODULES]
    ]
    rest = ranked[NUM_MODULES:]
    if rest:
        num_modules = sum(len(members[pattern]) for pattern, _ in rest)
        rows.append({"module": None, "num_modules": num_modules, "bytes": sum(count for _, count in rest)})
    return rows


def _largest(moment: Moment, sizes: Sequence[int], lifetimes: Lifetimes) -> list[dict[str, Any]]:
    """The largest live tensors and workspaces, each with the module whose forward or backward made it."""
    trace = lifetimes.trace
    # The sort is stable: of equal ones, those that were made first.
    blocks = sorted(moment.blocks, key=sizes.__getitem__, reverse=True)[:NUM_LARGEST]
    rows = []
    for block in blocks:
        module, tensor = trace.owners[trace.block_owners[block]]
        row = {
            "bytes": sizes[block],
            "kind": str(lifetimes.kind(block)),
            "module": module,
            "tensor": tensor,
            "operator": trace.operators[block].removeprefix("aten::"),
            "made": lifetimes.when(lifetimes.born[block]),
        }
        rows.append(row)
    return rows


def _timeline(allocated: Sequence[int], reserved: Sequence[int], lifetimes: Lifetimes) -> dict[str, Any]:
    """Highest allocated and reserved bytes in each of up to ``NUM_POINTS`` equal stretches of events."""
    count = len(allocated)
    edges = [count * number // NUM_POINTS for number in range(NUM_POINTS + 1)]
    points = [
        [start, max(allocated[start:end]), max(reserved[start:end])]
        for start, end in itertools.pairwise(edges)
        if end > start
    ]
    return {"num_events": count, "points": points, "phases": _phases(lifetimes, count)}


def _phases(lifetimes: Lifetimes, count: int) -> list[list[Any]]:
    """``[first event, name]``; recomputation counts to the backward pass that it is for."""
    steps = {index: name for index, name in lifetimes.trace.marks if index < count}
    phases: Mapping[int, str] = {
        index: (Phase.BACKWARD if phase == Phase.RECOMPUTATION else Phase(phase)).name.lower()
        for index, phase in lifetimes.trace.phases
        if phase != Phase.MOVE and index < count
    }
    found: list[list[Any]] = []
    for index in sorted({*steps, *phases}):
        name = f"{lifetimes.step(index)}, {phases[index]}" if index in phases else steps[index]
        if not found or found[-1][1] != name:
            found.append([index, name])
    return found if len(found) <= MAX_PHASES else [[index, name] for index, name in steps.items()]
