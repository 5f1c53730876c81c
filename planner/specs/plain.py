"""A document as plain JSON data, whatever format it came from, within limits that no honest spec reaches."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from planner.errors import InvalidSpec

MAX_DEPTH = 24
MAX_VALUES = 20_000
MAX_TEXT_LENGTH = 10_000
MAX_INT = 2**63 - 1
"""What JSON readers in other languages and the database's integer columns hold."""

# A float of YAML 1.2 and JSON that YAML 1.1 (PyYAML) reads as text, because it wants a dot and a signed exponent.
_EXPONENT_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def join(path: str, key: str | int) -> str:
    """``("data.inputs", "x")`` -> ``"data.inputs.x"``; ``("shape", 1)`` -> ``"shape[1]"``."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


def shown(value: Any) -> str:
    """A value as an error message quotes it: JSON, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(document: Any) -> Any:
    """``document`` as fresh dicts, lists, strings, booleans, ``None``, finite floats and 64-bit integers.

    Keys that are integers (``id2label: {0: cat}`` in YAML) become text, as JSON has them. Raises ``InvalidSpec`` with
    the dotted path of the first value that JSON cannot hold, and for documents nested or grown beyond the limits.
    """
    return _Walk().value(document, "", 0)


def number(value: Any) -> Any:
    """Text that is a number (``"1e-4"``, ``"0.01"``) as that number, lists and mappings included; all else as it is."""
    return _convert(value, _NUMBER)


def exponent_number(value: Any) -> Any:
    """As ``number``, but only text with an exponent: ``"1e-5"`` is never meant as text, ``"12"`` may be."""
    return _convert(value, _EXPONENT_FLOAT)


def _convert(value: Any, pattern: re.Pattern[str]) -> Any:
    match value:
        case dict():
            return {key: _convert(item, pattern) for key, item in value.items()}
        case list():
            return [_convert(item, pattern) for item in value]
        case str() if len(value) <= 40 and pattern.fullmatch(value):
            parsed = int(value) if value.lstrip("+-").isdigit() else float(value)
            return parsed if abs(parsed) <= (MAX_INT if isinstance(parsed, int) else 1e308) else value
    return value


class _Walk:
    """One pass over a document that counts what it has seen: YAML aliases make small files of huge documents."""

    def __init__(self) -> None:
        self.count = 0

    def value(self, value: Any, path: str, depth: int) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            raise InvalidSpec(f"the document has more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise InvalidSpec(f"is nested more than {MAX_DEPTH} levels deep", field=path)
        match value:
            case None | bool():
                return value
            case int():
                if abs(value) > MAX_INT:
                    raise InvalidSpec("is an integer of more than 64 bits", field=path)
                return int(value)
            case float():
                if not math.isfinite(value):
                    raise InvalidSpec(f"must be a finite number, not {value}", field=path)
                return float(value)
            case str():
                return self.text(value, path)
            case Mapping():
                return self.mapping(value, path, depth)
            case list() | tuple():
                return [self.value(item, join(path, index), depth + 1) for index, item in enumerate(value)]
        kind = type(value).__name__
        raise InvalidSpec(f"a {kind} is not a value that a spec can hold; put it in quotes", field=path or None)

    def mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise InvalidSpec(f"a key must be text, not {key!r:.60}; put it in quotes", field=path or None)
            name = self.text(str(key), path)
            if name in result:
                raise InvalidSpec("the key is given twice", field=join(path, name))
            result[name] = self.value(item, join(path, name), depth + 1)
        return result

    @staticmethod
    def text(value: str, path: str) -> str:
        if len(value) > MAX_TEXT_LENGTH:
            raise InvalidSpec(f"text of more than {MAX_TEXT_LENGTH} characters", field=path or None)
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InvalidSpec("holds a character that is not text", field=path or None)
        return str(value)
