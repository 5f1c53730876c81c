"""The flags that several commands share, declared once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from planner.errors import InvalidArgument, nearest
from planner.units import MAX_BATCH_SIZE

SpecFile = Annotated[
    Path, typer.Argument(metavar="SPEC", help="What to train: a YAML, JSON or TOML file.", show_default=False)
]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="GPU type, as `planner gpus` lists it; by default this machine's GPU."),
]
On = Annotated[
    str | None,
    typer.Option(
        "--on", metavar="NAME", help="Measure on this GPU type, held to the capacity of the one that --gpu names."
    ),
]
Capacity = Annotated[
    str | None,
    typer.Option(
        "--capacity",
        metavar="SIZE",
        help="The most that PyTorch's caching allocator may reserve, e.g. 16GiB; by default what the GPU type leaves.",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="N", help="Answer for this batch size instead of searching the largest."),
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        envvar="PLANNER_STORE",
        help="Where plans are kept: sqlite:///FILE or postgresql://HOST/DATABASE; by default your data folder.",
    ),
]
ServerUrl = Annotated[
    str | None,
    typer.Option("--server", metavar="URL", envvar="PLANNER_SERVER", help="Ask this planner service instead."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Work it out again even where the store has an answer.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def check_batch_size(batch_size: int | None) -> None:
    """Raises ``InvalidArgument`` for a batch size below 1 or beyond ``MAX_BATCH_SIZE``."""
    if batch_size is not None and batch_size < 1:
        raise InvalidArgument(f"must be at least 1, not {batch_size}", field="batch_size")
    if batch_size is not None and batch_size > MAX_BATCH_SIZE:
        raise InvalidArgument(f"must be at most {MAX_BATCH_SIZE}, not {batch_size:.3g}", field="batch_size")


def one_of(kind: type[StrEnum], value: str | None, field: str) -> str | None:
    """``value`` if ``kind`` has it. Raises ``InvalidArgument`` naming ``field``, with the nearest value."""
    valid = [str(item) for item in kind]
    if value is not None and value not in valid:
        raise InvalidArgument(f"{value!r} is none of {', '.join(valid)}", field=field, suggestion=nearest(value, valid))
    return value


def one_of_store_and_server(
    context: typer.Context, store: str | None, server: str | None
) -> tuple[str | None, str | None]:
    """Where to ask: a flag beats the other one's environment variable; both flags contradict each other.

    With both variables set the service is asked. Raises ``InvalidArgument``.
    """
    if store is None or server is None:
        return store, server
    written = {name for name in ("store", "server") if "COMMANDLINE" in str(context.get_parameter_source(name))}
    if written == {"store", "server"}:
        raise InvalidArgument("cannot be given together with --store: a service has its own store", field="server")
    return (store, None) if "store" in written else (None, server)
