"""Small models of users, each odd in its own way."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy
import torch
from torch.nn import functional


class Classifier(torch.nn.Module):
    """A linear classifier of 8 features that returns its loss."""

    def __init__(self, classes: int = 4, branch: bool = False, unique: bool = False, masked: bool = False) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, classes)
        self.branch, self.unique, self.masked = branch, unique, masked
        if masked:
            self.offset = torch.nn.Parameter(torch.zeros(classes))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.linear(features)
        if self.branch and logits.sum() > 0:  # depends on the weights
            logits = logits * 2
        if self.unique:
            logits = logits + logits.detach().unique().numel()
        if self.masked:  # writes where a known mask says: the gradient of what is written has the mask's count of rows
            logits = logits.clone()
            logits[labels > 0] = self.offset
        if labels.max().item() < 0:  # follows from random integers alone
            raise ValueError("negative labels")
        return functional.cross_entropy(logits, labels)


class Tied(torch.nn.Module):
    """A language model of one weight, which embeds and projects."""

    def __init__(self, tokens: int = 100, width: int = 16) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(tokens, width)
        self.project = torch.nn.Linear(width, tokens, bias=False)
        self.project.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.project(self.embed(input_ids))
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


_losses: list[torch.Tensor] = []


def logging_step(model: Any, batch: Any, optimizer: Any, scaler: Any, autocast: Any) -> None:
    """A step that keeps the loss of every other one on the device."""
    del scaler, autocast
    optimizer.zero_grad()
    loss = model(**batch)
    loss.backward()
    optimizer.step()
    if len(_losses) % 2:
        _losses.append(loss.detach())


def reading_step(
    model: Callable[..., torch.Tensor],
    batch: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: Callable[[], AbstractContextManager[object]],
) -> None:
    """A training step that keeps the loss for a log, and skips the update where it is not finite."""
    optimizer.zero_grad()
    with autocast():
        loss = model(**batch)
    torch.autograd.backward(loss)
    LOG.append(loss.item())
    if not torch.isnan(loss):
        optimizer.step()


LOG: list[float] = []


class _Doubled(torch.autograd.Function):
    """Twice its input; keeps a copy of it for the backward pass, which no formula of PyTorch would."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values.clone())
        return values * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (values,) = ctx.saved_tensors
        return gradients[0] * 2 + values * 0


class Odd(torch.nn.Module):
    """A buffer that is larger than all weights together, and ``num_doubled`` calls of an autograd function of its
    own."""

    def __init__(self, num_doubled: int = 0) -> None:
        super().__init__()
        self.num_doubled = num_doubled
        self.linear = torch.nn.Linear(8, 4)
        self.table: torch.Tensor
        self.register_buffer("table", torch.zeros(1 << 18))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = features
        for _ in range(self.num_doubled):
            hidden = _Doubled.apply(hidden + self.linear.weight[0, 0])  # type: ignore[no-untyped-call]
        return functional.cross_entropy(self.linear(hidden) + self.table[0], labels)


class Random(Classifier):
    """Makes tensors of sizes that the host draws at random, and in the order of a set of names: neither is the same in
    two processes that are not told to."""

    def __init__(self) -> None:
        super().__init__()
        self.built = random.randrange(1, 1 << 20)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        first_name = next(iter({f"name {number}" for number in range(1000)}))
        counts = [
            self.built,
            random.randrange(1, 1 << 20),
            int(numpy.random.randint(1, 1 << 20)),
            (1 << 20) + 512 * int(first_name.split()[1]),
        ]
        kept = [torch.ones(count, device=features.device, requires_grad=True) for count in counts]
        return super().forward(features, labels) + sum(item.sum() for item in kept)


class Blind(Classifier):
    """Refuses to be built where CUDA shows it a GPU, whatever the machine has."""

    def __init__(self) -> None:
        super().__init__()
        if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            raise RuntimeError("a GPU is visible where traces are made")
