"""The worst case of a mixture of experts: every token goes to the same experts."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from planner.errors import InvalidSpec

_TOPK = (torch.topk, torch.Tensor.topk)
_ARGMAX = (torch.argmax, torch.Tensor.argmax)
_MAX = (torch.max, torch.Tensor.max)

NOTE = "experts: every token is assumed to go to the same ones (train.routing: worst)"


class WorstRouting(TorchFunctionMode):
    """Routers choose by ``topk``, ``argmax`` or ``max`` of what they score: here all of them choose the first ones.

    On the real GPU and the virtual one alike, so what is predicted is what is run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TOPK and args and args[0].is_floating_point():
            self.seen = True
            return _first(*args, **kwargs)
        if func in _ARGMAX and args and args[0].is_floating_point():
            self.seen = True
            return torch.zeros_like(func(*args, **kwargs))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if func in _MAX and isinstance(dim, int) and args[0].is_floating_point():
            self.seen = True
            found = func(*args, **kwargs)
            return type(found)((found.values, torch.zeros_like(found.indices)))
        return func(*args, **kwargs)

    def check(self) -> None:
        """Raises ``InvalidSpec`` where nothing was chosen."""
        if not self.seen:
            message = "the model chooses no experts (it calls neither topk nor argmax nor max): there is no worst case"
            raise InvalidSpec(message, field="train.routing", suggestion="balanced")


def _first(
    scores: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> torch.return_types.topk:
    """``torch.topk`` as if the first ``k`` entries were the largest."""
    shape = [1] * scores.dim()
    shape[dim] = k
    sizes = list(scores.shape)
    sizes[dim] = k
    indices = torch.arange(k, device=scores.device).view(shape).expand(sizes).contiguous()
    return torch.return_types.topk((scores.gather(dim, indices), indices))
