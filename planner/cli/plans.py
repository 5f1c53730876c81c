"""``planner plans``: read the plans that are stored, here or at a service."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from planner.cli.jobs import Cursor, Limit, open_service
from planner.cli.options import AsJson, Debug, ServerUrl, StoreUrl, one_of
from planner.cli.terminal import note, print_document, print_lines, stdout_console
from planner.specs.variants import variant_label

app = typer.Typer(help="List and show stored plans.")


@app.command("list")
def list_plans(
    context: typer.Context,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Only plans of this model.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="Only plans for this GPU type.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", metavar="NAME", help="Only this precision.")] = None,
    checkpointing: Annotated[
        str | None, typer.Option("--checkpointing", metavar="NAME", help="Only this checkpointing.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", metavar="NAME", help="Only measured, or only predicted plans.")
    ] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
    store: StoreUrl = None,
    server: ServerUrl = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """List stored plans, newest first."""
    from planner.gpus import find_gpu
    from planner.specs.variants import Checkpointing, Precision
    from planner.trials import Source

    filters = {
        "model": model,
        "gpu": None if gpu is None else find_gpu(gpu).name,
        "precision": one_of(Precision, precision, "precision"),
        "checkpointing": one_of(Checkpointing, checkpointing, "checkpointing"),
        "source": one_of(Source, source, "source"),
    }
    with open_service(context, store, server) as service:
        page = service.plans(limit=limit, cursor=cursor, **filters)
    if as_json:
        print_document(page)
        return 0
    if not page["plans"]:
        note("no such plans are stored")
        return 0
    _print_list(page["plans"])
    if page["next_cursor"]:
        note(f"more: --cursor {page['next_cursor']}")
    return 0


@app.command()
def show(
    context: typer.Context,
    plan_id: Annotated[str, typer.Argument(metavar="ID", help="The plan's id, as `planner plans list` shows it.")],
    store: StoreUrl = None,
    server: ServerUrl = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Show one stored plan with its trials."""
    with open_service(context, store, server) as service:
        plan = service.plan(plan_id)
    if as_json:
        print_document(plan)
    else:
        _print_plan(plan)
    return 0


def _print_list(plans: list[dict[str, Any]]) -> None:
    from planner.cli import wording
    from planner.cli.folding import Name
    from planner.cli.tables import NARROW, plain_table

    console = stdout_console()
    capacity = "capacity\nGiB" if console.width < NARROW else "capacity GiB"
    table = plain_table(console, "plan", "model", "variant", "gpu", capacity, "answer", right=(capacity,))
    table.columns[0].no_wrap = True  # to be copied
    for plan in plans:
        table.add_row(
            plan.get("id") or "-", Name(plan.get("model", "-")), Name(variant_label(plan["variant"])), plan["gpu"],
            wording.gib(plan["capacity_bytes"]), wording.answer_line(plan),
        )  # fmt: skip
    console.print(table)


def _print_plan(plan: dict[str, Any]) -> None:
    from planner.cli import wording
    from planner.cli.tables import plain_table, print_plans

    console = stdout_console()
    print_lines(console, [f"{plan.get('spec_name') or plan.get('model')} on {plan['gpu']}", ""])
    print_plans(console, [plan])
    numbers = ("batch", "allocated GiB", "reserved GiB", "device GiB")
    table = plain_table(console, "batch", "outcome", *numbers[1:], "fresh process", right=numbers)
    for trial in plan.get("trials") or ():
        peaks = [wording.gib(trial.get(f"peak_{layer}_bytes")) for layer in ("allocated", "reserved", "device")]
        table.add_row(str(trial["batch_size"]), trial["outcome"], *peaks, "yes" if trial.get("fresh_process") else "no")
    console.print()
    console.print(table)
    if plan.get("explanation"):
        from planner.cli.explanation import print_explanation

        console.print()
        print_explanation(console, plan)
