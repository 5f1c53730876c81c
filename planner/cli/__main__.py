"""``python -m planner.cli``: the ``planner`` command where its script is not on the path."""

from planner.cli import main

main()
