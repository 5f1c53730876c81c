"""The pages in a real Chromium: what they show, that they ask no other host, and that their console stays empty."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from api_fakes import GPT2, serving, store_plan
from planner_api.app import create_app
from planner_api.settings import Settings
from playwright.sync_api import Browser, Page, expect, sync_playwright

from planner.allocator import AllocatorConfig, Events
from planner.jobs import JobKind, JobRequest, JobState
from planner.store import Store
from planner.trials import PlanStatus, Source
from planner.units import GIB, MIB
from planner.virtual.explanation import explain
from planner.virtual.scaling import Scaled
from planner.virtual.trace import Phase, Purpose, Trace


@dataclass
class Visit:
    """A page with what went wrong while it was open."""

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)

    def open(self, path: str) -> Page:
        self.page.goto(self.url + path)
        self.page.wait_for_load_state("load")
        return self.page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    named = [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]
    with sync_playwright() as playwright:
        path = next(filter(None, named), playwright.chromium.executable_path)
        assert Path(path).exists(), "these tests drive a real browser: make browser installs one"
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Store]:
    with Store.open(sqlite_url) as store:
        yield store


@pytest.fixture
def visit(browser: Browser, store: Store) -> Iterator[Visit]:
    with serving(create_app(store, Settings(events_poll_s=0.05))) as url:
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        visit = Visit(context.new_page(), url)
        visit.page.on(
            "console",
            lambda message: visit.problems.append(message.text) if message.type in ("error", "warning") else None,
        )
        visit.page.on("pageerror", lambda error: visit.problems.append(str(error)))
        visit.page.on(
            "request",
            lambda request: None if request.url.startswith((url, "data:")) else visit.problems.append(request.url),
        )
        visit.page.on("requestfailed", lambda request: visit.problems.append(f"failed: {request.url}"))
        yield visit
        context.close()


def test_without_plans_the_front_page_says_what_to_run(visit: Visit) -> None:
    page = visit.open("/")
    expect(page.get_by_role("heading", name="No plans yet")).to_be_visible()
    expect(page.get_by_text(f"planner probe spec.yaml --gpu h200 --server {visit.url}")).to_be_visible()
    assert visit.problems == []


@pytest.mark.parametrize(
    ("path", "heading", "words"),
    [
        ("/gpus/h300", "Not found", "'h300' is not a GPU type in the catalogue (did you mean h200?)"),
        ("/plans/01ARZ3NDEKTSV4RRFFQ69G5FAV", "Not found", "01ARZ3NDEKTSV4RRFFQ69G5FAV"),
        ("/jobs/none", "Not found", "there is no job 'none'"),
        ("/nowhere", "Not found", "there is nothing at /nowhere"),
    ],
)
def test_what_is_not_there_is_a_page_too(visit: Visit, path: str, heading: str, words: str) -> None:
    page = visit.open(path)
    expect(page.get_by_role("heading", name=heading)).to_be_visible()
    expect(page.locator(".problem")).to_contain_text(words)
    page.get_by_role("link", name="All GPU types").click()
    expect(page.get_by_role("heading", name="No plans yet")).to_be_visible()
    assert all("status of 4" in problem for problem in visit.problems)  # Chromium's own word on a 404


def test_the_interface_answers_a_browser_with_documents(visit: Visit) -> None:
    reply = visit.page.goto(visit.url + "/v1/plans/01ARZ3NDEKTSV4RRFFQ69G5FAV")
    assert reply is not None
    assert reply.headers["content-type"] == "application/problem+json"


def test_the_front_page_shows_each_gpu_type_with_its_plans_and_chart(visit: Visit, store: Store) -> None:
    store_plan(store, variant=0, largest=6, source=Source.MEASURED)
    store_plan(store, variant=0, largest=5)
    store_plan(store, variant=3, largest=31, notes=("aten::foo is not modelled",))
    store_plan(store, gpu="a100-80gb", variant=2, largest=0, peaks=None)
    page = visit.open("/")
    h200 = page.locator("section#h200")
    expect(h200.locator("tbody tr").nth(0)).to_contain_text("certified")
    expect(h200.locator("tbody tr").nth(0)).to_contain_text("271 ms")
    expect(h200.locator("tbody tr").nth(1)).to_contain_text("predicted")
    expect(h200.get_by_text("aten::foo is not modelled")).to_be_visible()
    expect(h200.get_by_role("cell", name="16.00").first).to_be_visible()
    expect(page.locator("section#a100-80gb")).to_contain_text("nothing fits")
    expect(page.locator("section#a100-80gb figure")).to_have_count(0)
    chart = h200.locator("figure .main-svg").first
    expect(chart).to_be_visible()
    assert h200.locator("figure .bars .point").count() == 3
    assert visit.problems == []


def test_a_prediction_never_wears_the_badge_of_a_measurement(visit: Visit, store: Store) -> None:
    store_plan(store, source=Source.PREDICTED)
    page = visit.open("/gpus/h200")
    assert page.locator(".badge").all_inner_texts() == ["predicted"]
    assert page.locator(".badge.measured, .badge.certified").count() == 0


def test_an_older_answer_to_the_same_question_is_not_shown(visit: Visit, store: Store) -> None:
    store_plan(store, largest=3)
    store_plan(store, largest=9)
    page = visit.open("/gpus/h200")
    assert page.locator("tbody .strong").all_inner_texts() == ["9"]


def test_what_users_write_is_shown_as_text(visit: Visit, store: Store) -> None:
    label = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    store_plan(store, spec_name=label, model=label)
    store_plan(store, variant=1, model="bert")
    store.create_job(JobRequest(kind=JobKind.PROBE, spec={**GPT2, "name": label}, gpu="h200"))
    page = visit.open("/")
    expect(page.locator("td.model").first).to_be_visible()
    assert page.locator("main img").count() == 0
    assert label in page.locator("section#h200 td.model").all_inner_texts()
    expect(page.locator("figure .main-svg").first).to_be_visible()
    assert visit.problems == []


def test_a_variant_that_failed_says_why(visit: Visit, store: Store) -> None:
    error = {"code": "model_error", "message": "this GPU has no bf16", "field": None, "suggestion": None}
    plan = store_plan(
        store, status=PlanStatus.UNSUPPORTED, error=error, peaks=None, max_batch_size=None, first_oom_batch_size=None
    )
    page = visit.open("/gpus/h200")
    expect(page.get_by_text("this GPU has no bf16")).to_be_visible()
    expect(page.locator(".badge.unsupported")).to_be_visible()
    page = visit.open(f"/plans/{plan.id}")
    expect(page.get_by_text("this GPU has no bf16")).to_be_visible()
    expect(page.locator("#memory")).to_have_count(0)


def _explanation() -> dict[str, Any]:
    """A step that holds a batch and one activation for its backward pass."""
    trace = Trace()
    trace.owners += [("net.0", "weight"), ("net.0", ""), ("net.1", "")]
    trace.mark("move")
    trace.phases.append((0, Phase.MOVE))
    trace.allocate(300 * MIB, "aten::_to_copy", 1, Purpose.PARAMETER)
    for number in (1, 2):
        trace.mark(f"step {number}")
        trace.phases.append((len(trace.events), Phase.FORWARD))
        saved = [trace.allocate(700 * MIB, "aten::mm", owner) for owner in (2, 3)]
        trace.phases.append((len(trace.events), Phase.BACKWARD))
        flowing = trace.allocate(400 * MIB, "aten::mm", 3)
        for block in (*saved, flowing):
            trace.free(block)
    return explain(
        Scaled(Events(trace.events, trace.sizes), trace, True, ()),
        9,
        config=AllocatorConfig(),
        capacity_bytes=16 * GIB,
        device_total_bytes=141 * GIB,
        outside_bytes=751 * MIB,
    )


def test_a_plans_page_says_what_takes_the_memory(visit: Visit, store: Store) -> None:
    store_plan(store, source=Source.MEASURED, details={"explanation": _explanation()})
    page = visit.open("/gpus/h200")
    page.get_by_role("link", name="fp32").click()
    memory = page.locator("#memory")
    expect(memory.get_by_role("heading")).to_have_text("What takes the memory at batch size 9")
    expect(memory.locator(".badge")).to_have_text("predicted")  # whatever the plan itself is
    rows = {row[0]: row[1:] for row in (text.split("\t") for text in memory.locator("tbody tr").all_inner_texts())}
    assert rows["activations"] == ["1.37", "1.37"]
    assert rows["= device"] == ["2.78", "2.78"]
    parts = memory.locator(".stack span")
    assert parts.count() == memory.locator(".legend li").count() == 4
    widths = [box["width"] for part in parts.all() if (box := part.bounding_box())]
    assert widths[0] == max(widths)
    assert widths[0] / sum(widths) == pytest.approx(1400 / (2100 + 751), rel=0.02)
    expect(page.locator("#modules")).to_contain_text("net.*")
    expect(page.locator("#largest tbody tr")).to_have_count(4)
    expect(page.locator("#largest tbody tr").last).to_contain_text("weight")
    timeline = page.locator("#timeline svg polygon.allocated").bounding_box()
    assert timeline is not None
    assert timeline["height"] > 100
    assert page.locator(".steps span").all_inner_texts() == ["step 1", "step 2"]
    assert visit.problems == []


def test_a_plan_that_was_not_explained_says_how_to(visit: Visit, store: Store) -> None:
    plan = store_plan(store)
    page = visit.open(f"/plans/{plan.id}")
    expect(page.locator("#memory")).to_contain_text("planner explain")
    assert page.locator(".badge").all_inner_texts() == ["predicted"]
    assert visit.problems == []


def test_a_gpu_type_without_plans(visit: Visit) -> None:
    page = visit.open("/gpus/A100-80GB")
    expect(page.get_by_role("heading", name="a100-80gb")).to_be_visible()
    expect(page.get_by_text("--gpu a100-80gb")).to_be_visible()


def test_a_job_page_follows_its_job_and_ends_with_its_plans(visit: Visit, store: Store) -> None:
    job, _ = store.create_job(JobRequest(kind=JobKind.PROBE, spec=GPT2, gpu="h200"))
    page = visit.open(f"/jobs/{job.id}")
    expect(page.locator("[data-events] li")).to_have_count(1)
    claim = store.claim_job("worker-7")
    assert claim is not None
    variant = {"precision": "fp32", "checkpointing": "full", "compile": "on"}
    store.append_event(claim, "trial_started", {"variant": variant, "batch_size": 8})
    expect(page.get_by_text("fp32 + checkpointing full + compiled: running batch size 8")).to_be_visible()
    trial = {"batch_size": 8, "outcome": "oom", "source": "predicted", "peak_reserved_bytes": None}
    store.append_event(claim, "trial_finished", {"variant": variant, "trial": trial})
    expect(page.get_by_text("compiled: batch size 8 runs out of memory, predicted")).to_be_visible()
    store.append_event(claim, "variant_finished", {"variant": variant, "plan": {"status": "unsupported"}})
    expect(page.get_by_text("compiled: unsupported")).to_be_visible()
    plan = store_plan(store, largest=9)
    assert plan.id is not None
    store.finish_job(claim, JobState.SUCCEEDED, None, [plan.id])
    expect(page.locator("tbody .strong")).to_have_text("9")
    expect(page.locator("h1 + .badge")).to_have_text("succeeded")
    expect(page.locator("[data-events] li")).to_have_count(6)
    assert [text for text in visit.problems if not text.startswith("failed: ")] == []


def test_the_api_docs_render_from_this_service_alone(visit: Visit) -> None:
    page = visit.open("/docs")
    expect(page.get_by_text("/v1/preflight")).to_be_visible()
    page.get_by_text("Submit a job").click()
    expect(page.get_by_text("Idempotency-Key", exact=False).first).to_be_visible()
    assert visit.problems == []


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_the_screen_and_can_be_read(
    browser: Browser, visit: Visit, store: Store, width: int, scheme: str
) -> None:
    store_plan(store, variant=3, source=Source.MEASURED, model="my_project.models.segmentation:UNetWithAVeryLongName")
    plan = store_plan(store, details={"explanation": _explanation()})
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(f"{visit.url}/plans/{plan.id}")
    expect(page.locator("#timeline svg")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.goto(f"{visit.url}/")
    expect(page.locator("figure .main-svg").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background, text = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert contrast(background, text) > 7
    context.close()


def contrast(first: str, second: str) -> float:
    """The contrast of two ``rgb(...)`` colours (WCAG 2.2, "contrast ratio")."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
