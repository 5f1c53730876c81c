"""The memory of cuDNN's recurrent layers: weight space, reserve and workspace.

cuDNN documents none of it. The formulas are those behind what it answered for 60,000 shapes on an H200 (cuDNN 9.19;
``measurements/h200/recurrent.json.gz``): all cells and dtypes, 1 to 8 layers, both directions, packed or padded, with
and without dropout and projections. ``benchmarks/recurrent.py`` prints how many they give to the byte; none is off by
more than an allocator's block. What a term stands for is an interpretation; its size was measured. Pure Python: no
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate

from planner.virtual.architecture import MIB, Architecture

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
ALIGNMENT = 32
HEADER = 256
HANDLE_BYTES = 8 * MIB
"""For each layer and direction: as much as cuBLAS takes on its own account on older architectures."""
GATE_STEPS = 256
"""Forward, the gates of at most so many steps are in work at a time."""
MEASURED_ON = (9, 0)


class Algorithm(IntEnum):
    """``cudnnRNNAlgo_t``."""

    STANDARD = 0
    PERSIST_STATIC = 1
    PERSIST_STATIC_SMALL_H = 3


class Cell(IntEnum):
    """``cudnnRNNMode_t``; names as ``torch.nn.RNNBase.mode`` has them."""

    RNN_RELU = 0
    RNN_TANH = 1
    LSTM = 2
    GRU = 3


# States of each sequence that a layer has in work, and values for each unit and token of the persistent algorithms.
_FORWARD_STATES = {Cell.RNN_RELU: 1, Cell.RNN_TANH: 1, Cell.LSTM: 6, Cell.GRU: 3}
_BACKWARD_STATES = {Cell.RNN_RELU: 1, Cell.RNN_TANH: 1, Cell.LSTM: 3, Cell.GRU: 1}
_PERSISTENT_BACKWARD = {Cell.RNN_RELU: 9, Cell.RNN_TANH: 9, Cell.LSTM: 12, Cell.GRU: 14}
_GATES = {Cell.RNN_RELU: 1, Cell.RNN_TANH: 1, Cell.LSTM: 4, Cell.GRU: 3}


@dataclass(frozen=True, slots=True)
class Layers:
    """A recurrent module; ``projection`` is 0 where there is none."""

    cell: Cell
    input: int
    hidden: int
    projection: int
    num_layers: int
    directions: int

    @property
    def gates(self) -> int:
        return _GATES[self.cell]

    @property
    def cells(self) -> int:
        """Layers times directions."""
        return self.num_layers * self.directions

    @property
    def output(self) -> int:
        """Features that one direction passes on."""
        return self.projection or self.hidden

    @property
    def num_weights(self) -> int:
        """Elements of cuDNN's weight space (``cudnnGetRNNWeightSpaceSize``), both biases always included."""
        return sum(size for _, size in self.places(True))

    def places(self, has_biases: bool) -> list[tuple[int, int]]:
        """``(offset, elements)`` in the weight space of each weight of the module, in the module's order.

        cuDNN puts all matrices before all biases.
        """
        wide = self.gates * self.hidden
        matrices: list[list[int]] = []
        for layer in range(self.num_layers):
            source = self.output * self.directions if layer else self.input
            sizes = [wide * source, wide * self.output, *([self.projection * self.hidden] if self.projection else [])]
            matrices += [sizes] * self.directions
        ends = list(accumulate(size for sizes in matrices for size in sizes))
        found: list[tuple[int, int]] = []
        position = 0
        for index, sizes in enumerate(matrices):
            places = [(ends[position + number] - size, size) for number, size in enumerate(sizes)]
            position += len(sizes)
            if has_biases:
                start = ends[-1] + 2 * wide * index
                places[2:2] = [(start, wide), (start + wide, wide)]
            found += places
        return found


@dataclass(frozen=True, slots=True)
class Run:
    """One call: ``steps`` of ``batch`` sequences, ``tokens`` in all (fewer than their product where ``packed``)."""

    layers: Layers
    dtype: str
    steps: int
    batch: int
    tokens: int
    packed: bool
    dropout: bool
    architecture: Architecture

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]


def algorithm(run: Run, *, forward: bool) -> Algorithm:
    """What PyTorch asks for: ``get_algo`` in aten/src/ATen/native/cudnn/RNN.cpp, whose names the helpers have."""
    if run.layers.projection or run.packed:
        return Algorithm.STANDARD
    if run.dtype != "float64" and _use_rnn_persist_small_h(run, forward):
        return Algorithm.PERSIST_STATIC_SMALL_H
    if run.dtype == "float16" and _use_persist_common_heuristics(run) and _use_persist_device_heuristics(run):
        return Algorithm.PERSIST_STATIC
    return Algorithm.STANDARD


def _use_rnn_persist_small_h(run: Run, forward: bool) -> bool:
    simple = run.layers.cell in (Cell.RNN_RELU, Cell.RNN_TANH)
    limit = (384 if simple else 192) if forward else (256 if simple else 128)
    return run.architecture.compute_capability >= (6, 0) and run.layers.hidden <= limit


def _use_persist_common_heuristics(run: Run) -> bool:
    layers = run.layers
    return layers.cells == 1 and layers.hidden <= 1024 and layers.hidden % 128 == 0 == layers.input % 128


def _use_persist_device_heuristics(run: Run) -> bool:
    (major, minor), batch = run.architecture.compute_capability, run.batch
    if major == 7:
        limits = ((40, 128), (20, 96), (10, 32))
        fits = batch == 8 or (batch % 16 == 0 and batch not in (80, 112))
        return minor != 5 and fits and any(run.steps >= steps and batch <= most for steps, most in limits)
    if major < 8 or run.architecture.num_sms < 98 or minor == 6 or run.layers.cell is Cell.GRU:
        return False
    wide = run.layers.cell is not Cell.LSTM and batch >= 96 and run.layers.hidden >= 896
    return batch % 8 == 0 and batch <= 128 and not wide


def reserve_bytes(run: Run) -> int:
    """What the forward pass keeps for the backward pass; the same for all algorithms."""
    layers, size = run.layers, run.element_bytes
    values = layers.cells * run.tokens * layers.hidden * size  # one for each unit of each cell at each token
    if layers.cell is Cell.LSTM:  # gates, cell state, and the hidden state where the output is its projection
        kept = _aligned(4 * values) + _aligned(values) * (1 + bool(layers.projection))
    else:
        kept = _aligned((6 if layers.cell is Cell.GRU else 1) * values)
    if layers.projection:
        kept += _aligned(layers.cells * run.tokens * layers.projection * size)
    between = layers.num_layers - 1
    kept += _aligned(between * layers.directions * run.tokens * layers.hidden * size)
    if run.dropout:  # a bit for each value that may be dropped
        bits = run.steps * run.batch * layers.output * layers.directions
        kept += between * layers.directions * _aligned(-(-bits // 8))
    return kept + HEADER


def workspace_bytes(run: Run, *, training: bool, forward: bool = True) -> int:
    """The temporary memory of one call of cuDNN: the forward pass (in training or not), or a backward one."""
    return workspace_bytes_of(run, algorithm(run, forward=forward), training=training)


def workspace_bytes_of(run: Run, algorithm: Algorithm, *, training: bool) -> int:
    """The same for a given algorithm. In training one answer serves both passes: the larger one.

    In bfloat16 cuDNN answers for every algorithm what it answers for the standard one. At one or two steps
    ``PERSIST_STATIC`` was seen to take up to 0.8 MB more than this.
    """
    layers, size = run.layers, run.element_bytes
    persistent = algorithm is not Algorithm.STANDARD and run.dtype in ("float16", "float32")
    matrices = layers.num_weights - 2 * layers.cells * layers.gates * layers.hidden
    fixed = HEADER + layers.cells * HANDLE_BYTES + _aligned(matrices * size)
    padded = 0
    if not run.packed:  # cuDNN packs padded sequences itself: copies of input, output and states, and the lengths
        fixed += _aligned(8 * run.batch)
        states = layers.cells * run.batch * size
        padded = _aligned(run.tokens * layers.input * size) + _aligned(_output_bytes(run))
        padded += 2 * _aligned(layers.output * states)
        if layers.cell is Cell.LSTM:
            padded += 2 * _aligned(layers.hidden * states)
    if layers.projection:  # the hidden states before they are projected
        fixed += _aligned(layers.directions * run.tokens * layers.hidden * size)
    forward = padded + _forward_bytes(run, persistent)
    return fixed + (max(forward, 2 * padded + _backward_bytes(run, persistent)) if training else forward)


def workspace_doubt_bytes(run: Run, *, training: bool, forward: bool = True) -> int:
    """How far ``workspace_bytes`` may be off: all of it where this architecture was not asked; else the 96 bytes by
    which some answers differ are lost in the allocator's rounding."""
    if run.architecture.compute_capability != MEASURED_ON:
        return workspace_bytes(run, training=training, forward=forward)
    return 0


def _forward_bytes(run: Run, persistent: bool) -> int:
    """Gates of the tokens in work, dropped outputs, and states of each layer."""
    layers = run.layers
    step = run.batch * layers.hidden * run.element_bytes
    tokens = run.tokens * layers.hidden * run.element_bytes
    dropped = _aligned(tokens) if run.dropout else 0
    one = layers.directions == 1
    if persistent:
        values = 5 * layers.gates if one else 6 * layers.gates + 4
        return _aligned(values * tokens) + (dropped if one else 0) + _state_bytes(run, _BACKWARD_STATES, 1)
    if one:
        gates = _aligned(layers.gates * min(tokens, GATE_STEPS * step))
        return gates + dropped + _state_bytes(run, _FORWARD_STATES, 0)
    return _aligned(2 * layers.gates * tokens) + 2 * _aligned(2 * tokens) + _state_bytes(run, _FORWARD_STATES, 0)


def _backward_bytes(run: Run, persistent: bool) -> int:
    """Gradients of one layer's input and output, and states of each layer."""
    layers = run.layers
    step = run.batch * layers.hidden * run.element_bytes
    tokens = run.tokens * layers.hidden * run.element_bytes
    widest = max(tokens, run.tokens * layers.input * run.element_bytes)
    directions = layers.directions
    if persistent:
        between = directions * min(layers.num_layers, 2) * tokens
        gates = _PERSISTENT_BACKWARD[layers.cell] * tokens
        return _aligned(directions**2 * widest) + _aligned(between + gates) + _state_bytes(run, _BACKWARD_STATES, 1)
    if directions == 2:
        between = 2 * _aligned(min(layers.num_layers, 2) * tokens)
        return 2 * _aligned(2 * widest) + between + _state_bytes(run, _BACKWARD_STATES, 0)
    chunk = tokens if layers.num_layers == 1 else min(tokens, _chunk_steps(run) * step)
    return _aligned(widest) + _aligned(chunk) + _state_bytes(run, _BACKWARD_STATES, 0)


def _state_bytes(run: Run, states: dict[Cell, int], more: int) -> int:
    """So many states of each sequence for each layer."""
    layers = run.layers
    count = states[layers.cell] + more if layers.directions == 1 else 2 * states[layers.cell] + 4
    return _aligned(count * layers.num_layers * run.batch * layers.hidden * run.element_bytes)


def _chunk_steps(run: Run) -> int:
    """Steps of which the gradients between layers are in work at a time: layers work on chunks, one behind the other.

    The length of a chunk was measured at the batch sizes and steps that ``benchmarks/measure_recurrent.py`` lists.
    """
    if run.batch <= 16:
        chunk = 32 if run.batch == 1 else 16 if run.batch <= 8 else 8
    elif run.steps >= 128:
        chunk = 8
    else:
        chunk = 4 if run.batch <= 96 else 2
    return chunk * run.layers.num_layers + max(chunk, 8)


def _output_bytes(run: Run) -> int:
    return run.layers.directions * run.tokens * run.layers.output * run.element_bytes


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
