"""``planner explain``: tables, chart, advice, the snapshot, and what is wrong with what was typed."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import write_spec
from planner_api.memory import memory_view
from rich.console import Console

from planner.cli.app import run
from planner.cli.explain import chosen_variants
from planner.cli.explanation import CHART_ROWS, chart, print_advice, print_explanation
from planner.cli.parts import Parts
from planner.cli.tables import shares
from planner.errors import InvalidArgument
from planner.gpus import find_gpu
from planner.reports import KIND_NAMES
from planner.selection import Selected
from planner.specs.model import Spec
from planner.specs.variants import Checkpointing, Loss, Precision, Variant
from planner.trials import Source
from planner.units import GIB, MIB
from planner.virtual.explanation import Kind
from tests.planning_fakes import ExplainingDevice, make_spec

OWN = """\
model: {source: python, target: "tests.virtual_models:Tied"}
data:
  kind: tensors
  inputs: {input_ids: {shape: [12], dtype: int64, high: 100}, labels: {shape: [12], dtype: int64, high: 100}}
"""


def _peak(**kinds: int) -> dict[str, Any]:
    allocated = sum(kinds.values()) + MIB
    return {
        "when": "step 2, backward", "event": 5, "kinds": kinds, "rounding_bytes": MIB, "allocated_bytes": allocated,
        "cached_bytes": GIB, "reserved_bytes": allocated + GIB, "outside_bytes": GIB // 2,
        "device_bytes": allocated + GIB + GIB // 2,
    }  # fmt: skip


PLAN: dict[str, Any] = {
    "variant": {"precision": "bf16-amp", "checkpointing": "none", "compile": "off"},
    "gpu": "h200",
    "explanation": {
        "batch_size": 9,
        "fits": True,
        "peaks": {
            "allocated": _peak(activations=6 * GIB, parameters=GIB, gradients=512 * MIB),
            "reserved": {**_peak(activations=4 * GIB, parameters=GIB), "when": "step 1, update"},
        },
        "activations": [
            {"module": "h.*.mlp.act", "num_modules": 12, "bytes": 5 * GIB},
            {"module": "", "num_modules": 1, "bytes": GIB - 10 * MIB},
            {"module": "h.*.ln", "num_modules": 12, "bytes": 4 * MIB},
            {"module": None, "num_modules": 30, "bytes": 6 * MIB},
        ],
        "largest": [
            {
                "bytes": 200 * MIB, "kind": "optimizer_state", "module": "wte", "tensor": "exp_avg of weight",
                "operator": "zeros_like", "made": "step 1, update",
            },
            {
                "bytes": 100 * MIB, "kind": "parameters", "module": "wte", "tensor": "weight",
                "operator": "_to_copy", "made": "move",
            },
        ],
        "timeline": {
            "num_events": 400,
            "points": [[n * 10, n * GIB, max(n, 20) * GIB] for n in range(40)],
            "phases": [[0, "move"], [100, "step 1, forward"], [150, "step 1, backward"], [250, "step 2, forward"]],
        },
    },
    "advice": {
        "max_batch_size": 9,
        "changes": [
            {"change": "checkpointing full", "max_batch_size": 20, "gained_samples": 11, "effect": "same results"},
            {"change": "fused optimizer", "max_batch_size": 9, "gained_samples": 0, "effect": "same results"},
            {"change": "optimizer sgd", "max_batch_size": 8, "gained_samples": -1, "effect": "another"},
        ],
        "left_out": [{"change": "chunked loss", "reason": "it is for language models"}],
    },
}  # fmt: skip


def _printed(show: Any, encoding: str = "utf-8", *, plan: dict[str, Any] | None = None) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    show(Console(file=file, width=120, highlight=False), PLAN | (plan or {}))
    return raw.getvalue().decode(encoding)


def test_the_tables_show_both_moments_and_sum_up() -> None:
    text = _printed(print_explanation)
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert text.startswith("bf16-amp, batch size 9 on h200 (predicted)\n")
    assert lines["activations"][1:] == ["6.00", "67%", "4.00", "62%"]
    assert lines["= device"][2:] == ["9.00", "100%", "6.50", "100%"]
    assert "most allocated: step 2, backward; most reserved: first at step 1, update" in text
    assert lines["h.*.mlp.act"][1:] == ["12", "5.00", "83%"]
    assert lines["all others"][2:] == ["42", "0.01", "<1%"], "what is below 1% is summed up"
    assert lines["outside any module"][3:] == ["1", "0.99", "17%"]
    assert "exp_avg of wte.weight 200.0 MiB optimizer state" in text


def test_what_does_not_fit_says_why_it_is_explained() -> None:
    unfit = {"max_batch_size": 0, "explanation": {**PLAN["explanation"], "fits": False}}
    line = "(predicted; the smallest that was asked about, and does not fit: this is without a limit)"
    assert _printed(print_explanation, plan=unfit).startswith(f"bf16-amp, batch size 9 on h200 {line}\n")
    asked = _printed(print_explanation, plan={**unfit, "max_batch_size": None, "batch_size": 9})
    assert "(predicted; does not fit: this is without a limit)" in asked
    (_, shown) = shares([PLAN | unfit])
    assert shown.startswith(
        "  bf16-amp, batch size 9 (the smallest that was asked about, and does not fit): activations"
    )
    view = memory_view(unfit["explanation"])
    assert view is not None
    assert view.unfit == "the smallest that was asked about, and does not fit"


def test_every_kind_has_a_name() -> None:
    assert set(KIND_NAMES) == {str(kind) for kind in Kind}


def test_the_chart_keeps_its_size_and_its_highest_point() -> None:
    lines = chart(PLAN["explanation"]["timeline"], 20, "#", ".")
    assert len(lines) == CHART_ROWS + 2
    assert lines[0].endswith("#")
    assert lines[0].split()[0] == "39.00"
    assert max(len(line) for line in lines[:-1]) == 10 + 20
    assert lines[CHART_ROWS - 1].count("#") > lines[0].count("#")
    assert lines[-2].index("|step 1") == 10 + 5
    assert lines[-2].index("|step 2") == 10 + 12
    assert "." not in lines[0].partition(" ")[2].replace("39.00", "")


def test_a_terminal_without_block_characters_gets_a_chart_too() -> None:
    assert "█" in _printed(print_explanation)
    assert "#" in _printed(print_explanation, "ascii")


def test_advice_shows_gains_and_what_was_left_out() -> None:
    text = _printed(print_advice)
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines()}
    assert lines["checkpointing full"][2:4] == ["20", "+11"]
    assert lines["fused optimizer"][2:4] == ["9", "0"]
    assert lines["optimizer sgd"][2:4] == ["8", "-1"]
    assert "left out: chunked loss: it is for language models" in text


def test_the_table_of_plans_says_what_takes_most_in_a_line() -> None:
    assert shares([PLAN, {"variant": {}, "explanation": None}]) == [
        "At the peak of allocated bytes, predicted (planner explain says more):",
        "  bf16-amp, batch size 9: activations 80%, parameters 13%, gradients 7%",
    ]
    assert shares([{"variant": {}}]) == []


def test_variants_are_chosen_by_their_names() -> None:
    spec = make_spec(Precision.FP32, Precision.BF16_AMP, checkpointing=(Checkpointing.NONE, Checkpointing.FULL))
    assert len(chosen_variants(spec, [])) == 4
    (chosen,) = chosen_variants(spec, ["bf16-amp + checkpointing full"])
    assert (chosen.precision, chosen.checkpointing) == (Precision.BF16_AMP, Checkpointing.FULL)
    with pytest.raises(InvalidArgument, match="'fp32 \\+ checkpointing full'") as caught:
        chosen_variants(spec, ["bf16-amp + full"])
    assert caught.value.field == "variant"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "bf16"], "error: variant: 'bf16' is none of the spec's variants"),
        (["--snapshot", "out.pickle"], "error: snapshot: is of one variant: name it with --variant, one of 'fp32'"),
        (["--variant", "fp32", "--snapshot", "no/out.pickle"], "error: snapshot: no/out.pickle is not a file"),
        (["--variant", "fp32", "--snapshot", "."], "error: snapshot: . is not a file"),
        (["--batch-size", "0"], "error: batch_size: must be at least 1"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["explain", str(write_spec(tmp_path)), *arguments]) == 2
    assert message in capsys.readouterr().err


class ExplainedParts(Parts):
    """A virtual GPU that knows its answers: checkpointing and a chunked loss help, nothing else does."""

    def __init__(self) -> None:
        self.snapshots: list[tuple[Variant, int, Path]] = []

    def choose_device(
        self, gpu: str | None, capacity_bytes: int | None, *, predicted_only: bool, on: str | None
    ) -> Selected:
        assert predicted_only
        return Selected(device=ExplainedDevice(), gpu=find_gpu(gpu or "h200"), predictor=None, notes=("a note",))

    def write_snapshot(self, spec: Spec, variant: Variant, selected: Selected, batch_size: int, path: Path) -> int:
        self.snapshots.append((variant, batch_size, path))
        return 3 * MIB


class ExplainedDevice(ExplainingDevice):
    def __init__(self) -> None:
        super().__init__(9, source=Source.PREDICTED)

    def open(self, spec: Spec, variant: Variant, *, capacity_bytes: int | None = None) -> Any:
        self.same = 9
        if variant.checkpointing is Checkpointing.FULL:
            self.same = 20
        elif variant.loss is Loss.CHUNKED:
            self.same = 12
        runner = super().open(spec, variant, capacity_bytes=capacity_bytes)
        runner.explain = lambda size: {**PLAN["explanation"], "batch_size": size, "fits": size <= self.same}
        return runner


def _explain(folder: Path, *arguments: str) -> tuple[int, ExplainedParts]:
    parts = ExplainedParts()
    store = f"sqlite:///{folder}/store.db"
    return run(["explain", str(write_spec(folder)), "--gpu", "h200", "--store", store, *arguments], parts), parts


def test_one_variant_is_explained_and_advised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, parts = _explain(tmp_path, "--variant", "bf16-amp", "--snapshot", str(tmp_path / "out.pickle"), "--json")
    assert status == 0
    output, told = capsys.readouterr()
    (plan,) = json.loads(output)["plans"]
    assert (plan["source"], plan["max_batch_size"], plan["explanation"]["batch_size"]) == ("predicted", 9, 9)
    gains = [(row["change"], row["gained_samples"]) for row in plan["advice"]["changes"]]
    assert gains[:2] == [("checkpointing full", 11), ("chunked loss", 3)]
    assert {gained for _, gained in gains[2:]} == {0}
    assert parts.snapshots == [(Variant(precision=Precision.BF16_AMP), 9, tmp_path / "out.pickle")]
    assert "[2/8] what if: checkpointing full" in told
    assert "out.pickle (3.0 MiB): predicted memory of batch size 9" in told


def test_several_variants_are_explained_and_advised_only_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _explain(tmp_path, "--quiet")[0] == 0
    output, told = capsys.readouterr()
    assert output.count("what takes the memory") == 4
    assert "one change to" not in output
    assert told == "a note\n"
    assert _explain(tmp_path, "--quiet", "--advise")[0] == 0
    assert capsys.readouterr().out.count("one change to") == 4


def test_one_batch_size_is_advised_by_its_largest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _explain(tmp_path, "--variant", "fp32", "--batch-size", "12", "--json", "--quiet")[0] == 1
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert (plan["fits"], plan["explanation"]["batch_size"], plan["explanation"]["fits"]) == (False, 12, False)
    assert (plan["advice"]["max_batch_size"], plan["advice"]["changes"][0]["max_batch_size"]) == (9, 20)
    assert _explain(tmp_path, "--variant", "fp32", "--batch-size", "12", "--no-advise")[0] == 1
    assert "does not fit: this is without a limit" in capsys.readouterr().out


def test_a_stored_plan_is_shown_with_its_explanation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _explain(tmp_path, "--variant", "fp32", "--no-advise", "--json", "--quiet")[0] == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert run(["plans", "show", plan["id"], "--store", f"sqlite:///{tmp_path}/store.db"]) == 0
    shown = capsys.readouterr().out
    assert "fp32, batch size 9 on h200 (predicted)" in shown
    assert "what takes the memory" in shown


class Service:
    """A service that has finished any job at once."""

    url = "http://service"

    def __init__(self, *plans: dict[str, Any]) -> None:
        self.plans = plans
        self.asked: dict[str, Any] = {}

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, question: dict[str, Any]) -> dict[str, Any]:
        self.asked = question
        return {"id": "7"}

    def events(self, job_id: str) -> list[Any]:
        return []

    def job(self, job_id: str) -> dict[str, Any]:
        return {"id": job_id, "state": "succeeded", "plans": list(self.plans)}


def _ask(service: Service, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.setattr(Parts, "connect", lambda self, url: service)
    return run(["explain", str(write_spec(folder)), "--server", "http://service", *arguments])


def test_a_service_is_asked_for_the_predictions_that_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = {key: value for key, value in PLAN.items() if key != "advice"} | {"source": "predicted", "max_batch_size": 9}
    other = plan | {"variant": {**PLAN["variant"], "precision": "fp32"}}
    service = Service(other, plan)
    assert _ask(service, monkeypatch, tmp_path, "--variant", "bf16-amp", "--capacity", "16GiB") == 0
    assert (service.asked["kind"], service.asked["capacity_bytes"], service.asked["gpu"]) == ("predict", 16 * GIB, None)
    shown = capsys.readouterr().out
    assert shown.startswith("bf16-amp, batch size 9 on h200 (predicted)\n")
    assert shown.count("what takes the memory") == 1
    assert _ask(service, monkeypatch, tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["plans"] == [other, plan]


def test_what_a_service_cannot_explain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"code": "invalid_spec", "message": "no such kernel", "field": "variants.precision", "suggestion": None}
    refused = {"variant": PLAN["variant"], "gpu": "h200", "status": "unsupported", "error": error}
    service = Service(refused)
    assert _ask(service, monkeypatch, tmp_path) == 2
    assert "error: variants.precision: no such kernel" in capsys.readouterr().err
    for flag in (["--advise"], ["--variant", "fp32", "--snapshot", str(tmp_path / "out.pickle")]):
        service.asked = {}
        assert _ask(service, monkeypatch, tmp_path, *flag) == 2
        assert (
            f"error: {flag[-1 if len(flag) == 1 else 2][2:]}: is worked out on this machine only"
            in capsys.readouterr().err
        )
        assert not service.asked


def test_nothing_is_faked_in_this_one(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    command = [sys.executable, "-m", "planner.cli", "explain", "own.yaml", "--gpu", "h200", "--capacity", "1GiB"]
    done = subprocess.run(
        [*command, "--store", "sqlite:///s.db", "--no-advise", "--snapshot", "own.pickle", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(done.stdout)["plans"]
    size = plan["max_batch_size"]
    peak = plan["explanation"]["peaks"]["allocated"]
    assert plan["explanation"]["batch_size"] == size > 1
    assert peak["allocated_bytes"] == plan["peak_allocated_bytes"]
    assert (
        peak["device_bytes"] == peak["reserved_bytes"] + find_gpu("h200").context_bytes + find_gpu("h200").library_bytes
    )
    assert "advice" not in plan
    document = pickle.loads((tmp_path / "own.pickle").read_bytes())
    assert document["planner"] == {"source": "predicted", "batch_size": size, "fits": True}
