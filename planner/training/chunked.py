"""The loss of a language model in chunks of tokens: the logits of all tokens never exist together."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from planner.errors import InvalidSpec
from planner.specs.model import ModelSource, Spec
from planner.training.data import Batch

NUM_CHUNKS = 8
"""As torchtune's CEWithChunkedOutputLoss has it by default. Along the sequence, so that their number does not depend on
the batch size."""
TASKS = ("causal-lm", "masked-lm")
_IGNORED = -100  # transformers' label of a token that counts for nothing (loss/loss_utils.py)
_CHANGED = "needs logits as the output layer returns them, and this model changes them afterwards"


class ChunkedLoss:
    """The model's hidden states, then its output layer and the cross-entropy for each chunk of tokens, both worked out
    again in the backward pass (``torch.utils.checkpoint``).

    The model keeps its own forward pass up to its output layer, which hands its input through: what ``model(...)``
    returns as logits are hidden states from then on. Raises ``InvalidSpec`` for a model that has no output embeddings,
    or a task whose loss is not that of its tokens.
    """

    def __init__(self, spec: Spec, model: torch.nn.Module) -> None:
        if spec.model.source is not ModelSource.TRANSFORMERS or spec.model.task not in TASKS:
            _refuse(f"is for transformers models with the task {' or '.join(TASKS)}")
        for name in ("loss", "step"):
            if getattr(spec.train, name) is not None:
                _refuse(f"has no place beside train.{name}, which works the loss out itself")
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        if type(head) is not torch.nn.Linear:
            what = "no output embeddings" if head is None else f"{type(head).__name__} as its output embeddings"
            _refuse(f"needs a linear output layer, and {type(model).__name__} has {what}")
        if getattr(model.config, "final_logit_softcapping", None) is not None:
            _refuse(_CHANGED)
        self.is_causal = spec.model.task == "causal-lm"
        self.head: torch.nn.Linear = head
        self._handed: torch.Tensor | None = None
        head.forward = self._hand_through

    def __call__(self, forward: Any, batch: Batch) -> torch.Tensor:
        """The scalar loss of ``batch``, the mean over its labelled tokens."""
        labels = batch["labels"]
        if self.is_causal:  # token t is predicted from those before it, as ForCausalLMLoss of transformers shifts it
            labels = functional.pad(labels, (0, 1), value=_IGNORED)[:, 1:]
        outputs = forward(**{name: item for name, item in batch.items() if name != "labels"})
        hidden, handed, self._handed = outputs.logits, self._handed, None
        if handed is not None and hidden is not handed:  # compiled, it is not handed over
            _refuse(_CHANGED)
        if hidden.shape != (*labels.shape, self.head.in_features):
            _refuse(f"needs hidden states for each label, not of shape {list(hidden.shape)}")
        if getattr(outputs, "aux_loss", None) is not None:
            _refuse("is the loss of the tokens alone, and this model has a loss of its router beside it")
        count = (labels != _IGNORED).sum()
        total: torch.Tensor | float = 0.0
        for states, wanted in zip(hidden.chunk(NUM_CHUNKS, 1), labels.chunk(NUM_CHUNKS, 1), strict=True):
            total = total + checkpoint(self._sum, states, wanted, use_reentrant=False)
        assert isinstance(total, torch.Tensor), "a sequence has at least one token"
        return total / count

    def _hand_through(self, hidden: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self._handed = hidden
        return hidden

    def _sum(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(hidden, self.head.weight, self.head.bias).float()
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="sum")


def _refuse(why: str) -> None:
    raise InvalidSpec(f"chunked {why}", field="variants.loss", suggestion="default")
