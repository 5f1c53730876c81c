"""The user's own code behind ``source: python``, a custom loss or step: which files, without running any of them."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from planner.errors import ModelError, nearest
from planner.specs.model import Spec
from planner.targets import named_targets

_NOT_CODE = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
_INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCode:
    """What a spec's targets lead to."""

    hash: str
    """SHA-256 over every file's place in its package and its content."""
    imports: frozenset[str] = field(default_factory=frozenset)
    """Top-level names that the code imports from elsewhere: installed packages and the standard library."""


def find_user_code(spec: Spec, folder: Path | None = None) -> UserCode | None:
    """Every file of the top-level modules and packages that ``spec`` targets; ``None`` for a spec without targets.

    A module beside them that they import is theirs too (a ``train.py`` that imports ``layers.py``), read off their
    ``import`` statements. An installed package counts, but not what it imports. Modules in ``folder`` (by default the
    current one) come first, as in ``python -c``. Raises ``ModelError`` naming the field whose module does not exist.
    """
    folder = folder or Path.cwd()
    importlib.invalidate_caches()  # the user may have written the module a moment ago
    places: dict[str, ModuleSpec] = {}
    for path, target in named_targets(spec):
        top = target.partition(":")[0].partition(".")[0]
        found = _locate(top, folder)
        if found is None:
            raise ModelError(f"there is no module {top!r} here", field=path, suggestion=nearest(top, _beside(folder)))
        places[top] = found
    if not places:
        return None
    digest = hashlib.sha256()
    elsewhere: set[str] = set()
    waiting = list(places)
    contents: dict[str, bytes] = {}
    while waiting:
        top = waiting.pop()
        files = dict(_files(top, places[top]))
        for label, file in files.items():
            contents[label] = _read(file)
        if any(_INSTALLED & set(file.parts) for file in files.values()):
            continue
        for name in {name for label in files for name in _imports(contents[label])} - places.keys():
            found = None if name in sys.stdlib_module_names else _locate(name, folder)
            if found is None or any(_INSTALLED & set(file.parts) for _, file in _files(name, found)):
                elsewhere.add(name)
            else:
                places[name] = found
                waiting.append(name)
    for label in sorted(contents):
        digest.update(f"{label}\0{len(contents[label])}\0".encode() + contents[label])
    return UserCode(hash=digest.hexdigest(), imports=frozenset(elsewhere))


def code_hash(spec: Spec, folder: Path | None = None) -> str | None:
    """``find_user_code(spec, folder).hash``: changes whenever the user's code does; ``None`` without any."""
    code = find_user_code(spec, folder)
    return code.hash if code else None


def _locate(top: str, folder: Path) -> ModuleSpec | None:
    """Where a top-level module would be imported from; finding it runs nothing."""
    found = PathFinder.find_spec(top, [str(folder), *sys.path])
    if found is not None:
        return found
    try:
        return importlib.util.find_spec(top)  # builtin modules, and editable installs with finders of their own
    except (ImportError, ValueError):
        return None


def _files(top: str, place: ModuleSpec) -> Iterator[tuple[str, Path]]:
    """``(label, file)`` of all of a module's files: labels do not depend on where it is installed."""
    if place.submodule_search_locations is None:
        if place.has_location and place.origin:
            yield f"{top}{Path(place.origin).suffix}", Path(place.origin)
        return
    for location in place.submodule_search_locations:
        for parent, folders, names in os.walk(location):
            folders[:] = sorted(name for name in folders if name not in _NOT_CODE and not name.startswith("."))
            for name in sorted(names):
                if name.endswith(".py"):
                    file = Path(parent, name)
                    yield f"{top}/{file.relative_to(location).as_posix()}", file


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelError(f"{file.name} cannot be read: {error.strerror}", field="model.target") from error


def _imports(source: bytes) -> Iterator[str]:
    """Top-level names of the absolute imports in a file, wherever in it they stand."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return  # not Python source; importing it will say why
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def _beside(folder: Path) -> list[str]:
    try:
        return [item.stem for item in folder.iterdir() if item.suffix == ".py" or item.is_dir()]
    except OSError:
        return []
