"""Whose memory a block is: the module whose forward or backward made it, and what it is there for."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from planner.virtual.backend import NAME
from planner.virtual.trace import Phase, Purpose, Trace

_OUTSIDE = 0
"""Code of the owner ``("", "")``: outside any module, as a loss function of the training loop."""
_NO_SEQUENCE = 1 << 63
"""``AccumulateGrad`` has the largest sequence number there is (torch/csrc/autograd/functions/accumulate_grad.cpp)."""


def _nowhere(tensor: torch.Tensor) -> None:
    return None


class Owners:
    """Follows which module runs, so that each block of ``trace`` gets an owner: a code into ``trace.owners``.

    Nothing is hooked into autograd: the nodes that a module's forward makes have consecutive sequence numbers, so the
    number of the node that the engine runs tells the module whose backward it is.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._main = threading.get_ident()
        self._stacks: dict[int, list[int]] = {self._main: []}
        self._modules: dict[int, int] = {}
        self._codes: dict[tuple[str, str], int] = {("", ""): _OUTSIDE}
        self._numbers: list[int] = []
        self._running: list[int] = []
        self._phase = Phase.MOVE
        self._block_of: Callable[[torch.Tensor], int | None] = _nowhere

    @contextmanager
    def following(self, model: torch.nn.Module, block_of: Callable[[torch.Tensor], int | None]) -> Iterator[None]:
        """Know the modules of ``model`` by their names and follow their calls; tensors are where ``block_of`` says.

        ``torch.nn.Module.__call__`` itself is wrapped: global hooks would send every call the slow way.
        """
        self._block_of = block_of
        for name, module in model.named_modules():
            self._modules[id(module)] = self._code(name or type(module).__name__, "")
        for name, buffer in model.named_buffers():
            self._mark_named(buffer, Purpose.BUFFER, name)
        for name, parameter in model.named_parameters():
            self._mark_named(parameter, Purpose.PARAMETER, name)
        original = torch.nn.Module.__call__
        torch.nn.Module.__call__ = self._called(original)  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.nn.Module.__call__ = original  # type: ignore[method-assign]
            self._modules.clear()
            self._block_of = _nowhere

    def mark_averages(self, copy: torch.nn.Module) -> None:
        """The parameters and buffers of a moving average's copy of the model."""
        for tensors in (copy.named_parameters(), copy.named_buffers()):
            for name, tensor in tensors:
                self._mark_named(tensor, Purpose.AVERAGED_PARAMETER, name)

    def begin_batch(self) -> None:
        self._phase = Phase.FORWARD

    def mark_inputs(self, batch: Mapping[str, torch.Tensor]) -> None:
        """The samples of a batch: name -> tensor."""
        for name, tensor in batch.items():
            self.mark(tensor, Purpose.INPUT, ("", str(name)))

    def mark_gradients(self, model: torch.nn.Module) -> None:
        """What has become some parameter's ``.grad``, whichever operator made it."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self._mark_named(parameter.grad, Purpose.GRADIENT, name)

    def mark_state(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """What the optimizer keeps for each parameter."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                module, _, name = names.get(id(parameter), "").rpartition(".")
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, torch.Tensor):
                        self.mark(tensor, Purpose.OPTIMIZER_STATE, (module, f"{key} of {name}"))

    def mark(self, tensor: torch.Tensor, purpose: Purpose, owner: tuple[str, str] | None = None) -> None:
        """Say what a tensor is there for, and whose it is if not the module's that runs."""
        if tensor.device.type != NAME:
            return
        block = self._block_of(tensor)
        if block is not None:
            self._trace.purposes[block] = purpose
            if owner is not None:
                self._trace.block_owners[block] = self._code(*owner)

    def _mark_named(self, tensor: torch.Tensor, purpose: Purpose, name: str) -> None:
        module, _, leaf = name.rpartition(".")
        self.mark(tensor, purpose, (module, leaf))

    def enter_operator(self, *, in_optimizer: bool) -> int:
        """The owner of what the operator that runs now allocates; notes where a phase begins."""
        ident = threading.get_ident()
        stack = self._stacks.get(ident)
        if ident == self._main:
            if in_optimizer or (self._phase in (Phase.BACKWARD, Phase.RECOMPUTATION) and not stack):
                phase = Phase.UPDATE
            elif stack and self._phase is not Phase.MOVE:
                phase = Phase.FORWARD
            else:
                phase = self._phase if self._phase is not Phase.RECOMPUTATION else Phase.UPDATE
        else:
            phase = Phase.RECOMPUTATION if stack else Phase.BACKWARD
        self._phase = phase
        phases = self._trace.phases
        if not phases or phases[-1][1] != phase:
            phases.append((len(self._trace.events), phase))
        if stack:
            return stack[-1]
        return self._of_node() if phase is Phase.BACKWARD else _OUTSIDE

    def _of_node(self) -> int:
        """The module whose forward made the node that the engine runs."""
        node: Any = torch._C._current_autograd_node()
        number = _NO_SEQUENCE if node is None else node._sequence_nr()
        if number >= _NO_SEQUENCE:
            return _OUTSIDE
        position = bisect_right(self._numbers, number) - 1
        return self._running[position] if position >= 0 else _OUTSIDE

    def _called(self, original: Callable[..., Any]) -> Callable[..., Any]:
        stacks, modules, main = self._stacks, self._modules, self._main
        sequence_number: Callable[[], int] = torch._C._autograd._get_sequence_nr

        def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            code = modules.get(id(module))
            if code is None:
                return original(module, *args, **kwargs)
            ident = threading.get_ident()
            stack = stacks.setdefault(ident, [])
            stack.append(code)
            if ident == main:
                self._turn(sequence_number(), code)
            try:
                return original(module, *args, **kwargs)
            finally:
                stack.pop()
                if ident == main:
                    self._turn(sequence_number(), stack[-1] if stack else _OUTSIDE)

        return call

    def _turn(self, number: int, code: int) -> None:
        """From node ``number`` on, the forward of ``code`` makes the nodes."""
        if self._numbers and self._numbers[-1] == number:
            self._running[-1] = code
        else:
            self._numbers.append(number)
            self._running.append(code)

    def _code(self, module: str, tensor: str) -> int:
        key = (module, tensor)
        code = self._codes.get(key)
        if code is None:
            code = self._codes[key] = len(self._trace.owners)
            self._trace.owners.append(key)
        return code
