"""The wheel: exactly our own names at its top level, and every data file inside."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"planner": ".", "planner_api": "api", "planner_workers": "workers", "planner_migrations": "migrations"}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", folder, ROOT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_top_level_names_are_ours_alone(wheel_names: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


def test_every_tracked_file_of_a_package_is_inside(wheel_names: list[str]) -> None:
    """gpus.toml, templates, scripts, styles, migrations: whatever a package holds must reach users."""
    expected = set()
    for package, parent in PACKAGES.items():
        files = (ROOT / parent / package).rglob("*")
        expected |= {
            str(file.relative_to(ROOT / parent)) for file in files if file.is_file() and "__pycache__" not in file.parts
        }
    assert expected <= set(wheel_names)
    for data in ("planner/gpus.toml", "planner/py.typed", "planner_migrations/script.py.mako"):
        assert data in wheel_names
    assert any(name.startswith("planner_migrations/versions/") for name in wheel_names)
    assert any(name.startswith("planner_api/templates/") for name in wheel_names)
    assert any(name.startswith("planner_api/static/") for name in wheel_names)


def test_licence_and_command_are_inside(wheel_names: list[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel_names)


def test_locked_versions_are_exact_and_complete() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line and " " not in line for line in lines)
    names = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    project = (ROOT / "pyproject.toml").read_text()
    for name in (
        "torch",
        "torchvision",
        "transformers",
        "timm",
        "sqlalchemy",
        "fastapi",
        "typer",
        "pytest",
        "hatchling",
    ):
        assert name in names
        assert f'"{name}' in project.lower()
    assert "torch==2.13.0" in lines
