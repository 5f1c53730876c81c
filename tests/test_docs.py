"""What users can type or set is documented, and what is documented can be typed or set."""

from __future__ import annotations

import re
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from planner_api.settings import Settings

from planner.cli.app import app
from planner.specs.document import parse_spec
from planner.specs.model import DataSpec, ModelSpec, SearchSpec, TrainSpec
from planner.specs.variants import AXES, VariantAxes

ROOT = Path(__file__).parent.parent
CLI = (ROOT / "docs/cli.md").read_text()
SETTINGS = (ROOT / "docs/settings.md").read_text()
INTERNAL = {"PLANNER_REPLY_FD"}
"""Set by the planner for its own children."""


def commands(command: Any, path: str = "planner") -> dict[str, Any]:
    """``{"planner jobs list": command, ...}``: every command that does something."""
    children = getattr(command, "commands", None)
    if children is None:
        return {path: command}
    return {name: found for key in children for name, found in commands(children[key], f"{path} {key}").items()}


COMMANDS = commands(typer.main.get_command(app))


def section(path: str) -> str:
    """The text below the heading of a command."""
    match = re.search(rf"^#+ {re.escape(path)}\n(.*?)(?=^#|\Z)", CLI, re.MULTILINE | re.DOTALL)
    assert match is not None, f"docs/cli.md has no heading for: {path}"
    return match[1]


def options_of(command: Any) -> set[str]:
    words = {word for option in command.params for word in (*option.opts, *option.secondary_opts)}
    return {word for word in words if word.startswith("--")} - {"--help"}


@pytest.mark.parametrize("path", sorted(COMMANDS))
def test_every_option_is_documented_and_none_is_invented(path: str) -> None:
    assert options_of(COMMANDS[path]) == set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", usage(path)))


def usage(path: str) -> str:
    """The indented lines that show how the command is called."""
    lines = [line for line in section(path).splitlines() if line.startswith("    ")]
    assert lines
    assert lines[0].strip().startswith(path), f"the usage of {path} is missing"
    return "\n".join(lines)


def test_no_command_is_invented() -> None:
    headings = set(re.findall(r"^#+ (planner [a-z ]+)$", CLI, re.MULTILINE))
    groups = {path.rpartition(" ")[0] for path in COMMANDS}
    assert headings <= COMMANDS.keys() | groups


def test_every_shared_option_is_explained() -> None:
    shared = [options_of(command) for command in COMMANDS.values()]
    counted = {option: sum(option in options for options in shared) for options in shared for option in options}
    table = CLI.split("## Common options")[1].split("\n## ")[0]
    for option, number in counted.items():
        text = table if number > 3 and option not in ("--limit", "--cursor") else CLI
        assert f"`{option}" in text or f"[{option}" in text, option


def test_every_setting_is_documented_and_none_is_invented() -> None:
    named = {f"PLANNER_{field.upper()}" for field in Settings.model_fields}
    for folder in ("planner", "api", "workers", "migrations"):
        for file in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r"[\"'](PLANNER_[A-Z][A-Z_]*)[\"']", file.read_text()))
    documented = set(re.findall(r"^\| `(PLANNER_[A-Z_]+)` \|", SETTINGS, re.MULTILINE))
    assert documented == named - INTERNAL


def test_defaults_of_settings_are_those_documented() -> None:
    for name, field in Settings.model_fields.items():
        row = re.search(rf"^\| `PLANNER_{name.upper()}` \|.*\| (.+) \|$", SETTINGS, re.MULTILINE)
        assert row is not None
        if isinstance(field.default, int | float) or name == "host":
            assert type(field.default)(row[1].strip("`")) == field.default


def test_readme_begins_with_the_two_commands_and_names_only_what_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.index("make probe") < readme.index("make test") < 1200
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)(?= |$|`)", code_of(readme), re.MULTILINE)) <= targets
    for line in re.findall(r"^ *\$? *(planner .*)$", code_of(readme), re.MULTILINE):
        words = [word for word in line.split() if re.fullmatch(r"[a-z]+", word)]
        path = " ".join(words[:3]) if " ".join(words[:3]) in COMMANDS else " ".join(words[:2])
        assert path in COMMANDS, line
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) <= options_of(COMMANDS[path]), line


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def code_of(text: str) -> str:
    """Code blocks and inline code of a Markdown page, a line each."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
    indented = re.findall(r"^    (.*)$", text, re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*blocks, *indented, *inline])


def test_every_key_and_value_of_a_spec_is_documented() -> None:
    text = (ROOT / "docs/spec.md").read_text()
    documented = set(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))
    sections = {"model": ModelSpec, "data": DataSpec, "train": TrainSpec, "variants": VariantAxes, "search": SearchSpec}
    for name, section in sections.items():
        assert f"## `{name}`" in text
        keys = {item.name for item in fields(section)} - ({"config"} if name == "model" else set())
        assert keys <= documented, f"{name}: {sorted(keys - documented)}"
    for axis, values in AXES.items():
        if isinstance(values, type) and issubclass(values, StrEnum):
            assert {str(value) for value in values} <= documented, axis


def test_the_example_of_a_spec_is_one() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/spec.md").read_text(), flags=re.DOTALL)
    assert len(parse_spec(yaml.safe_load(example)).variants.product()) == 96
