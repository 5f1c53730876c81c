"""``planner preflight``: the gate in front of a rented GPU, for continuous integration."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from planner.cli.exits import ExitStatus
from planner.cli.options import (
    AsJson,
    Capacity,
    Debug,
    ServerUrl,
    SpecFile,
    StoreUrl,
    check_batch_size,
    one_of_store_and_server,
)
from planner.cli.parts import Parts, parts_of
from planner.cli.signals import Interrupted, interruptible
from planner.cli.terminal import note, print_document, print_lines, stdout_console
from planner.specs.variants import variant_label
from planner.units import format_bytes, parse_bytes

_STATUSES = {
    "fits": ExitStatus.OK,
    "does_not_fit": ExitStatus.DOES_NOT_FIT,
    "unknown": ExitStatus.NOT_ENOUGH_EVIDENCE,
}
_WORDS = {"fits": "fits", "does_not_fit": "does not fit", "unknown": "not enough evidence"}


def preflight(
    context: typer.Context,
    spec: SpecFile,
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME", help="GPU type that the run is for.")],
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Batch size that the run will use.")],
    capacity: Capacity = None,
    store: StoreUrl = None,
    server: ServerUrl = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Say whether a run fits before hardware is rented for it: by a stored measurement first, else by a prediction.

    Exit status: 0 fits, 1 does not fit, 2 bad input, 3 not enough evidence.
    """
    check_batch_size(batch_size)
    capacity_bytes = None if capacity is None else parse_bytes(capacity)
    store, server = one_of_store_and_server(context, store, server)
    parts = parts_of(context)
    try:
        with interruptible():
            if server is None:
                verdict = _decide_here(parts, spec, gpu, batch_size, capacity_bytes, store)
            else:
                question = {
                    "spec": parts.read_document(spec), "gpu": gpu, "batch_size": batch_size,
                    "capacity_bytes": capacity_bytes,
                }  # fmt: skip
                with parts.connect(server) as client:
                    verdict = client.preflight(question)
    except Interrupted as stop:
        note("interrupted: nothing was decided")
        return stop.exit_status
    if as_json:
        print_document(verdict)
    else:
        print_lines(stdout_console(), verdict_lines(verdict))
    return _STATUSES[verdict["verdict"]]


def _decide_here(
    parts: Parts, path: Any, gpu: str, batch_size: int, capacity_bytes: int | None, store: str | None
) -> dict[str, Any]:
    from planner.reports import verdict_dict

    spec = parts.load_spec(path)
    with parts.open_store(store) as opened:
        return verdict_dict(parts.preflight(spec, gpu, batch_size, capacity_bytes=capacity_bytes, store=opened))


def verdict_lines(verdict: dict[str, Any]) -> list[str]:
    """A verdict as JSON data in sentences: the whole, then each variant with what decided it."""
    what = verdict.get("spec_name") or verdict.get("model")
    lines = [
        f"{_WORDS[verdict['verdict']]}: {what} with batch size {verdict['batch_size']} on {verdict['gpu']}, where the "
        f"allocator may reserve {format_bytes(verdict['capacity_bytes'])}"
    ]
    for each in verdict["variants"]:
        label = variant_label(each["variant"])
        lines.append(f"  {label}: {_WORDS[each['verdict']]}; {each['reason']}")
        lines.extend(f"    {text}" for text in each.get("notes") or ())
    return [*lines, *(verdict.get("notes") or ())]
