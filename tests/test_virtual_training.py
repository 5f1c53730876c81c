"""What the parts of a training step and the axes of a sweep take on the virtual GPU, in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from planner.errors import InvalidSpec
from tests.test_virtual_models import IMAGES, TOKENS, _transformers
from tests.virtual_child import Process

GPT2 = _transformers("gpt2", "causal-lm", n_layer=2, n_embd=128, n_head=2, vocab_size=4096)
ENCODER = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 128}
WIDE = {"kind": "tokens", "sequence_length": 512}


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


def _peak(
    process: Process,
    variant: dict[str, Any] | None = None,
    *,
    model: dict[str, Any] = GPT2,
    data: dict[str, Any] = TOKENS,
    batch_size: int = 2,
    **train: Any,
) -> int:
    """Peak of allocated bytes at ``batch_size``, traced."""
    spec = {"model": model, "data": data, "train": train}
    chosen = {"precision": "bf16-amp", **(variant or {})}
    found = process.do("peaks", spec=spec, variant=chosen, batch_sizes=[batch_size])
    peak: int = found["peaks"][0][0]
    return peak


def _weights_bytes(process: Process) -> int:
    """Of GPT2's parameters in float32: what moving it allocates."""
    trace = process.do("traced", spec={"model": GPT2, "data": TOKENS}, variant={}, batch_size=2)
    moved = trace["sizes"][: trace["born_before_step_1"]]
    return sum(-(-size // 512) * 512 for size in moved)


def test_an_average_of_the_weights_takes_as_much_as_the_weights(process: Process) -> None:
    assert _peak(process, ema=0.99) - _peak(process) == _weights_bytes(process)


@pytest.mark.parametrize("batch_size", [2, 9])
def test_three_micro_batches_have_the_peak_of_many(process: Process, batch_size: int) -> None:
    import planner.virtual.tracing as tracing

    limit = tracing.MAX_MICRO_BATCHES
    code = f"""
import planner.virtual.tracing as tracing
from planner.allocator import Events, replay
from planner.specs.document import parse_spec
from planner.specs.variants import Variant
from planner.virtual.architecture import Architecture

def peaks(steps):
    tracing.MAX_MICRO_BATCHES = steps
    spec = parse_spec({{"model": {GPT2!r}, "data": {TOKENS!r}, "train": {{"accumulation_steps": 7}}}})
    architecture = Architecture(compute_capability=(9, 0), num_sms=132, torch_version=(2, 11))
    found = []
    for variant in ({{}}, {{"precision": "bf16-amp", "checkpointing": "full"}}):
        trace = tracing.trace_steps(spec, Variant.from_dict(variant), {batch_size}, architecture)
        result = replay(Events(trace.events, trace.sizes))
        found.append((result.peak_allocated_bytes, result.peak_reserved_bytes))
    return found

result = peaks({limit}) == peaks(7)
tracing.MAX_MICRO_BATCHES = {limit}
"""
    assert process.do("run", code=code)


def test_gradients_of_earlier_micro_batches_persist(process: Process) -> None:
    """At the peak of the backward pass, which a plain step reaches with few gradients made."""
    plain, accumulated = (_peak(process, data=WIDE, batch_size=8, accumulation_steps=steps) for steps in (1, 2))
    assert 0.5 * _weights_bytes(process) < accumulated - plain <= 1.1 * _weights_bytes(process)


def test_frozen_parameters_have_neither_gradient_nor_state(process: Process) -> None:
    """Adam keeps two numbers for each; the frozen ones are all but those of one block."""
    everything = _peak(process, batch_size=1)
    frozen = _peak(process, batch_size=1, freeze=["transformer.wte.*", "transformer.wpe.*", "transformer.h.0.*"])
    assert everything - frozen > 2 * 4 * 4096 * 128


def test_an_evaluation_of_a_larger_batch_sets_the_peak(process: Process) -> None:
    plain = _peak(process, data=WIDE)
    assert _peak(process, data=WIDE, evaluation=True) == plain
    evaluated = _peak(process, data=WIDE, evaluation={"batch_size": 32})
    logits = 32 * 512 * 4096 * 4  # in float32, for the loss
    assert plain < logits < evaluated < 3 * logits


def test_lengths_have_the_peak_of_the_longest(process: Process) -> None:
    """And a mask for the padding, since the samples of a batch differ."""
    lengths = {"kind": "tokens", "lengths": {"lengths": [100, 200, 512], "counts": [5, 5, 1]}}
    plain, mixed = _peak(process, data=WIDE, batch_size=4), _peak(process, data=lengths, batch_size=4)
    assert plain <= mixed < 1.05 * plain
    trace = process.do("traced", spec={"model": GPT2, "data": lengths}, variant={}, batch_size=2)
    assert trace["marks"][1:-1] == [f"step {number}" for number in range(1, 8)]


def test_a_chunked_loss_never_holds_all_logits(process: Process) -> None:
    """The logits in bfloat16, twice in float32 and their gradient are most of this model's peak."""
    logits = 8 * 512 * 4096 * 4
    default = _peak(process, data=WIDE, batch_size=8)
    chunked = _peak(process, {"loss": "chunked"}, data=WIDE, batch_size=8)
    assert default > 2 * logits
    assert default - chunked > 1.5 * logits


def test_selective_checkpointing_is_between_none_and_full(process: Process) -> None:
    model = _transformers("llama", "causal-lm", num_key_value_heads=2, vocab_size=64, **ENCODER)
    none, selective, full = (
        _peak(process, {"checkpointing": mode}, model=model, data=WIDE, batch_size=16)
        for mode in ("none", "selective", "full")
    )
    assert none > selective > full


def test_a_fused_optimizer_has_no_copy_of_its_gradients(process: Process) -> None:
    """foreach's holds intermediate lists as large as the weights, and in a small batch they set the peak."""
    model = _transformers(
        "gpt2", "causal-lm", n_layer=1, n_embd=128, n_head=2, vocab_size=50_000, tie_word_embeddings=False
    )
    data = {"kind": "tokens", "sequence_length": 8}
    peaks = {
        name: _peak(process, {"optimizer_implementation": name}, model=model, data=data, batch_size=1)
        for name in ("default", "foreach", "for-loop", "fused")
    }
    assert peaks["default"] == peaks["foreach"]
    for copying in ("foreach", "for-loop"):
        assert peaks[copying] - peaks["fused"] >= 0.9 * 50_000 * 128 * 4


@pytest.mark.parametrize(
    ("backend", "operator"),
    [
        ("flash", "aten::_scaled_dot_product_flash_attention"),
        ("efficient", "aten::_scaled_dot_product_efficient_attention"),
        ("cudnn", "aten::_scaled_dot_product_cudnn_attention"),
    ],
)
def test_attention_runs_on_the_back_end_that_was_asked_for(process: Process, backend: str, operator: str) -> None:
    variant = {"precision": "bf16-amp", "sdpa": backend, "checkpointing": "full"}
    trace = process.do("traced", spec={"model": GPT2, "data": TOKENS}, variant=variant, batch_size=2)
    used = {name for name in trace["operators"] if "_attention" in name}
    assert used == {operator, f"{operator}_backward"}


def test_the_math_back_end_holds_the_scores(process: Process) -> None:
    scores = 4 * 2 * 512 * 512 * 2  # batch, heads, queries, keys, bfloat16
    math = _peak(process, {"sdpa": "math"}, data=WIDE, batch_size=4)
    assert math - _peak(process, {"sdpa": "flash"}, data=WIDE, batch_size=4) > 2 * scores


@pytest.mark.parametrize(
    ("variant", "model", "words"),
    [
        ({"sdpa": "flash", "precision": "fp32"}, GPT2, "takes torch.float16 and torch.bfloat16, not torch.float32"),
        ({"sdpa": "cudnn"}, _transformers("gpt2", "causal-lm", n_layer=1, n_embd=20, n_head=2), "multiple of 8"),
        (
            {"sdpa": "flash"},
            _transformers(
                "t5", "seq2seq-lm", d_model=64, num_layers=1, num_heads=4, d_ff=128, decoder_start_token_id=0
            ),
            "takes no attention mask",
        ),
        ({"sdpa": "math"}, {"source": "torchvision", "name": "squeezenet1_1"}, "does not call"),
    ],
    ids=["dtype", "head_dim", "mask", "no attention"],
)
def test_a_back_end_that_cannot_run_says_why(
    process: Process, variant: dict[str, str], model: dict[str, Any], words: str
) -> None:
    data = IMAGES if model["source"] == "torchvision" else TOKENS
    with pytest.raises(InvalidSpec, match=words) as caught:
        _peak(process, variant, model=model, data=data)
    assert caught.value.field == "variants.sdpa"


def test_channels_last_needs_no_copies_before_convolutions(process: Process) -> None:
    model = {"source": "torchvision", "name": "resnet18"}
    variant = {"precision": "bf16-amp", "memory_format": "channels-last"}
    trace = process.do("traced", spec={"model": model, "data": IMAGES}, variant=variant, batch_size=2)
    assert trace["unmodelled"] == []
    assert "aten::clone" not in trace["operators"]


# Models of every kind


def _moved(process: Process, model: str, precision: str, **args: Any) -> list[int]:
    """Bytes of what moving the model to the device allocates."""
    inputs = {"features": {"shape": [8], "dtype": "float32"}, "labels": {"shape": [], "dtype": "int64", "high": 4}}
    source = {"source": "python", "target": f"tests.virtual_models:{model}", "args": args}
    spec = {"model": source, "data": {"kind": "tensors", "inputs": inputs}}
    trace = process.do("traced", spec=spec, variant={"precision": precision}, batch_size=2)
    sizes: list[int] = trace["sizes"][: trace["born_before_step_1"]]
    return sizes


def test_a_model_built_on_the_cpu_is_moved_with_its_buffers_and_cast_on_the_way(process: Process) -> None:
    """The cast is the CPU's (``copy_kernel_cuda``, aten/src/ATen/native/cuda/Copy.cu): no float32 copy on the GPU."""
    weight, bias, table = 8 * 4, 4, 1 << 18
    assert _moved(process, "Odd", "fp32") == [4 * weight, 4 * bias, 4 * table]
    assert _moved(process, "Odd", "bf16") == [2 * weight, 2 * bias, 2 * table]


def test_a_tied_weight_is_moved_once(process: Process) -> None:
    inputs = {key: {"shape": [12], "dtype": "int64", "high": 100} for key in ("input_ids", "labels")}
    model = {"source": "python", "target": "tests.virtual_models:Tied"}
    spec = {"model": model, "data": {"kind": "tensors", "inputs": inputs}}
    trace = process.do("traced", spec=spec, variant={}, batch_size=2)
    assert trace["sizes"][: trace["born_before_step_1"]] == [100 * 16 * 4]


def test_what_an_autograd_function_of_the_users_own_keeps_is_held(process: Process) -> None:
    """One copy of the batch for each call."""
    batch_size = 1 << 16
    inputs = {"features": {"shape": [8], "dtype": "float32"}, "labels": {"shape": [], "dtype": "int64", "high": 4}}
    data = {"kind": "tensors", "inputs": inputs}

    def peak(calls: int) -> int:
        model = {"source": "python", "target": "tests.virtual_models:Odd", "args": {"num_doubled": calls}}
        return _peak(process, {"precision": "fp32"}, model=model, data=data, batch_size=batch_size)

    assert peak(9) - peak(5) == 4 * batch_size * 8 * 4


def test_the_padding_mask_of_a_large_batch_is_known(process: Process) -> None:
    """More than 2^20 padded tokens: the model reads which of them are padding."""
    data = {"kind": "tokens", "lengths": [16, 100]}
    small, large = (_peak(process, data=data, batch_size=size, model=TINY) for size in (1_000, 11_000))
    assert 8 * small < large < 11 * small  # but for what no batch changes


TINY = _transformers("gpt2", "causal-lm", n_layer=1, n_embd=16, n_head=1, vocab_size=64)
