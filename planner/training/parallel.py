"""One model on several GPUs of one host, as this rank sees it: DistributedDataParallel and FSDP2.

The ranks and their process group are ``planner.runtime.ranks``'s; here they exist already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from planner.errors import InvalidSpec
from planner.specs.model import Spec
from planner.specs.variants import Compile, Loss, Parallelism, Precision, Variant
from planner.training.checkpointing import repeated_blocks

_MIXED = {Precision.BF16_AMP: torch.bfloat16}


def check_parallel(spec: Spec, variant: Variant) -> None:
    """Raise ``InvalidSpec`` for what cannot go with the variant's parallelism, with the reason."""
    kind = variant.parallelism
    if kind is Parallelism.SINGLE:
        return
    if not torch.distributed.is_initialized():
        message = f"{kind} is measured on {variant.gpus} GPUs of one host, by a rank for each; nothing is predicted"
        raise InvalidSpec(message, field="variants.parallelism", suggestion=str(Parallelism.SINGLE))
    refused: list[tuple[bool, str, str]] = [
        (variant.compile is Compile.ON, "variants.compile", "a compiled model is only measured on one GPU"),
        (
            variant.loss is Loss.CHUNKED,
            "variants.loss",
            f"a chunked loss calls the model's parts by themselves, past what {kind} does around the whole",
        ),
    ]
    if kind is Parallelism.FSDP2:
        refused += [
            (
                variant.precision is Precision.FP16_AMP,
                "variants.precision",
                "fp16-amp scales the loss by what it finds in all gradients, and fsdp2 shows each rank a shard; "
                "use bf16-amp",
            ),
            (spec.train.ema is not None, "train.ema", "the average would be a copy of the shards; leave it out"),
        ]
    for is_asked, field, reason in refused:
        if is_asked:
            raise InvalidSpec(f"not supported with {kind}: {reason}", field=field)


def shard(model: torch.nn.Module, variant: Variant, device: torch.device) -> None:
    """FSDP2 in place: each repeated block by itself, then what is left, on the default process group.

    Parameters become shards on ``device`` one block at a time, so that the whole model never stands there. bf16-amp is
    FSDP2's own mixed precision: parameters are gathered in bf16 and gradients reduced in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),))}
    if variant.precision in _MIXED:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=_MIXED[variant.precision], reduce_dtype=torch.float32)
    for block in repeated_blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    model.to(device)  # buffers of the blocks' parents


def replicate(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """``DistributedDataParallel`` with torch's defaults around a model that is on ``device``."""
    ids = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)


def reducing(forward: Callable[..., Any], is_last: bool) -> contextlib.AbstractContextManager[Any]:
    """The context of one micro-batch: only the last one's backward pass reduces gradients between ranks."""
    if isinstance(forward, torch.nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext() if is_last else forward.no_sync()
    if hasattr(forward, "set_requires_gradient_sync"):
        forward.set_requires_gradient_sync(is_last)
    return contextlib.nullcontext()
