"""Stands in for the process that predicts: it is ready at once, and a trial takes for ever."""

import time
from pathlib import Path

from planner.processes import serve


def trial(batch_size, **_):
    Path(batch_size).touch()  # the test's own: where to say that the trial has begun
    time.sleep(600)
    return {}


serve({"open": lambda **_: {}, "trial": trial})
