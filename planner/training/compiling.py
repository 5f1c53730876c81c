"""``torch.compile`` with static shapes, and what there is to say of it: its time, its cache, where it ran eager."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from planner.errors import InvalidSpec, first_line
from planner.specs.model import Spec
from planner.training.oom import is_out_of_memory

MAX_REASONS = 3
"""Reasons of graph breaks that are quoted."""


class Compiled:
    """``model`` compiled by inductor. Each shape of its inputs is compiled once; nothing falls back to eager silently.

    ``look_in`` sees every graph before it is compiled. Raises ``InvalidSpec`` for a data set of more lengths than torch
    compiles (``torch._dynamo.config.recompile_limit``).
    """

    def __init__(self, spec: Spec, model: torch.nn.Module, look_in: Callable[[torch.fx.GraphModule], None]) -> None:
        import torch._dynamo as dynamo
        from torch._inductor.compile_fx import compile_fx

        limit = dynamo.config.recompile_limit
        if len(spec.data.lengths) > limit:
            raise InvalidSpec(
                f"with static shapes each of the {len(spec.data.lengths)} lengths is compiled, and torch gives up "
                f"after {limit} (torch._dynamo.config.recompile_limit): pad to fewer lengths",
                field="variants.compile",
                suggestion="off",
            )
        dynamo.config.fail_on_recompile_limit_hit = True

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            look_in(graph)
            return compile_fx(graph, inputs)

        self.forward: Callable[..., Any] = torch.compile(model, backend=backend, dynamic=False)

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Raises ``InvalidSpec`` where the compiler gives up in the body."""
        from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

        try:
            yield
        except FailOnRecompileLimitHit as error:
            message = f"torch.compile gave up after too many compilations of one function: {first_line(error)}"
            raise InvalidSpec(message, field="variants.compile", suggestion="off") from error
        except BackendCompilerFailed as error:
            if is_out_of_memory(error):
                raise
            message = f"torch.compile cannot compile this model here: {first_line(error)}"
            raise InvalidSpec(message, field="variants.compile", suggestion="off") from error

    @staticmethod
    def report() -> dict[str, Any]:
        """Of this process so far, as JSON data: ``compile_s`` (seconds, forward and backward graphs), ``cache`` (hits
        and misses of inductor's on-disk cache; without misses the time is the warm one), ``num_graphs``,
        ``graph_breaks`` (how many, by reason)."""
        from torch._dynamo.utils import calculate_time_spent, counters

        inductor, aot = counters["inductor"], counters["aot_autograd"]
        hits = inductor["fxgraph_cache_hit"] + aot["autograd_cache_hit"]
        misses = inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"]
        return {
            "compile_s": round(calculate_time_spent()["total_wall_time"], 3),
            "cache": {"hits": hits, "misses": misses, "warm": hits > 0 and misses == 0},
            "num_graphs": counters["stats"]["unique_graphs"],
            "graph_breaks": {first_line(ValueError(str(why))): count for why, count in counters["graph_break"].items()},
        }


def notes_of(report: dict[str, Any]) -> list[str]:
    """What of ``report`` a reader must see beside the figures."""
    breaks = report["graph_breaks"]
    if not breaks:
        return []
    reasons = "; ".join(list(breaks)[:MAX_REASONS])
    return [f"compiled as {report['num_graphs']} graphs; between them the model runs eager: {reasons}"]
