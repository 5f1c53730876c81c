"""Where a question is answered: on a GPU of this machine where one of that type is at hand, else on the virtual GPU.

The command line and the workers choose by the same rules, and say what they chose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.allocator.config import SMALL_SEGMENT_BYTES
from planner.devices import Device
from planner.errors import InvalidArgument
from planner.gpus import Gpu, default_capacity_bytes, find_gpu
from planner.local_gpus import LocalGpu, local_gpus
from planner.units import GIB, format_bytes

DEFAULT_GPU = "h200"
"""The type that a prediction is for when no type was named and no GPU is here. A note says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which GPU type answers, whether on a card of this machine, and under which capacity."""

    gpu: Gpu
    local: LocalGpu | None
    """The card to measure on; ``None`` = the virtual GPU."""
    capacity_bytes: int
    stands_for: Gpu | None = None
    """The type whose capacity that is, where it is measured on another one."""
    notes: tuple[str, ...] = ()
    """Sentences that whoever asked must see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """A device, ready to use, and what must be said about it."""

    device: Device
    gpu: Gpu
    predictor: Device | None
    """For a measurement: the virtual GPU of the same type and capacity, which says where the search begins."""
    notes: tuple[str, ...]


def choose_device(
    gpu: str | None,
    capacity_bytes: int | None,
    predicted_only: bool,
    on: str | None = None,
    *,
    find_local: Callable[[], Sequence[LocalGpu]] = local_gpus,
) -> Selected:
    """The device for a question about ``gpu`` (``None`` = this machine's) under ``capacity_bytes`` (``None`` = all).

    ``on`` is the type to measure it on, in place of ``gpu``, under the capacity of ``gpu``. Raises ``InvalidArgument``
    (``gpu``, ``capacity``, ``on``), ``DeviceUnavailable`` when a driver is there but does not answer.

    Nothing is started; torch is not imported.
    """
    from planner.virtual.device import VirtualDevice

    here = find_local()
    choice = choose(gpu, capacity_bytes, predicted_only, here, on)
    virtual = VirtualDevice(choice.gpu, choice.capacity_bytes)
    if choice.local is None:
        return Selected(device=virtual, gpu=choice.gpu, predictor=None, notes=choice.notes)
    from planner.runtime.device import LocalDevice

    same = choice.local.gpu.name
    peers = [card for card in here if card.gpu.name == same and card.uuid != choice.local.uuid]
    real = LocalDevice(choice.local, choice.capacity_bytes, peers=peers, stands_for=choice.stands_for)
    return Selected(device=real, gpu=choice.gpu, predictor=virtual, notes=choice.notes)


def choose(
    name: str | None,
    capacity_bytes: int | None,
    predicted_only: bool,
    here: Sequence[LocalGpu],
    on: str | None = None,
) -> Choice:
    """The rules of ``choose_device``, given the GPUs that are ``here``. Raises ``InvalidArgument``."""
    if on is not None:
        return _choose_on(on, name, capacity_bytes, predicted_only, here)
    types = [card.gpu for card in here]
    if name is not None:
        gpu = next((kind for kind in types if kind.name == name), None) or find_gpu(name)
    else:
        gpu = types[0] if types else find_gpu(DEFAULT_GPU)
    local = next((card for card, kind in zip(here, types, strict=True) if kind.name == gpu.name), None)
    notes = [] if name is not None or here else [f"no GPU type was named and none is here: answered for {gpu.name}"]
    if local is None or predicted_only:
        reason = "" if predicted_only else f"no {gpu.name} is here: "
        notes.append(f"{reason}predicted on a virtual {gpu.name}, nothing is measured")
        local = None
    capacity, limited = usable_capacity(gpu, capacity_bytes, real=local is not None)
    notes.extend(limited)
    return Choice(gpu=gpu, local=local, capacity_bytes=capacity, notes=tuple(notes))


def check_on(on: str | None, predicted_only: bool) -> None:
    """Raises ``InvalidArgument`` for a prediction that is to be measured on some GPU."""
    if on is not None and predicted_only:
        raise InvalidArgument("a prediction runs on no GPU; name the type that it is for in gpu", field="on")


def _choose_on(
    on: str, name: str | None, capacity_bytes: int | None, predicted_only: bool, here: Sequence[LocalGpu]
) -> Choice:
    """``on`` measures under the capacity of ``name``, or of its own where that is not given."""
    check_on(on, predicted_only)
    types = {card.gpu.name: card for card in reversed(here)}
    local = types.get(on) or types.get(find_gpu(on, field="on").name)
    if local is None:
        listed = f"only {', '.join(types)}" if types else "no GPU"
        raise InvalidArgument(f"no {on} is here: {listed}", field="on", suggestion=next(iter(types), None))
    card, gpu = local.gpu, local.gpu if name is None else types[name].gpu if name in types else find_gpu(name)
    stands_for = None if gpu.name == card.name else gpu
    capacity, notes = usable_capacity(gpu, capacity_bytes, real=stands_for is None)
    most = default_capacity_bytes(card)
    if stands_for is not None and capacity > most:
        raise InvalidArgument(
            f"one {card.name} leaves the allocator {format_bytes(most)}, which is less than the "
            f"{format_bytes(capacity)} to be measured for {gpu.name}",
            field="on",
        )
    return Choice(gpu=card, local=local, capacity_bytes=capacity, stands_for=stands_for, notes=notes)


def usable_capacity(gpu: Gpu, capacity_bytes: int | None, *, real: bool) -> tuple[int, tuple[str, ...]]:
    """The capacity that a question about ``gpu`` is answered for, and what must be said about it.

    ``None`` = all that the type leaves. Raises ``InvalidArgument`` (``capacity``) for more than the card has, and for
    less than torch reserves for the first byte.
    """
    most = default_capacity_bytes(gpu)
    capacity = most if capacity_bytes is None else capacity_bytes
    if capacity > gpu.total_bytes:
        raise InvalidArgument(
            f"{format_bytes(capacity)} is more than the {format_bytes(gpu.total_bytes)} of one {gpu.name}",
            field="capacity",
        )
    if capacity < SMALL_SEGMENT_BYTES:
        # Most likely a number whose unit was left out: 16 for 16GiB.
        meant = f"{capacity}GiB" if capacity * GIB <= gpu.total_bytes else None
        raise InvalidArgument(
            f"{format_bytes(capacity)} is less than the {format_bytes(SMALL_SEGMENT_BYTES)} of the smallest segment "
            "that torch reserves",
            field="capacity",
            suggestion=meant,
        )
    if capacity > most and not real:
        # A real card refuses what its context has taken; the virtual one must not promise it.
        note = f"beside its CUDA context a {gpu.name} leaves {format_bytes(most)}: answered for that capacity"
        return most, (note,)
    return capacity, ()
