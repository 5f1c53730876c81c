"""A recurrent language model: an example of a user's own model that runs cuDNN's LSTM."""

from __future__ import annotations

import torch
from torch import nn


class LanguageModel(nn.Module):
    """Embedding, LSTM, projection; returns ``{"loss": ...}`` from tokens ``[batch, length]``."""

    def __init__(self, vocabulary: int = 20_000, width: int = 512, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=layers, batch_first=True, dropout=0.1 if layers > 1 else 0.0)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, _ = self.lstm(self.embedding(input_ids))
        return {"loss": nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())}
