"""A small model, on any device."""

import torch


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def forward(self, x):
        return {"loss": self.layer(x).mean()}


class Overflowing(Small):
    """Its gradients overflow while they are scaled by more than ``most``."""

    def __init__(self, most):
        super().__init__()
        self.factor = torch.finfo(torch.float32).max / most

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return {"loss": self.layer.weight.sum() * self.factor}
