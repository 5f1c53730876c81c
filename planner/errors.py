"""Every error that the planner reports on purpose, in one tree.

PlannerError
├── InvalidInput            the caller's input is wrong: nothing was started
│   ├── InvalidSpec         a field of a spec is wrong; ``field`` is its path
│   │   └── TargetNotAllowed    it names user code that this machine's operator did not allow
│   └── InvalidArgument     a flag, query parameter or header is wrong
├── ModelError              the user's model, loss, step or target cannot be built or run
├── NotFound                a job, plan or other record does not exist
├── Conflict                the request contradicts an earlier one (an idempotency key, a cancelled job)
├── StoreError              the database cannot be opened, migrated or written
├── DeviceError             the GPU cannot be used
│   ├── DeviceUnavailable   there is none, or torch cannot drive it
│   ├── DeviceBusy          another process holds its memory
│   └── DeviceLost          it vanished, or its process died, while work was running
└── ServiceError            a remote planner service could not be reached or answered nonsense

An error knows no HTTP status and no exit status: one table in the API and one in the CLI map ``code`` to them.
Running out of GPU memory is not an error but an outcome (``planner.trials.Outcome.OOM``).
"""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Iterable
from typing import Any, ClassVar


class PlannerError(Exception):
    """An expected failure with a stable ``code``, the field it is about, and what to do.

    ``message`` is one sentence without the field's path; ``suggestion`` is the nearest valid value, or ``None``.
    """

    code: ClassVar[str] = "planner_error"

    def __init__(self, message: str, *, field: str | None = None, suggestion: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.suggestion = suggestion

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}" if self.field else self.message
        return f"{text} (did you mean {self.suggestion!r}?)" if self.suggestion else text

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON data; ``error_from_dict`` is its inverse."""
        return {"code": self.code, "message": self.message, "field": self.field, "suggestion": self.suggestion}


class InvalidInput(PlannerError):
    code = "invalid_input"


class InvalidSpec(InvalidInput):
    code = "invalid_spec"


class TargetNotAllowed(InvalidSpec):
    code = "target_not_allowed"


class InvalidArgument(InvalidInput):
    code = "invalid_argument"


class ModelError(PlannerError):
    code = "model_error"


class NotFound(PlannerError):
    code = "not_found"


class Conflict(PlannerError):
    code = "conflict"


class StoreError(PlannerError):
    code = "store_error"


class DeviceError(PlannerError):
    code = "device_error"


class DeviceUnavailable(DeviceError):
    code = "device_unavailable"


class DeviceBusy(DeviceError):
    code = "device_busy"


class DeviceLost(DeviceError):
    code = "device_lost"


class ServiceError(PlannerError):
    code = "service_error"


def _tree(root: type[PlannerError]) -> Iterable[type[PlannerError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def error_from_dict(data: dict[str, Any]) -> PlannerError:
    """Rebuild an error that crossed a process or the network; an unknown code becomes the root class."""
    types = {kind.code: kind for kind in _tree(PlannerError)}
    kind = types.get(str(data.get("code")), PlannerError)
    return kind(str(data.get("message", "")), field=data.get("field"), suggestion=data.get("suggestion"))


MAX_QUOTED = 300
"""Characters of another program's message that an error quotes: some print whole tensors."""


def first_line(error: BaseException) -> str:
    """What ``error`` says, as part of a sentence: its first line, without control characters, not longer than a few
    lines on a screen."""
    lines = str(error).strip().splitlines()
    text = "".join(letter if letter.isprintable() else " " for letter in lines[0][: MAX_QUOTED + 1]) if lines else ""
    return (text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}...") or "(no message)"


def described(error: BaseException) -> str:
    """``KeyError: 'x'``: the type of ``error`` and its ``first_line``."""
    return f"{type(error).__name__}: {first_line(error)}"


def raised(error: BaseException) -> str:
    """``described``, and where it was raised: ``ValueError: no (my_project.models, line 38)``."""
    return f"{described(error)}{place(error)}"


def place(error: BaseException) -> str:
    """`` (my_project.models, line 38)``: the innermost line that ``error`` passed through which is not of torch, of
    Python's own library or of this package; empty where there is none."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in _NOT_THE_MODEL:
            found = f" ({module}, line {line})"
    return found


_NOT_THE_MODEL = {"__main__", "planner", "torch", *sys.stdlib_module_names}


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that ``name`` was most likely meant to be, or ``None`` when nothing is close."""
    by_lower = {item.lower(): item for item in valid}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[matches[0]] if matches else None
