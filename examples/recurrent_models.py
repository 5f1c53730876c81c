"""Recurrent models as users write them: a classifier of sequences and a tagger of packed ones."""

from __future__ import annotations

import torch
from torch import nn


class Classifier(nn.Module):
    """Embedding, GRU, and a linear layer on its last hidden state; tokens ``[batch, length]``, labels ``[batch]``."""

    def __init__(
        self, vocabulary: int = 20_000, width: int = 256, hidden: int = 512, layers: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, hidden, num_layers=layers, batch_first=True, dropout=0.2)
        self.head = nn.Linear(hidden, classes)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        _, hidden = self.gru(self.embedding(input_ids))
        return {"loss": nn.functional.cross_entropy(self.head(hidden[-1]), labels)}


class Tagger(nn.Module):
    """Embedding, bidirectional LSTM over packed sequences, a label for each token.

    Tokens and labels ``[batch, length]``; ``mask`` is true where there is a token.
    """

    def __init__(
        self, vocabulary: int = 20_000, width: int = 128, hidden: int = 256, layers: int = 2, classes: int = 32
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        lengths = mask.sum(dim=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(input_ids), lengths, batch_first=True, enforce_sorted=False
        )
        tagged, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return {"loss": nn.functional.cross_entropy(self.head(tagged).flatten(0, 1), labels.flatten())}
