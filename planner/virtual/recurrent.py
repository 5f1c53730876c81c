"""Recurrent layers as CUDA runs them: a whole LSTM, GRU or RNN is one call of cuDNN, over weights in one buffer.

On a device without cuDNN PyTorch would run them cell by cell. Here the operators are routed to ``aten._cudnn_rnn``, as
``_cudnn_impl`` in aten/src/ATen/native/cudnn/RNN.cpp does, and PyTorch's own autograd does the rest. The sizes that
cuDNN answers are those of ``planner.virtual.cudnn_rnn``, the order of the allocations is in
``planner.virtual.recurrent_kernels``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from planner.virtual.architecture import Architecture
from planner.virtual.backend import DISPATCH_KEY, NAME, library
from planner.virtual.cudnn_rnn import Cell, Layers, Run, reserve_bytes
from planner.virtual.packing import known_lengths

aten = torch.ops.aten

_CELLS = {"rnn_relu": Cell.RNN_RELU, "rnn_tanh": Cell.RNN_TANH, "lstm": Cell.LSTM, "gru": Cell.GRU}
_FLATTENED = (torch.float16, torch.float32, torch.float64)
"""``CUDNN_TENSOR_DTYPES`` in torch/backends/cudnn/__init__.py: weights in bfloat16 are copied at every call instead."""
AUTOCAST_DTYPE = torch.float16
"""Recurrent layers run in float16 whatever the dtype of autocast: ``_cudnn_rnn_cast_reflatten`` in
aten/src/ATen/cudnn/AutocastRNN.cpp names it; a recorded trace under bf16 shows the casts to and fro."""


def install() -> None:
    """Route the recurrent operators of the ``vgpu`` backend to cuDNN's."""
    kernels = library("Autograd" + DISPATCH_KEY)
    for operator, kernel in ROUTES.items():
        kernels.impl(operator, kernel)
    flatten: Callable[[torch.nn.RNNBase], None] = torch.nn.RNNBase.flatten_parameters

    def flatten_parameters(self: torch.nn.RNNBase) -> None:
        weights: list[Any] = self._flat_weights
        if weights and all(isinstance(weight, torch.Tensor) and weight.device.type == NAME for weight in weights):
            _flatten_parameters(self, weights)
        else:
            flatten(self)

    torch.nn.RNNBase.flatten_parameters = flatten_parameters  # type: ignore[method-assign]


def _padded(cell: Cell) -> Any:
    """``lstm.input`` and its like: ``[steps, batch, input]``, or with the first two swapped for ``batch_first``."""

    def run(
        inputs: torch.Tensor, hidden: Any, weights: list[torch.Tensor], has_biases: bool, num_layers: int,
        dropout: float, train: bool, bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        return _run(
            cell, inputs, hidden, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first, []
        )

    return run


def _packed(cell: Cell) -> Any:
    """``lstm.data`` and its like: packed sequences ``[tokens, input]`` and how many have each step."""

    def run(
        inputs: torch.Tensor, batch_sizes: torch.Tensor, hidden: Any, weights: list[torch.Tensor], has_biases: bool,
        num_layers: int, dropout: float, train: bool, bidirectional: bool,
    ) -> Any:  # fmt: skip
        sizes = known_lengths(batch_sizes)
        return _run(cell, inputs, hidden, weights, has_biases, num_layers, dropout, train, bidirectional, False, sizes)

    return run


def _run(
    cell: Cell, inputs: torch.Tensor, hidden: Any, weights: list[torch.Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool, batch_sizes: list[int],
) -> Any:  # fmt: skip
    """``_cudnn_impl``: output, last hidden state and, for an LSTM, last cell state."""
    hx, cx = hidden if cell is Cell.LSTM else (hidden, None)
    hidden_size, projection = hx.shape[2], 0
    if cx is not None and cx.shape[2] != hx.shape[2]:
        hidden_size, projection = cx.shape[2], hx.shape[2]
    stride = (4 if has_biases else 2) + bool(projection)
    layers = Layers(cell, inputs.shape[-1], hidden_size, projection, num_layers, 1 + bidirectional)
    buffer = _weight_buffer(weights, layers)
    state = None
    if train and dropout > 0:  # made by the first call in the process; which that is, ``Kernels`` knows
        state = aten._cudnn_init_dropout_state(dropout, train, 0, dtype=torch.uint8, device=inputs.device)
    outputs = aten._cudnn_rnn(
        inputs, weights, stride, buffer, hx, cx, int(cell), hidden_size, projection, num_layers, batch_first, dropout,
        train, bidirectional, batch_sizes, state,
    )  # fmt: skip
    return outputs[:3] if cell is Cell.LSTM else outputs[:2]


ROUTES: dict[Any, Callable[..., Any]] = {
    **{getattr(aten, name).input: _padded(cell) for name, cell in _CELLS.items()},
    **{getattr(aten, name).data: _packed(cell) for name, cell in _CELLS.items()},
}
"""The operators that are routed, which in inference mode reach the recorder whole."""


def _weight_buffer(weights: Sequence[torch.Tensor], layers: Layers) -> torch.Tensor | None:
    """``try_get_weight_buf``: the buffer that all weights are views of, in cuDNN's order; ``None`` where they are
    not."""
    first = weights[0]
    storage = first.untyped_storage()
    if storage.nbytes() < layers.num_weights * first.element_size():
        return None
    offsets = _offsets(layers, has_biases=len(weights) // layers.cells >= 4)
    for weight, offset in zip(weights, offsets, strict=True):
        if weight.untyped_storage()._cdata != storage._cdata or weight.storage_offset() != offset:
            return None
    with torch.no_grad():
        return first.detach().as_strided((layers.num_weights,), (1,), 0)


def _offsets(layers: Layers, has_biases: bool) -> list[int]:
    """Where in cuDNN's buffer each weight lies, in the order of the module's weights."""
    return [offset for offset, size in layers.places(has_biases)]


def _flatten_parameters(module: torch.nn.RNNBase, weights: list[torch.Tensor]) -> None:
    """``RNNBase.flatten_parameters`` and ``_cudnn_rnn_flatten_weight``: one zeroed buffer, of which the weights become
    views.

    Parameters that alias are left alone, and so is a dtype that ``torch.backends.cudnn.is_acceptable`` refuses.
    """
    first = weights[0]
    if first.dtype not in _FLATTENED or any(weight.dtype is not first.dtype for weight in weights):
        return
    if len({(weight.untyped_storage()._cdata, weight.storage_offset()) for weight in weights}) != len(weights):
        return
    layers = Layers(
        Cell[module.mode], module.input_size, module.hidden_size, module.proj_size, module.num_layers,
        1 + module.bidirectional,
    )  # fmt: skip
    with torch.no_grad():
        buffer = torch.zeros(layers.num_weights, dtype=first.dtype, device=first.device)
        for weight, (offset, size) in zip(weights, layers.places(module.bias), strict=True):
            weight.set_(buffer.narrow(0, offset, size).view(weight.shape))  # type: ignore[call-overload]


def cast_and_flatten(cast: Callable[[Any, torch.dtype], Any]) -> Callable[..., Any]:
    """``_cudnn_rnn`` under autocast (``_cudnn_rnn_cast_reflatten``), which casts by ``cast``; its weights go to a new
    buffer at every call, and past the cache."""

    def kernel(
        inputs: torch.Tensor, weights: list[torch.Tensor], stride: int, buffer: torch.Tensor | None, hx: torch.Tensor,
        cx: torch.Tensor | None, mode: int, hidden_size: int, projection: int, num_layers: int, batch_first: bool,
        dropout: float, train: bool, bidirectional: bool, *rest: Any,
    ) -> Any:  # fmt: skip
        source = weights[0] if buffer is None else buffer
        if source.dtype in (torch.float32, torch.bfloat16):
            layers = Layers(Cell(mode), inputs.shape[-1], hidden_size, projection, num_layers, 1 + bidirectional)
            buffer = torch.zeros(layers.num_weights, dtype=AUTOCAST_DTYPE, device=inputs.device)
            weights = [
                _copied(weight, buffer, offset, size)
                for weight, (offset, size) in zip(weights, layers.places(stride >= 4), strict=True)
            ]
        cx = cast(cx, AUTOCAST_DTYPE)
        hx = cast(hx, AUTOCAST_DTYPE)
        inputs = cast(inputs, AUTOCAST_DTYPE)
        return aten._cudnn_rnn(
            inputs, weights, stride, buffer, hx, cx, mode, hidden_size, projection, num_layers, batch_first, dropout,
            train, bidirectional, *rest,
        )  # fmt: skip

    return kernel


def _copied(weight: torch.Tensor, buffer: torch.Tensor, offset: int, size: int) -> torch.Tensor:
    """A copy of ``weight`` in ``buffer``, through which gradients flow, though not as of a view of the buffer."""
    copied: torch.Tensor = buffer.narrow(0, offset, size).view(size, 1).detach().copy_(weight.view(size, 1))
    return copied


def dropout_state(*_: Any, device: torch.device, **__: Any) -> torch.Tensor:
    """Stands for what ``_cudnn_init_dropout_state`` returns."""
    return torch.empty(0, dtype=torch.uint8, device=device)


def forward_outputs(
    architecture: Architecture, inputs: torch.Tensor, weights: Sequence[torch.Tensor], stride: int,
    buffer: torch.Tensor | None, hx: torch.Tensor, cx: torch.Tensor | None, *options: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What ``_cudnn_rnn`` returns: output, last hidden and cell state, reserve, and the weights' buffer."""
    run = run_of(architecture, inputs, *options)
    layers = run.layers
    batch_first, train = options[4], options[6]
    width = (layers.projection or layers.hidden) * layers.directions
    if run.packed:
        output = inputs.new_empty((run.tokens, width))
    else:
        output = inputs.new_empty((run.steps, run.batch, width))
        output = output.transpose(0, 1) if batch_first else output
    hy = torch.empty_like(hx, memory_format=torch.contiguous_format)
    cy = hx.new_empty(0) if cx is None else torch.empty_like(cx, memory_format=torch.contiguous_format)
    if buffer is None:
        buffer = inputs.new_empty(layers.num_weights)
    reserve = inputs.new_empty(reserve_bytes(run) if train else 0, dtype=torch.uint8)
    return output, hy, cy, reserve, buffer


def backward_outputs(
    inputs: torch.Tensor, weights: Sequence[torch.Tensor], stride: int, buffer: torch.Tensor, hx: torch.Tensor,
    cx: torch.Tensor | None, output: torch.Tensor, grad_output: torch.Tensor | None, grad_hy: torch.Tensor | None,
    grad_cy: torch.Tensor | None, mode: int, hidden_size: int, projection: int, num_layers: int, batch_first: bool,
    dropout: float, train: bool, bidirectional: bool, batch_sizes: list[int], dropout_state: torch.Tensor | None,
    reserve: torch.Tensor, output_mask: list[bool],
) -> tuple[Any, ...]:  # fmt: skip
    """What ``_cudnn_rnn_backward`` returns: gradients of input, states and weights, the last as views of one buffer."""
    if grad_output is None and grad_hy is None and grad_cy is None:
        return None, None, None, [None] * len(weights)
    swapped = batch_first and not batch_sizes
    source = inputs.transpose(0, 1) if swapped else inputs
    dx = torch.empty_like(source, memory_format=torch.contiguous_format)
    dx = dx.transpose(0, 1) if swapped else dx
    dhx = torch.empty_like(hx)
    dcx = None if cx is None else torch.empty_like(cx)
    grads: list[torch.Tensor] = []
    if output_mask[3]:
        if stride >= 4:
            layers = Layers(Cell(mode), inputs.shape[-1], hidden_size, projection, num_layers, 1 + bidirectional)
            flat = torch.empty_like(buffer)
            grads = [
                flat.narrow(0, offset, size).view(weight.shape)
                for weight, (offset, size) in zip(weights, layers.places(True), strict=True)
            ]
        else:
            grads = [torch.empty_like(weight) for weight in weights]
    return dx, dhx, dcx, grads


def run_of(architecture: Architecture, inputs: torch.Tensor, mode: int, hidden_size: int, projection: int,
           num_layers: int, batch_first: bool, dropout: float, train: bool, bidirectional: bool,
           batch_sizes: Sequence[int], *_: Any) -> Run:  # fmt: skip
    """The call of cuDNN that these arguments of ``_cudnn_rnn`` (from ``mode`` on) make."""
    if batch_sizes:
        steps, batch, tokens = len(batch_sizes), batch_sizes[0], inputs.shape[0]
    else:
        steps, batch = (inputs.shape[1], inputs.shape[0]) if batch_first else inputs.shape[:2]
        tokens = steps * batch
    layers = Layers(Cell(mode), inputs.shape[-1], hidden_size, projection, num_layers, 1 + bidirectional)
    return Run(
        layers, str(inputs.dtype)[6:], steps, batch, tokens, bool(batch_sizes), train and dropout > 0, architecture
    )
