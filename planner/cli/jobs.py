"""``planner jobs``: submit, list, show, cancel and watch jobs, at a service or in a store."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    one_of,
    one_of_store_and_server,
)
from planner.cli.parts import parts_of
from planner.cli.signals import Interrupted, interruptible
from planner.cli.sweep import as_table, show_job_plans
from planner.cli.terminal import note, print_document, print_lines, stdout_console
from planner.errors import error_from_dict
from planner.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from planner.cli.embedded import EmbeddedService
    from planner.client import ServiceClient

app = typer.Typer(help="Submit jobs to a service or a store's worker, and follow them.")

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as `planner jobs list` shows it.")]
Limit = Annotated[int, typer.Option("--limit", metavar="N", min=1, max=200, help="At most so many, newest first.")]
Cursor = Annotated[str | None, typer.Option("--cursor", metavar="TEXT", help="Go on after an earlier page.")]


def open_service(
    context: typer.Context, store: str | None, server: str | None
) -> contextlib.AbstractContextManager[ServiceClient | EmbeddedService]:
    """The service at ``--server``, or the same questions asked of the store."""
    store, server = one_of_store_and_server(context, store, server)
    if server is not None:
        return parts_of(context).connect(server)
    from planner.cli.embedded import EmbeddedService

    return EmbeddedService(parts_of(context).open_store(store))


@app.command()
def submit(
    context: typer.Context,
    spec: SpecFile,
    kind: Annotated[str, typer.Option("--kind", metavar="KIND", help="probe or predict.")] = "probe",
    gpu: Gpu = None,
    on: On = None,
    capacity: Capacity = None,
    batch_size: BatchSize = None,
    fresh: Fresh = False,
    idempotency_key: Annotated[
        str | None,
        typer.Option("--idempotency-key", metavar="TEXT", help="The same key submits the same job only once."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end and print its plans.")] = False,
    store: StoreUrl = None,
    server: ServerUrl = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Queue a job. A worker takes it: the service's own, or one that `planner worker` starts."""
    from planner.jobs import JobKind

    check_batch_size(batch_size)
    question = {
        "spec": parts_of(context).read_document(spec), "kind": one_of(JobKind, kind, "kind"), "gpu": gpu, "on": on,
        "capacity_bytes": None if capacity is None else parse_bytes(capacity), "batch_size": batch_size, "fresh": fresh,
    }  # fmt: skip
    with open_service(context, store, server) as service:
        job = service.submit(question, idempotency_key=idempotency_key)
        if watch:
            return _follow(service, job["id"], as_json, quiet)
    if as_json:
        print_document(job)
    else:
        print_lines(stdout_console(), [f"job {job['id']} {job['state']}"])
        note(f"follow it with: planner jobs watch {job['id']}")
    return 0


@app.command("list")
def list_jobs(
    context: typer.Context,
    state: Annotated[
        str | None,
        typer.Option("--state", metavar="STATE", help="Only queued, running, succeeded, failed or cancelled jobs."),
    ] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
    store: StoreUrl = None,
    server: ServerUrl = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """List jobs, newest first."""
    from planner.jobs import JobState

    with open_service(context, store, server) as service:
        page = service.jobs(limit=limit, cursor=cursor, state=one_of(JobState, state, "state"))
    if as_json:
        print_document(page)
        return 0
    if not page["jobs"]:
        note("there are no such jobs")
        return 0
    from planner.cli.tables import plain_table

    console = stdout_console()
    table = plain_table(console, "job", "state", "kind", "spec", "gpu", "created")
    for job in page["jobs"]:
        table.add_row(
            job["id"], job["state"], job["kind"], job["name"] or "-", job["gpu"] or "any", _when(job["created_at"])
        )
    console.print(table)
    _say_next(page)
    return 0


@app.command()
def show(
    context: typer.Context,
    job_id: JobId,
    store: StoreUrl = None,
    server: ServerUrl = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Show one job with its plans."""
    with open_service(context, store, server) as service:
        job = service.job(job_id)
    if as_json:
        print_document(job)
    else:
        _print_job(job)
    return 0


@app.command()
def cancel(
    context: typer.Context,
    job_id: JobId,
    store: StoreUrl = None,
    server: ServerUrl = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Cancel a job: at once while it waits, else after the trial that is running. What is finished stays."""
    with open_service(context, store, server) as service:
        job = service.cancel(job_id)
    if as_json:
        print_document(job)
    else:
        word = "cancelled" if job["state"] == "cancelled" else f"{job['state']}, cancellation requested"
        print_lines(stdout_console(), [f"job {job['id']} {word}"])
    return 0


@app.command()
def watch(
    context: typer.Context,
    job_id: JobId,
    store: StoreUrl = None,
    server: ServerUrl = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Follow a job to its end and print its plans. Exit status: as of `planner probe`."""
    with open_service(context, store, server) as service:
        return _follow(service, job_id, as_json, quiet)


def _follow(service: ServiceClient | EmbeddedService, job_id: str, as_json: bool, quiet: bool) -> int:
    from planner.cli.watch import follow

    try:
        with interruptible():
            job = follow(service, job_id, quiet=quiet)
    except Interrupted as stop:
        note(f"no longer watching: job {job_id} goes on; cancel it with: planner jobs cancel {job_id}")
        return stop.exit_status
    return show_job_plans(job, as_json, as_table(f"from {service.url}, job {job_id}"))


def _print_job(job: dict[str, Any]) -> None:
    from planner.cli.tables import print_plans

    console = stdout_console()
    asked = [f"gpu {job['gpu'] or 'any'}", *([f"measured on {job['on']}"] if job.get("on") else [])]
    if job["capacity_bytes"]:
        asked.append(f"capacity {format_bytes(job['capacity_bytes'])}")
    if job["batch_size"]:
        asked.append(f"batch size {job['batch_size']}")
    lines = [
        f"job {job['id']}: {job['state']}" + (", cancellation requested" if job["cancel_requested"] else ""),
        f"{job['kind']} {job['name'] or job['spec'].get('model', {})}: {', '.join(asked)}",
        f"created {_when(job['created_at'])}, started {_when(job['started_at'])}, finished {_when(job['finished_at'])}",
        f"worker {job['worker'] or '-'}, attempt {job['attempt']}",
    ]
    if job["error"]:
        lines.append(f"error: {error_from_dict(job['error'])}")
    print_lines(console, lines)
    if job["plans"]:
        console.print()
        print_plans(console, job["plans"], job.get("summary") or ())


def _when(moment: str | None) -> str:
    """An ISO 8601 time for people, in UTC: ``2026-11-21 07:04:02Z``."""
    return "-" if moment is None else f"{moment[:10]} {moment[11:19]}Z"


def _say_next(page: dict[str, Any]) -> None:
    if page["next_cursor"]:
        note(f"more: --cursor {page['next_cursor']}")
