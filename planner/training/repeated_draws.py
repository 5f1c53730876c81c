"""Random weights in a fraction of the time: a block of values is drawn, and repeated.

What a step takes does not depend on the values of weights. Drawing each one, on the one thread that a process which
forks may compute on, is nearly all that building a model takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

BLOCK_VALUES = 65_521
"""Prime, so that the rows of a matrix differ: none begins where another did in the block, unless it is as wide."""

_DRAWS = ("normal_", "uniform_")
"""What torch.nn.init draws by: the others work on what these have drawn."""


@contextmanager
def repeated_draws() -> Iterator[None]:
    """Within it ``Tensor.normal_`` and ``Tensor.uniform_`` draw ``BLOCK_VALUES`` values and repeat them through a
    larger tensor. Those that are given a generator, or that are not on the CPU, are drawn as ever."""
    for name in _DRAWS:
        setattr(torch.Tensor, name, _repeating(getattr(torch._C.TensorBase, name)))
    try:
        yield
    finally:
        for name in _DRAWS:
            delattr(torch.Tensor, name)  # uncovers the one of TensorBase


def _repeating(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(draw)
    def drawn(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        refused = self.requires_grad and torch.is_grad_enabled()  # torch has words for that
        plain = type(self) in (torch.Tensor, torch.nn.Parameter) and self.device.type == "cpu" and self.is_contiguous()
        if refused or not plain or self.numel() <= BLOCK_VALUES or options.get("generator") is not None:
            return draw(self, *args, **options)
        first, *others = self.detach().view(-1).split(BLOCK_VALUES)  # type: ignore[no-untyped-call]
        draw(first, *args, **options)
        for other in others:
            other.copy_(first[: other.numel()])
        return self

    return drawn
