"""``planner preflight``: the gate in front of a rented GPU, for continuous integration."""

from __future__ import annotations

from typing import Annotated

import typer

from planner.cli.options import (
    AsJson,
    Capacity,
    Debug,
    ServerUrl,
    SpecFile,
    StoreUrl,
)


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
    return 0
