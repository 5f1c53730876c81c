"""``planner doctor``: what this machine offers, what is missing, and what to do about it. Imports no torch."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version

import typer

from planner.cli.options import AsJson, Debug, StoreUrl
from planner.cli.parts import Parts, parts_of
from planner.cli.terminal import print_document, print_lines, stdout_console
from planner.doctor import Finding
from planner.errors import PlannerError


def doctor(context: typer.Context, store: StoreUrl = None, as_json: AsJson = False, debug: Debug = False) -> int:
    """Report what this machine offers to the planner, what stands in the way, what to change and why.

    Exit status: 0, or 2 when something that is there does not work.
    """
    findings = list(examine(parts_of(context), store))
    is_broken = any(finding.state == "broken" for finding in findings)
    if as_json:
        print_document({"findings": [asdict(finding) for finding in findings], "ok": not is_broken})
    else:
        _print(findings)
    return 2 if is_broken else 0


def examine(parts: Parts, store_url: str | None) -> Iterator[Finding]:
    """Every finding, in the order in which one depends on another."""
    from planner import __version__, doctor

    yield Finding(name="planner", value=__version__)
    yield Finding(name="python", value=f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from doctor.examine()
    try:
        yield from _store(parts, store_url)
    except PlannerError as error:
        yield Finding(name="store", value=str(error), state="broken")
    yield from _extras()


def _store(parts: Parts, url: str | None) -> Iterator[Finding]:
    with parts.open_store(url) as store:
        plans = sum(each.num_measured + each.num_predicted for each in store.count_plans())
        yield Finding(name="store", value=f"{store.url}, {plans} plans")


def _extras() -> Iterator[Finding]:
    """Which extras of the package are installed: all that each one requires is there."""
    try:
        requirements = requires("planner") or ()
    except PackageNotFoundError:  # a checkout on the import path that was never installed
        advice = "pip install '.[torch,transformers,vision,server]', or make setup in the checkout"
        yield Finding(name="extras", value="not known: planner is not installed", state="absent", advice=advice)
        return
    missing: dict[str, list[str]] = {}
    for line in requirements:
        requirement, _, marker = line.partition(";")
        extra = marker.partition("extra ==")[2].strip(" '\"")
        if not extra:
            continue
        absent = missing.setdefault(extra, [])
        name = requirement.strip().split("[")[0].split(">")[0].split("<")[0].split("=")[0].split("!")[0].strip()
        try:
            version(name)
        except PackageNotFoundError:
            absent.append(name)
    for extra, absent in missing.items():
        yield Finding(
            name=f"extra {extra}",
            value=f"lacks {', '.join(absent)}" if absent else "installed",
            state="absent" if absent else "ok",
            advice=f"pip install 'planner[{extra}]'" if absent else None,
        )


def _print(findings: list[Finding]) -> None:
    from planner.cli.tables import plain_table

    console = stdout_console()
    table = plain_table(console, "what", "found", "")
    for finding in findings:
        table.add_row(finding.name, finding.value, "" if finding.state == "ok" else finding.state)
    console.print(table)
    advice = [
        f"{finding.name}: {finding.advice}" + (f" ({finding.reason})" if finding.reason else "")
        for finding in findings
        if finding.advice
    ]
    if advice:
        print_lines(console, ["", *advice])
