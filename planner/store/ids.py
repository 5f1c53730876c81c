"""Record identifiers: ULIDs, 26 characters that sort by the time of creation.

Because they sort, an identifier alone is a complete keyset cursor and no query needs a second sort column.
Format: https://github.com/ulid/spec (48 bits of milliseconds, 80 random bits, Crockford's base 32).
"""

from __future__ import annotations

import re
import secrets
import threading
from datetime import datetime

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_RANDOM_BITS = 80
_PATTERN = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")

_lock = threading.Lock()
_last = 0


def new_id(at: datetime) -> str:
    """An identifier for a record made at ``at`` (timezone-aware, 1970 or later).

    Identifiers that one process makes within one millisecond grow too, so that a page lists them in order.
    """
    global _last
    milliseconds = int(at.timestamp() * 1000)
    with _lock:
        if _last >> _RANDOM_BITS == milliseconds:
            number = _last + 1
        else:
            number = (milliseconds << _RANDOM_BITS) | secrets.randbits(_RANDOM_BITS)
        _last = number
    return "".join(_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5))


def is_id(text: str) -> bool:
    """Whether ``text`` has the form of an identifier."""
    return _PATTERN.fullmatch(text) is not None
