"""A user's own model: the noise predictor of a diffusion model, a U-Net with residual blocks, group norms and attention
(Ho et al. 2020, Denoising Diffusion Probabilistic Models)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """``[N, c_in, H, W]`` and the time's embedding ``[N, e]`` -> ``[N, c_out, H, W]``."""

    def __init__(self, c_in: int, c_out: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(embedding, c_out))
        self.second = nn.Sequential(nn.GroupNorm(32, c_out), nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.first(x) + self.time(time)[:, :, None, None]
        result: Tensor = self.second(hidden) + self.skip(x)
        return result


class Attention(nn.Module):
    """Self-attention over the pixels, ``[N, c, H, W] -> [N, c, H, W]``."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, 3 * self.heads, c // self.heads, h * w).transpose(2, 3).chunk(3, dim=1)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = x + self.out(mixed.transpose(2, 3).reshape(n, c, h, w))
        return result


class Block(nn.Module):
    """A residual block, and attention where asked for."""

    def __init__(self, c_in: int, c_out: int, embedding: int, heads: int) -> None:
        super().__init__()
        self.residual = Residual(c_in, c_out, embedding)
        self.attention = Attention(c_out, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        result: Tensor = self.attention(self.residual(x, time))
        return result


class DiffusionUNet(nn.Module):
    """Two blocks a level down, three up, attention at the lower levels. Sides: multiples of 2^(levels - 1)."""

    def __init__(
        self, channels: int = 3, widths: tuple[int, ...] = (128, 256, 256, 256), attention_from: int = 1
    ) -> None:
        super().__init__()
        self.width = widths[0]
        embedding = 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        kept, c = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            heads = 4 if level >= attention_from else 0
            for _ in range(2):
                self.down.append(Block(c, width, embedding, heads))
                c = width
                kept.append(c)
            if level < len(widths) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                kept.append(c)
        self.middle = Block(c, c, embedding, 4)
        for level, width in reversed(list(enumerate(widths))):
            heads = 4 if level >= attention_from else 0
            for _ in range(3):
                self.up.append(Block(c + kept.pop(), width, embedding, heads))
                c = width
            if level:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)))
        self.head = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Images ``[N, C, H, W]``, times ``[N]`` and the noise in the images -> the loss and the noise as told."""
        half = self.width // 2
        rates = torch.exp(torch.arange(half, device=noisy.device) * (-math.log(10_000) / half))
        angles = timesteps[:, None] * rates[None]
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        x = self.stem(noisy)
        kept = [x]
        for layer in self.down:
            x = layer(x, time) if isinstance(layer, Block) else layer(x)
            kept.append(x)
        x = self.middle(x, time)
        for layer in self.up:
            x = layer(torch.cat([x, kept.pop()], dim=1), time) if isinstance(layer, Block) else layer(x)
        told = self.head(x)
        return {"loss": functional.mse_loss(told, labels), "noise": told}
