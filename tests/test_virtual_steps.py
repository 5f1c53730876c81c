"""Predicted steps against those that an H200 recorded, event by event (``measurements/h200/steps``)."""

from __future__ import annotations

import gzip
import importlib.util
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.specs.files import read_document
from tests.virtual_child import Process

ROOT = Path(__file__).parent.parent
MEASURED_TORCH = (2, 11)
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


def _program() -> Any:
    spec = importlib.util.spec_from_file_location("step_events", ROOT / "benchmarks/step_events.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _recorded(name: str) -> dict[str, Any]:
    data = (ROOT / f"measurements/h200/steps/{name}.json.xz").read_bytes()
    found: dict[str, Any] = json.loads(lzma.decompress(data))
    return found


def _spec(recorded: dict[str, Any]) -> Any:
    document: Any = read_document(ROOT / f"measurements/specs/{recorded['spec']}.yaml")
    if document["model"]["source"] == "python":
        document["model"]["target"] = "examples." + document["model"]["target"]
    return document


def _differing(process: Process, recorded: dict[str, Any]) -> tuple[int, int]:
    """How many allocations and frees are not those recorded, in their order, and how many there are."""
    theirs = [token for token, _ in _program().events_of(recorded) if token[0] in "+-"]
    trace = process.do(
        "traced", spec=_spec(recorded), variant=recorded["variant"], batch_size=recorded["size"], num_steps=3
    )
    sizes = [-(-size // 512) * 512 for size in trace["sizes"]]
    mine = [f"+{sizes[event]}" if event >= 0 else f"-{sizes[~event]}" for event in trace["events"]]
    mine = [token for token in mine if token[1:] != "0"]
    return sum(a != b for a, b in zip(mine, theirs, strict=False)) + abs(len(mine) - len(theirs)), len(theirs)


@pytest.mark.parametrize(
    "name",
    [
        "resnext50-timm.fp32.none.0.8",  # segments that are taken before the first kernel lie elsewhere than later ones
        "unet-256.bf16-amp.none.0.1",  # the heap of the first kernel that asserts lies among segments
        "unet-256.bf16-amp.none.0.2",
        "wav2vec2-bert.fp32.none.0.1",  # so do handles, and code that attention brings
        "eva02-tiny-timm.bf16.full.0.494",  # 126,958 rows of 192: gradients of a layer norm's weight in two steps
        pytest.param(
            "vit-b-32-torchvision.bf16.selective.0.198",  # a mode looks on: biases are not added in place
            marks=pytest.mark.skipif(TORCH != MEASURED_TORCH, reason="attention's Python code frees in another order"),
        ),
    ],
)
def test_peaks_are_exact(process: Process, name: str) -> None:
    recorded = _recorded(name)
    found = process.do("peaks", spec=_spec(recorded), variant=recorded["variant"], batch_sizes=[recorded["size"]])
    assert found["peaks"] == [recorded["steps"][-1][:2]]


def test_every_event_of_resnext_is_the_recorded_one(process: Process) -> None:
    differing, events = _differing(process, _recorded("resnext50-timm.fp32.none.0.8"))
    assert (differing, events) == (0, 4_217)


@pytest.mark.skipif(TORCH != MEASURED_TORCH, reason="attention's Python code frees in another order")
def test_every_event_of_vit_with_selective_checkpointing_is_the_recorded_one(process: Process) -> None:
    differing, events = _differing(process, _recorded("vit-b-32-torchvision.bf16.selective.0.198"))
    assert (differing, events) == (0, 6_805)


def test_a_bias_is_added_in_place_unless_a_mode_looks_on(process: Process) -> None:
    code = """
from torch.utils._python_dispatch import TorchDispatchMode

class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

linear = torch.nn.Linear(64, 32, device=device)
inputs = torch.empty(4, 64, 8, device=device).transpose(1, 2)

def operators(mode):
    before = len(trace.operators)
    with mode:
        linear(inputs)
    return [name for name in trace.operators[before:] if name in ("aten::mm", "aten::add")]

import contextlib
result = [operators(contextlib.nullcontext()), operators(Looking())]
"""
    plain, looked_on = process.run(code)
    assert "aten::add" not in plain
    assert looked_on[-1] == "aten::add"


@pytest.mark.parametrize(("dtype", "copies"), [("float16", 0), ("bfloat16", 1)])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_softmax_of_float16_in_float32_makes_no_copy(process: Process, name: str, dtype: str, copies: int) -> None:
    """Recorded for hiera in fp16-amp, whose attention takes the math kernel."""
    code = f"""
scores = torch.empty(8, 64, 64, device=device, dtype=torch.{dtype}, requires_grad=True)
before = len(trace.operators)
found = torch.nn.functional.{name}(scores, -1, dtype=torch.float32)
made = trace.operators[before:]
found.sum().backward()
result = [made.count("aten::_to_copy"), str(found.dtype), str(scores.grad.dtype)]
"""
    assert process.run(code) == [copies, "torch.float32", f"torch.{dtype}"]


def test_autocast_lets_go_of_casts_from_the_first_argument_on(process: Process) -> None:
    """Recorded for wavlm with checkpointing: a projection whose input is transposed and whose bias is no leaf."""
    code = """
weight = torch.nn.Parameter(torch.empty(48, 64, device=device))
bias = torch.empty(96, device=device)[:48] * 1
inputs = torch.empty(4, 64, 8, device=device).transpose(1, 2)
before = len(trace.events)
with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
    torch.nn.functional.linear(inputs, weight, bias)
    events = trace.events[before:]
result = [trace.sizes[~event] for event in events if event < 0]
"""
    freed = process.run(code)
    inputs, bias = 4 * 8 * 64 * 2, 48 * 2
    assert freed.index(inputs) < freed.index(bias)


def test_the_gradient_through_a_layer_norm_is_contiguous(process: Process) -> None:
    """Recorded for wav2vec2-bert: the depthwise convolution before it copies a gradient that is transposed."""
    code = """
norm = torch.nn.LayerNorm(32, device=device)
inputs = torch.empty(2, 32, 8, device=device).transpose(1, 2).requires_grad_()
loss = (norm(inputs) * torch.empty(2, 32, 8, device=device).transpose(1, 2)).sum()
(seen,) = torch.autograd.grad(loss, inputs)
result = [list(seen.stride()), seen.is_contiguous()]
"""
    assert process.run(code) == [[256, 32, 1], True]


def test_memory_of_a_layer_norms_gradients_grows_with_its_rows() -> None:
    """Bytes of partial sums and of their reduction, as recorded for eva02 at three batch sizes; none for few rows."""
    from planner.virtual.norm_kernels import _partial_sums, _staging

    for size, partial_sums, staging in (
        (4, 0, 0), (494, 1_523_712, 6_094_848), (1153, 2_097_024, 8_454_144), (1648, 2_097_024, 8_454_144),
    ):  # fmt: skip
        rows = 257 * size
        assert (_partial_sums(192, 2, rows), _staging(192, 132, 2048, rows)) == (partial_sums, staging)


def test_the_first_kernel_comes_after_random_numbers_and_its_own_results(process: Process) -> None:
    """The driver frees memory of its own when it is loaded: recorded for resnet50 and eva02."""
    recorded = _recorded("resnext50-timm.fp32.none.0.8")
    code = f"""
from planner.specs.document import parse_spec
from planner.specs.variants import Variant
from planner.virtual.tracing import trace_steps
found = trace_steps(parse_spec({_spec(recorded)!r}), Variant(), 8, architecture, num_steps=1)
start = found.steps[0][0]
result = [found.operators[block] for block in found.events[start:found.first_kernel] if block >= 0]
"""
    assert process.run(code) == ["aten::randn", "aten::randint", "aten::convolution", "aten::convolution"]


def test_what_a_run_without_updates_needs_lies_between_what_was_measured_while_they_were_skipped(
    process: Process,
) -> None:
    """An LSTM in fp16-amp whose first two updates were skipped: allocated and reserved bytes after them."""
    measured = json.loads(gzip.decompress((ROOT / "measurements/h200/unseen-5.json.gz").read_bytes()))["cases"]
    (case,) = (
        each for each in measured if (each["case"], each["variant"]["precision"]) == ("lstm-projected", "fp16-amp")
    )
    (allocated, reserved, _), *_ = case["peaks"]["1"]["steps"]
    code = f"""
from planner.allocator import AllocatorConfig
from planner.specs.document import parse_spec
from planner.specs.variants import Variant
from planner.virtual.prediction import needed_without_update
from planner.virtual.scaling import TraceFamily
from planner.virtual.tracing import trace_steps

spec = parse_spec({read_document(ROOT / "measurements/specs/lstm-projected.yaml")!r})
found = []
for precision in ("fp16-amp", "bf16-amp"):
    variant = Variant.from_dict({{"precision": precision}})
    family = TraceFamily(lambda size: trace_steps(spec, variant, size, architecture))
    found.append(needed_without_update(family.traced(1), AllocatorConfig(), 8 << 30, 150_109_880_320))
result = found
"""
    needed, never_skipped = process.run(code)
    assert allocated <= needed <= reserved
    assert never_skipped is None


def test_writing_where_a_known_mask_says_lists_as_many_positions_as_it_marks(process: Process) -> None:
    """Recorded for wav2vec2-bert and wavlm, whose masks leave most positions out: 16 bytes for each marked one."""
    code = """
values = torch.empty(4, 100, 8, device=device)
mask = torch.zeros(4, 100, dtype=torch.bool)
mask[:, 3:9] = True
marked = torch.tensor(mask.tolist(), device=device)
before = len(trace.sizes)
values[marked] = torch.empty(8, device=device)
values[torch.empty(4, 100, device=device) > 0] = torch.empty(8, device=device)
found = zip(trace.sizes[before:], trace.operators[before:])
result = [size for size, name in found if "index_put" in name]
"""
    marked, half = 16 * 4 * 6, 16 * 4 * 100 // 2  # the second mask is not known
    assert [size for size in process.run(code) if size in (marked, half)] == [marked, half]
