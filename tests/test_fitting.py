"""What stored plans say about one batch size."""

import pytest
from planner_api.fitting import judge

from tests.test_reports import make_plan

HEADROOM = {"headroom": {"bytes": 0, "share": 0.05}}
LEAK = {"leak": {"batch_size": 9, "bytes_per_step": 1, "steps_left": 9}}


@pytest.mark.parametrize(
    ("plan", "batch_size", "fits"),
    [
        (make_plan(size=9), 9, True),
        (make_plan(size=9), 10, False),
        (make_plan(size=48, first_oom_batch_size=56), 50, None),
        (make_plan(size=48, first_oom_batch_size=None), 60, None),
        (make_plan(size=9, question=HEADROOM), 9, True),
        (make_plan(size=9, question=HEADROOM), 10, None),  # it ran out of less than the capacity
        (make_plan(size=9, details=LEAK), 9, None),  # it fitted for a few steps
        (make_plan(size=9, details=LEAK), 10, False),
        (make_plan(size=0), 1, False),
        (make_plan(None, None, batch_size=8, fits=True), 8, True),
        (make_plan(None, None, batch_size=8, fits=True), 9, None),
    ],
)
def test_a_plan_speaks_of_what_it_has_evidence_for(plan, batch_size, fits):
    assert judge(plan, batch_size).fits is fits
