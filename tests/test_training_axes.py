"""The axes of a sweep on the CPU: each is another way to the same result, or refused with a reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from planner.errors import InvalidSpec
from planner.specs.document import parse_spec
from planner.specs.model import Spec
from planner.specs.variants import (
    Checkpointing,
    Compile,
    Loss,
    MemoryFormat,
    OptimizerImplementation,
    Precision,
    Sdpa,
    Variant,
)
from planner.training import Training, build_model, check_tf32, phases
from planner.training.checkpointing import enable_checkpointing, repeated_blocks
from planner.virtual.architecture import Architecture
from planner.virtual.tracing import trace_steps
from tests.test_training import CPU, SMALL, TARGETS, TOKENS, XY, _library, _python, _training, _transformers

GPT2 = _transformers("gpt2", "causal-lm", TOKENS, n_layer=2, n_embd=32, n_head=2, vocab_size=64)
BERT = _transformers("bert", "masked-lm", TOKENS, **SMALL)


def _blocks(**args: Any) -> Spec:
    return parse_spec({"model": {"source": "python", "target": f"{TARGETS}:Blocks", "args": args}, "data": XY})


def _gradients(training: Training, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    loss = training._trained_loss(batch or training.batch(3))
    torch.autograd.backward(loss)
    return {name: item.grad for name, item in training.model.named_parameters() if item.grad is not None}


def _same(spec: Spec, **variant: Any) -> None:
    """The variant has the gradients of the plain step."""
    model = build_model(spec)
    plain = _gradients(Training(spec, Variant(), copy.deepcopy(model), CPU))
    other = _gradients(Training(spec, Variant(**variant), model, CPU))
    assert plain.keys() == other.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient, msg=name)


# Checkpointing


@pytest.mark.parametrize("mode", [Checkpointing.FULL, Checkpointing.SELECTIVE])
@pytest.mark.parametrize(
    "spec", [_blocks(), _library("torchvision", "resnet18"), _library("timm", "test_vit", img_size=32), GPT2]
)
def test_checkpointing_changes_no_gradient(spec: Spec, mode: Checkpointing) -> None:
    """Dropout included: it is drawn again as it was."""
    _same(spec, checkpointing=mode)


def test_a_model_that_overwrites_what_selective_keeps_is_refused() -> None:
    """squeezenet's convolutions are followed by activations in place."""
    spec = _library("torchvision", "squeezenet1_1")
    with pytest.raises(InvalidSpec, match="selective keeps results that this model overwrites") as caught:
        _training(spec, checkpointing=Checkpointing.SELECTIVE).run(phases(spec)[0], 2)
    assert (caught.value.field, caught.value.suggestion) == ("variants.checkpointing", "full")


def test_blocks_are_found_in_any_library() -> None:
    kinds = {
        ("torchvision", "resnet18"): ("BasicBlock", 8),
        ("torchvision", "swin_t"): ("SwinTransformerBlock", 12),
        ("torchvision", "mobilenet_v3_small"): ("InvertedResidual", 11),
        ("timm", "test_vit"): ("Block", 6),
    }
    for (source, name), (kind, count) in kinds.items():
        blocks = repeated_blocks(build_model(_library(source, name)))
        assert [type(block).__name__ for block in blocks].count(kind) == count, name
        inner = {id(child) for block in blocks for child in block.modules() if child is not block}
        assert not inner & {id(block) for block in blocks}, "no block within a block"


def test_a_block_is_recomputed_once_for_each_backward_pass() -> None:
    model = build_model(_blocks())
    block = repeated_blocks(model)[0]
    calls: list[int] = []
    block.register_forward_hook(lambda *_: calls.append(1))
    block.linear.register_forward_hook(lambda *_: calls.append(2))
    for _ in range(2):  # a process that is kept warm does it again
        enable_checkpointing(model, Checkpointing.FULL)
    torch.autograd.backward(model(torch.randn(2, 4), torch.randn(2, 2)))
    assert calls == [2, 1, 2]


# Attention


def test_the_math_back_end_has_the_same_gradients() -> None:
    training = _training(GPT2, sdpa=Sdpa.MATH)
    training.run(phases(GPT2)[0], 2)
    training.run(phases(GPT2)[1], 2)


def test_a_back_end_that_cannot_run_is_refused_with_the_reason() -> None:
    """cuDNN is none of a CPU's."""
    with pytest.raises(InvalidSpec, match="the cudnn back end cannot run this model's attention") as caught:
        _training(GPT2, sdpa=Sdpa.CUDNN).run(phases(GPT2)[0], 2)
    assert (caught.value.field, caught.value.suggestion) == ("variants.sdpa", "default")


def test_a_back_end_for_a_model_without_that_attention_is_refused() -> None:
    spec = _blocks()
    with pytest.raises(InvalidSpec, match="does not call scaled_dot_product_attention") as caught:
        _training(spec, sdpa=Sdpa.MATH).run(phases(spec)[0], 2)
    assert caught.value.field == "variants.sdpa"


# Optimizers


def test_implementations_of_the_optimizer() -> None:
    found = {}
    for kind in OptimizerImplementation:
        training = _training(_blocks(), optimizer_implementation=kind)
        training.step(3)
        found[kind] = (training.optimizer.defaults["foreach"], training.optimizer.defaults["fused"])
    assert list(found.values()) == [(None, None), (False, False), (True, None), (None, True)]


@pytest.mark.parametrize(
    ("optimizer", "field"),
    [("adamax", "variants.optimizer_implementation"), ({"name": "adamw", "fused": False}, "train.optimizer.fused")],
)
def test_an_implementation_that_an_optimizer_lacks(optimizer: Any, field: str) -> None:
    spec = _python(returns="scalar", train={"optimizer": optimizer})
    with pytest.raises(InvalidSpec) as caught:
        _training(spec, optimizer_implementation=OptimizerImplementation.FUSED)
    assert caught.value.field == field


# Memory format


def test_channels_last_orders_weights_and_images() -> None:
    training = _training(_library("torchvision", "squeezenet1_1"), memory_format=MemoryFormat.CHANNELS_LAST)
    for tensor in (training.batch(2)["pixel_values"], training.model.features[0].weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()
    training.step(2)


def test_channels_last_has_no_meaning_for_tokens() -> None:
    with pytest.raises(InvalidSpec, match="this data has none") as caught:
        _training(GPT2, memory_format=MemoryFormat.CHANNELS_LAST)
    assert caught.value.field == "variants.memory_format"


# Loss


@pytest.mark.parametrize(
    "spec",
    [GPT2, BERT, _transformers("llama", "causal-lm", {"kind": "tokens", "sequence_length": 13}, **SMALL)],
    ids=["gpt2", "bert", "llama, odd length"],
)
def test_the_chunked_loss_is_the_loss(spec: Spec) -> None:
    model = build_model(spec).eval()  # dropout would be drawn in another order
    labels = torch.randint(0, 64, (3, spec.data.sequence_length or 0))
    labels[0, 5:] = -100
    batch = {"input_ids": labels.clamp(min=0), "labels": labels}
    plain = Training(spec, Variant(), copy.deepcopy(model), CPU)
    chunked = Training(spec, Variant(loss=Loss.CHUNKED), model, CPU)
    torch.testing.assert_close(chunked._loss(batch), plain._loss(batch))
    expected, found = _gradients(plain, **batch), _gradients(chunked, **batch)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (_blocks(), "is for transformers models with the task causal-lm or masked-lm"),
        (_library("torchvision", "squeezenet1_1"), "is for transformers models"),
        (
            _transformers("gemma2", "causal-lm", TOKENS, head_dim=16, num_key_value_heads=2, **SMALL),
            "this model changes them afterwards",
        ),
    ],
    ids=["a user's own", "images", "soft-capped logits"],
)
def test_a_loss_that_cannot_be_chunked(spec: Spec, words: str) -> None:
    with pytest.raises(InvalidSpec, match=words) as caught:
        _training(spec, loss=Loss.CHUNKED)
    assert caught.value.field == "variants.loss"


# Compilation


@pytest.fixture
def compiler(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch's compiler with an empty cache, as it was afterwards."""
    import torch._dynamo as dynamo

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with dynamo.config.patch(fail_on_recompile_limit_hit=False):
        _forget(dynamo)
        yield dynamo
        _forget(dynamo)


def _forget(dynamo: Any) -> None:
    dynamo.reset()
    dynamo.utils.counters.clear()
    dynamo.utils.cumulative_time_spent_ns.clear()


def test_a_compiled_step_says_what_compiling_took_cold_and_warm(compiler: Any) -> None:
    spec = _blocks()
    reports = []
    for _ in range(2):
        _forget(compiler)
        training = _training(spec, compile=Compile.ON)
        for phase in phases(spec):
            training.run(phase, 4)
        reports.append(training.report())
    cold, warm = (report["compile"] for report in reports)
    assert (cold["cache"]["warm"], warm["cache"]["warm"]) == (False, True)
    assert cold["compile_s"] > warm["compile_s"] > 0
    assert cold["num_graphs"] == 1
    assert "notes" not in reports[0]


def test_where_a_compiled_model_runs_eager_is_said(compiler: Any) -> None:
    spec = _blocks(breaks=True)
    training = _training(spec, compile=Compile.ON)
    training.run(phases(spec)[0], 4)
    report = training.report()
    assert report["compile"]["num_graphs"] == 2
    assert "compiled as 2 graphs; between them the model runs eager" in report["notes"][0]


def test_a_compiler_that_gives_up_is_no_silent_eager_run(compiler: Any) -> None:
    spec = _blocks()
    training = _training(spec, compile=Compile.ON)
    with compiler.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        training.run(phases(spec)[0], 2)
        with pytest.raises(InvalidSpec, match="gave up after too many compilations") as caught:
            training.run(phases(spec)[0], 3)
    assert caught.value.field == "variants.compile"


def test_more_lengths_than_torch_compiles(compiler: Any) -> None:
    data = {"kind": "tokens", "lengths": list(range(8, 18))}
    spec = _transformers("gpt2", "causal-lm", data, n_layer=1, n_embd=32, n_head=2, vocab_size=64)
    with pytest.raises(InvalidSpec, match="each of the 10 lengths is compiled, and torch gives up after 8"):
        _training(spec, compile=Compile.ON)


def test_a_back_end_of_a_compiled_model_without_that_attention_is_refused(compiler: Any) -> None:
    spec = _blocks()
    with pytest.raises(InvalidSpec, match="does not call scaled_dot_product_attention"):
        _training(spec, compile=Compile.ON, sdpa=Sdpa.MATH).run(phases(spec)[0], 2)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_tf32_runs_from_ampere_on(capability: tuple[int, int]) -> None:
    check_tf32(capability)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_tf32_is_refused_where_it_would_be_fp32(capability: tuple[int, int]) -> None:
    turing = Architecture(compute_capability=capability, num_sms=40)
    with pytest.raises(InvalidSpec, match="tf32 needs a GPU of compute capability 8") as caught:
        trace_steps(GPT2, Variant(precision=Precision.TF32), 2, turing)
    assert (caught.value.field, caught.value.suggestion) == ("variants.precision", "fp32")
