"""Recurrent layers: cuDNN runs a whole LSTM or GRU as one kernel whose memory is not modelled, and the prediction has
to say so.

On the virtual device the layers run cell by cell (PyTorch's own decomposition), which keeps other tensors than cuDNN's
reserve and workspace.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from planner.virtual.backend import DISPATCH_KEY, NAME, library
from planner.virtual.trace import Formula

_VALUES_PER_STATE = 24
"""How many values of one hidden state the two ways of running may differ by: four gates, the cell and the output, kept
and in work, twice."""


def install(doubt: Callable[[str, Formula], None]) -> None:
    """Route the recurrent operators of the ``vgpu`` backend through ``doubt(operator, bytes that it may be off
    by)``."""
    kernels = library("Autograd" + DISPATCH_KEY)
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        operator = getattr(torch.ops.aten, name).input
        kernels.impl(operator, _doubted(name, operator, doubt))


def _doubted(name: str, operator: Any, doubt: Callable[[str, Formula], None]) -> Any:
    def run(inputs: torch.Tensor, *args: Any) -> Any:
        weights: list[torch.Tensor] = args[1]
        hidden = weights[1].shape[-1]
        layers = max(1, len(weights) // 4)
        steps = inputs.numel() // inputs.shape[-1]  # time steps of all samples
        weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        per_step = _VALUES_PER_STATE * hidden * layers * inputs.element_size()
        if inputs.device.type == NAME:
            doubt(name, Formula(partial(_doubt_bytes, per_step, 2 * weight_bytes), (steps,)))
        return operator.decompose(inputs, *args)

    return run


def _doubt_bytes(per_step: int, constant: int, steps: int) -> int:
    return per_step * steps + constant
