"""Shows a running sweep on standard error: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from planner.cli import wording
from planner.cli.progress import SweepProgress, VariantProgress, bracket
from planner.progress import Progress, TrialFinished, TrialStarted, VariantFinished
from planner.reports import plan_dict
from planner.trials import PlanStatus


class Display(Protocol):
    """A context manager that is also the listener of a sweep."""

    def __call__(self, event: Progress) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


def open_display(console: Console, progress: SweepProgress, *, quiet: bool = False) -> Display:
    """The display that suits ``console``; ``progress`` collects the events whichever it is."""
    if quiet:
        return QuietDisplay(progress)
    return (
        LiveDisplay(console, progress)
        if console.is_terminal and not console.is_dumb_terminal
        else PlainDisplay(console, progress)
    )


class QuietDisplay:
    """Shows nothing; only collects."""

    def __init__(self, progress: SweepProgress) -> None:
        self.progress = progress

    def __call__(self, event: Progress) -> None:
        self.progress.handle(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class PlainDisplay(QuietDisplay):
    """One line per event that matters, for logs and pipes."""

    def __init__(self, console: Console, progress: SweepProgress) -> None:
        super().__init__(progress)
        self.console = console

    def __call__(self, event: Progress) -> None:
        row = self.progress.handle(event)
        if row is None:
            return
        match event:
            case TrialStarted():
                self._line(
                    row,
                    "; ".join(
                        part for part in (f"tries batch {event.batch_size}", row.bracket(), left(self.progress)) if part
                    ),
                )
            case TrialFinished():
                self._line(row, wording.trial_line(event.trial))
            case VariantFinished():
                self._line(row, wording.answer_line(plan_dict(event.plan)))

    def _line(self, row: VariantProgress, text: str) -> None:
        place = f"[{self.progress.rows.index(row) + 1}/{len(self.progress.rows)}]"
        self.console.print(f"{place} {row.variant.label()}: {text}", markup=False, highlight=False, soft_wrap=True)


class LiveDisplay(QuietDisplay):
    """A table that is drawn anew a few times a second and cleared at the end: the final table takes its place."""

    def __init__(self, console: Console, progress: SweepProgress) -> None:
        super().__init__(progress)
        self._spinner = Spinner("dots")
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def render(self) -> Group:
        """The table as it stands now."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("variant", overflow="fold")
        table.add_column("state", overflow="fold")
        table.add_column("trying now", no_wrap=True)
        table.add_column("bracket", overflow="fold")
        table.add_column("trials", justify="right", no_wrap=True)
        for row in self.progress.rows:
            table.add_row(
                row.variant.label(), Text(row.state, style=_STATE_STYLES.get(row.state, "")), self._running(row),
                _bracket(row), str(len(row.trials)) if row.trials else "-",
            )  # fmt: skip
        elapsed = wording.whole_seconds(self.progress.elapsed_s)
        footer = Table.grid(padding=(0, 1))
        footer.add_row(self._spinner, Text(f"{elapsed} so far; {left(self.progress)}", style="dim"))
        return Group(table, footer)

    def _running(self, row: VariantProgress) -> str:
        if row.batch_size is None or row.trial_started_at_s is None:
            return "-"
        since = self.progress.started_at_s + self.progress.elapsed_s - row.trial_started_at_s
        return f"batch {row.batch_size}, {since:.0f} s"


_STATE_STYLES = {
    "waiting": "dim", "running": "bold cyan", "planned": "green", "stored": "green",
    "unsupported": "yellow", "failed": "red",
}  # fmt: skip


def _bracket(row: VariantProgress) -> str:
    plan = row.plan
    if plan is None or plan.status is not PlanStatus.PLANNED or not plan.max_batch_size:
        return row.bracket() or "-" if plan is None else wording.sizes_line(plan_dict(plan))
    return bracket(plan.max_batch_size, plan.first_oom_batch_size)


def left(progress: SweepProgress) -> str:
    """What is left, as far as it can be known: never a number that nothing stands behind."""
    total = progress.seconds_left()
    if total is not None:
        return f"about {wording.whole_seconds(total)} left" if total >= 1 else "almost done"
    here = progress.variant_seconds_left()
    if here is None:
        return "time left unknown yet"
    more = wording.counted(progress.waiting, "more variant")
    return f"about {wording.whole_seconds(max(here, 1))} left for this variant, then {more}"
