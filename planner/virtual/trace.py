"""The memory events of some training steps: what was allocated, how large, by which operator, and when it was freed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Trace:
    """Events in order. ``events[i] >= 0``: block number ``events[i]`` is allocated; ``-1 - n``: block ``n`` is freed."""

    events: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Requested bytes of each block, by block number."""
    operators: list[str] = field(default_factory=list)
    """The operator that allocated each block."""
    marks: list[tuple[int, str]] = field(default_factory=list)
    """``(index into events, name)``: where a phase begins."""

    def allocate(self, size: int, operator: str) -> int:
        block = len(self.sizes)
        self.sizes.append(size)
        self.operators.append(operator)
        self.events.append(block)
        return block

    def free(self, block: int) -> None:
        self.events.append(-1 - block)

    def mark(self, name: str) -> None:
        self.marks.append((len(self.events), name))
