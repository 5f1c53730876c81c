"""Importing what ``module:attribute`` names: the user's own model, loss or step."""

from __future__ import annotations

import importlib
from typing import Any

from planner.errors import ModelError, described, nearest


def import_target(target: str, *, field: str) -> Any:
    """The object that ``package.module:attribute`` names. Raises ``ModelError`` naming ``field``."""
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        named = f"{module_name}.".startswith(f"{missing}.")
        why = f"there is no module {missing!r}" if named else f"it imports {missing!r}, which is not installed"
        raise ModelError(f"{target!r} cannot be imported: {why}", field=field) from error
    except (Exception, SystemExit) as error:  # the border to user code: a script without a main guard may even exit
        raise ModelError(f"importing {module_name!r} raised {described(error)}", field=field) from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if not name.startswith("_")]
            raise ModelError(f"{module_name!r} has no {attribute!r}", field=field, suggestion=nearest(part, names))
        found = getattr(found, part)
    if not callable(found):
        raise ModelError(f"{target!r} is not callable", field=field)
    return found
