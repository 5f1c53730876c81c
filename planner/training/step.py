"""The training step: one implementation, run on the real GPU and on the virtual one alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from planner.errors import InvalidSpec, ModelError
from planner.specs.model import DataKind, Routing, Spec
from planner.specs.variants import Checkpointing, Compile, Loss, MemoryFormat, Parallelism, Precision, Sdpa, Variant
from planner.training.attention import AttentionCalls, attention_by
from planner.training.checkpointing import checkpointing_failures, enable_checkpointing
from planner.training.chunked import ChunkedLoss
from planner.training.compiling import Compiled, notes_of
from planner.training.data import Batch, make_batch, positional
from planner.training.freezing import freeze
from planner.training.optimizers import make_optimizer
from planner.training.parallel import check_parallel, reducing, replicate, shard
from planner.training.routing import NOTE, WorstRouting
from planner.training.schedule import Phase
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

    Raises ``InvalidSpec`` for a part of the variant that the model, the optimizer or this planner does not offer and
    for arguments that the optimizer refuses, ``ModelError`` for a model without trainable parameters and for a loss or
    step that cannot be imported. ``model`` may be one that an earlier ``Training`` of the same variant used.
    """

    def __init__(self, spec: Spec, variant: Variant, model: torch.nn.Module, device: torch.device) -> None:
        self.spec, self.variant, self.device = spec, variant, device
        self.loss = import_target(spec.train.loss, field="train.loss") if spec.train.loss else None
        self.custom_step = import_target(spec.train.step, field="train.step") if spec.train.step else None
        check_parallel(spec, variant)
        self._check_memory_format()
        freeze(model, spec.train.freeze)
        if variant.checkpointing is not Checkpointing.NONE:
            enable_checkpointing(model, variant.checkpointing)
        self.chunked = ChunkedLoss(spec, model) if variant.loss is Loss.CHUNKED else None
        is_sharded = variant.parallelism is Parallelism.FSDP2
        options: dict[str, Any] = {} if is_sharded else {"device": device}
        if variant.precision in _WEIGHTS:
            options["dtype"] = _WEIGHTS[variant.precision]
        if self._is_channels_last:
            options["memory_format"] = torch.channels_last
        self.model = model.to(**options) if options else model
        if is_sharded:
            shard(self.model, variant, device)
        self.worst_routing = WorstRouting() if spec.train.routing is Routing.WORST else None
        self._attention_calls = AttentionCalls()
        self._is_first = True
        self.forward: Callable[..., Any] = self.model
        if variant.parallelism is Parallelism.DDP:
            self.forward = replicate(self.model, device)
        self.compiled: Compiled | None = None
        if variant.compile is Compile.ON:
            self.compiled = Compiled(spec, self.model, self._attention_calls.look_in)
            self.forward = self.compiled.forward
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not self.trainable:
            if spec.train.freeze:
                raise InvalidSpec("leaves no parameter that requires a gradient", field="train.freeze")
            raise ModelError("the model has no parameter that requires a gradient", field="model")
        self.optimizer = make_optimizer(spec.train.optimizer, self.trainable, variant.optimizer_implementation)
        self.scaler = torch.amp.GradScaler(device.type, enabled=variant.precision is Precision.FP16_AMP)
        self.ema: torch.optim.swa_utils.AveragedModel | None = None
        if spec.train.ema is not None:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(spec.train.ema)  # type: ignore[no-untyped-call]
            self.ema = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average)
        if variant.precision is Precision.TF32:
            if device.type == "cuda":
                check_tf32(torch.cuda.get_device_capability(device))
            # A mode of the whole process, where trials of other variants never run. Every other precision keeps torch's
            # defaults: no TF32 in matrix products, TF32 in cuDNN.
            torch.backends.cuda.matmul.allow_tf32 = True

    @property
    def _is_channels_last(self) -> bool:
        return self.variant.memory_format is MemoryFormat.CHANNELS_LAST

    def _check_memory_format(self) -> None:
        data = self.spec.data
        has_images = data.kind is DataKind.IMAGES or any(len(item.shape) == 3 for item in data.inputs.values())
        if self._is_channels_last and not has_images:
            message = "channels-last orders the dimensions of images, and this data has none"
            raise InvalidSpec(message, field="variants.memory_format", suggestion=str(MemoryFormat.CONTIGUOUS))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The forward pass's context: autocast for the ``-amp`` precisions, else nothing (FSDP2 casts by itself)."""
        is_sharded = self.variant.parallelism is Parallelism.FSDP2
        dtype = None if is_sharded else _AUTOCAST.get(self.variant.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else contextlib.nullcontext()

    def run(self, phase: Phase, batch_size: int) -> None:
        """One phase of a trial (``planner.training.schedule``) of ``batch_size``.

        Raises what the model raises, ``ModelError`` where there is no scalar loss that depends on a parameter, and
        ``InvalidSpec`` for a part of the variant that turns out not to run, or to change nothing.
        """
        watched, self._is_first = self._is_first and self.variant.sdpa is not Sdpa.DEFAULT, False
        with contextlib.ExitStack() as stack:
            if self.compiled is not None:
                stack.enter_context(self.compiled.failures())
            elif watched:
                stack.enter_context(self._attention_calls)
            if self.worst_routing is not None:
                stack.enter_context(self.worst_routing)
            stack.enter_context(checkpointing_failures())
            stack.enter_context(attention_by(self.variant.sdpa))
            size = phase.size(batch_size)
            (self.evaluate if phase.is_evaluation else self.step)(size, phase.sequence_length)
        if watched:
            self._attention_calls.check()
        if self.worst_routing is not None:
            self.worst_routing.check()

    def report(self) -> dict[str, Any]:
        """What there is to say of the phases that were run, as JSON data: ``compile`` and ``notes``, where there are
        any."""
        report: dict[str, Any] = {}
        notes = [] if self.worst_routing is None else [NOTE]
        if self.compiled is not None:
            report["compile"] = self.compiled.report()
            notes += notes_of(report["compile"])
        return report | ({"notes": notes} if notes else {})

    def batch(self, batch_size: int, sequence_length: int | None = None) -> Batch:
        """A new random batch on the device; floats in the weights' precision when the weights are not float32."""
        memory_format = torch.channels_last if self._is_channels_last else torch.contiguous_format
        batch = make_batch(
            self.spec, self.model, batch_size, self.device, sequence_length=sequence_length, memory_format=memory_format
        )
        dtype = _WEIGHTS.get(self.variant.precision)
        if dtype is None:
            return batch
        return {name: item.to(dtype) if item.is_floating_point() else item for name, item in batch.items()}

    def step(self, batch_size: int, sequence_length: int | None = None) -> None:
        """One training step: ``accumulation_steps`` micro-batches of ``batch_size`` new samples each."""
        if self.custom_step is not None:
            batch = self.batch(batch_size, sequence_length)
            self.custom_step(
                model=self.forward, batch=batch, optimizer=self.optimizer, scaler=self.scaler, autocast=self.autocast
            )
            return
        train = self.spec.train
        for number in range(train.accumulation_steps):
            batch = self.batch(batch_size, sequence_length)
            if number == 0:
                self.optimizer.zero_grad(set_to_none=True)
            with reducing(self.forward, is_last=number == train.accumulation_steps - 1):
                with self.autocast():
                    loss = self._trained_loss(batch)
                if train.accumulation_steps > 1:
                    loss = loss / train.accumulation_steps
                torch.autograd.backward(self.scaler.scale(loss))
        if train.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.trainable, train.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def evaluate(self, batch_size: int, sequence_length: int | None = None) -> None:
        """One evaluation step: the forward pass of ``batch_size`` new samples in evaluation mode, without gradients.

        With its loss, as the training step works it out; beside ``train.step``, which does that, the outputs alone.
        """
        self.model.eval()
        try:
            with torch.no_grad():
                batch = self.batch(batch_size, sequence_length)
                with self.autocast():
                    if self.custom_step is not None:
                        self.forward(batch["pixel_values"]) if positional(self.spec) else self.forward(**batch)
                    else:
                        self._loss(batch)
        finally:
            self.model.train()

    def _loss(self, batch: Batch) -> Any:
        if self.chunked is not None:
            return self.chunked(self.forward, batch)
        if positional(self.spec):
            outputs = self.forward(batch["pixel_values"])
            if self.loss is None:
                return torch.nn.functional.cross_entropy(_logits(outputs), batch["labels"])
        else:
            outputs = self.forward(**batch)
        return self.loss(outputs, batch) if self.loss is not None else _returned_loss(outputs)

    def _trained_loss(self, batch: Batch) -> torch.Tensor:
        loss = self._loss(batch)
        field = "train.loss" if self.loss is not None else "model"
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ModelError(f"the loss must be a scalar tensor, not {what}", field=field)
        if not loss.requires_grad:
            raise ModelError("the loss does not depend on any trainable parameter", field=field)
        return loss


def check_tf32(compute_capability: tuple[int, int]) -> None:
    """Raises ``InvalidSpec`` for a GPU older than Ampere, which has no TF32: it would run fp32 under another name (CUDA
    C++ Programming Guide, arithmetic of compute capability 8.0)."""
    if compute_capability < (8, 0):
        has = ".".join(map(str, compute_capability))
        message = f"tf32 needs a GPU of compute capability 8.0 or newer; this one has {has}, where it is fp32"
        raise InvalidSpec(message, field="variants.precision", suggestion=str(Precision.FP32))


def _logits(outputs: Any) -> torch.Tensor:
    """The classifier's logits: torchvision's Inception and GoogLeNet return a named tuple in training, its models for
    segmentation a mapping."""
    named = outputs.get("out") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    logits = outputs if isinstance(outputs, torch.Tensor) else named
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
