"""``planner explain``: what takes the memory, and which single change gains how many samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.advice import Advice, Change, advise, only
from planner.cli.exits import status_of_plans
from planner.cli.options import (
    AsJson,
    BatchSize,
    Capacity,
    Debug,
    Fresh,
    Gpu,
    Quiet,
    ServerUrl,
    SpecFile,
    StoreUrl,
    check_batch_size,
    one_of_store_and_server,
)
from planner.cli.parts import Parts, parts_of
from planner.cli.signals import Interrupted, interruptible
from planner.cli.sweep import Question, finished_job, refusals, show_job_plans
from planner.cli.terminal import note, print_document, print_error, print_lines, stderr_console, stdout_console
from planner.errors import InvalidArgument, nearest
from planner.selection import Selected
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.trials import Plan, PlanStatus
from planner.units import format_bytes, parse_bytes

Variants = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        metavar="NAME",
        help="Only this variant, by the name that tables show, e.g. 'bf16-amp + checkpointing full'; may be repeated.",
    ),
]
Advise = Annotated[
    bool | None,
    typer.Option(
        "--advise/--no-advise",
        help="Predict what single changes would gain: a search for each. By default for one variant, not for several.",
    ),
]
SnapshotFile = Annotated[
    Path | None,
    typer.Option(
        "--snapshot",
        metavar="FILE",
        help="Also write a snapshot of one variant for PyTorch's memory viewer.",
    ),
]


def explain(
    context: typer.Context,
    spec: SpecFile,
    gpu: Gpu = None,
    capacity: Capacity = None,
    batch_size: BatchSize = None,
    variant: Variants = None,
    advise: Advise = None,
    snapshot: SnapshotFile = None,
    store: StoreUrl = None,
    server: ServerUrl = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Say what takes the memory at the largest batch size, or at --batch-size, and which single change gains how much.

    All of it is predicted on a virtual GPU. Exit status: 0 planned, 1 nothing fits, 2 bad spec or arguments,
    3 --batch-size fits a few steps but leaks. With --server neither changes are tried nor is a snapshot written.
    """
    check_batch_size(batch_size)
    parts = parts_of(context)
    document = parts.load_spec(spec)
    variants = chosen_variants(document, variant or [])
    if snapshot is not None:
        _check_snapshot(snapshot, variants)
    capacity_bytes = None if capacity is None else parse_bytes(capacity)
    store, server = one_of_store_and_server(context, store, server)
    if server is not None:
        _check_service_can(advise, snapshot)
        question = Question(
            kind="predict", spec=spec, gpu=gpu, on=None, capacity_bytes=capacity_bytes, batch_size=batch_size,
            fresh=fresh, as_json=as_json, quiet=quiet,
        )  # fmt: skip
        return _ask_service(parts, question, server, variants)
    selected = parts.choose_device(gpu, capacity_bytes, predicted_only=True, on=None)
    for line in selected.notes:
        note(line)
    work = _Work(parts, selected, batch_size, fresh, quiet)
    wants_advice = len(variants) == 1 if advise is None else advise
    plans: list[dict[str, Any]] = []
    try:
        with interruptible(), parts.open_store(store) as opened:
            where = opened.url
            for each in variants:
                found = work.explained(document, each, opened, wants_advice)
                plans.append(found)
            if snapshot is not None:
                work.write_snapshot(document, variants[0], plans[0], snapshot)
    except Interrupted as stop:
        note("interrupted")
        return stop.exit_status
    unanswered = refusals(plans)
    if as_json:
        print_document({"plans": plans, "store": where} | ({"error": unanswered[0].as_dict()} if unanswered else {}))
    else:
        _show(plans)
    for refusal in unanswered:
        print_error(refusal, as_json=False)
    return status_of_plans(plans)


def chosen_variants(spec: Spec, names: list[str]) -> tuple[Variant, ...]:
    """The spec's variants that are called ``names``; all where none is named. Raises ``InvalidArgument``."""
    every = {variant.label(): variant for variant in spec.variants.product()}
    for name in names:
        if name not in every:
            raise InvalidArgument(
                f"{name!r} is none of the spec's variants: {', '.join(map(repr, every))}",
                field="variant",
                suggestion=nearest(name, list(every)),
            )
    return tuple(every[name] for name in names or every)


def _check_snapshot(path: Path, variants: tuple[Variant, ...]) -> None:
    """Before any work. Raises ``InvalidArgument``."""
    if len(variants) != 1:
        names = ", ".join(repr(variant.label()) for variant in variants)
        raise InvalidArgument(f"is of one variant: name it with --variant, one of {names}", field="snapshot")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InvalidArgument(f"{path} is not a file in a folder that is there", field="snapshot")


def _check_service_can(advise: bool | None, snapshot: Path | None) -> None:
    """Raises ``InvalidArgument``."""
    for field, is_wanted in (("advise", advise), ("snapshot", snapshot)):
        if is_wanted:
            raise InvalidArgument("is worked out on this machine only: leave --server out", field=field)


def _ask_service(parts: Parts, question: Question, server: str, variants: tuple[Variant, ...]) -> int:
    try:
        job = finished_job(parts, question, server)
    except Interrupted as stop:
        return stop.exit_status
    chosen = [variant.as_dict() for variant in variants]
    job["plans"] = [plan for plan in job.get("plans") or () if plan["variant"] in chosen]
    status = show_job_plans(job, question.as_json, lambda plans, sentences: _show(plans))
    for refusal in refusals(job["plans"]):
        print_error(refusal, as_json=False)
    return status


class _Work:
    """Predictions on one virtual GPU."""

    def __init__(self, parts: Parts, selected: Selected, batch_size: int | None, fresh: bool, quiet: bool) -> None:
        self._parts, self._selected, self._batch_size = parts, selected, batch_size
        self._fresh, self._quiet = fresh, quiet

    def explained(self, spec: Spec, variant: Variant, store: Any, wants_advice: bool) -> dict[str, Any]:
        """The plan of one variant as JSON data, with ``advice`` where it is wanted."""
        from planner.reports import advice_dict, plan_dict

        plan = self._planned(only(spec, variant), store, self._batch_size, shown=True)
        document = plan_dict(plan)
        if wants_advice and plan.status is PlanStatus.PLANNED:
            document["advice"] = advice_dict(self._advised(plan, spec, store))
        return document

    def _advised(self, plan: Plan, spec: Spec, store: Any) -> Advice:
        def predict(changed: Spec) -> Plan:
            return self._planned(changed, store, None, shown=False)

        def say(number: int, total: int, change: Change) -> None:
            if not self._quiet:
                note(f"[{number}/{total}] what if: {change.label}")

        base = plan if self._batch_size is None else predict(only(spec, plan.variant))
        return advise(base, spec, predict, compute_capability=self._selected.gpu.compute_capability, on_change=say)

    def _planned(self, spec: Spec, store: Any, batch_size: int | None, *, shown: bool) -> Plan:
        """The plan of a spec's only variant, stored or predicted now."""
        from planner.cli.live import open_display
        from planner.cli.progress import SweepProgress

        for fresh in (self._fresh, True):
            display = open_display(stderr_console(), SweepProgress(), quiet=self._quiet or not shown)
            with display:
                (plan,) = self._parts.plan_sweep(
                    spec, self._selected, store=store, batch_size=batch_size, fresh=fresh, listener=display
                )
            if not plan.stored or "explanation" in plan.details:
                break  # else it was stored by a version that explained nothing
        return plan

    def write_snapshot(self, spec: Spec, variant: Variant, plan: dict[str, Any], path: Path) -> None:
        explanation = plan.get("explanation")
        if explanation is None:
            note(f"no snapshot was written: {variant.label()} was not explained")
            return
        size = explanation["batch_size"]
        written = self._parts.write_snapshot(spec, variant, self._selected, size, path)
        note(
            f"{path} ({format_bytes(written)}): predicted memory of batch size {size}; open it at "
            "https://docs.pytorch.org/memory_viz"
        )


def _show(plans: Sequence[Mapping[str, Any]]) -> None:
    from planner.cli import wording
    from planner.cli.explanation import print_advice, print_explanation
    from planner.specs.variants import variant_label

    console = stdout_console()
    for number, plan in enumerate(plans):
        if number:
            console.print()
        if wording.status(plan) != "planned":
            if not refusals(plans):
                print_lines(console, [f"{variant_label(plan['variant'])}: {wording.sizes_line(plan)}"])
            continue
        if plan["explanation"] is not None:
            print_explanation(console, plan)
        if "advice" in plan:
            print_advice(console, plan)
