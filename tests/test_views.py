"""What the pages show of plans."""

from dataclasses import replace

from planner_api.views import chart, newest_answers, plan_row

from planner.specs.variants import Sdpa, Variant
from planner.trials import Source
from tests.planning_fakes import BF16
from tests.test_reports import CONSTRAINED, make_plan

WAY = {
    "global_batch_size": 512, "micro_batch_size": 16, "accumulation_steps": 32, "gpus": 1, "samples_per_second": 150.0,
    "source": "measured",
}  # fmt: skip


def test_a_row_says_what_a_plan_answers_beside_its_batch_size():
    fastest = {"batch_size": 16, "step_time_s": 0.1, "samples_per_second": 160.0, "source": "measured"}
    details = {
        "unconstrained": {"max_batch_size": 27, "source": "predicted"},
        "accumulation": WAY,
        "fastest": fastest,
    }
    row = plan_row(make_plan(size=24, question=CONSTRAINED, details=details, notes=("a note",)))
    assert row.remarks == (
        "a note",
        "With multiples of 8 and a headroom of 5%: 24 in place of 27 (predicted) with bf16-amp.",
        "Fastest: 160.0 samples per second with bf16-amp at batch size 16 (measured).",
        "512 samples a step: 32 micro-batches of 16 with bf16-amp (150.0 samples per second, measured).",
    )
    assert plan_row(make_plan(size=24)).remarks == ()
    assert plan_row(make_plan(size=24, source=Source.PREDICTED)).remarks == ()


def test_another_question_is_another_row():
    plain, constrained = make_plan(size=27), make_plan(size=24, question=CONSTRAINED)
    other = make_plan(Variant(precision=BF16.precision, sdpa=Sdpa.MATH), size=20)
    assert len(newest_answers([plain, constrained, other, plain])) == 3


def test_the_chart_draws_what_fits():
    fits, leaks, does_not = (
        replace(make_plan(size=9), batch_size=9, max_batch_size=None, fits=said) for said in (True, None, False)
    )
    drawn = chart([fits, leaks, does_not, make_plan(size=0)])
    assert drawn is not None
    assert len(drawn["bars"]) == 2
    assert chart([does_not]) is None
