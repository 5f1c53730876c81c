"""What the display shows of a sweep: state, bracket, estimate; and how quantities are written."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from planner.cli import wording
from planner.cli.live import LiveDisplay, PlainDisplay, QuietDisplay, left, open_display
from planner.cli.progress import SweepProgress
from planner.progress import SweepStarted, TrialFinished, TrialStarted, VariantFinished, VariantStarted
from planner.specs.variants import Checkpointing, Variant
from planner.trials import Environment, Outcome, Peaks, Plan, PlanStatus, Source, Trial

PLAIN, FULL = Variant(), Variant(checkpointing=Checkpointing.FULL)
GIB = 1 << 30


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def trial(batch_size: int, outcome: Outcome = Outcome.FITS, **more: object) -> Trial:
    peaks = Peaks(allocated_bytes=3 * GIB, reserved_bytes=4 * GIB)
    return Trial(batch_size=batch_size, outcome=outcome, source=Source.MEASURED, peaks=peaks, **more)  # type: ignore[arg-type]


def plan(variant: Variant, **more: object) -> Plan:
    environment = Environment(
        source=Source.MEASURED, gpu="h200", gpu_name="NVIDIA H200", gpu_uuid=None, total_bytes=141 * GIB,
        driver_version="580", cuda_version="13.0", torch_version="2.13.0",
    )  # fmt: skip
    fields = {"max_batch_size": 9, "first_oom_batch_size": 10, "certified": True, **more}
    return Plan(
        spec_hash="0" * 64, spec_name=None, model="gpt2", variant=variant, environment=environment,
        capacity_bytes=16 * GIB, source=Source.MEASURED, **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def started(variant: Variant, batch_size: int, low: int, high: int | None, remaining: int | None) -> TrialStarted:
    return TrialStarted(variant=variant, batch_size=batch_size, low=low, high=high, remaining_trials=remaining)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> SweepProgress:
    sweep = SweepProgress(clock)
    sweep.handle(SweepStarted(variants=(PLAIN, FULL)))
    return sweep


def run_trial(progress: SweepProgress, clock: Clock, event: TrialStarted, outcome: Outcome, took_s: float) -> None:
    progress.handle(event)
    clock.now += took_s
    progress.handle(TrialFinished(variant=event.variant, trial=trial(event.batch_size, outcome)))


def test_bracket_narrows_as_trials_end(progress: SweepProgress, clock: Clock) -> None:
    progress.handle(VariantStarted(variant=PLAIN, index=0))
    row = progress.rows[0]
    assert (row.state, row.bracket(), progress.rows[1].state) == ("running", "", "waiting")
    run_trial(progress, clock, started(PLAIN, 8, 0, None, None), Outcome.FITS, 2)
    assert row.bracket() == "fits 8"
    run_trial(progress, clock, started(PLAIN, 16, 8, None, None), Outcome.OOM, 2)
    assert row.bracket() == "fits 8 · OOM 16"
    run_trial(progress, clock, started(PLAIN, 12, 8, 16, 3), Outcome.FAILED, 2)
    assert row.bracket() == "fits 8 · OOM 16", "a failed trial says nothing about memory"
    assert row.batch_size is None
    assert len(row.trials) == 3


def test_nothing_is_estimated_before_there_is_a_bracket(progress: SweepProgress, clock: Clock) -> None:
    progress.handle(VariantStarted(variant=PLAIN, index=0))
    run_trial(progress, clock, started(PLAIN, 8, 0, None, None), Outcome.FITS, 2)
    progress.handle(started(PLAIN, 16, 8, None, None))
    assert progress.variant_seconds_left() is None
    assert progress.seconds_left() is None
    assert left(progress) == "time left unknown yet"


def test_estimate_is_remaining_trials_times_their_mean(progress: SweepProgress, clock: Clock) -> None:
    progress.handle(VariantStarted(variant=PLAIN, index=0))
    run_trial(progress, clock, started(PLAIN, 8, 0, None, None), Outcome.FITS, 2)
    run_trial(progress, clock, started(PLAIN, 16, 8, None, None), Outcome.OOM, 4)
    progress.handle(started(PLAIN, 12, 8, 16, 4))
    assert progress.variant_seconds_left() == pytest.approx(12)
    clock.now += 1
    assert progress.variant_seconds_left() == pytest.approx(11)
    assert progress.seconds_left() is None, "no variant is finished: nothing is known of the waiting one"
    assert left(progress) == "about 11 s left for this variant, then 1 more variant"


def test_waiting_variants_count_as_long_as_finished_ones_took(progress: SweepProgress, clock: Clock) -> None:
    progress.handle(VariantStarted(variant=PLAIN, index=0))
    run_trial(progress, clock, started(PLAIN, 8, 0, None, None), Outcome.FITS, 30)
    progress.handle(VariantFinished(plan=plan(PLAIN), index=0))
    assert progress.seconds_left() == pytest.approx(30)
    assert left(progress) == "about 30 s left"
    progress.handle(VariantStarted(variant=FULL, index=1))
    progress.handle(VariantFinished(plan=plan(FULL), index=1))
    assert progress.seconds_left() == 0
    assert left(progress) == "almost done"
    assert [found.variant for found in progress.plans] == [PLAIN, FULL]


def test_a_stored_answer_says_nothing_about_how_long_work_takes(progress: SweepProgress, clock: Clock) -> None:
    progress.handle(VariantStarted(variant=PLAIN, index=0))
    progress.handle(VariantFinished(plan=plan(PLAIN, stored=True), index=0))
    assert progress.rows[0].state == "stored"
    assert progress.seconds_left() is None


def test_plain_display_writes_a_line_for_each_step(progress: SweepProgress, clock: Clock) -> None:
    text = io.StringIO()
    display = open_display(Console(file=text, width=60), progress)
    assert isinstance(display, PlainDisplay)
    with display:
        display(VariantStarted(variant=PLAIN, index=0))
        display(started(PLAIN, 8, 0, None, None))
        display(TrialFinished(variant=PLAIN, trial=trial(8, duration_s=1.25)))
        display(started(PLAIN, 16, 8, None, 1))
        display(TrialFinished(variant=PLAIN, trial=trial(16, Outcome.OOM)))
        display(VariantFinished(plan=plan(PLAIN), index=0))
    assert text.getvalue().splitlines() == [
        "[1/2] fp32: tries batch 8; time left unknown yet",
        "[1/2] fp32: batch 8 fits: 4.00 GiB reserved (1.2 s)",
        "[1/2] fp32: tries batch 16; fits 8; about 1 s left for this variant, then 1 more variant",
        "[1/2] fp32: batch 16 runs out of memory",
        "[1/2] fp32: largest batch size 9, 10 runs out of memory (certified, 0 trials)",
    ]


def test_live_display_shows_every_variant_and_clears_itself(progress: SweepProgress, clock: Clock) -> None:
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=True, color_system=None)
    display = open_display(console, progress)
    assert isinstance(display, LiveDisplay)
    with display:
        display(VariantStarted(variant=PLAIN, index=0))
        display(started(PLAIN, 16, 8, 32, 2))
        clock.now += 3
        with console.capture() as frame:
            console.print(display.render())
    shown = frame.get()
    assert "batch 16, 3 s" in shown
    assert "fits 8 · OOM 32" in shown
    assert "fp32 + checkpointing full" in shown
    assert "waiting" in shown
    assert text.getvalue().endswith("\x1b[2K"), "the last thing drawn is the table's own removal"


def test_quiet_and_dumb_terminals(progress: SweepProgress, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    assert isinstance(open_display(console, progress, quiet=True), QuietDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_display(Console(file=io.StringIO(), force_terminal=True), progress), PlainDisplay)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0.0 ms"), (0.0123, "12.3 ms"), (0.0999, "99.9 ms"), (0.4, "400 ms"), (0.9996, "1.0 s"),
     (9.94, "9.9 s"), (12.2, "12 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (75, "1 min 15 s"), (7260, "2 h 1 min")],
)  # fmt: skip
def test_seconds(value: float | None, text: str) -> None:
    assert wording.seconds(value) == text


def test_rates_and_counts() -> None:
    assert [wording.rate(value) for value in (None, 0.5, 12.34, 1234.5)] == ["-", "0.50", "12.3", "1234"]
    assert [wording.counted(number, "trial") for number in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]
    assert wording.gib(16703815680) == "15.56"


def test_a_plan_that_failed_says_why() -> None:
    failed = {"status": "failed", "error": {"message": "it raised"}, "variant": FULL.as_dict(), "source": "measured"}
    assert wording.answer_line(failed) == "failed: it raised"
    assert wording.evidence(failed) == "failed"
    assert PlanStatus.FAILED == "failed"


def test_evidence_never_calls_a_prediction_measured() -> None:
    assert wording.evidence({"source": "predicted", "stored": True}) == "predicted, stored"
    assert wording.evidence({"source": "measured", "certified": False}) == "measured"
    assert wording.evidence({"source": "measured", "certified": True}) == "certified"
