"""Running the training step on the virtual GPU and recording it."""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from planner.errors import InvalidSpec
from planner.specs.model import Spec
from planner.specs.variants import Compile, Precision, Variant
from planner.virtual import assumptions, attention, autocast, backend, composites, ctc, norms, packing, recurrent
from planner.virtual.architecture import Architecture
from planner.virtual.indices import IndexOutOfRange
from planner.virtual.kernels import Kernels
from planner.virtual.recorder import Recorder, prepare_thread, spare_lookups
from planner.virtual.steady import grown_in_last_step, repeat_last_step, successors_of_last_step
from planner.virtual.trace import Purpose, Trace

if TYPE_CHECKING:
    from planner.training import Training
    from planner.training.data import Batch


@functools.cache
def prepare(architecture: Architecture) -> torch.device:
    """Install the virtual device in this process as a GPU of ``architecture``."""
    device = backend.install()
    prepare_thread()
    autocast.install(_note_cast)
    attention.install(architecture)
    norms.install()
    recurrent.install()
    packing.install()
    composites.install()
    ctc.install()
    spare_lookups()
    _show_values_to_transformers()
    return device


@dataclass(frozen=True, slots=True)
class Built:
    """A model on the CPU, without storage, and the mode that its tensors belong to. It serves for one trace."""

    mode: FakeTensorMode
    model: torch.nn.Module


def build(spec: Spec, architecture: Architecture) -> Built:
    """Build the model of ``spec`` in this process, which becomes one with a virtual GPU."""
    from planner.training import build_model

    prepare(architecture)
    _seed()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.cache_enabled = False  # the recorder has answers to equal calls (``planner.virtual.repeats``)
    with mode, Recorder(Kernels(architecture)):
        return Built(mode, build_model(spec))


def trace_steps(
    spec: Spec,
    variant: Variant,
    batch_size: int,
    architecture: Architecture,
    *,
    num_steps: int = 3,
    built: Built | None = None,
) -> Trace:
    """Build the model where it is not ``built``, move it and run the phases of a trial (``planner.training.schedule``),
    all without storage.

    From the third step on, a step that goes as the one before it is copied instead of run (``planner.virtual.steady``);
    a step of the user's own is always run, since it may count. Where a further step would go so too, the trace says how
    (``Trace.successors``).

    Raises ``InvalidSpec`` for a compiled variant: what the compiler fuses and recomputes is not known here; and for
    tokens or classes that the model has no positions or outputs for.
    """
    from planner.training import Training, check_tf32, phases

    if variant.compile is Compile.ON:
        message = "torch.compile is not predicted, since its compiler decides what is kept: probe it on a GPU"
        raise InvalidSpec(message, field="variants.compile", suggestion="off")
    if variant.precision is Precision.TF32:
        check_tf32(architecture.compute_capability)
    spec = _few_micro_batches(spec)
    device = prepare(architecture)
    built = built or build(spec, architecture)
    _seed()  # a trace shows the same whichever came before it
    recorder = Recorder(Kernels(architecture))
    _recording.append(recorder)
    try:
        with built.mode, recorder:
            recorder.trace.mark("move")
            training = Training(spec, variant, built.model, device)
            schedule = phases(spec, num_steps)
            recorder.is_stepping = True
            with _followed(training, recorder):
                for number, phase in enumerate(schedule):
                    # Only the last phases can be copies: one after a copy would go on from the step that was copied.
                    copies = number >= 2 and all(later.repeats(schedule[number - 1]) for later in schedule[number:])
                    if not copies or spec.train.step or not repeat_last_step(recorder.trace):
                        recorder.trace.mark(phase.name)
                        training.run(phase, batch_size)
                if not spec.train.step:
                    recorder.trace.successors = successors_of_last_step(recorder.trace)
                for sentence in training.report().get("notes", ()):
                    recorder.trace.note(sentence)
                if variant.precision is Precision.FP16_AMP:
                    recorder.trace.note(assumptions.NO_OVERFLOW)
                recorder.stop()
                if (grown := grown_in_last_step(recorder.trace)) > 0:
                    recorder.trace.in_cycles = 2 * recorder.collect() >= grown
    except IndexOutOfRange as error:
        raise error.of_spec(spec) from error
    finally:
        _recording.remove(recorder)
    return recorder.trace


def _seed() -> None:
    """Start the host's random numbers where every prediction starts them: models draw masks from them, whose counts
    become sizes (``_compute_mask_indices`` of transformers' wav2vec2 asks NumPy). A trial on a GPU seeds nothing."""
    random.seed(0)
    torch.default_generator.manual_seed(0)
    if importlib.util.find_spec("numpy") is not None:
        importlib.import_module("numpy").random.seed(0)


MAX_MICRO_BATCHES = 3
"""The third finds what the second left, as every later one does: its peaks are those of any number."""


def _few_micro_batches(spec: Spec) -> Spec:
    steps = min(spec.train.accumulation_steps, MAX_MICRO_BATCHES)
    return replace(spec, train=replace(spec.train, accumulation_steps=steps))


@contextmanager
def _followed(training: Training, recorder: Recorder) -> Iterator[None]:
    """Let the recorder know whose memory it sees: the model's, a batch's, a gradient's, the optimizer's."""
    model, owners, draw = training.model, recorder.owners, training.batch

    def batch(batch_size: int, sequence_length: int | None = None) -> Batch:
        owners.begin_batch()
        drawn = draw(batch_size, sequence_length)
        owners.mark_inputs(drawn)
        return drawn

    def before_step(*_: object) -> None:
        if training.scaler.is_enabled() and recorder.trace.skippable_update is None:
            recorder.trace.skippable_update = len(recorder.trace.events)
        owners.mark_gradients(model)
        recorder.in_optimizer = True

    def after_step(*_: object) -> None:
        recorder.in_optimizer = False
        owners.mark_state(model, training.optimizer)

    training.batch = batch  # type: ignore[method-assign]

    def enter_model(*_: object) -> None:
        recorder.in_own_step = False

    def leave_model(*_: object) -> None:
        recorder.in_own_step = training.custom_step is not None

    leave_model()
    hooks = [
        model.register_forward_pre_hook(enter_model),
        model.register_forward_hook(leave_model, always_call=True),
        training.optimizer.register_step_pre_hook(before_step),
        training.optimizer.register_step_post_hook(after_step),
    ]
    try:
        with owners.following(model, recorder.block_of):
            if training.ema is not None:
                owners.mark_averages(training.ema.module)
            yield
    finally:
        # Nothing may keep the training alive: that its memory is freed at the end is part of the trace.
        del training.batch
        for hook in hooks:
            hook.remove()


_recording: list[Recorder] = []


def _note_cast(cast: torch.Tensor) -> None:
    for recorder in _recording:
        recorder.owners.mark(cast, Purpose.CAST_PARAMETER)


def _show_values_to_transformers() -> None:
    """Let transformers look at masks and positions as it does on a GPU.

    It leaves shortcuts out (a causal mask that need not exist) where it sees a fake tensor, whose values it takes for
    unknown; here the small ones are known (``planner.virtual.values``).
    """
    if importlib.util.find_spec("transformers") is not None:
        library: Any = importlib.import_module("transformers.utils.import_utils")
        if hasattr(library, "is_fake_tensor"):
            library.is_fake_tensor = lambda tensor: False
