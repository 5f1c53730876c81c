"""A model with a defect that many training loops have: something on the GPU is kept at every step."""

from __future__ import annotations

import torch


class Leaking(torch.nn.Module):
    """A small network that keeps 12 MiB of every forward pass, as a list of outputs for a later plot would."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)
        )
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.kept.append(torch.zeros(12 << 20, dtype=torch.uint8, device=x.device))
        return torch.nn.functional.mse_loss(self.layers(x), y)
