"""The memory events of some training steps: what was allocated, how large, by which operator, and when it was freed."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise


class Purpose(IntEnum):
    """What a block is there for, as far as it is known when it is made or soon after; the rest its lifetime tells."""

    TENSOR = 0
    WORKSPACE = 1
    """A kernel's own: no tensor of the program."""
    PARAMETER = 2
    BUFFER = 3
    GRADIENT = 4
    OPTIMIZER_STATE = 5
    INPUT = 6
    CAST_PARAMETER = 7
    """A copy in autocast's lower precision."""
    AVERAGED_PARAMETER = 8
    """Of an exponential moving average."""


class Phase(IntEnum):
    """Which part of training runs; a step goes through them in turn."""

    MOVE = 0
    FORWARD = 1
    BACKWARD = 2
    RECOMPUTATION = 3
    """A checkpointed forward, again, within the backward pass."""
    UPDATE = 4
    """From the end of the backward pass on: unscaling, clipping, the optimizer's step."""


@dataclass(frozen=True, slots=True)
class Formula:
    """A temporary whose size is not affine in the batch size, though the numbers that it follows from are.

    A kernel's rule gives its temporaries in this form even where they are empty, so that the order of events is the
    same at every batch size.
    """

    function: Callable[..., int]
    """Of a module, or a ``functools.partial`` of one: a trace is pickled on its way to the process that replays it. A
    closure could not be, and would keep the tensors alive that it holds."""
    numbers: tuple[int, ...]
    """Dimensions and strides: each affine in the batch size."""

    def size(self) -> int:
        """Bytes."""
        return self.function(*self.numbers)

    def between(self, other: Formula, low: int, high: int, batch_size: int) -> int:
        """Bytes at ``batch_size``, where this formula was seen at batch size ``low`` and ``other`` at ``high``."""
        return self.function(
            *(
                a + (b - a) * (batch_size - low) // (high - low)
                for a, b in zip(self.numbers, other.numbers, strict=True)
            )
        )


@dataclass(frozen=True, slots=True)
class Workspace(Formula):
    """The workspace of a convolution's first plan; where it is refused, another plan without one is taken."""

    convolution: Hashable
    """Equal for equal convolutions: they share a plan."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """One call of an operator whose temporary memory may be off."""

    operator: str
    error: Formula
    """The most bytes that it may be off by."""
    modelled: bool
    """Whether a rule gives its usual size; if not, the operator is named to the user."""


@dataclass(slots=True)
class Trace:
    """Events in order, as ``planner.allocator.Events`` has them: ``i`` allocates block ``i``, ``~i`` frees it."""

    events: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Requested bytes of each block, by block number."""
    operators: list[str] = field(default_factory=list)
    """The operator that allocated each block."""
    formulas: dict[int, Formula] = field(default_factory=dict)
    """Of the blocks whose size follows from a formula."""
    convolutions: dict[int, int] = field(default_factory=dict)
    """Of the blocks that are workspaces: which convolution's."""
    marks: list[tuple[int, str]] = field(default_factory=list)
    """``(index into events, name)``: where a phase begins."""
    doubts: list[Doubt] = field(default_factory=list)
    """Where what a kernel allocates is not known exactly, in the order of the calls."""
    skippable_update: int | None = None
    """The event with which the optimizer's first step begins, where a gradient scaler may skip it; else ``None``."""
    successors: dict[int, int] | None = None
    """Of the last step, as ``planner.allocator.Events`` has them."""
    in_cycles: bool = False
    """Whether half of what the last step left beyond what it found is for Python's garbage collector to free."""
    library_bytes: dict[int, int] = field(default_factory=dict)
    """As ``planner.allocator.Events`` has them."""
    driver_bytes: dict[int, list[int]] = field(default_factory=dict)
    """As ``planner.allocator.Events`` has them."""
    first_kernel: int = 0
    """As ``planner.allocator.Events`` has it."""
    notes: list[str] = field(default_factory=list)
    """What was assumed, in sentences that the user must see."""
    owners: list[tuple[str, str]] = field(default_factory=lambda: [("", "")])
    """``(module, tensor)``: the path of a module, and the name of its parameter, buffer or state; the first is outside
    any module."""
    block_owners: array[int] = field(default_factory=lambda: array("i"))
    """Of each block, into ``owners``."""
    purposes: bytearray = field(default_factory=bytearray)
    """The ``Purpose`` of each block."""
    phases: list[tuple[int, int]] = field(default_factory=list)
    """``(index into events, Phase)``: where each part of a step begins."""

    def take(self, sizes: Iterable[int]) -> None:
        """The driver takes so many bytes for itself now, one after another."""
        for size in sizes:
            self.driver_bytes.setdefault(len(self.events), []).append(size)

    def allocate(self, size: int | Formula, operator: str, owner: int = 0, purpose: Purpose = Purpose.TENSOR) -> int:
        """A new block of ``size`` bytes; returns its number."""
        block = len(self.sizes)
        if isinstance(size, Formula):
            self.formulas[block] = size
            size = size.size()
        self.sizes.append(size)
        self.operators.append(operator)
        self.block_owners.append(owner)
        self.purposes.append(purpose)
        self.events.append(block)
        return block

    def allocate_again(self, block: int) -> int:
        """A new block like ``block``; returns its number."""
        size, operator = self.formulas.get(block, self.sizes[block]), self.operators[block]
        again = self.allocate(size, operator, self.block_owners[block], Purpose(self.purposes[block]))
        if block in self.convolutions:
            self.convolutions[again] = self.convolutions[block]
        return again

    def free(self, block: int) -> None:
        self.events.append(~block)

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Of each training step: the index of its first event and of the one after its last."""
        marks = [*self.marks, (len(self.events), "end")]
        return [(start, end) for (start, name), (end, _) in pairwise(marks) if name.startswith("step")]

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def mark(self, name: str) -> None:
        self.marks.append((len(self.events), name))
