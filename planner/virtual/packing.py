"""Packing sequences of several lengths, and padding them again, as PyTorch's C++ does it
(aten/src/ATen/native/PackedSequence.cpp).

There it reads lengths from memory; here from the values that are known beside the fakes (``planner.virtual.values``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from planner.errors import ModelError
from planner.virtual import values
from planner.virtual.backend import DISPATCH_KEY, library


def install() -> None:
    """Register the operators for the ``vgpu`` backend."""
    kernels = library("Autograd" + DISPATCH_KEY)
    kernels.impl("_pad_packed_sequence", _pad_packed_sequence)
    kernels.impl("_pack_padded_sequence_backward", _pack_padded_sequence_backward)


def known_lengths(lengths: torch.Tensor) -> list[int]:
    known = values.value_of(lengths)
    if known is None:
        raise ModelError("the lengths of packed sequences depend on the weights", field="model")
    listed: list[int] = known.tolist()
    return listed


def pack_padded_sequence(
    inputs: torch.Tensor, lengths: torch.Tensor, batch_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``_pack_padded_sequence`` (aten/src/ATen/native/PackedSequence.cpp): blocks of steps that equally many sequences
    reach, each made contiguous, then joined."""
    known = known_lengths(lengths)
    swapped = inputs.transpose(0, 1) if batch_first else inputs
    blocks, batch_sizes, previous = [], [], 0
    for index, length in enumerate(reversed(known)):
        if length > previous:
            count = len(known) - index
            block = swapped[previous:length, :count].contiguous()
            blocks.append(block.view(-1, *swapped.shape[2:]))
            del block
            batch_sizes += [count] * (length - previous)
            previous = length
    joined = torch.cat(blocks)
    blocks.reverse()  # Python empties a list from its end, C++ a vector from its beginning
    return joined, torch.tensor(batch_sizes)


def _pack_padded_sequence_backward(
    grad: torch.Tensor, size: Sequence[int], batch_sizes: torch.Tensor, batch_first: bool
) -> torch.Tensor:
    """Zeros that the packed gradient is copied into, step by step and in place."""
    if not batch_first:
        return grad.new_zeros(size)
    return grad.new_zeros((size[1], size[0], *size[2:])).transpose(0, 1)


def _pad_packed_sequence(
    data: torch.Tensor, batch_sizes: torch.Tensor, batch_first: bool, padding: float, total_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``_pad_packed_sequence`` (aten/src/ATen/native/PackedSequence.cpp): a full tensor, then one copy for each block
    of steps that equally many sequences reach."""
    sizes = known_lengths(batch_sizes)
    output = torch.full(
        (max(total_length, len(sizes)), sizes[0], *data.shape[1:]), padding, dtype=data.dtype, device=data.device
    )
    offset = step = 0
    for count, block in itertools.groupby(sizes):
        steps = len(list(block))
        part = data[offset : offset + steps * count].view(steps, count, *data.shape[1:])
        output[step : step + steps, :count].copy_(part)
        offset, step = offset + steps * count, step + steps
    lengths = torch.tensor([sum(size > index for size in sizes) for index in range(sizes[0])])
    return output.transpose(0, 1) if batch_first else output, lengths
