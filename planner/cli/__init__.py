"""The ``planner`` command. This module stays light, so that ``planner --help`` answers at once."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the ``planner`` script: run the command line and end with its exit status."""
    from planner.cli.app import run

    sys.exit(run())
