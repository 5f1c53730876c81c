"""Exit statuses: the only place that turns an answer or an error into a number.

====== ==================================================================
0      planned, or fits
1      nothing fits, or the asked batch size does not fit
2      bad spec, bad arguments, or the work could not be done
3      ``preflight``, or a question about one batch size: not enough evidence
130    interrupted by Ctrl-C (128 + SIGINT); 143 by SIGTERM
====== ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from planner.errors import PlannerError


class ExitStatus(IntEnum):
    OK = 0
    DOES_NOT_FIT = 1
    ERROR = 2
    NOT_ENOUGH_EVIDENCE = 3


EXIT_STATUSES: dict[str, ExitStatus] = {"planner_error": ExitStatus.ERROR}
"""By ``PlannerError.code``; a code that is not listed has the status of the class above it in the tree."""

PREFLIGHT_EXIT_STATUSES: dict[str, ExitStatus] = {
    **EXIT_STATUSES,
    "device_error": ExitStatus.NOT_ENOUGH_EVIDENCE,
    "child_error": ExitStatus.NOT_ENOUGH_EVIDENCE,
}
"""The same for ``preflight``: nothing is wrong with what the user wrote, but no evidence could be had."""


def status_of_error(error: PlannerError, *, preflight: bool = False) -> ExitStatus:
    """The exit status that ``error`` ends the command with."""
    table = PREFLIGHT_EXIT_STATUSES if preflight else EXIT_STATUSES
    codes = (getattr(kind, "code", None) for kind in type(error).__mro__)
    return next((table[code] for code in codes if code in table), ExitStatus.ERROR)


def status_of_plans(plans: Sequence[Mapping[str, Any]]) -> ExitStatus:
    """0 when a variant fits; 1 when variants were answered and none fits, 3 where one leaks; 2 when none was answered.

    ``plans`` are plans as JSON data (``planner.reports.plan_dict``).
    """
    if any(plan.get("fits") or plan.get("max_batch_size") for plan in plans):
        return ExitStatus.OK
    if any(plan.get("batch_size") is not None and plan.get("fits") is None for plan in plans if _is_planned(plan)):
        return ExitStatus.NOT_ENOUGH_EVIDENCE
    if any(_is_planned(plan) for plan in plans):
        return ExitStatus.DOES_NOT_FIT
    return ExitStatus.ERROR


def _is_planned(plan: Mapping[str, Any]) -> bool:
    return str(plan.get("status", "planned")) == "planned"
