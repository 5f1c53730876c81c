"""The training step: one implementation, run on the real GPU and on the virtual one alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from planner.errors import InvalidSpec, ModelError
from planner.specs.model import Spec
from planner.specs.variants import Checkpointing, Compile, Precision, Variant
from planner.training.data import Batch, make_batch, positional
from planner.training.optimizers import make_optimizer
from planner.training.targets import import_target

_AUTOCAST = {Precision.FP16_AMP: torch.float16, Precision.BF16_AMP: torch.bfloat16}
_WEIGHTS = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


class Training:
    """A model, its optimizer and its data on one device, ready to take training steps of any batch size.

    The order of allocations is that of a plain loop: the model is built on the CPU and moved, each batch is drawn on
    the device, gradients are set to ``None`` first, the optimizer creates its state in its first step.

    ``train.step`` names a function that replaces ``step`` and is called with the keyword arguments ``model`` (to be
    called for the forward pass; compiled where the variant says so), ``batch`` (name -> tensor), ``optimizer``,
    ``scaler`` (a ``GradScaler``, enabled for fp16-amp alone) and ``autocast`` (makes the forward pass's context).

    Raises ``InvalidSpec`` for checkpointing that the model does not offer and for arguments that the optimizer refuses,
    ``ModelError`` for a model without trainable parameters and for a loss or step that cannot be imported.
    """

    def __init__(self, spec: Spec, variant: Variant, model: torch.nn.Module, device: torch.device) -> None:
        self.spec, self.variant, self.device = spec, variant, device
        self.loss = import_target(spec.train.loss, field="train.loss") if spec.train.loss else None
        self.custom_step = import_target(spec.train.step, field="train.step") if spec.train.step else None
        if variant.checkpointing is not Checkpointing.NONE:
            enable_checkpointing(model, variant.checkpointing)
        dtype = _WEIGHTS.get(variant.precision)
        self.model = model.to(device=device, dtype=dtype) if dtype else model.to(device)
        self.forward: Callable[..., Any] = self.model
        if variant.compile is Compile.ON:
            self.forward = torch.compile(self.model, dynamic=False)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trainable:
            raise ModelError("the model has no parameter that requires a gradient", field="model")
        self.optimizer = make_optimizer(spec.train.optimizer, trainable)
        self.scaler = torch.amp.GradScaler(device.type, enabled=variant.precision is Precision.FP16_AMP)
        if variant.precision is Precision.TF32:
            # A mode of the whole process, where trials of other variants never run. Every other precision keeps torch's
            # defaults: no TF32 in matrix products, TF32 in cuDNN.
            torch.backends.cuda.matmul.allow_tf32 = True

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The forward pass's context: autocast for the ``-amp`` precisions, else nothing."""
        dtype = _AUTOCAST.get(self.variant.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else contextlib.nullcontext()

    def batch(self, batch_size: int) -> Batch:
        """A new random batch on the device; floats in the weights' precision when the weights are not float32."""
        batch = make_batch(self.spec, self.model, batch_size, self.device)
        dtype = _WEIGHTS.get(self.variant.precision)
        if dtype is None:
            return batch
        return {name: item.to(dtype) if item.is_floating_point() else item for name, item in batch.items()}

    def step(self, batch_size: int) -> None:
        """One training step on ``batch_size`` new samples.

        Raises what the model raises, and ``ModelError`` where there is no scalar loss that depends on a parameter.
        """
        batch = self.batch(batch_size)
        if self.custom_step is not None:
            self.custom_step(
                model=self.forward, batch=batch, optimizer=self.optimizer, scaler=self.scaler, autocast=self.autocast
            )
            return
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self._loss(batch)
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _loss(self, batch: Batch) -> torch.Tensor:
        if positional(self.spec):
            outputs = self.forward(batch["pixel_values"])
            if self.loss is None:
                return torch.nn.functional.cross_entropy(_logits(outputs), batch["labels"])
        else:
            outputs = self.forward(**batch)
        loss = self.loss(outputs, batch) if self.loss is not None else _returned_loss(outputs)
        field = "train.loss" if self.loss is not None else "model"
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ModelError(f"the loss must be a scalar tensor, not {what}", field=field)
        if not loss.requires_grad:
            raise ModelError("the loss does not depend on any trainable parameter", field=field)
        return loss


def _logits(outputs: Any) -> torch.Tensor:
    """The classifier's logits: torchvision's Inception and GoogLeNet return a named tuple in training."""
    logits = outputs if isinstance(outputs, torch.Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise ModelError("the model returns no logits; name a function in train.loss", field="model")
    return logits


def _returned_loss(outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor) and outputs.dim() == 0:
        return outputs
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        message = (
            "the model returns no loss: return it as a scalar, .loss or ['loss'], or name a function in train.loss"
        )
        raise ModelError(message, field="model")
    return loss


def enable_checkpointing(model: torch.nn.Module, mode: Checkpointing) -> None:
    """Switch on activation checkpointing as the model's own library does it.

    transformers: ``gradient_checkpointing_enable`` (non-reentrant); timm: ``set_grad_checkpointing``; a user's model
    may have either. Raises ``InvalidSpec`` for a model that has neither, and for ``selective``, which no library has a
    switch for.
    """
    kind = type(model).__name__
    if mode is Checkpointing.SELECTIVE:
        message = f"{kind} offers no selective checkpointing: which activations to keep is for its own code to say"
        raise InvalidSpec(message, field="variants.checkpointing", suggestion="full")
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is not None and getattr(model, "supports_gradient_checkpointing", True):
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return
    enable = getattr(model, "set_grad_checkpointing", None)
    try:
        if enable is not None:
            enable(True)
            return
    except AssertionError as error:  # how timm's models say that they cannot
        raise InvalidSpec(f"{kind} offers no full checkpointing: {error}", field="variants.checkpointing") from error
    message = f"{kind} offers no full checkpointing (no gradient_checkpointing_enable or set_grad_checkpointing)"
    raise InvalidSpec(message, field="variants.checkpointing")
