"""Follows a job, at a service or in a store, with a line on standard error for each event."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from planner.cli import wording
from planner.cli.terminal import note
from planner.client import ServiceEvent
from planner.specs.variants import variant_label


class Followable(Protocol):
    """A service or a store: what has jobs with events."""

    def job(self, job_id: str) -> dict[str, Any]: ...

    def events(self, job_id: str) -> Iterator[ServiceEvent]: ...


def follow(service: Followable, job_id: str, *, quiet: bool = False) -> dict[str, Any]:
    """Wait for the job's end and answer its document. Raises what ``service`` raises."""
    for event in service.events(job_id):
        if not quiet and (line := event_line(event)):
            note(line)
    return service.job(job_id)


def event_line(event: ServiceEvent) -> str | None:
    """An event for people; ``None`` for one that says nothing new."""
    data = event.data
    label = variant_label(data["variant"]) if isinstance(data.get("variant"), Mapping) else ""
    match event.kind:
        case "state":
            where = f" on {data['worker']}" if data.get("worker") and data.get("state") == "running" else ""
            return f"job {data.get('state')}{where}"
        case "note":
            return str(data.get("text"))
        case "trial_started":
            return f"{label}: batch {data.get('batch_size')} runs"
        case "trial_finished":
            trial = data.get("trial", data)
            word = {"fits": "fits", "oom": "runs out of memory"}.get(str(trial.get("outcome")), "failed")
            return f"{label}: batch {trial.get('batch_size')} {word}"
        case "variant_finished":
            plan = data.get("plan", data)
            return f"{variant_label(plan['variant'])}: {wording.answer_line(plan)}"
        case _:
            return None
