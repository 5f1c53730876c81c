"""One trial on several GPUs of this host: a process for each rank, started by torchrun's own agent.

Every rank writes down what it sees in a file of its own as it goes. One that runs out of memory says so and ends, upon
which the agent ends the others, wherever in a collective they wait: no rank hangs on another that is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from planner.errors import InvalidInput, InvalidSpec, error_from_dict
from planner.processes import answer, describe_exit, die_with_parent
from planner.trials import Outcome

_LEFT_EARLY = 70
"""Exit status of a rank that has said all and must not be waited for (EX_SOFTWARE in sysexits.h)."""
_MONITOR_S = 0.05
_GRACE_S = 1.0


_REQUEST = "request.json"
RankTrial = Callable[[int, dict[str, Any]], Mapping[str, Any]]
"""Of a local rank and the request: its part of the trial's result, as ``TrialProcess.run`` gives it."""


class Ending(NamedTuple):
    """How a rank ended that gave no result."""

    rank: int
    exit_status: int
    """Negative for a signal."""

    def __str__(self) -> str:
        return f"rank {self.rank} {describe_exit(self.exit_status)}"


def run_ranks(arguments: Sequence[str], num_ranks: int, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run ``python ARGUMENTS FOLDER`` once for each rank, as torchrun does, and put the results together.

    Each is a fresh interpreter that finds ``request`` as ``FOLDER/request.json`` and calls ``report``: ranks that are
    forks of a process with torch in it were seen to abort under NCCL. Raises the ``PlannerError`` that a rank raised.
    """
    with tempfile.TemporaryDirectory(prefix="planner-ranks-") as name:
        folder = Path(name)
        (folder / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
        ending = _launch([*arguments, name], num_ranks)
        replies = [_read(folder / f"{rank}.json") for rank in range(num_ranks)]
    return combined(replies, ending)


def report(folder: Path, run_rank: RankTrial) -> None:
    """A rank's life: write down what ``run_rank`` answers. It returns only when the trial fitted; otherwise this
    process ends here, which is what frees the others."""
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    rank = int(os.environ["LOCAL_RANK"])
    reply = answer({"rank": lambda: run_rank(rank, request)}, {"do": "rank"})
    if "error" in reply:
        reply["error"]["at"] = time.monotonic()  # the machine's clock: which rank was first
    path = folder / f"{rank}.json"
    path.with_suffix(".part").write_text(json.dumps(reply), encoding="utf-8")
    path.with_suffix(".part").rename(path)
    if "error" in reply:
        time.sleep(_GRACE_S)  # it may be for another rank's death, which the agent has to see first
    if reply.get("ok", {}).get("outcome") != Outcome.FITS:
        # At once: handlers at exit would wait for collectives that never end.
        os._exit(_LEFT_EARLY)


def _launch(arguments: Sequence[str], num_ranks: int) -> Ending | None:
    """Start the ranks and wait for all of them; how one ended early, else ``None``."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=num_ranks, run_id="planner", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=_MONITOR_S, local_addr="localhost",
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        # A rank that was killed is the cause of what the others ended with.
        rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
        return Ending(rank, failure.exitcode)
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        reply: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return reply


def combined(replies: Sequence[Mapping[str, Any] | None], ending: Ending | None) -> dict[str, Any]:
    """One result from those of all ranks: out of memory where one was, and of each figure the largest.

    ``replies``: by rank, as ``planner.processes.answer`` gives them; ``None`` for a rank that was ended before it had
    one. ``ending``: why the agent ended them. ``details["ranks"]`` keeps each rank's own figures. Raises what a rank
    raised first, unless that may be for another rank's death.
    """
    errors = {rank: reply["error"] for rank, reply in enumerate(replies) if reply is not None and "error" in reply}
    results = [reply["ok"] if reply is not None and "ok" in reply else None for reply in replies]
    known = [result for result in results if result is not None]
    # What a rank raises after another one is gone (a lost connection) says nothing; running out of memory does.
    chosen = next((result for result in known if result["outcome"] == Outcome.OOM), None)
    if chosen is None:
        was_killed = ending is not None and ending.exit_status != _LEFT_EARLY
        for error in sorted(errors.values(), key=lambda error: error.get("at", 0.0)):
            if not was_killed or error["code"] in _OF_THE_SPEC:
                raise error_from_dict(dict(error))
        chosen = next((result for result in known if result["outcome"] == Outcome.FAILED), None)
    if chosen is None and len(known) < len(replies):
        said = [f"rank {rank}: {error['message']}" for rank, error in errors.items()]
        said.append(str(ending or "a rank ended without a result"))
        return {"outcome": str(Outcome.FAILED), "error": "; ".join(said)}
    chosen = chosen or known[0]
    error_text = chosen.get("error")
    return {
        **chosen,
        "error": error_text and f"rank {results.index(chosen)}: {error_text}",
        "peaks": {name: max(result["peaks"][name] for result in known) for name in chosen["peaks"]},
        "num_alloc_retries": max(result["num_alloc_retries"] for result in known),
        # A step ends when the slowest rank's does.
        "step_times_s": [max(times) for times in zip(*(result["step_times_s"] for result in known), strict=False)],
        "details": {**chosen["details"], "ranks": [_figures(result) for result in results]},
    }


_OF_THE_SPEC = {InvalidSpec.code, InvalidInput.code}
"""Codes of errors that one rank cannot raise alone."""


def _figures(result: Mapping[str, Any] | None) -> dict[str, Any]:
    if result is None:
        return {"outcome": "ended with the others"}
    return {
        "outcome": result["outcome"],
        **{f"peak_{name}": value for name, value in result["peaks"].items()},
        "num_alloc_retries": result["num_alloc_retries"],
        **{name: result["details"].get(name) for name in ("context_bytes", "communicator_bytes")},
    }
