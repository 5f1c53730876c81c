"""The ``planner`` command: exit statuses, JSON, streams, errors. A card with known limits is the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_fakes import LARGEST, SPEC, CardParts, raising_for, write_spec

from planner.cli.app import run
from planner.cli.exits import EXIT_STATUSES, PREFLIGHT_EXIT_STATUSES, ExitStatus, status_of_error, status_of_plans
from planner.errors import DeviceLost, InvalidSpec, ModelError, PlannerError
from planner.jobs import JobKind, JobRequest, JobState
from planner.specs.variants import Precision, Variant
from planner.store import Store
from planner.units import GIB

PLAIN = Variant(precision=Precision.FP32)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("PLANNER_SERVER", raising=False)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    return str(write_spec(tmp_path))


@pytest.fixture
def store_flag(tmp_path: Path) -> str:
    return f"--store=sqlite:///{tmp_path / 'cli.db'}"


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one JSON document on standard output: anything else there fails to parse."""
    return json.loads(capsys.readouterr().out)


def test_json_of_a_search_is_the_contract_field_by_field(
    spec: str, store_flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["probe", spec, "--json", "--capacity", "16GiB", store_flag], CardParts()) == 0
    plans = document(capsys)["plans"]
    assert [plan["variant"] for plan in plans] == [variant.as_dict() for variant in LARGEST]
    for plan, largest in zip(plans, LARGEST.values(), strict=True):
        assert plan["variant"].keys() == {"precision", "checkpointing", "compile"}
        assert plan["gpu"] == "h200"
        assert plan["capacity_bytes"] == 16 * GIB
        assert plan["source"] == "measured"
        assert plan["max_batch_size"] == largest
        assert plan["first_oom_batch_size"] == largest + 1
        assert plan["certified"] is True
        assert isinstance(plan["peak_allocated_bytes"], int)
        assert plan["peak_reserved_bytes"] > plan["peak_allocated_bytes"]
        assert plan["num_trials"] == len(plan["trials"]) >= 2
        assert "batch_size" not in plan
        assert "fits" not in plan


def test_json_of_one_batch_size(spec: str, store_flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["probe", spec, "--json", "--batch-size", "12", store_flag], CardParts()) == 0
    plans = document(capsys)["plans"]
    assert [(plan["batch_size"], plan["fits"]) for plan in plans] == [(12, False), (12, True), (12, True), (12, True)]
    assert all("max_batch_size" not in plan and "first_oom_batch_size" not in plan for plan in plans)


def test_nothing_fits_is_1(spec: str, store_flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = CardParts(dict.fromkeys(LARGEST, 0))
    assert run(["probe", spec, "--json", store_flag], nothing) == 1
    assert [plan["max_batch_size"] for plan in document(capsys)["plans"]] == [0, 0, 0, 0]
    assert run(["probe", spec, "--batch-size", "40", store_flag, "--fresh"], CardParts()) == 1


def test_one_variant_that_fits_is_0(spec: str, store_flag: str) -> None:
    assert run(["probe", spec, store_flag], CardParts({**dict.fromkeys(LARGEST, 0), PLAIN: 1})) == 0


def test_table_shows_everything_a_plan_says(spec: str, store_flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["probe", spec, "--capacity", "16GiB", store_flag], CardParts()) == 0
    out, err = capsys.readouterr()
    header, first, *_ = out.splitlines()
    for words in ("variant", "largest batch", "first OOM", "allocated GiB", "reserved GiB", "device GiB", "step time",
                  "samples per s", "evidence"):  # fmt: skip
        assert words in header
    assert first.split()[:3] == ["fp32", "9", "10"]
    assert "certified" in first
    assert "trials" in first
    assert "180 ms" in first
    assert "50.0" in first
    assert "measured on NVIDIA H200, driver 580.159.04" in out
    assert "the allocator may reserve 16.00 GiB" in out
    assert "stored in sqlite:///" in out
    assert out.split("\n\n")[1].startswith("Largest batch size: 33")
    assert "[1/4] fp32: tries batch" in err
    assert "predicted" not in out


@pytest.mark.parametrize("columns", [80, 100, 130, 200])
def test_table_is_whole_at_any_width(
    columns: int, spec: str, store_flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(["probe", spec, store_flag, "--quiet"], CardParts(dict.fromkeys(LARGEST, 123456))) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out
    assert out.count("123456 ") >= 4
    assert out.count(" 123457 ") == 4


def test_second_run_answers_from_the_store_and_fresh_does_not(
    spec: str, store_flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = CardParts(), CardParts(), CardParts()
    assert run(["probe", spec, store_flag], first) == 0
    capsys.readouterr()
    assert run(["probe", spec, store_flag], second) == 0
    assert "certified, stored" in capsys.readouterr().out
    assert run(["probe", spec, store_flag, "--fresh", "--json"], third) == 0
    assert not any(plan.get("stored") for plan in document(capsys)["plans"])
    assert first.card is not None
    assert second.card is not None
    assert third.card is not None
    assert second.card.num_trials == 0
    assert first.card.num_trials == third.card.num_trials > 0


def test_a_gpu_that_vanishes_keeps_what_is_finished(
    spec: str, store_flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    third = list(LARGEST)[2]
    parts = CardParts(before=raising_for(third, DeviceLost("the GPU is gone")))
    assert run(["probe", spec, "--json", store_flag], parts) == 2
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert [plan["max_batch_size"] for plan in answer["plans"] if plan.get("status", "planned") == "planned"][:2] == [
        9,
        21,
    ]
    assert "the GPU is gone" in err
    assert "Traceback" not in err
    parts = CardParts()
    assert run(["probe", spec, "--json", store_flag], parts) == 0
    assert [bool(plan.get("stored")) for plan in document(capsys)["plans"]][:2] == [True, True]


def test_a_model_that_cannot_run_is_2_with_one_line(
    spec: str, store_flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def before(variant: Variant, batch_size: int) -> None:
        raise ModelError("has no loss", field="model.target")

    assert run(["probe", spec, "--json", "--quiet", store_flag], CardParts(before=before)) == 2
    out, err = capsys.readouterr()
    assert err == "error: model.target: has no loss\n"
    assert json.loads(out)["error"]["code"] == "model_error"


BAD_INPUT = {
    "a key that does not exist": ("precision: [fp32", "precison: [fp32", "variants.precison", "precision"),
    "a task that does not exist": ("causal-lm", "causal-ml", "model.task", "causal-lm"),
    "a precision that does not exist": ("bf16-amp", "bf16-apm", "variants.precision", "bf16-amp"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_a_bad_spec_is_one_line_with_field_and_nearest_value(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong, field, nearest = BAD_INPUT[case]
    path = write_spec(tmp_path, SPEC.replace(right, wrong))
    assert run(["predict", str(path)], CardParts()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: {field}")
    assert f"did you mean '{nearest}'" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", "0"], "error: batch_size: must be at least 1, not 0"),
        (["--batch-size", "-3"], "error: batch_size: must be at least 1"),
        (["--batch-size", "many"], "--batch-size"),
        (["--capacity", "lots"], "error: capacity: 'lots' is not a size"),
        (["--gpu", "h2000"], "error: gpu: 'h2000' is not a GPU type in the catalogue (did you mean 'h200'?)"),
        (["--batchsize", "3"], "--batch-size"),
        (["--store", "plans.db"], "error: store: 'plans.db' is not a store URL (did you mean 'sqlite:///plans.db'?)"),
        (["--store", "mysql://h/d"], "error: store: mysql is not supported"),
        (["--store", "sqlite:////nowhere/at/all/plans.db"], "error: store: "),
        (["--server", "localhost:8000"], "error: server: 'localhost:8000' is not the URL of a service"),
        (["--server", "http://127.0.0.1:1"], "error: server: http://127.0.0.1:1 cannot be reached"),
        (["--server", "http://h", "--store", "sqlite:///x.db"], "error: server: cannot be given together with --store"),
    ],
)
def test_bad_arguments_are_2_with_one_line(
    arguments: list[str], words: str, spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["probe", spec, *arguments], CardParts()) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""
    assert len(err.splitlines()) == 1
    assert run(["probe", spec, "--json", *arguments], CardParts()) == 2
    out, _ = capsys.readouterr()
    assert (
        json.loads(out)["error"]["code"] == "service_error"
        if "cannot be reached" in words
        else "error" in json.loads(out)
    )


def test_a_missing_spec_names_its_neighbour(tmp_path: Path, spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["probe", str(tmp_path / "spce.yaml")], CardParts()) == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_store_that_cannot_be_made(tmp_path: Path, spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The default store's folder is a file: nothing is measured first and lost."""
    parts = CardParts()
    blocked = tmp_path / "data-home"
    blocked.write_text("in the way")
    assert run(["probe", spec], parts) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "planner.db" in err
    assert parts.card is None or parts.card.num_trials == 0


def test_debug_shows_the_traceback(spec: str) -> None:
    with pytest.raises(PlannerError):
        run(["probe", spec, "--batch-size", "0", "--debug"], CardParts())


def test_a_defect_is_one_line_too(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(CardParts):
        def load_spec(self, path: Path) -> Any:
            raise RuntimeError("boom\nand more")

    assert run(["probe", spec], Broken()) == 2
    assert capsys.readouterr().err.startswith("error: internal error, please report it: RuntimeError: boom and more")
    with pytest.raises(RuntimeError):
        run(["probe", spec, "--debug"], Broken())


def test_no_command_prints_help_and_an_unknown_one_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "preflight" in capsys.readouterr().out
    assert run(["prob"]) == 2
    assert "prob" in capsys.readouterr().err
    assert run(["jobs"]) == 2


def test_statuses_of_errors() -> None:
    assert EXIT_STATUSES["planner_error"] is ExitStatus.ERROR
    assert status_of_error(InvalidSpec("x")) == status_of_error(DeviceLost("x")) == 2
    assert status_of_error(DeviceLost("x"), preflight=True) == 3
    assert status_of_error(InvalidSpec("x"), preflight=True) == 2
    assert set(EXIT_STATUSES) <= set(PREFLIGHT_EXIT_STATUSES)


def test_statuses_of_plans() -> None:
    failed = {"status": "failed"}
    assert status_of_plans([failed, {"max_batch_size": 0}]) == 1
    assert status_of_plans([failed, {"max_batch_size": 3}]) == 0
    assert status_of_plans([failed, failed]) == 2
    assert status_of_plans([{"batch_size": 8, "fits": False}]) == 1
    leaking = {"batch_size": 8, "fits": None}
    assert status_of_plans([leaking, {"batch_size": 8, "fits": False}]) == 3
    assert status_of_plans([leaking, {"batch_size": 8, "fits": True}]) == 0


def test_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["gpus", "--json"]) == 0
    names = [gpu["name"] for gpu in document(capsys)["gpus"]]
    assert {"h200", "a100-80gb", "rtx-4090"} <= set(names)
    assert run(["gpus"]) == 0
    assert all(name in capsys.readouterr().out for name in ["h200"])


def test_doctor_reports_and_says_what_to_do(
    store_flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert run(["doctor", "--json", store_flag]) == 0
    findings = {finding["name"]: finding for finding in document(capsys)["findings"]}
    assert findings["allocator settings"]["value"] == "expandable_segments:True"
    assert findings["python"]["value"].startswith(sys.version.split()[0])
    assert findings["torch"]["state"] == "ok"
    assert findings["store"]["value"].endswith("0 plans")
    assert findings["extra server"]["value"] == "installed"
    assert run(["doctor", "--json", "--store", "sqlite:////nowhere/plans.db"]) == 2
    findings = {finding["name"]: finding for finding in document(capsys)["findings"]}
    assert findings["store"]["state"] == "broken"


def test_doctor_in_a_checkout_that_was_never_installed(store_flag: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "planner" not in entry.name:
            (libraries / entry.name).symlink_to(entry)
    folders = (root, root / "api", root / "workers", root / "migrations", libraries)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "planner", "doctor", "--json", store_flag],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["planner"]["value"] == "0+checkout"
    assert "make setup" in findings["extras"]["advice"]


def test_plans_are_listed_and_shown(spec: str, store_flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(["probe", spec, store_flag], CardParts())
    capsys.readouterr()
    assert run(["plans", "list", "--json", "--precision", "fp32", "--gpu", "H200", store_flag]) == 0
    plans = document(capsys)["plans"]
    assert [plan["max_batch_size"] for plan in plans] == [21, 9]
    assert run(["plans", "show", plans[1]["id"], store_flag]) == 0
    shown = capsys.readouterr().out
    assert "small on h200" in shown
    assert shown.count("oom") >= 1
    assert run(["plans", "list", "--precision", "fp23", store_flag]) == 2
    assert "did you mean 'fp32'" in capsys.readouterr().err
    assert run(["plans", "show", "nothing", store_flag]) == 2


def test_jobs_in_a_store(spec: str, store_flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["jobs", "submit", spec, "--kind", "predict", "--idempotency-key", "k1", "--json", store_flag]) == 0
    job = document(capsys)
    assert job["state"] == "queued"
    assert run(["jobs", "submit", spec, "--kind", "predict", "--idempotency-key", "k1", "--json", store_flag]) == 0
    assert document(capsys)["id"] == job["id"]
    assert run(["jobs", "list", "--json", "--state", "queued", store_flag]) == 0
    assert [each["id"] for each in document(capsys)["jobs"]] == [job["id"]]
    assert run(["jobs", "show", job["id"], store_flag]) == 0
    assert "predict small" in capsys.readouterr().out
    assert run(["jobs", "cancel", job["id"], "--json", store_flag]) == 0
    assert document(capsys)["state"] == "cancelled"
    assert run(["jobs", "watch", job["id"], store_flag]) == 2
    assert "was cancelled" in capsys.readouterr().err
    assert run(["jobs", "submit", spec, "--kind", "guess", store_flag]) == 2
    assert run(["jobs", "submit", spec, "--kind", "predict", "--on", "h200", store_flag]) == 2
    assert run(["jobs", "show", "nothing", store_flag]) == 2


def test_help_is_quick_and_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys; from planner.cli.app import run; run(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.endswith("False\n")


def test_a_missing_command_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plans"]) == 2
    assert capsys.readouterr().err == "error: missing command: one of list, show\n"


@pytest.mark.parametrize(
    ("command", "said"), [("jobs", "there are no such jobs\n"), ("plans", "no such plans are stored\n")]
)
def test_an_empty_list_says_so(command: str, said: str, sqlite_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "list", "--store", sqlite_url]) == 0
    assert capsys.readouterr() == ("", said)


def test_a_failed_job_is_shown_with_the_whole_error(sqlite_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = InvalidSpec("unknown key", field="model.config.n_layerz", suggestion="n_layer")
    with Store.open(sqlite_url) as store:
        job, _ = store.create_job(JobRequest(kind=JobKind.PREDICT, spec=yaml.safe_load(SPEC)))
        claim = store.claim_job("w")
        assert claim is not None
        store.finish_job(claim, JobState.FAILED, error=error.as_dict())
    assert run(["jobs", "show", job.id, "--store", sqlite_url]) == 0
    assert "error: model.config.n_layerz: unknown key (did you mean 'n_layer'?)" in capsys.readouterr().out
