"""The memory events of some training steps: what was allocated, how large, by which operator, and when it was freed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


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
    optional: set[int] = field(default_factory=set)
    """Blocks that the program can do without where they are refused."""
    marks: list[tuple[int, str]] = field(default_factory=list)
    """``(index into events, name)``: where a phase begins."""
    doubts: list[Doubt] = field(default_factory=list)
    """Where what a kernel allocates is not known exactly, in the order of the calls."""

    def allocate(self, size: int | Formula, operator: str) -> int:
        """A new block of ``size`` bytes; returns its number."""
        block = len(self.sizes)
        if isinstance(size, Formula):
            self.formulas[block] = size
            size = size.size()
        self.sizes.append(size)
        self.operators.append(operator)
        self.events.append(block)
        return block

    def allocate_again(self, block: int) -> int:
        """A new block like ``block``; returns its number."""
        again = self.allocate(self.formulas.get(block, self.sizes[block]), self.operators[block])
        if block in self.optional:
            self.optional.add(again)
        return again

    def free(self, block: int) -> None:
        self.events.append(~block)

    def mark(self, name: str) -> None:
        self.marks.append((len(self.events), name))
