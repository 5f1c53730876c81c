"""The order in which cuDNN's recurrent layers allocate: ``_cudnn_rnn`` and ``_cudnn_rnn_backward`` in
aten/src/ATen/native/cudnn/RNN.cpp, held against the recorded traces of ``measurements/h200/recurrent.json.gz``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from planner.virtual.architecture import Architecture
from planner.virtual.cudnn_rnn import Run, reserve_bytes, workspace_bytes, workspace_doubt_bytes
from planner.virtual.recurrent import run_of
from planner.virtual.rules import Call, Step, bytes_of, rule
from planner.virtual.trace import Formula


@rule("_cudnn_rnn")
def forward(call: Call, architecture: Architecture) -> Iterator[Step]:
    """Input made contiguous, results, workspace, reserve; all but the results go when the call ends."""
    inputs, _, _, buffer, _, cx, *options = call.args
    run = run_of(architecture, inputs, *options)
    train = options[6]
    names = ["output", "hy", *(["cy"] if cx is not None else []), *(["reserve"] if train else [])]
    names += ["buffer"] if buffer is None else []
    source = _by_step(inputs, options)
    if not source.is_contiguous():
        yield "temporary", bytes_of(source)
    for name in ("output", "hy", "cy", "buffer"):
        if name in names:
            yield "output", names.index(name)
    yield from _workspace(run, training=train, forward=True)
    if train:
        yield "size", _formula(reserve_bytes, run)
        yield "output", names.index("reserve")


@rule("_cudnn_rnn_backward")
def backward(call: Call, architecture: Architecture) -> Iterator[Step]:
    """Gradients that nobody gave become zeros; then one call for input and states, and one for the weights."""
    inputs, _, stride, buffer, hx, cx, output, grad_output, grad_hy, grad_cy, *options = call.args
    run = run_of(architecture, inputs, *options)
    results = iter(range(len(call.sizes)))
    for grad, like in ((grad_output, output), (grad_hy, hx), (grad_cy, cx)):
        if grad is None and like is not None:
            yield "temporary", bytes_of(like)
    source = _by_step(inputs, options)
    swaps = source is not inputs
    copied = 0 if source.is_contiguous() else 1
    for _ in range(copied):
        yield "temporary", bytes_of(source)
    # Zeros were made for the output as the caller sees it.
    contiguous = not swaps if grad_output is None else _by_step(grad_output, options).is_contiguous()
    states = [grad for grad in (grad_hy, grad_cy) if grad is not None and not grad.is_contiguous()]
    if not contiguous:
        yield "temporary", bytes_of(output)
    yield "output", next(results)
    for grad in states:
        yield "temporary", bytes_of(grad)
    for _ in range(1 if cx is None else 2):
        yield "output", next(results)
    yield from _workspace(run, training=True, forward=False)
    yield from [("free", 0)] * (1 + len(states) + (not contiguous) + copied)
    if options[-1][3]:
        for _ in range(copied):
            yield "temporary", bytes_of(source)
        if stride >= 4:
            yield "output", next(results)
        else:  # cuDNN's buffer has biases that the module lacks: the gradients are copied out of it
            yield "temporary", bytes_of(buffer)
        yield from _workspace(run, training=True, forward=False)
        for index in results:
            yield "output", index


def _workspace(run: Run, *, training: bool, forward: bool) -> Iterator[Step]:
    yield "temporary", _formula(partial(workspace_bytes, training=training, forward=forward), run)
    yield "doubt", _formula(partial(workspace_doubt_bytes, training=training, forward=forward), run)


def _formula(size_of: Callable[[Run], int], run: Run) -> Formula:
    return Formula(partial(_sized, size_of, run), (run.steps, run.batch, run.tokens))


def _sized(size_of: Callable[[Run], int], run: Run, steps: int, batch: int, tokens: int) -> int:
    return size_of(replace(run, steps=steps, batch=batch, tokens=tokens))


def _by_step(tensor: torch.Tensor, options: Sequence[Any]) -> torch.Tensor:
    """``[steps, batch, ...]``: the order in which cuDNN wants it (``options``: from ``mode`` on)."""
    batch_first, batch_sizes = options[4], options[8]
    return tensor.transpose(0, 1) if batch_first and not batch_sizes else tensor
