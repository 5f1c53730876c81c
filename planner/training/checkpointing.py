"""Activation checkpointing: by the model's own switch where it has one, else by its repeated blocks."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from planner.errors import InvalidSpec
from planner.specs.variants import Checkpointing

aten = torch.ops.aten
_KEPT = [
    getattr(aten, name).default
    for name in """mm addmm bmm baddbmm convolution _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention""".split()
    if hasattr(aten, name)
]
"""Results that ``selective`` keeps: those of matrix products, convolutions and attention kernels, which cost the most
to work out again. Everything else of a block is worked out again in the backward pass."""
_CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential)


_MUTATED = "Tensor cached during selective activation checkpoint has been mutated"  # torch/utils/checkpoint.py


@contextlib.contextmanager
def checkpointing_failures() -> Iterator[None]:
    """Raises ``InvalidSpec`` where the body overwrites a result that ``selective`` kept."""
    try:
        yield
    except RuntimeError as error:
        if _MUTATED not in str(error):
            raise
        message = "selective keeps results that this model overwrites (an in-place activation follows them)"
        raise InvalidSpec(message, field="variants.checkpointing", suggestion="full") from error


def enable_checkpointing(model: torch.nn.Module, mode: Checkpointing) -> None:
    """Switch on activation checkpointing, non-reentrant; again on the same model changes nothing.

    transformers: ``gradient_checkpointing_enable``, which takes a selective policy too; timm, ``full``:
    ``set_grad_checkpointing``; a user's model may have either. A model without a switch is checkpointed by block
    (``repeated_blocks``), whatever library it comes from. ``selective`` is torch's own policy
    (``torch.utils.checkpoint.create_selective_checkpoint_contexts``). Raises ``InvalidSpec`` for a model that has
    neither a switch nor blocks.
    """
    selective = mode is Checkpointing.SELECTIVE
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _KEPT)
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is not None and getattr(model, "supports_gradient_checkpointing", True):
        enable(gradient_checkpointing_kwargs=options)
        return
    enable = getattr(model, "set_grad_checkpointing", None)
    refusal = ""
    if enable is not None and not selective:
        try:
            enable(True)
        except AssertionError as error:  # how timm's models say that they cannot
            refusal = f": {error}"
        else:
            return
    blocks = repeated_blocks(model)
    if not blocks:
        message = (
            f"{type(model).__name__} offers no {mode} checkpointing{refusal} (no gradient_checkpointing_enable or "
            "set_grad_checkpointing, and no repeated blocks in a ModuleList or Sequential)"
        )
        raise InvalidSpec(message, field="variants.checkpointing")
    for block in blocks:
        if "forward" not in vars(block):
            block.forward = functools.partial(checkpoint, block.forward, **options)


def repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost modules of every class that stands at least twice in a ``ModuleList`` or ``Sequential``.

    A block is made of other modules and is no container itself: layers such as a convolution save too little.
    """
    listed = Counter(
        type(child)
        for module in model.modules()
        if isinstance(module, _CONTAINERS)
        for child in module.children()
        if not isinstance(child, _CONTAINERS) and any(True for _ in child.children())
    )
    kinds = tuple(kind for kind, count in listed.items() if count >= 2)
    found: list[torch.nn.Module] = []
    _walk(model, lambda module: type(module) in kinds, found)
    return found


def _walk(module: torch.nn.Module, wanted: Callable[[torch.nn.Module], bool], found: list[torch.nn.Module]) -> None:
    for child in module.children():
        if wanted(child):
            if all(child is not other for other in found):  # a block that is used twice is one
                found.append(child)
        else:
            _walk(child, wanted, found)
