"""``planner doctor``: what this machine offers, what is missing, and what to do about it. Imports no torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import typer

from planner.cli.options import AsJson, Debug, StoreUrl
from planner.cli.parts import Parts, parts_of
from planner.cli.terminal import print_document, print_lines, stdout_console
from planner.errors import PlannerError
from planner.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    state: str = "ok"
    """``ok``, ``absent`` (fine, but something is not possible) or ``broken``."""
    advice: str | None = None


def doctor(context: typer.Context, store: StoreUrl = None, as_json: AsJson = False, debug: Debug = False) -> int:
    """Report what this machine offers to the planner: Python, torch, CUDA, driver, GPUs, allocator settings, store.

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
    from planner import __version__
    from planner.environment import allocator_conf

    yield Finding(name="planner", value=__version__)
    yield Finding(name="python", value=f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _checked("torch", _torch)
    yield from _checked("gpu", _gpus)
    yield Finding(name="allocator settings", value=allocator_conf() or "default")
    yield Finding(name="visible devices", value=os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    yield from _shared_memory()
    yield from _checked("store", lambda: _store(parts, store_url))
    yield from _extras()


def _checked(name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except PlannerError as error:
        yield Finding(name=name, value=str(error), state="broken")


def _torch() -> Iterator[Finding]:
    from planner.environment import torch_build
    from planner.errors import DeviceUnavailable

    try:
        build = torch_build()
    except DeviceUnavailable as error:
        yield Finding(name="torch", value="not installed", state="absent", advice=error.message)
        return
    yield Finding(name="torch", value=build.version)
    yield Finding(
        name="cuda of torch",
        value=build.cuda or "none: a CPU build",
        state="ok" if build.cuda else "absent",
        advice=None if build.cuda else "enough for predictions; measuring needs a CUDA build of torch",
    )


def _gpus() -> Iterator[Finding]:
    from planner.local_gpus import local_gpus

    found = local_gpus()
    if not found:
        yield Finding(
            name="gpu",
            value="none visible",
            state="absent",
            advice="probe runs on a virtual GPU here: name its type with --gpu",
        )
        return
    yield Finding(name="driver", value=found[0].driver_version)
    for card in found:
        major, minor = card.compute_capability
        used = f"{format_bytes(card.used_bytes)} of {format_bytes(card.total_bytes)} in use"
        yield Finding(
            name=f"gpu {card.index}", value=f"{card.name} ({card.gpu.name}), compute capability {major}.{minor}, {used}"
        )


def _shared_memory() -> Iterator[Finding]:
    try:
        room = os.statvfs("/dev/shm")  # noqa: S108 - its size is what is asked for
    except OSError:
        yield Finding(name="shared memory", value="no /dev/shm", state="absent", advice="NCCL and data loaders need it")
        return
    total = room.f_frsize * room.f_blocks
    small = total < 1 << 30
    advice = "NCCL and data loaders may fail: start the container with --ipc=host or --shm-size=8g" if small else None
    yield Finding(name="shared memory", value=format_bytes(total), state="absent" if small else "ok", advice=advice)


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
    marks: dict[str, Any] = {"ok": "", "absent": "absent", "broken": "broken"}
    for finding in findings:
        table.add_row(finding.name, finding.value, marks[finding.state])
    console.print(table)
    advice = [f"{finding.name}: {finding.advice}" for finding in findings if finding.advice]
    if advice:
        print_lines(console, ["", *advice])
