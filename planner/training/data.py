"""Batches of random data, drawn on the device that trains: sizes matter to memory, values do not."""

from __future__ import annotations

from typing import Any

import torch

from planner.errors import InvalidSpec
from planner.specs.model import DataKind, DataSpec, ModelSource, Spec

# Tasks whose labels have the shape of the tokens; others classify the whole sequence.
_TOKEN_LABELS = ("causal-lm", "masked-lm", "seq2seq-lm", "token-classification")

Batch = dict[str, torch.Tensor]


def make_batch(spec: Spec, model: torch.nn.Module, batch_size: int, device: torch.device) -> Batch:
    """One batch of ``batch_size`` samples: name -> tensor ``[batch_size, ...]`` on ``device``."""
    makers = {DataKind.TOKENS: _tokens, DataKind.IMAGES: _images, DataKind.TENSORS: _tensors}
    return makers[spec.data.kind](spec, model, batch_size, device)


def _config(model: torch.nn.Module) -> Any:
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config() if get_text_config is not None else config


def _tokens(spec: Spec, model: torch.nn.Module, batch_size: int, device: torch.device) -> Batch:
    vocabulary = getattr(_config(model), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise InvalidSpec("the model has no vocabulary; describe its inputs with kind: tensors", field="data.kind")
    length = spec.data.sequence_length
    assert length is not None, "checked when the spec was read"
    tokens = torch.randint(0, vocabulary, (batch_size, length), device=device)
    if spec.model.task in _TOKEN_LABELS and spec.model.task != "token-classification":
        # The same tensor, as a plain training loop passes it: a model shifts or copies what it needs by itself.
        return {"input_ids": tokens, "labels": tokens}
    classes = int(getattr(model.config, "num_labels", 2))  # type: ignore[union-attr,arg-type]
    shape = (batch_size, length) if spec.model.task in _TOKEN_LABELS else (batch_size,)
    return {"input_ids": tokens, "labels": torch.randint(0, classes, shape, device=device)}


def _images(spec: Spec, model: torch.nn.Module, batch_size: int, device: torch.device) -> Batch:
    data = spec.data
    assert data.size is not None, "checked when the spec was read"
    channels = getattr(getattr(model, "config", None), "num_channels", 3)
    classes = data.classes or _classes(model, data)
    pixels = torch.randn((batch_size, channels, data.size, data.size), device=device)
    return {"pixel_values": pixels, "labels": torch.randint(0, classes, (batch_size,), device=device)}


def _classes(model: torch.nn.Module, data: DataSpec) -> int:
    for owner, name in ((getattr(model, "config", None), "num_labels"), (model, "num_classes")):
        value = getattr(owner, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 1000 if data.classes is None else data.classes


def _tensors(spec: Spec, model: torch.nn.Module, batch_size: int, device: torch.device) -> Batch:
    batch: Batch = {}
    for name, item in spec.data.inputs.items():
        dtype = getattr(torch, item.dtype)
        shape = (batch_size, *item.shape)
        if dtype.is_floating_point or dtype.is_complex:
            batch[name] = torch.randn(shape, device=device, dtype=dtype)
        elif dtype is torch.bool:
            batch[name] = torch.ones(shape, device=device, dtype=dtype)
        else:
            batch[name] = torch.randint(item.low, 2 if item.high is None else item.high, shape, device=device, dtype=dtype)
    return batch


def positional(spec: Spec) -> bool:
    """Whether the model takes its images as the one positional argument and returns logits (timm, torchvision)."""
    return spec.data.kind is DataKind.IMAGES and spec.model.source in (ModelSource.TIMM, ModelSource.TORCHVISION)
