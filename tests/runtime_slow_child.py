"""As ``tests.runtime_child``, but building the model lasts until the file ``$GATE`` exists."""

import os
import time

from planner.runtime.zygote import Zygote
from tests.runtime_child import build, run_trial, start


def build_slowly(spec_text):
    while not os.path.exists(os.environ["GATE"]):  # noqa: PTH110
        time.sleep(0.01)
    return build(spec_text)


if __name__ == "__main__":
    Zygote(build_slowly, start, run_trial).serve()
