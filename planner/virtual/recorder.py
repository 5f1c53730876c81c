"""Recording every birth and death of device memory below autograd while the real training step runs."""

from __future__ import annotations

import dis
import functools
import gc
import importlib
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from planner.errors import ModelError
from planner.virtual import assumptions, convolution_kernels, ctc, norms, packing, recurrent, repeats, values
from planner.virtual.attention import adds_in_place
from planner.virtual.backend import NAME, install
from planner.virtual.driver_memory import DriverMemory
from planner.virtual.fills import check_fill
from planner.virtual.indices import check_indices
from planner.virtual.kernels import Kernels
from planner.virtual.operators import Operator
from planner.virtual.owners import Owners
from planner.virtual.rules import Call, Step
from planner.virtual.trace import Doubt, Formula, Purpose, Trace, Workspace

aten = torch.ops.aten
# What a gradient that only the engine's buffer holds counts here, seen from inside a dispatch mode.
_ENGINE_TENSOR_REFERENCES, _ENGINE_STORAGE_REFERENCES = 4, 2
_GROUPED_MM: Any = getattr(getattr(aten, "_grouped_mm", None), "default", None)
_LIFT = aten.lift_fresh.default
_PACK = aten._pack_padded_sequence.default
_WRAPPERS = {"torch._compile", "torch._dynamo.eval_frame", "torch.utils._python_dispatch", __name__}
"""Modules whose frames stand between the engine and ``Recorder.__torch_dispatch__``: torch wraps each dispatch."""
_ZERO = {torch.bool: False, torch.int64: 0, torch.int32: 0, torch.uint8: 0}
_DEVICE = torch.ops.prim.device.default
_ADD = aten.add.Tensor
_PUT = aten.index_put.default


def _grouped_mm(*args: Any, **kwargs: Any) -> torch.Tensor:
    """``_grouped_mm`` takes float32 and float16 on CUDA, one product for each group; its shape function knows bf16
    alone."""
    dtype = args[0].dtype
    low = [
        item.to(torch.bfloat16) if isinstance(item, torch.Tensor) and item.is_floating_point() else item
        for item in args
    ]
    out: torch.Tensor = _GROUPED_MM(*low, **{**kwargs, "out_dtype": None} if "out_dtype" in kwargs else kwargs)
    return out if dtype is torch.bfloat16 else out.to(dtype)


_UPDATES = [
    getattr(packet, overload)
    for name in ("_fused_sgd_", "_fused_adagrad_")
    if (packet := getattr(aten, name, None)) is not None
    for overload in packet.overloads()
]
"""Fused optimizer steps that have no shape function: they write into what they are given."""


def _update(*_: Any, **__: Any) -> None:
    return None


def _is_assignment() -> bool:
    """Whether an assignment to an item (``tensor[index] = number``) is what runs."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _WRAPPERS:
        frame = frame.f_back
    return frame is not None and dis.opname[frame.f_code.co_code[frame.f_lasti]] in ("STORE_SUBSCR", "STORE_SLICE")


_ONE_BY_ONE = [getattr(aten, f"_foreach_{name}").default for name in ("sqrt", "neg", "abs", "reciprocal")]
"""Optimizers' kernels that take each tensor of a list by itself: ``FakeTensorMode`` asks for each of hundreds."""


_BY_META_KERNEL = [
    packet.default
    for name in """_log_softmax _safe_softmax _softmax _softmax_backward_data _to_copy _unsafe_view addmm as_strided bmm
    expand mm native_dropout native_dropout_backward native_layer_norm nll_loss_backward nll_loss_forward silu_backward
    slice_backward t tanh_backward threshold_backward unsqueeze view""".split()
    if (packet := getattr(aten, name, None)) is not None
]
"""Operators of which ``FakeTensorMode`` says the same, and is slow to say it."""


def _one_by_one(func: Any, tensors: Any) -> Any:
    return repeats.like_each(tensors) or func(tensors)


@dataclass(slots=True)
class _Seen:
    """What is known of an operator call from an equal one before it."""

    answer: repeats.Answer
    sizes: list[int] | None = None
    """Bytes of the new storages that ``steps`` were given for."""
    steps: list[Step] = field(default_factory=list)
    is_plain: bool = False
    """The steps are those storages, one after another, and nothing else."""


def spare_lookups() -> None:
    """Have torch find no rule of an operator's own for ``Recorder`` without a search in Python: there is none, and it
    searches at each of tens of thousands of calls.

    torch keeps the function that it searches with from a process's first dispatch to a mode on
    (``maybe_get_registered_torch_dispatch_rule`` in torch/csrc/utils/python_arg_parser.cpp).
    """
    registry: Any = importlib.import_module("torch._library.simple_registry")
    search = registry.find_torch_dispatch_rule
    registry.find_torch_dispatch_rule = lambda func, kind: None if kind is Recorder else search(func, kind)


class _Thread(threading.local):
    is_prepared = False


_thread = _Thread()


def prepare_thread() -> None:
    """Have ``torch.tensor(..., device=...)`` made on the CPU and moved below the modes: there is no device to make it
    on. Torch keeps that for each thread, and a checkpointed block runs again in the engine's."""
    torch._C._set_only_lift_cpu_tensors(True)
    _thread.is_prepared = True


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs above ``FakeTensorMode``: sees each operator that a CUDA kernel would serve.

    A storage on the virtual device is born with the operator that returns it first and dies when PyTorch frees it,
    which a weak reference tells at the very moment. ``kernels`` adds what CUDA kernels allocate beyond their outputs.
    """

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.owners = Owners(self.trace)
        self.kernels = kernels
        self._live: dict[int, tuple[Any, int | None]] = {}
        self._answers: dict[repeats.Key, _Seen] = {}
        self._stopped = False
        # Of operators whose own shape function is slow, is missing or knows less than CUDA.
        self._shape_functions: dict[Any, Callable[..., Any]] = {
            **{func: functools.partial(repeats.by_meta_kernel, func) for func in _BY_META_KERNEL},
            _GROUPED_MM: _grouped_mm,
            aten.convolution.default: convolution_kernels.result,
            aten.convolution_backward.default: convolution_kernels.gradients,
            aten.native_layer_norm_backward.default: norms.layer_norm_gradients,
            aten._cudnn_init_dropout_state.default: recurrent.dropout_state,
            aten._cudnn_rnn.default: functools.partial(recurrent.forward_outputs, kernels.architecture),
            aten._cudnn_rnn_backward.default: recurrent.backward_outputs,
            **ctc.SHAPE_FUNCTIONS,
            **dict.fromkeys(_UPDATES, _update),
            **{func: functools.partial(_one_by_one, func) for func in _ONE_BY_ONE},
        }
        self._convolutions: dict[tuple[Any, ...], int] = {}  # PyTorch keeps their plans for each thread
        self._main = threading.get_ident()
        self._device = install()
        self._has_launched = False
        self.driver_memory = DriverMemory()
        self.is_stepping = False
        """Whether weights are there and steps are taken: copying them launches no kernel."""
        self.in_optimizer = False
        """Whether an optimizer takes its step: what it reads scales its update, and no size follows from it."""
        self.in_own_step = False
        """Whether a step of the user's own runs, outside its model: what it reads it shows or compares."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and the guard against it would cost more than many an answer."""
        return False

    def stop(self) -> None:
        """Record nothing more: what dies from now on does so because the trace is at its end."""
        self.trace.mark("end")
        self._stopped = True

    def collect(self) -> int:
        """Run Python's garbage collector; how many bytes it freed."""
        before = [block for _, block in self._live.values() if block is not None]
        gc.collect()
        left = {block for _, block in self._live.values()}
        return sum(self.trace.sizes[block] for block in before if block not in left)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _thread.is_prepared:
            prepare_thread()
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # the engine asks it of each gradient many times
            return args[0].fake_device
        kwargs = kwargs or {}
        operator = Operator.of(func)
        if operator.is_question:
            return func(*args, **kwargs)
        if operator.is_composite:  # reached undecomposed, as in inference mode: its parts are what a kernel serves
            with self:
                return recurrent.ROUTES.get(func, func.decompose)(*args, **kwargs)
        if operator.writes_lists:
            if values.compute_values(func, args, kwargs) is values.UNKNOWN:
                values.forget_mutated(func, args, kwargs)
            return None
        if func is _LIFT and (lifted := repeats.lifted(args[0])) is not None:
            values.set_value(lifted, args[0])
            return lifted
        if func is _PACK:
            with self:
                return packing.pack_padded_sequence(*args)
        if operator.reads:
            known = values.value_of(args[0])
            if known is not None:
                if values.is_assumed(args):
                    self.trace.note(assumptions.BALANCED)
                if args[0].device.type == NAME and self.is_stepping:
                    self.trace.take(self.driver_memory.of_launch(operator.packet, args, None))
                with unset_fake_temporarily():
                    return known.item()
            if args[0].device.type == NAME and self.in_own_step and not self.in_optimizer:
                self.trace.note(assumptions.READ_BY_STEP)
                return args[0].dtype is not torch.bool and (1.0 if args[0].is_floating_point() else 1)
            if args[0].device.type == NAME and not self.in_optimizer:
                raise ModelError(
                    "the model reads the value of a tensor that depends on its weights, or of a very large one; the "
                    "virtual GPU has none",
                    field="model",
                )
            # Initialising weights on the CPU, or a norm that Adafactor scales by: the value costs no memory.
            return _ZERO.get(args[0].dtype, 0.0)
        if func is _ADD and self._accumulates_in_place(args):
            return args[0]
        if func is _ADD and adds_in_place():
            return aten.detach.default(args[0])
        if operator.adds_to_zeros and self._writes_in_place(func, args):
            self._record(operator, args, kwargs, args[0])
            return args[0]
        repeated = repeats.described(operator, args, kwargs)
        if repeated is not None:
            seen = self._answers.get(repeated.key)
            if seen is not None:
                outputs = seen.answer.made(repeated)
                if repeated.has_values:
                    real = values.compute_values(func, args, kwargs)
                    if real is not values.UNKNOWN:
                        values.attach_values(outputs, real, assumed=values.is_assumed(args, kwargs))
                self._record(operator, args, kwargs, outputs, seen)
                return outputs
        check_indices(func, args)
        check_fill(func, args)
        real = values.compute_values(func, args, kwargs)
        assumed = real is not values.UNKNOWN and values.is_assumed(args, kwargs)
        if real is values.UNKNOWN:
            values.forget_mutated(func, args, kwargs)
        try:
            shape = self._shape_functions.get(func)
            outputs = shape(*args, **kwargs) if shape is not None else func(*args, **kwargs)
        except torch._subclasses.fake_tensor.DynamicOutputShapeException as error:
            if values.is_assumed(args):
                self.trace.note(assumptions.BALANCED)
            if real is not values.UNKNOWN:
                outputs = torch.utils._pytree.tree_map(lambda item: torch.empty_like(item, device=args[0].device), real)
            elif func is aten.index.Tensor and (listed := values.listed_indices(args[1])) is not None:
                outputs = func(args[0], listed)
            else:
                raise ModelError(
                    f"the shape of {func}'s result depends on values that the virtual GPU does not have", field="model"
                ) from error
        values.adopt_constants(outputs)
        if real is not values.UNKNOWN:
            values.attach_values(outputs, real, assumed=assumed)
        else:
            assumptions.assume_choice(func, args, kwargs, outputs)
        values.carry_range(func, args, outputs)
        if func is aten.scalar_tensor.default and _is_assignment():
            # ``tensor[index] = 1``: on CUDA the number stays in host memory (``THPVariable_setitem`` of
            # torch/csrc/autograd/python_variable_indexing.cpp).
            self._overlook(outputs.untyped_storage())
            return outputs
        seen = None
        # What an operator does to its arguments' own layout or values, no answer tells.
        if repeated is not None and repeats.described(operator, args, kwargs) == repeated:
            answer = repeats.answer_of(repeated, outputs)
            if answer is not None:
                seen = self._answers[repeated.key] = _Seen(answer)
        self._record(operator, args, kwargs, outputs, seen)
        return outputs

    def _record(self, operator: Operator, args: Any, kwargs: Any, outputs: Any, seen: _Seen | None = None) -> None:
        born: list[tuple[torch.UntypedStorage, int]] = []
        new: set[int] = set()
        touched = False
        for item in (outputs,) if isinstance(outputs, FakeTensor) else values.tensors_of(outputs):
            if isinstance(item, FakeTensor) and item.fake_device == self._device:
                touched = True
                storage = item.untyped_storage()
                key = storage._cdata
                if key not in self._live and key not in new and (size := storage.nbytes()):
                    new.add(key)
                    born.append((storage, size))
        if not touched:
            return
        name, packet = operator.name, operator.packet
        trace = self.trace
        if self._has_launched and not trace.first_kernel:  # what the first one takes is there before it is launched
            trace.first_kernel = len(trace.events)
        self._has_launched |= self.is_stepping and operator.launches
        driver = self.driver_memory if self.is_stepping else None
        owner = self.owners.enter_operator(in_optimizer=self.in_optimizer)
        sizes = [size for _, size in born]
        if seen is not None and seen.sizes == sizes:
            steps = seen.steps
            if seen.is_plain:
                for storage, size in born:
                    self._birth(storage, size, name, owner, None)
                if driver is not None:
                    trace.take(driver.of_handles(packet, self._thread()))
                    trace.take(driver.of_launch(packet, args, outputs))
                return
        else:
            steps = list(self.kernels.of_call(Call(packet, args, kwargs, sizes)))
            if seen is not None:
                seen.sizes, seen.steps = sizes, steps
                in_turn = steps == [("output", index) for index in range(len(born))]
                seen.is_plain = in_turn and operator.is_modelled and not operator.has_handles
        temporaries: list[int] = []
        in_host_memory = set(range(len(born)))
        own_size: int | Formula | None = None
        if operator.has_handles:
            steps = [*steps, *self.kernels.of_handles(packet, self._thread())]
        if driver is not None and not born:
            trace.take(driver.of_handles(packet, self._thread()))
        for kind, value in steps:
            if kind == "output":
                assert isinstance(value, int)
                self._birth(*born[value], name, owner, own_size)
                in_host_memory.discard(value)
                own_size = None
                if driver is not None:  # workspaces come after a handle
                    trace.take(driver.of_handles(packet, self._thread()))
            elif kind == "size":
                own_size = value
            elif kind == "free":
                assert isinstance(value, int)
                trace.free(temporaries.pop(-1 - value))
            elif kind == "doubt":
                assert isinstance(value, Formula)
                trace.doubts.append(Doubt(name.removeprefix("aten::"), value, modelled=True))
            elif kind == "library":
                assert isinstance(value, int)
                trace.library_bytes[len(trace.events)] = value
            else:
                block = trace.allocate(value, name, owner, Purpose.WORKSPACE)
                if kind != "kept":
                    temporaries.append(block)
                if isinstance(value, Workspace):
                    key = (self._thread(), value.convolution, value.numbers)
                    trace.convolutions[block] = self._convolutions.setdefault(key, len(self._convolutions))
        if driver is not None:
            trace.take(driver.of_launch(packet, args, outputs))
        if not operator.is_modelled:
            involved = values.tensors_of((args, kwargs, outputs))
            touched_bytes = sum(item.numel() * item.element_size() for item in involved if isinstance(item, FakeTensor))
            trace.doubts.append(Doubt(name.removeprefix("aten::"), Formula(int, (touched_bytes,)), modelled=False))
        for block in reversed(temporaries):  # as their C++ owners go out of scope
            trace.free(block)
        for index in in_host_memory:
            self._overlook(born[index][0])

    def _accumulates_in_place(self, args: Any) -> bool:
        """Whether this addition is the engine's, summing two gradients of one tensor, and CUDA would do it in place.

        ``InputBuffer::accumulate`` (torch/csrc/autograd/input_buffer.cpp) adds in place when nobody else holds the
        first gradient; it never does so for subclasses, which fake tensors are.
        """
        if len(args) != 2 or not self._is_engine():
            return False
        first, second = args
        if not isinstance(second, torch.Tensor) or first.shape != second.shape or first.dtype is not second.dtype:
            return False
        return (
            first._use_count() <= _ENGINE_TENSOR_REFERENCES
            and torch._C._storage_Use_Count(first.untyped_storage()._cdata) <= _ENGINE_STORAGE_REFERENCES
        )

    def _writes_in_place(self, func: Any, args: Any) -> bool:
        """Whether these are zeros that the engine writes a gradient into, though not into a subclass's:
        ``index_backward`` in torch/csrc/autograd/FunctionsManual.cpp, ``index_select_backward_symint`` and
        ``gather_backward`` in aten/src/ATen/native/TensorAdvancedIndexing.cpp (recorded trace of lstm-tagger)."""
        accumulates = func is not _PUT or (len(args) > 3 and args[3])
        return bool(accumulates) and self._is_engine()

    def _is_engine(self) -> bool:
        """Whether the autograd engine itself asked: from its own thread, with no Python below but torch's."""
        if threading.get_ident() == self._main or torch.is_grad_enabled():
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_globals.get("__name__") not in _WRAPPERS:
                return False
            frame = frame.f_back
        return True

    def _thread(self) -> str:
        return "forward" if threading.get_ident() == self._main else "backward"

    def block_of(self, tensor: torch.Tensor) -> int | None:
        """The block that ``tensor`` lies in; ``None`` where it has none on the virtual device."""
        found = self._live.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def _overlook(self, storage: torch.UntypedStorage) -> None:
        """Never take ``storage`` for a new one: it is in host memory."""
        key = storage._cdata
        self._live[key] = (weakref.ref(storage, lambda _: self._live.pop(key, None)), None)

    def _birth(
        self, storage: torch.UntypedStorage, own: int, name: str, owner: int, size: int | Formula | None
    ) -> None:
        key = storage._cdata
        block = self.trace.allocate(own if size is None else size, name, owner)

        def died(_: object) -> None:
            self._live.pop(key, None)
            if not self._stopped:
                self.trace.free(block)

        self._live[key] = (weakref.ref(storage, died), block)
