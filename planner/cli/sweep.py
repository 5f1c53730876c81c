"""``planner probe`` and ``planner predict``: plan every variant of a spec."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from planner.cli.exits import status_of_error, status_of_plans
from planner.cli.options import (
    AsJson,
    BatchSize,
    Capacity,
    Debug,
    Fresh,
    Gpu,
    On,
    Quiet,
    ServerUrl,
    SpecFile,
    StoreUrl,
    check_batch_size,
    one_of_store_and_server,
)
from planner.cli.parts import Parts, parts_of
from planner.cli.signals import Interrupted, interruptible
from planner.cli.terminal import note, print_document, print_error, stderr_console, stdout_console
from planner.errors import PlannerError, error_from_dict
from planner.units import parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the user asked on the command line."""

    kind: str
    """``probe`` or ``predict``."""
    spec: Path
    gpu: str | None
    on: str | None
    capacity_bytes: int | None
    batch_size: int | None
    fresh: bool
    as_json: bool
    quiet: bool


def probe(
    context: typer.Context,
    spec: SpecFile,
    gpu: Gpu = None,
    on: On = None,
    capacity: Capacity = None,
    batch_size: BatchSize = None,
    store: StoreUrl = None,
    server: ServerUrl = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Find the largest batch size of every variant: measured on this machine's GPU, else on a virtual one.

    With no GPU here, or with --gpu of another type, the plans are predictions, and say so; with --on they are measured
    under that type's capacity, and say so.
    Exit status: 0 planned, 1 nothing fits, 2 bad spec or arguments, 3 --batch-size fits a few steps but leaks.
    """
    return _answer(context, "probe", spec, gpu, on, capacity, batch_size, store, server, fresh, as_json, quiet)


def predict(
    context: typer.Context,
    spec: SpecFile,
    gpu: Gpu = None,
    capacity: Capacity = None,
    batch_size: BatchSize = None,
    store: StoreUrl = None,
    server: ServerUrl = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Predict the largest batch size of every variant on a virtual GPU; needs no GPU.

    Exit status: 0 planned, 1 nothing fits, 2 bad spec or arguments, 3 --batch-size fits a few steps but leaks.
    """
    return _answer(context, "predict", spec, gpu, None, capacity, batch_size, store, server, fresh, as_json, quiet)


def _answer(
    context: typer.Context, kind: str, spec: Path, gpu: str | None, on: str | None, capacity: str | None,
    batch_size: int | None, store: str | None, server: str | None, fresh: bool, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    check_batch_size(batch_size)
    question = Question(
        kind=kind, spec=spec, gpu=gpu, on=on, capacity_bytes=None if capacity is None else parse_bytes(capacity),
        batch_size=batch_size, fresh=fresh, as_json=as_json, quiet=quiet,
    )  # fmt: skip
    store, server = one_of_store_and_server(context, store, server)
    if server is not None:
        return _ask_service(parts_of(context), question, server)
    return _plan_here(parts_of(context), question, store)


def _plan_here(parts: Parts, question: Question, store_url: str | None) -> int:
    from planner.cli.live import open_display
    from planner.cli.progress import SweepProgress
    from planner.reports import plan_dict
    from planner.summaries import summary

    spec = parts.load_spec(question.spec)
    selected = parts.choose_device(
        question.gpu, question.capacity_bytes, predicted_only=question.kind == "predict", on=question.on
    )
    total = len(spec.variants.product())
    progress = SweepProgress()
    error: PlannerError | None = None
    stop: Interrupted | None = None
    with interruptible(), parts.open_store(store_url) as store:
        where = store.url
        for line in selected.notes:
            note(line)
        try:
            with open_display(stderr_console(), progress, quiet=question.quiet) as display:
                plans = parts.plan_sweep(
                    spec, selected, store=store, batch_size=question.batch_size, fresh=question.fresh, listener=display
                )
        except PlannerError as failure:
            plans, error = progress.plans, failure
            if not plans:
                raise
        except Interrupted as signal:
            plans, stop = progress.plans, signal
    documents = [plan_dict(plan) for plan in plans]
    sentences = list(summary(plans))
    document: dict[str, Any] = {"plans": documents, "summary": sentences, "store": where}
    if stop is not None:
        document["interrupted"] = {"num_finished": len(plans), "num_variants": total}
    unanswered = [] if stop is not None or error is not None else refusals(documents)
    if error is not None or unanswered:
        document["error"] = (error or unanswered[0]).as_dict()
    _show(document, question, f"stored in {where}")
    if error is not None:
        note(f"{len(plans)} of {total} plans are stored in {where}")
        print_error(error, as_json=False)
        return status_of_error(error)
    for refusal in unanswered:
        print_error(refusal, as_json=False)
    if stop is not None:
        note(
            f"interrupted: {len(plans)} of {total} plans are stored in {where}; run the same command again to continue"
        )
        return stop.exit_status
    return status_of_plans(documents)


def _ask_service(parts: Parts, question: Question, server: str) -> int:
    try:
        job = finished_job(parts, question, server)
    except Interrupted as stop:
        return stop.exit_status
    return show_job_plans(job, question.as_json, as_table(f"from {server.rstrip('/')}, job {job['id']}"))


def finished_job(parts: Parts, question: Question, server: str) -> dict[str, Any]:
    """The service's job that answers ``question``, at its end. Raises ``Interrupted``, and has said what goes on."""
    from planner.cli.watch import follow

    document = parts.read_document(question.spec)
    with interruptible(), parts.connect(server) as client:
        job = client.submit(
            {
                "spec": document, "kind": question.kind, "gpu": question.gpu, "on": question.on,
                "capacity_bytes": question.capacity_bytes, "batch_size": question.batch_size, "fresh": question.fresh,
            }
        )  # fmt: skip
        try:
            return follow(client, str(job["id"]), quiet=question.quiet)
        except Interrupted:
            note(
                f"interrupted: job {job['id']} goes on at {client.url}; "
                f"cancel it with: planner jobs cancel {job['id']} --server {client.url}"
            )
            raise


Show = Callable[[Sequence[Mapping[str, Any]], Sequence[str]], None]
"""Prints plans as JSON data and the sentences that sum them up."""


def as_table(origin: str) -> Show:
    """As ``probe`` prints its own, with where they come from."""
    from planner.cli.tables import print_plans

    return lambda plans, sentences: print_plans(stdout_console(), plans, sentences, [origin])


def show_job_plans(job: dict[str, Any], as_json: bool, show: Show) -> int:
    """Print the plans of a finished job, and answer the exit status that they mean."""
    plans, sentences = job.get("plans") or [], job.get("summary") or []
    error = error_from_dict(job["error"]) if job.get("error") else None
    if error is None and job["state"] == "cancelled":
        error = PlannerError(f"job {job['id']} was cancelled")
    if as_json:
        document = {"plans": plans, "summary": sentences, "job": job["id"]}
        print_document(document | ({"error": error.as_dict()} if error else {}))
    elif plans:
        show(plans, sentences)
    if error is not None:
        print_error(error, as_json=False)
        return status_of_error(error)
    return status_of_plans(plans)


def refusals(plans: Sequence[Mapping[str, Any]]) -> list[PlannerError]:
    """Why no variant could be answered, each reason once; empty when at least one was."""
    if any(plan.get("status", "planned") == "planned" for plan in plans):
        return []
    reasons = {json.dumps(plan["error"], sort_keys=True): plan["error"] for plan in plans if plan.get("error")}
    return [error_from_dict(reason) for reason in reasons.values()]


def _show(document: dict[str, Any], question: Question, origin: str) -> None:
    if question.as_json:
        print_document(document)
    elif document["plans"] and not refusals(document["plans"]):
        as_table(origin)(document["plans"], document["summary"])
