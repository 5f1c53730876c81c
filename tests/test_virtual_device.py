"""The virtual device in its process: values, autocast, gradients, what is told about a model that it cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from planner.errors import InvalidSpec, ModelError
from tests.virtual_child import Process

FEATURES = {
    "kind": "tensors",
    "inputs": {
        "features": {"shape": [8], "dtype": "float32"},
        "labels": {"shape": [], "dtype": "int64", "high": 4},
    },
}
TOKENS = {
    "kind": "tensors",
    "inputs": {name: {"shape": [12], "dtype": "int64", "high": 100} for name in ("input_ids", "labels")},
}


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


def _trace(process: Process, target: str, data: dict[str, Any], optimizer: Any = "adamw", **model: Any) -> Any:
    spec = {
        "model": {"source": "python", "target": f"tests.virtual_models:{target}", "args": model},
        "data": data,
        "train": {"optimizer": optimizer},
    }
    return process.do("traced", spec=spec, variant={}, batch_size=3)


def test_small_integers_have_values(process: Process) -> None:
    code = """
mask = torch.ones(2, 4, dtype=torch.long, device=device)
mask[0, 2:] = 0
positions = mask.cumsum(-1)
counted = torch.tensor([3, 4], device=device)
result = [positions.max().item(), int(mask.sum()), bool((mask == 0).any()), counted[1].item(), positions[0].tolist()]
"""
    assert process.run(code) == [4, 6, True, 4, [1, 2, 2, 2]]


def test_a_value_is_forgotten_when_unknown_ones_are_written_over_it(process: Process) -> None:
    code = """
known = torch.zeros(2, device=device)
assert known.sum().item() == 0
known.copy_(torch.randn(2, device=device))
result = known.sum().item()
"""
    with pytest.raises(ModelError, match="depends on its weights"):
        process.do("run", code=code)


def test_a_model_whose_path_depends_on_its_weights_is_refused(process: Process) -> None:
    with pytest.raises(ModelError, match="depends on its weights") as caught:
        _trace(process, "Classifier", FEATURES, branch=True)
    assert caught.value.field == "model"


def test_a_model_whose_shapes_depend_on_its_weights_is_refused(process: Process) -> None:
    with pytest.raises(ModelError, match=r"shape of aten.*unique.* depends on values") as caught:
        _trace(process, "Classifier", FEATURES, unique=True)
    assert caught.value.field == "model"


def test_a_known_mask_decides_the_shape_of_a_gradient(process: Process) -> None:
    trace = _trace(process, "Classifier", FEATURES, masked=True)
    row = 4 * 4  # one row of logits, float32
    gathered = [
        size for size, operator in zip(trace["sizes"], trace["operators"], strict=True) if operator == "aten::index"
    ]
    assert gathered, "the gradient of the rows that were written is gathered by the mask"
    assert any(size % row == 0 and 0 < size <= 3 * row for size in gathered), "whole rows, beside the positions"


def test_weights_gradients_and_the_optimizers_state_are_allocated(process: Process) -> None:
    trace = _trace(process, "Classifier", FEATURES)
    weights, bias = 8 * 4 * 4, 4 * 4
    move = trace["sizes"][:2]
    assert move == [weights, bias]
    # Weight, gradient of each step, two moments.
    assert trace["sizes"].count(weights) >= 5
    freed = {~event for event in trace["events"] if event < 0}
    kept = [size for block, size in enumerate(trace["sizes"]) if block not in freed]
    assert kept.count(weights) == 0 or kept.count(weights) <= 4, "gradients of the first step are freed"
    assert trace["marks"] == ["move", "step 1", "step 2", "end"]
    assert trace["unmodelled"] == []


def test_tied_weights_stay_tied(process: Process) -> None:
    trace = _trace(process, "Tied", TOKENS, optimizer={"name": "sgd", "lr": 0.1})
    weight = 100 * 16 * 4
    before_steps = trace["sizes"][: trace["sizes"].index(3 * 12 * 8)]  # the first batch of tokens
    assert before_steps.count(weight) == 1


def test_a_constant_is_made_in_the_engines_thread_too(process: Process) -> None:
    code = """
class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.tensor([2.0] * 8, device=gradient.device)

values = torch.empty(5, 8, device=device, requires_grad=True)
Scaled.apply(values).sum().backward()
result = list(values.grad.shape)
"""
    assert process.run(code) == [5, 8]


def test_two_gradients_of_one_weight_are_added_in_place(process: Process) -> None:
    code = """
weight = torch.nn.Parameter(torch.empty(1000, 1000, device=device))
one, two = torch.empty(2, 1000, device=device), torch.empty(2, 1000, device=device)
((one @ weight) + (two @ weight)).sum().backward()
result = [weight.grad.shape[0], peak(trace), sum(size == 4_000_000 for size in trace.sizes)]
"""
    rows, peak, large = process.run(code)
    # Weight and two gradients; a third one would be their sum out of place.
    assert (rows, large) == (1000, 3)
    assert peak < 4 * 4_000_000 + 2 * 32 * 2**20 + 2**20


def test_autocast_has_the_operators_of_cudas(process: Process) -> None:
    code = """
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = torch._C._dispatch_get_all_op_names()
cuda = {name for name in names if has(name, "AutocastCUDA")}
mine = {name for name in names if has(name, "AutocastPrivateUse1")}
result = [sorted(cuda - mine), sorted(mine - cuda), len(cuda)]
"""
    missing, extra, count = process.run(code)
    # The first is an error under autocast; no version of torch calls the others since 1.7.
    assert set(missing) <= {
        "aten::binary_cross_entropy",
        "aten::cudnn_convolution",
        "aten::cudnn_convolution_transpose",
    }
    assert set(extra) <= {"aten::_cudnn_rnn"}  # which CUDA builds alone register for CUDA
    assert count > 100


def test_autocast_chooses_dtypes_as_cuda_does(process: Process) -> None:
    code = """
linear = torch.nn.Linear(16, 16).to(device)
x = torch.randn(4, 16, device=device)
with torch.autocast("vgpu", dtype=torch.bfloat16):
    y = linear(x)
    result = [y, y.exp(), y.softmax(-1), torch.nn.functional.layer_norm(y, (16,)), y + x, y @ x.T, y.relu(), y.sum()]
result = [str(item.dtype) for item in result]
"""
    low, full = "torch.bfloat16", "torch.float32"
    assert process.run(code) == [low, full, full, full, full, low, low, full]


def test_a_weight_is_cast_once_in_an_autocast_context(process: Process) -> None:
    code = """
weight = torch.nn.Parameter(torch.empty(64, 64, device=device))
x = torch.randn(4, 64, device=device)
casts = lambda: sum(size == 64 * 64 * 2 for size in trace.sizes)
with torch.autocast("vgpu", dtype=torch.bfloat16):
    (x @ weight) @ weight
    first = casts()
freed = len([event for event in trace.events if event < 0 and trace.sizes[~event] == 64 * 64 * 2])
with torch.autocast("vgpu", dtype=torch.bfloat16):
    x @ weight
result = [first, freed, casts()]
"""
    assert process.run(code) == [1, 1, 2]


def test_accumulated_norms_of_adafactor_are_no_obstacle(process: Process) -> None:
    """It reads norms of weights back, to scale its update: no size follows from them."""
    trace = _trace(process, "Classifier", FEATURES, optimizer="adafactor")
    assert len(trace["events"]) > 50


def test_a_compiled_step_is_not_predicted(process: Process) -> None:
    spec = {"model": {"source": "python", "target": "tests.virtual_models:Classifier"}, "data": FEATURES}
    with pytest.raises(InvalidSpec, match=r"torch\.compile is not predicted") as caught:
        process.do("traced", spec=spec, variant={"compile": "on"}, batch_size=2)
    assert (caught.value.field, caught.value.suggestion) == ("variants.compile", "off")


CTC = """
log_probs = torch.randn(50, 4, 20, device=device).log_softmax(-1).requires_grad_()
targets = torch.randint(1, 20, (4 * 7,), dtype=torch.int32)
lengths = torch.full((4,), {length}, dtype=torch.int32), torch.full((4,), 7, dtype=torch.int32)
torch.nn.functional.ctc_loss(log_probs, targets{moved}, *lengths, zero_infinity=True).backward()
result = [sorted({{name for name in trace.operators if "ctc" in name}}), log_probs.grad.shape[0]]
result.append([doubt.operator for doubt in trace.doubts])
"""


@pytest.mark.parametrize(
    ("length", "moved", "implementation"),
    [(50, ".to(device)", "cudnn"), (50, ".long()", "native"), (6, "", "native")],
)
def test_a_ctc_loss_runs_as_cuda_chooses(process: Process, length: int, moved: str, implementation: str) -> None:
    """By cuDNN for 32-bit targets in a row that are no longer than their inputs, whose workspace is not known."""
    operators, steps, doubts = process.run(CTC.format(length=length, moved=moved))
    assert steps == 50
    if implementation == "cudnn":
        assert (operators, doubts) == (["aten::_cudnn_ctc_loss"], ["_cudnn_ctc_loss"])
    else:
        assert (operators, doubts) == (["aten::_ctc_loss", "aten::_ctc_loss_backward"], [])


CTC_OF_LOGITS = """
features = torch.randn(11, 199, 768, device=device, requires_grad=True)
logits = torch.nn.functional.linear(features, torch.randn(40, 768, device=device), torch.zeros(40, device=device))
log_probs = logits.log_softmax(-1).transpose(0, 1)
targets = torch.randint(1, 40, (11 * 70,))
lengths = torch.full((11,), 199), torch.full((11,), 70)
torch.nn.functional.ctc_loss(log_probs, targets, *lengths).backward()
softmax = trace.operators.index("aten::_log_softmax_backward_data")
result = [[name, size] for name, size in zip(trace.operators[softmax:], trace.sizes[softmax:]) if size > 300_000]
"""


def test_the_gradient_of_a_softmax_before_a_ctc_loss_is_contiguous(process: Process) -> None:
    """wav2vec2 of 4 s at batch size 11, recorded on an H200: 350,240 bytes twice, then the product's."""
    found = process.run(CTC_OF_LOGITS)
    assert found[:3] == [
        ["aten::_log_softmax_backward_data", 350_240], ["aten::_log_softmax_backward_data", 350_240],
        ["aten::mm", 4 * 11 * 199 * 768],
    ]  # fmt: skip
