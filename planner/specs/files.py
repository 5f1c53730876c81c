"""Spec files: YAML, JSON or TOML text to a mapping, with the line of whatever is wrong."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from planner.errors import InvalidArgument, InvalidSpec, nearest
from planner.specs.plain import MAX_VALUES

MAX_FILE_BYTES = 1 << 20
"""No honest spec is larger, and a wrong path (a checkpoint, a log) is not read into memory."""
MAX_TEXT_DEPTH = 100
"""Far above what ``planner.specs.plain`` accepts, far below what a C stack holds."""


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in the file at ``path``, in the format that its suffix names.

    Raises ``InvalidArgument`` for a file that cannot be read, ``InvalidSpec`` for one whose text is malformed; the
    file's name is the error's field.
    """
    if path.suffix.lower() not in _READERS:
        raise InvalidArgument(
            f"a spec is a file that ends in {', '.join(_READERS)}", field=str(path), suggestion=_neighbour(path)
        )
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = error.strerror or type(error).__name__
        raise InvalidArgument(reason, field=str(path), suggestion=_neighbour(path) if missing else None) from error
    if len(content) > MAX_FILE_BYTES:
        raise InvalidSpec(f"is larger than {MAX_FILE_BYTES} bytes", field=str(path))
    return parse_text(content, path.suffix.lower(), field=str(path))


def parse_text(content: bytes, suffix: str, *, field: str) -> dict[str, Any]:
    """The mapping that ``content`` says, in the format of files that end in ``suffix`` (``.yaml``, ``.json``, ...).

    Raises ``InvalidSpec`` for ``field`` when the text is malformed, empty or no mapping.
    """
    try:
        document = _READERS[suffix](content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidSpec(f"is not UTF-8 text (byte {error.start})", field=field) from error
    except RecursionError as error:
        raise InvalidSpec("is nested too deep", field=field) from error
    except (ValueError, yaml.YAMLError) as error:
        raise InvalidSpec(_one_line(error), field=field) from error
    if document is None:
        raise InvalidSpec("is empty", field=field)
    if not isinstance(document, dict):
        raise InvalidSpec("must hold a mapping with the keys model and data", field=field)
    return document


def _neighbour(path: Path) -> str | None:
    """The spec in the same folder that was most likely meant."""
    try:
        names = [item.name for item in path.parent.iterdir() if item.suffix.lower() in _READERS]
    except OSError:
        return None
    name = nearest(path.name, names)
    return str(path.parent / name) if name else None


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg[:1].lower()}{error.msg[1:]}"
    return " ".join(str(error).split())


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where PyYAML was built with it: 10 x faster


class _Loader(_SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader that refuses a key given twice, which it would silently take the last of."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:  # merge keys of merge keys: each level multiplies
            raise yaml.constructor.ConstructorError(None, None, "too many merged keys", node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def _read_yaml(text: str) -> Any:
    depth = 0
    # libyaml's composer recurses in C: text nested a few thousand levels deep would end the process, not raise.
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_TEXT_DEPTH:
                raise RecursionError
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} is given twice")
        result[key] = value
    return result


def _read_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_distinct) if text.strip() else None


def _read_toml(text: str) -> Any:
    # tomllib's memory grows with the square of a dotted key's length.
    if any(line.partition("=")[0].count(".") > MAX_TEXT_DEPTH for line in text.splitlines()):
        raise RecursionError
    return tomllib.loads(text) or None


_READERS: dict[str, Callable[[str], Any]] = {
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".json": _read_json,
    ".toml": _read_toml,
}
