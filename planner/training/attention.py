"""One back end of ``scaled_dot_product_attention`` for a whole phase, never silently another one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from planner.errors import InvalidSpec, first_line
from planner.specs.variants import Sdpa

_BACKENDS = {
    Sdpa.FLASH: SDPBackend.FLASH_ATTENTION,
    Sdpa.EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    Sdpa.CUDNN: SDPBackend.CUDNN_ATTENTION,
    Sdpa.MATH: SDPBackend.MATH,
}
NO_KERNEL = ("No available kernel", "No viable backend")
"""How torch says that none that is switched on can run (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and
attention.cpp)."""
# The same file heads the reasons of each back end with these words, as warnings.
_HEADINGS = {
    Sdpa.FLASH: "Flash attention kernel not used because",
    Sdpa.EFFICIENT: "Memory efficient kernel not used because",
    Sdpa.CUDNN: "cuDNN attention kernel not used because",
}
_ATTENTION = torch._C._nn.scaled_dot_product_attention


@contextlib.contextmanager
def attention_by(sdpa: Sdpa) -> Iterator[None]:
    """Forward, backward and whatever is computed again in it run on the back end ``sdpa`` alone.

    Raises ``InvalidSpec`` with torch's reasons where it cannot run the model's attention.
    """
    if sdpa is Sdpa.DEFAULT:
        yield
        return
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(_BACKENDS[sdpa]):
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if any(words in text for words in NO_KERNEL):
                why = _reason(sdpa, [str(item.message) for item in said]) or first_line(error)
            elif sdpa is Sdpa.CUDNN and "cuDNN Frontend error" in text:
                why = first_line(error)
            else:
                raise
            message = f"the {sdpa} back end cannot run this model's attention: {why}"
            raise InvalidSpec(message, field="variants.sdpa", suggestion=str(Sdpa.DEFAULT)) from error


def _reason(sdpa: Sdpa, said: list[str]) -> str:
    """Torch's first reason under the heading of this back end, without where in its source it was printed."""
    heading = _HEADINGS.get(sdpa, NO_KERNEL[0])
    for position, text in enumerate(said):
        if text.startswith(heading) and position + 1 < len(said):
            return first_line(ValueError(said[position + 1].split(" (Triggered internally")[0]))
    return ""


class AttentionCalls(TorchFunctionMode):
    """Whether the operator is called at all: a back end that is chosen for a model without it changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func is _ATTENTION
        return func(*args, **(kwargs or {}))

    def look_in(self, graph: torch.fx.GraphModule) -> None:
        """The same of a graph that is about to be compiled."""
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                self.seen = self.seen or any(node.target is _ATTENTION for node in module.graph.nodes)

    def check(self) -> None:
        """Raises ``InvalidSpec`` where nothing called it."""
        if not self.seen:
            message = "the model does not call scaled_dot_product_attention, so no back end of it can be chosen"
            raise InvalidSpec(message, field="variants.sdpa", suggestion=str(Sdpa.DEFAULT))
