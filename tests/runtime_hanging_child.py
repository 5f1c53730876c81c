"""As ``tests.runtime_child``, but a trial waits a moment only for the process beside it, and fails where that hangs."""

from planner.runtime import zygote
from tests.runtime_child import build, run_trial, start


def run_settled(built, **request):
    result = run_trial(built, **request)
    return result if request["beside"] is None or result["details"]["is_settled"] else {**result, "outcome": "failed"}


if __name__ == "__main__":
    zygote.SETTLE_S = zygote.START_S = 0.2
    zygote.Zygote(build, start, run_settled).serve()
