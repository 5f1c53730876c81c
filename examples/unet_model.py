"""A user's own model: the classic U-Net for semantic segmentation (Ronneberger et al. 2015; with padding, batch norm).

With ``c=64`` and 21 classes it has 31.04 million parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each with batch norm and ReLU: ``[N, c_in, H, W] -> [N, c_out, H, W]``."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_out, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(c_out, c_out, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        )


class Up(nn.Module):
    """Double the resolution and join what the way down left: ``[N, 2c, H, W], [N, c, 2H, 2W] -> [N, c, 2H, 2W]``."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * c, c, kernel_size=2, stride=2)
        self.conv = DoubleConv(2 * c, c)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        joined: Tensor = self.conv(torch.cat([skip, self.up(below)], dim=1))
        return joined


class UNet(nn.Module):
    """Four levels down, four up. The image's height and width must be multiples of 16."""

    def __init__(self, c: int = 64, channels: int = 3, classes: int = 21) -> None:
        super().__init__()
        self.stem = DoubleConv(channels, c)
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), DoubleConv(c * 2**level, c * 2 ** (level + 1))) for level in range(4)
        )
        self.up = nn.ModuleList(Up(c * 2**level) for level in reversed(range(4)))
        self.head = nn.Conv2d(c, classes, kernel_size=1)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Pixels ``[N, 3, H, W]`` and their classes ``[N, H, W]`` -> the loss, and logits ``[N, classes, H, W]``."""
        features = [self.stem(pixel_values)]
        for down in self.down:
            features.append(down(features[-1]))
        x = features.pop()
        for up in self.up:
            x = up(x, features.pop())
        logits = self.head(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}
