"""Bytes in, bytes out: parsing what people write (``16GiB``) and printing what they read.

Inside the planner every quantity is an integer number of bytes or a float number of seconds.
"""

from __future__ import annotations

import re

from planner.errors import InvalidArgument

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

MAX_BYTES = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly: 8 PiB."""

# Binary units only by their binary names: "16GB" on a GPU box means 16 GiB to some and 16e9 to others, so GB is decimal
# here, as SI says, and the error for a bare number says which unit to write.
_FACTORS = {
    "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
# No more digits than any size has: int() refuses thousands of them with an error of its own.
_SIZE = re.compile(r"^\s*(?P<number>[0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(?P<unit>[a-zA-Z]*)\s*$")


MAX_BATCH_SIZE = 2**31 - 1
"""The largest that anyone may ask about: every count and every size that follows from it stays a 64-bit integer."""


def parse_bytes(text: str | int, *, field: str = "capacity") -> int:
    """``"16GiB"`` -> 17179869184. A bare integer is a number of bytes. Raises ``InvalidArgument`` naming ``field``."""
    if isinstance(text, int) and not isinstance(text, bool):
        value = text
    else:
        match = _SIZE.match(str(text))
        unit = match["unit"].lower() or "b" if match else ""
        if match is None or unit not in _FACTORS:
            raise InvalidArgument(f"{text!r} is not a size; write for example 16GiB, 40GiB or 17179869184", field=field)
        value = (
            int(float(match["number"]) * _FACTORS[unit])
            if "." in match["number"]
            else int(match["number"]) * _FACTORS[unit]
        )
    if value <= 0:
        raise InvalidArgument(f"{text!r} must be more than 0 bytes", field=field)
    if value > MAX_BYTES:
        raise InvalidArgument(f"{text!r} is more than any GPU or computer has", field=field)
    return value


def format_bytes(count: int | None) -> str:
    """Bytes as a person reads them: ``17179869184`` -> ``"16.00 GiB"``; ``None`` -> ``"-"``."""
    if count is None:
        return "-"
    if abs(count) >= GIB:
        return f"{count / GIB:.2f} GiB"
    if abs(count) >= MIB:
        return f"{count / MIB:.1f} MiB"
    return f"{count} B"
