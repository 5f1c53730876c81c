"""What a user's module may hold: models, losses and steps, good and bad."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import functional

Batch = Mapping[str, torch.Tensor]


class Regression(torch.nn.Module):
    """A linear model; what it returns is ``returns``: the outputs, their loss, or the loss under that name."""

    def __init__(self, returns: str = "outputs", frozen: bool = False) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)
        self.returns = returns
        self.requires_grad_(not frozen)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        outputs = self.linear(x)
        loss = functional.mse_loss(outputs.float(), y.float())
        return {"outputs": outputs, "scalar": loss, "mapping": {"loss": loss}, "constant": loss.detach()}[self.returns]


class Checkpointed(Regression):
    """A user's own model with timm's switch."""

    checkpointed = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointed = enable


def loss(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    return functional.mse_loss(outputs.float(), batch["y"].float())


def unreduced(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    return outputs - batch["y"]


def nothing(outputs: torch.Tensor, batch: Batch) -> None:
    return None


CALLS: list[dict[str, Any]] = []


def step(
    model: Callable[..., Any],
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    optimizer.zero_grad()
    with autocast():
        value = loss(model(**batch), batch)
    torch.autograd.backward(scaler.scale(value))
    scaler.step(optimizer)
    scaler.update()
    CALLS.append({"batch": dict(batch), "optimizer": optimizer, "scaled": scaler.is_enabled()})


def not_a_model() -> str:
    return "no"


CONSTANT = 3


class Blocks(torch.nn.Module):
    """Four blocks in a Sequential; remembers in which modes it was called. ``breaks``: ends the compiler's graph."""

    def __init__(self, width: int = 8, breaks: bool = False) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, width)
        self.blocks = torch.nn.Sequential(*(_Block(width) for _ in range(4)))
        self.last = torch.nn.Linear(width, 2)
        self.breaks = breaks
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.calls.append((self.training, torch.is_grad_enabled()))
        hidden = self.blocks(self.first(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return functional.mse_loss(self.last(hidden).float(), y.float())


class _Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        grown: torch.Tensor = hidden + self.dropout(functional.gelu(self.linear(hidden)))
        return grown


class GreedyRank(torch.nn.Module):
    """Takes 64 TiB on the second rank alone, when the batch has four samples or more."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) >= 4 and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            torch.empty(1 << 46, dtype=torch.uint8, device=x.device)
        return self.linear(x).square().mean()
