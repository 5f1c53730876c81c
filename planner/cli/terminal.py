"""Where a command writes: the answer to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from planner.errors import PlannerError


def print_document(document: Mapping[str, Any]) -> None:
    """One JSON document on standard output: all that ``--json`` may write there."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()


def print_error(error: PlannerError, *, as_json: bool) -> None:
    """``error: field: message (did you mean ...?)`` on standard error; with ``as_json`` also as the document."""
    # One line whatever the message quotes: a log search or a CI annotation takes the line, not the paragraph.
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    sys.stderr.flush()
    if as_json:
        print_document({"error": error.as_dict()})


def note(line: str) -> None:
    """One line for the user on standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Sentences on ``console``, wrapped to its width, taken literally."""
    from planner.cli.folding import hanging

    for line in lines:
        for part in hanging(line, console.width):
            console.print(part, markup=False, highlight=False)


def stdout_console() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, soft_wrap=False)


def stderr_console() -> Console:
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)
