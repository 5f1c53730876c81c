"""A model that runs out of memory at batch size 99, on any device."""

import torch


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def forward(self, x):
        if len(x) == 99:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"loss": self.layer(x).mean()}
