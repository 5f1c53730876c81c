"""Batches of random data, drawn on the device that trains: sizes matter to memory, values do not."""

from __future__ import annotations

import inspect
import random
from typing import Any

import torch

from planner.errors import InvalidSpec
from planner.specs.model import DataKind, ModelSource, Spec

_LANGUAGE_MODELS = ("causal-lm", "masked-lm", "seq2seq-lm")

Batch = dict[str, torch.Tensor]


def make_batch(
    spec: Spec,
    model: torch.nn.Module,
    batch_size: int,
    device: torch.device,
    *,
    sequence_length: int | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Batch:
    """One batch of ``batch_size`` samples: name -> tensor ``[batch_size, ...]`` on ``device``.

    ``sequence_length`` is that of the longest sample, in tokens, where samples differ; the others are padded to it.
    Tensors of four dimensions are made in ``memory_format``.

    Raises ``InvalidSpec`` where the data does not fit the model: tokens for a model without a vocabulary, images for
    one that takes more than an image and its class.
    """
    _check_torchvision(spec, model)
    if spec.data.kind is DataKind.TOKENS:
        batch = _tokens(spec, model, batch_size, device, sequence_length)
        return batch if sequence_length is None else _padded(spec, model, batch, device)
    makers = {DataKind.IMAGES: _images, DataKind.TENSORS: _tensors}
    return makers[spec.data.kind](spec, model, batch_size, device, memory_format)


_TAKEN_BY_TORCHVISION = {
    "detection": "boxes and labels of each image, which no kind of data has: wrap the model in one of your own "
    "(source: python) whose forward makes them and returns the loss, with kind: tensors for the images; probe it on a "
    "GPU, since which boxes match follows from values, so that it is not predicted",
    "optical_flow": "two images and returns flows: use kind: tensors, and name a function of your own in train.loss",
    "video": "images [3, frames, height, width] and returns logits: use kind: tensors with the model's own names of "
    "its inputs, and name a function of your own in train.loss",
}


def _check_torchvision(spec: Spec, model: torch.nn.Module) -> None:
    library, _, kind = type(model).__module__.rpartition("torchvision.models.")
    needs = _TAKEN_BY_TORCHVISION.get(kind.partition(".")[0]) if not library else None
    suits = spec.data.kind is DataKind.TENSORS and not kind.startswith("detection.")
    if spec.model.source is ModelSource.TORCHVISION and needs is not None and not suits:
        raise InvalidSpec(f"{spec.model.name} takes {needs}", field="data.kind")


def num_classes(model: torch.nn.Module) -> int | None:
    """The labels that the model tells apart, where it says so."""
    # transformers, then timm and many models of users; torchvision's say it only in their last layer.
    for owner, name in ((getattr(model, "config", None), "num_labels"), (model, "num_classes")):
        value = getattr(owner, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def segmentation_classes(model: torch.nn.Module) -> int | None:
    """The classes of torchvision's semantic segmentation models, which only their last layer knows; else ``None``."""
    if not type(model).__module__.startswith("torchvision.models.segmentation."):
        return None
    *_, last = (layer for layer in model.get_submodule("classifier").modules() if isinstance(layer, torch.nn.Conv2d))
    return last.out_channels


def positional(spec: Spec) -> bool:
    """Whether the model takes its images as the one positional argument and returns logits (timm, torchvision)."""
    return spec.data.kind is DataKind.IMAGES and spec.model.source in (ModelSource.TIMM, ModelSource.TORCHVISION)


def _tokens(
    spec: Spec, model: torch.nn.Module, batch_size: int, device: torch.device, sequence_length: int | None
) -> Batch:
    vocabulary = getattr(_text_config(model), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise InvalidSpec("the model has no vocabulary; describe its inputs with kind: tensors", field="data.kind")
    length = sequence_length or spec.data.sequence_length
    assert length is not None, "checked when the spec was read"
    tokens = torch.randint(0, vocabulary, (batch_size, length), device=device)
    if spec.model.task in _LANGUAGE_MODELS:
        # The same tensor, as a plain training loop passes it: a model shifts or copies what it needs by itself.
        return {"input_ids": tokens, "labels": tokens}
    if spec.model.task == "next-sentence-prediction":
        return {"input_ids": tokens, "labels": torch.randint(0, 2, (batch_size,), device=device)}
    shape = (batch_size, length) if spec.model.task == "token-classification" else (batch_size,)
    return {"input_ids": tokens, "labels": _labels(model, num_classes(model) or 2, shape, device)}


def _padded(spec: Spec, model: torch.nn.Module, batch: Batch, device: torch.device) -> Batch:
    """``batch`` as a collator pads it: a mask for models that take one, and no labels for the padding.

    The first sample is as long as the batch, the last the shortest of all, the others are drawn from the histogram.
    """
    batch_size, longest = batch["input_ids"].shape
    tokens, counts = zip(*((length, count) for length, count in spec.data.lengths if length <= longest), strict=True)
    drawn = random.Random(longest).choices(tokens, counts, k=max(0, batch_size - 2))  # noqa: S311 - no secret
    lengths = torch.tensor([longest, *drawn, *([min(tokens)] if batch_size > 1 else [])], device=device)
    mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
    if "attention_mask" in inspect.signature(model.forward).parameters:
        batch["attention_mask"] = mask
    if batch["labels"].shape == mask.shape:
        batch["labels"] = batch["labels"].masked_fill(mask == 0, _IGNORED)
    return batch


_IGNORED = -100  # the label that counts for nothing: transformers' loss functions and torch's cross_entropy


def _text_config(model: torch.nn.Module) -> Any:
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config() if get_text_config is not None else config


def _images(
    spec: Spec, model: torch.nn.Module, batch_size: int, device: torch.device, memory_format: torch.memory_format
) -> Batch:
    size = spec.data.size
    assert size is not None, "checked when the spec was read"
    pixels = _normal((batch_size, _channels(spec, model), size, size), torch.float32, device, memory_format)
    segmented = segmentation_classes(model)
    if segmented is not None:  # a class for each pixel
        shape = (batch_size, size, size)
        return {"pixel_values": pixels, "labels": _labels(model, spec.data.classes or segmented, shape, device)}
    classes = spec.data.classes or num_classes(model) or 1000
    return {"pixel_values": pixels, "labels": _labels(model, classes, (batch_size,), device)}


def _channels(spec: Spec, model: torch.nn.Module) -> int:
    """3, unless the config (transformers) or the arguments (timm) say otherwise."""
    for value in (spec.model.config.get("in_chans"), getattr(getattr(model, "config", None), "num_channels", None)):
        if isinstance(value, int) and value > 0:
            return value
    return 3


def _labels(model: torch.nn.Module, classes: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Class labels ``shape``, or the floats that a transformers model asks for by its config's ``problem_type``.

    Left out, one label means regression, as in ``ForSequenceClassificationLoss`` of transformers.
    """
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return torch.zeros((*shape, num_classes(model) or classes), device=device)
    if problem == "regression" or (problem is None and getattr(config, "num_labels", None) == 1):
        outputs = num_classes(model) or 1
        return torch.zeros(shape if outputs == 1 else (*shape, outputs), device=device)
    return torch.randint(0, classes, shape, device=device)


def _normal(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, memory_format: torch.memory_format
) -> torch.Tensor:
    if memory_format is torch.contiguous_format or len(shape) != 4:
        return torch.randn(shape, device=device, dtype=dtype)
    return torch.empty(shape, device=device, dtype=dtype, memory_format=memory_format).normal_()


def _tensors(
    spec: Spec, model: torch.nn.Module, batch_size: int, device: torch.device, memory_format: torch.memory_format
) -> Batch:
    batch: Batch = {}
    for name, item in spec.data.inputs.items():
        dtype = getattr(torch, item.dtype)
        shape = (batch_size, *item.shape)
        if dtype.is_floating_point or dtype.is_complex:
            batch[name] = _normal(shape, dtype, device, memory_format)
        elif dtype is torch.bool:
            batch[name] = torch.ones(shape, device=device, dtype=dtype)
        else:
            high = 2 if item.high is None else item.high
            batch[name] = torch.randint(item.low, high, shape, device=device, dtype=dtype)
    return batch
