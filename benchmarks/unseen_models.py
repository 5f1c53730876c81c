"""Models of users' own for the sets that are predicted before they are measured: kinds that no library here has.

Each takes the names of its spec's ``data.inputs`` and returns its loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ProjectedTagger(nn.Module):
    """Bidirectional LSTM with projections and a CTC loss: features ``[N, T, bands]``, labels ``[N, L]`` from 1 on."""

    def __init__(
        self, bands: int = 80, hidden: int = 768, projection: int = 256, layers: int = 4, symbols: int = 60
    ) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            bands, hidden, num_layers=layers, batch_first=True, bidirectional=True, proj_size=projection, dropout=0.1
        )
        self.head = nn.Linear(2 * projection, symbols)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        hidden, _ = self.lstm(features)
        return _ctc(self.head(hidden), labels)


def _ctc(logits: Tensor, labels: Tensor) -> Tensor:
    """``[N, T, symbols]`` and ``[N, L]``, no sample padded."""
    log_probabilities = logits.float().log_softmax(-1).transpose(0, 1)
    steps, samples = log_probabilities.shape[:2]
    lengths = torch.full((samples,), steps, dtype=torch.long)
    return functional.ctc_loss(
        log_probabilities, labels, lengths, torch.full((samples,), labels.shape[1], dtype=torch.long)
    )


class Translator(nn.Module):
    """GRU encoder, GRU decoder with teacher forcing, attention over the source: tokens ``[N, S]`` and ``[N, T]``."""

    def __init__(self, vocabulary: int = 24_000, width: int = 512, layers: int = 2) -> None:
        super().__init__()
        self.source = nn.Embedding(vocabulary, width)
        self.target = nn.Embedding(vocabulary, width)
        self.encoder = nn.GRU(width, width // 2, num_layers=layers, batch_first=True, bidirectional=True, dropout=0.2)
        self.decoder = nn.GRU(width, width, num_layers=layers, batch_first=True, dropout=0.2)
        self.mix = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.target.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        memory, _ = self.encoder(self.source(input_ids))
        shifted = functional.pad(labels[:, :-1], (1, 0), value=1)
        state, _ = self.decoder(self.target(shifted))
        weights = torch.bmm(state, memory.transpose(1, 2)).softmax(-1)
        mixed = torch.tanh(self.mix(torch.cat([state, torch.bmm(weights, memory)], dim=-1)))
        return {"loss": functional.cross_entropy(self.head(mixed).flatten(0, 1), labels.flatten())}


class ConformerBlock(nn.Module):
    """Half a feed-forward layer, attention, a convolution over time, the other half (Gulati et al. 2020)."""

    def __init__(self, width: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = self._feed_forward(width), self._feed_forward(width)
        self.norm_attention, self.norm_convolution, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.contract = nn.Conv1d(width, width, 1)

    @staticmethod
    def _feed_forward(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Dropout(0.1), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.before(x)
        n, t, width = x.shape
        parts = self.qkv(self.norm_attention(x)).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        hidden = functional.glu(self.expand(self.norm_convolution(x).transpose(1, 2)), dim=1)
        hidden = self.contract(functional.silu(self.batch_norm(self.depthwise(hidden))))
        x = x + hidden.transpose(1, 2)
        result: Tensor = self.norm_out(x + 0.5 * self.after(x))
        return result


class Conformer(nn.Module):
    """Speech recognition: features ``[N, T, bands]`` subsampled four times, labels ``[N, L]`` from 1 on."""

    def __init__(self, bands: int = 80, width: int = 256, layers: int = 8, heads: int = 4, symbols: int = 200) -> None:
        super().__init__()
        self.subsample = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2), nn.ReLU()
        )
        rest = ((bands - 1) // 2 - 1) // 2
        self.enter = nn.Linear(width * rest, width)
        self.layers = nn.ModuleList(ConformerBlock(width, heads, 31) for _ in range(layers))
        self.head = nn.Linear(width, symbols)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        x = self.subsample(features[:, None])
        x = self.enter(x.transpose(1, 2).flatten(2))
        for layer in self.layers:
            x = layer(x)
        return _ctc(self.head(x), labels)


class Detector(nn.Module):
    """A transformer over convolutional features that tells a fixed set of boxes (after Carion et al. 2020).

    Pixels ``[N, 3, H, W]``, classes ``[N, boxes]`` and corners ``[N, boxes, 4]``; boxes are matched in order.
    """

    def __init__(self, width: int = 256, queries: int = 100, layers: int = 4, classes: int = 80) -> None:
        super().__init__()
        stages, channels = [], 3
        for number in (32, 64, 128, 256, width):
            stages += [nn.Conv2d(channels, number, 3, 2, 1, bias=False), nn.BatchNorm2d(number), nn.ReLU(inplace=True)]
            channels = number
        self.backbone = nn.Sequential(*stages)
        self.transformer = nn.Transformer(width, 8, layers, layers, 4 * width, dropout=0.1, batch_first=True)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.positions = nn.Parameter(torch.randn(4096, width))
        self.classes, self.corners = nn.Linear(width, classes + 1), nn.Linear(width, 4)

    def forward(self, pixel_values: Tensor, labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        features = self.backbone(pixel_values).flatten(2).transpose(1, 2)
        features = features + self.positions[: features.shape[1]]
        found = self.transformer(features, self.queries.expand(len(features), -1, -1))
        count = labels.shape[1]
        loss = functional.cross_entropy(self.classes(found)[:, :count].flatten(0, 1), labels.flatten())
        return {"loss": loss + 5 * functional.l1_loss(self.corners(found)[:, :count].sigmoid(), boxes)}


class Transformer(nn.Module):
    """``torch.nn.Transformer`` as its tutorial uses it: source and target tokens, padding and causal masks."""

    def __init__(self, vocabulary: int = 20_000, width: int = 512, layers: int = 4, positions: int = 512) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.transformer = nn.Transformer(width, 8, layers, layers, 4 * width, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, vocabulary)

    def _embedded(self, ids: Tensor) -> Tensor:
        result: Tensor = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return result

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        causal = nn.Transformer.generate_square_subsequent_mask(labels.shape[1], device=labels.device)
        padding = input_ids == 0
        hidden = self.transformer(
            self._embedded(input_ids),
            self._embedded(labels),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return {"loss": functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())}


class CrossAttention(nn.Module):
    """Attention of pixels to themselves, to a text, and a gated feed-forward layer: ``[N, P, c]``."""

    def __init__(self, c: int, text: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(c) for _ in range(3))
        self.queries = nn.ModuleList(nn.Linear(c, c, bias=False) for _ in range(2))
        self.keys = nn.ModuleList(nn.Linear(width, c, bias=False) for width in (c, text))
        self.values = nn.ModuleList(nn.Linear(width, c, bias=False) for width in (c, text))
        self.outs = nn.ModuleList(nn.Linear(c, c) for _ in range(2))
        self.gated, self.out = nn.Linear(c, 8 * c), nn.Linear(4 * c, c)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for index in range(2):
            hidden = self.norms[index](x)
            other = hidden if index == 0 else text
            mixed = functional.scaled_dot_product_attention(
                self._split(self.queries[index](hidden)),
                self._split(self.keys[index](other)),
                self._split(self.values[index](other)),
            )
            x = x + self.outs[index](mixed.transpose(1, 2).flatten(2))
        hidden, gate = self.gated(self.norms[2](x)).chunk(2, dim=-1)
        result: Tensor = x + self.out(hidden * functional.gelu(gate))
        return result


class TextBlock(nn.Module):
    """A residual block of two convolutions that knows the time, then attention to the text where asked for."""

    def __init__(self, c_in: int, c_out: int, embedding: int, text: int, heads: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.second = nn.Sequential(nn.GroupNorm(32, c_out), nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.time = nn.Linear(embedding, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = CrossAttention(c_out, text, heads) if heads else None

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        hidden = self.first(x) + self.time(functional.silu(time))[:, :, None, None]
        x = self.second(hidden) + self.skip(x)
        if self.attention is not None:
            pixels = x.flatten(2).transpose(1, 2)
            x = self.attention(pixels, text).transpose(1, 2).reshape(x.shape)
        return x


class TextUNet(nn.Module):
    """The noise predictor of a latent diffusion model with attention to a text (after Rombach et al. 2022).

    Latents and noise ``[N, 4, H, W]``, times ``[N]``, texts ``[N, L, text]``.
    """

    def __init__(self, widths: tuple[int, ...] = (160, 320, 640), text: int = 768, heads: int = 8) -> None:
        super().__init__()
        embedding = 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(1, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.stem = nn.Conv2d(4, widths[0], 3, padding=1)
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        c = widths[0]
        for width in widths:
            self.down.append(TextBlock(c, width, embedding, text, heads))
            self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            c = width
        self.middle = TextBlock(c, c, embedding, text, heads)
        for width in reversed(widths):
            self.grow.append(nn.Conv2d(c, width, 3, padding=1))
            self.up.append(TextBlock(2 * width, width, embedding, text, heads))
            c = width
        self.head = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, 4, 3, padding=1))

    def forward(self, latents: Tensor, timesteps: Tensor, texts: Tensor, labels: Tensor) -> dict[str, Tensor]:
        time = self.time(timesteps[:, None])
        x, kept = self.stem(latents), []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            x = block(x, time, texts)
            kept.append(x)
            x = shrink(x)
        x = self.middle(x, time, texts)
        for block, grow in zip(self.up, self.grow, strict=True):
            x = grow(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = block(torch.cat([x, kept.pop()], dim=1), time, texts)
        return {"loss": functional.mse_loss(self.head(x), labels)}
