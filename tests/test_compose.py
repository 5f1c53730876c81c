"""The compose file and the images: no container engine runs here, so syntax, and every command started natively."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def planner_commands() -> dict[str, list[str]]:
    found = {name: service["command"] for name, service in SERVICES.items() if "command" in service}
    for dockerfile in DOCKERFILES:
        (command,) = [rest for word, rest in instructions(dockerfile) if word == "CMD"]
        found[dockerfile.name] = yaml.safe_load(command)
    return found


def test_services() -> None:
    assert set(SERVICES) == {"postgres", "api", "worker", "gpu-worker"}
    assert SERVICES["postgres"]["healthcheck"]["test"]
    assert SERVICES["gpu-worker"]["profiles"] == ["gpu"]
    assert not any("profiles" in SERVICES[name] for name in ("postgres", "api", "worker"))
    (device,) = SERVICES["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    for name in ("worker", "gpu-worker"):
        assert SERVICES[name]["shm_size"] == "8gb"


def test_dependencies_and_volumes_exist() -> None:
    for service in SERVICES.values():
        for other, condition in service.get("depends_on", {}).items():
            assert "healthcheck" in SERVICES[other] or condition["condition"] != "service_healthy"
    assert set(COMPOSE["volumes"]) == {"postgres"}


def test_all_share_the_database_that_the_compose_file_starts() -> None:
    settings = SERVICES["postgres"]["environment"]
    urls = {service["environment"]["PLANNER_STORE"] for name, service in SERVICES.items() if name != "postgres"}
    assert urls == {
        f"postgresql://{settings['POSTGRES_USER']}:{settings['POSTGRES_PASSWORD']}@postgres:5432/{settings['POSTGRES_DB']}"
    }


@pytest.mark.parametrize("name", sorted(planner_commands()))
def test_command_exists_and_starts(name: str) -> None:
    """With ``--help`` the command parses its whole line and ends; an unknown command or option would be refused."""
    program, *arguments = planner_commands()[name]
    assert program == "planner"
    done = subprocess.run(
        [sys.executable, "-m", "planner.cli", *arguments, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for option in [word for word in arguments if word.startswith("--")]:
        assert option in done.stdout


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_copies_what_exists_and_is_not_ignored(dockerfile: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [source for word, rest in instructions(dockerfile) if word == "COPY" for source in shlex.split(rest)[:-1]]
    assert {"pyproject.toml", "planner", "api", "workers", "migrations"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert source.removeprefix("./") in allowed


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_installs_extras_that_exist(dockerfile: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r'"\.\[([\w,]+)\]"', dockerfile.read_text())
    assert extras is not None
    for extra in extras[1].split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


def test_build_contexts_and_dockerfiles_exist() -> None:
    built = {service["build"]["dockerfile"] for service in SERVICES.values() if "build" in service}
    assert built == {str(path.relative_to(ROOT)) for path in DOCKERFILES}
    worker = dict(instructions(ROOT / "docker/worker.Dockerfile"))
    assert worker["ARG"].startswith("PYTORCH_IMAGE=pytorch/pytorch:2.13.0-cuda")
    assert not any("torch" in rest for word, rest in instructions(ROOT / "docker/api.Dockerfile") if word == "RUN")
