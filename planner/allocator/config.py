"""The caching allocator's settings, read from ``PYTORCH_ALLOC_CONF`` as PyTorch reads them.

Sources: c10/core/AllocatorConfig.{h,cpp} and c10/cuda/CUDAAllocatorConfig.cpp, as of torch 2.13. A setting that PyTorch
would refuse is refused here, and so is a number followed by other letters (``64MB``), which PyTorch reads as 64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from planner.errors import InvalidArgument, nearest
from planner.units import MIB

MIN_BLOCK_BYTES = 512
"""kMinBlockSize: every request is rounded up to a multiple of this."""
SMALL_BYTES = MIB
"""kSmallSize: the largest request of the small pool; a block of the large pool is split if more than this is left."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""kSmallBuffer: bytes of a small pool's segment."""
MIN_LARGE_BYTES = 10 * MIB
"""kMinLargeAlloc: a rounded request from here on gets a segment of its own size."""
LARGE_ROUND_BYTES = 2 * MIB
"""kRoundLarge: ... rounded up to a multiple of this."""
_ROUNDUP_INTERVALS = (
    16  # kRoundUpPowerOfTwoIntervals: one for each power of two from 1 MiB to 32 GiB, the last open-ended
)

ENVIRONMENT_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""In the order in which PyTorch looks: the first that is set is used, the others are not read at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorConfig:
    """What decides the device memory that the caching allocator takes; the defaults are PyTorch's."""

    large_segment_bytes: int = 20 * MIB
    """Segment for requests between 1 and 10 MiB, and the page of a large expandable segment."""
    max_split_bytes: int | None = None
    """Blocks of this size or more are never split, nor used for smaller requests; ``None``: no such size."""
    max_non_split_rounding_bytes: int = 20 * MIB
    """How much larger than an oversize request the cached block that serves it may be (exclusive)."""
    roundup_power2_divisions: tuple[int, ...] = (0,) * _ROUNDUP_INTERVALS
    """Per power of two from 1 MiB to 32 GiB: the steps that it is divided into for rounding up; 0 and 1: none."""
    garbage_collection_threshold: float = 0.0
    """Share of the limit above which old cached segments are freed before a new one is taken; 0: never."""
    expandable_segments: bool = False
    per_process_memory_fraction: float = 1.0
    """Share of the device's memory that may be reserved; 1: no limit other than the device's own."""

    def round_size(self, size: int) -> int:
        """Bytes of the block for a request of ``size`` bytes (round_size, roundup_power2_next_division)."""
        if size < MIN_BLOCK_BYTES:
            return MIN_BLOCK_BYTES
        exponent = size.bit_length() - 1
        divisions = self.roundup_power2_divisions[min(max(exponent - 20, 0), _ROUNDUP_INTERVALS - 1)]
        if divisions > 1 and size > MIN_BLOCK_BYTES * divisions:
            step = (1 << exponent) // divisions
            return -(-size // step) * step
        return -(-size // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES

    def segment_size(self, rounded: int) -> int:
        """Bytes that are asked of the driver when no cached block serves ``rounded`` bytes (get_allocation_size)."""
        if rounded <= SMALL_BYTES:
            return SMALL_SEGMENT_BYTES
        if rounded < MIN_LARGE_BYTES:
            return self.large_segment_bytes
        return -(-rounded // LARGE_ROUND_BYTES) * LARGE_ROUND_BYTES

    def limit_bytes(self, device_total_bytes: int) -> int | None:
        """The limit that ``per_process_memory_fraction`` sets on reserved bytes; ``None``: no limit."""
        return fraction_limit_bytes(self.per_process_memory_fraction, device_total_bytes)


def fraction_limit_bytes(fraction: float, device_total_bytes: int) -> int | None:
    """What ``torch.cuda.set_per_process_memory_fraction(fraction)`` allows to be reserved; ``None``: no limit."""
    return int(fraction * device_total_bytes) if fraction < 1.0 else None


def conf_from_environment(environment: Mapping[str, str]) -> str:
    """The allocator's settings in ``environment``, or ``""``."""
    return next((environment[name] for name in ENVIRONMENT_VARIABLES if name in environment), "")


def normalised_conf(text: str) -> str:
    """``text`` without spaces and sorted by key, so that equal settings compare equal. Raises ``InvalidArgument``."""
    parse_conf(text)
    settings = dict(_settings(text, "PYTORCH_ALLOC_CONF"))
    return ",".join(f"{key}:{settings[key]}" for key in sorted(settings))


def parse_conf(text: str, *, field: str = "PYTORCH_ALLOC_CONF") -> AllocatorConfig:
    """``"max_split_size_mb:64,expandable_segments:True"`` -> its settings; ``""`` -> the defaults.

    Settings that do not change device memory (``pinned_*``, ``release_lock_on_cudamalloc``, ...) are checked for their
    name only. Raises ``InvalidArgument`` that names ``field.key`` and what is allowed there.
    """
    settings = dict(_settings(text, field))
    for key in settings:
        if key not in _PARSERS and key not in _WITHOUT_EFFECT:
            names = [*_PARSERS, *_WITHOUT_EFFECT]
            message = f"{key!r} is not a setting of PyTorch's allocator"
            raise InvalidArgument(message, field=field, suggestion=nearest(key, names))
    values: dict[str, object] = {}
    # First, as PyTorch does: it is the least that two other settings may be.
    for key in sorted(settings, key=lambda key: key != "large_segment_size_mb"):
        if key in _PARSERS:
            name, parse = _PARSERS[key]
            value = parse(settings[key], f"{field}.{key}")
            if key == "large_segment_size_mb":
                values["max_non_split_rounding_bytes"] = value
            elif key in ("max_split_size_mb", "max_non_split_rounding_mb"):
                _check_at_least(value, values.get("large_segment_bytes", 20 * MIB), f"{field}.{key}")
            if name is not None:
                values[name] = value
    return AllocatorConfig(**values)  # type: ignore[arg-type]


def _settings(text: str, field: str) -> Iterator[tuple[str, str]]:
    """The ``key:value`` pairs of ``text``; a value may be a list in brackets. A later pair replaces an earlier one."""
    rest = re.sub(r"\s+", "", text)
    pair = re.compile(r"(?P<key>[^,:\[\]]+):(?P<value>\[[^\]]*\]|[^,:\[\]]+)(?:,|$)")
    while rest:
        match = pair.match(rest)
        if match is None:
            message = f"cannot read {rest!r}: write key:value pairs with commas between them"
            raise InvalidArgument(message, field=field, suggestion="max_split_size_mb:64,expandable_segments:True")
        yield match["key"], match["value"]
        rest = rest[match.end() :]


def _megabytes(value: str, field: str) -> int:
    if not value.isascii() or not value.isdigit():
        raise InvalidArgument(f"{value!r} is not a whole number of MiB", field=field)
    return int(value) * MIB


def _large_segment(value: str, field: str) -> int:
    size = _megabytes(value, field)
    if size <= MIN_LARGE_BYTES:
        raise InvalidArgument(f"{value} must be more than {MIN_LARGE_BYTES // MIB}", field=field, suggestion="20")
    return size


def _check_at_least(value: object, least: object, field: str) -> None:
    assert isinstance(value, int)
    assert isinstance(least, int)
    if value < least:
        message = f"{value // MIB} must be at least {least // MIB}"
        raise InvalidArgument(message, field=field, suggestion=str(least // MIB))


def _number(value: str, field: str, what: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InvalidArgument(f"{value!r} is not {what}", field=field) from None


def _threshold(value: str, field: str) -> float:
    what = "a number between 0 and 1, both excluded"
    number = _number(value, field, what)
    if not 0 < number < 1:
        raise InvalidArgument(f"{value} is not {what}", field=field, suggestion="0.8")
    return number


def _fraction(value: str, field: str) -> float:
    what = "a number from 0 to 1"
    number = _number(value, field, what)
    if not 0 <= number <= 1:
        raise InvalidArgument(f"{value} is not {what}", field=field, suggestion="1.0")
    return number


def _boolean(value: str, field: str) -> bool:
    if value not in ("True", "False"):
        raise InvalidArgument(
            f"{value!r} must be True or False", field=field, suggestion=nearest(value, ["True", "False"])
        )
    return value == "True"


def _backend(value: str, field: str) -> str:
    if value == "cudaMallocAsync":
        message = "cudaMallocAsync leaves caching to the driver, which the planner cannot model"
        raise InvalidArgument(message, field=field, suggestion="native")
    if value != "native":
        raise InvalidArgument(f"{value!r} is not a backend", field=field, suggestion="native")
    return value


def _power_of_two(value: str, field: str, *, zero: bool = False) -> int:
    number = int(value) if value.isascii() and value.isdigit() else -1
    if number < 0 or number & (number - 1) or (number == 0 and not zero):
        raise InvalidArgument(f"{value!r} must be a power of two{' or 0' if zero else ''}", field=field, suggestion="4")
    return number


def _divisions(value: str, field: str) -> tuple[int, ...]:
    """``4`` for all sizes, or ``[256:1,512:2,>:4]``: from each power of two in MiB on; ``>`` for all above the last.

    As in PyTorch the first boundary also sets all sizes below it, and a size between two boundaries that is not named
    itself is not rounded.
    """
    if not value.startswith("["):
        return (_power_of_two(value, field),) * _ROUNDUP_INTERVALS
    divisions = [0] * _ROUNDUP_INTERVALS
    first, last = True, 0
    for item in value[1:-1].split(","):
        boundary, colon, count = item.partition(":")
        if not colon:
            raise InvalidArgument(f"{item!r} must be MiB:divisions", field=field, suggestion="[256:1,512:2,>:4]")
        steps = _power_of_two(count, field, zero=True)
        if boundary == ">":
            divisions[last + 1 :] = [steps] * (_ROUNDUP_INTERVALS - last - 1)
            continue
        index = min(_power_of_two(boundary, field).bit_length() - 1, _ROUNDUP_INTERVALS - 1)
        if first:
            divisions[:index] = [steps] * index
            first = False
        divisions[index] = steps
        last = index
    return tuple(divisions)


_PARSERS: Mapping[str, tuple[str | None, Callable[[str, str], object]]] = {
    "large_segment_size_mb": ("large_segment_bytes", _large_segment),
    "max_split_size_mb": ("max_split_bytes", _megabytes),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _megabytes),
    "roundup_power2_divisions": ("roundup_power2_divisions", _divisions),
    "garbage_collection_threshold": ("garbage_collection_threshold", _threshold),
    "expandable_segments": ("expandable_segments", _boolean),
    "per_process_memory_fraction": ("per_process_memory_fraction", _fraction),
    "backend": (None, _backend),
}
_WITHOUT_EFFECT = (
    "release_lock_on_cudamalloc", "release_lock_on_hipmalloc", "graph_capture_record_stream_reuse",
    "throw_on_cudamalloc_oom", "expandable_segments_reserve", "expandable_segments_reserve_by_class",
    "pinned_use_background_threads", "pinned_use_cuda_host_register", "pinned_use_hip_host_register",
    "pinned_num_register_threads", "pinned_reserve_segment_size_mb", "pinned_free_catch_all",
    "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb",
)  # fmt: skip
