"""The training step on the CPU: it really trains, and says clearly what it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.errors import InvalidSpec, ModelError
from planner.specs.document import parse_spec
from planner.specs.model import OptimizerSpec, Spec
from planner.specs.optimizers import OPTIMIZERS
from planner.specs.variants import Checkpointing, Compile, Precision, Variant
from planner.training import Training, build_model
from planner.training.data import make_batch, num_classes
from planner.training.optimizers import make_optimizer, optimizer_class
from planner.training.targets import import_target
from tests import training_targets

CPU = torch.device("cpu")
TARGETS = "tests.training_targets"
XY = {
    "kind": "tensors",
    "inputs": {"x": {"shape": [4], "dtype": "float32"}, "y": {"shape": [2], "dtype": "float32"}},
}
TOKENS = {"kind": "tokens", "sequence_length": 16}
IMAGES = {"kind": "images", "size": 32}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}


def _python(target: str = "Regression", train: dict[str, Any] | None = None, **args: Any) -> Spec:
    model = {"source": "python", "target": f"{TARGETS}:{target}", "args": args}
    return parse_spec({"model": model, "data": XY, "train": {"optimizer": {"name": "sgd", "lr": 0.1}, **(train or {})}})


def _transformers(model_type: str, task: str, data: dict[str, Any], **config: Any) -> Spec:
    model = {"source": "transformers", "model_type": model_type, "task": task, "config": config}
    return parse_spec({"model": model, "data": data})


def _library(source: str, name: str, classes: int | None = None, **args: Any) -> Spec:
    data = IMAGES if classes is None else {**IMAGES, "classes": classes}
    return parse_spec({"model": {"source": source, "name": name, "args": args}, "data": data})


def _training(spec: Spec, **variant: Any) -> Training:
    torch.manual_seed(0)
    return Training(spec, Variant(**variant), build_model(spec), CPU)


def _refused(spec: Spec) -> InvalidSpec:
    with pytest.raises(InvalidSpec) as caught:
        build_model(spec)
    return caught.value


@pytest.mark.parametrize(
    "spec",
    [
        _python(returns="scalar"),
        _python(returns="mapping"),
        _python(train={"loss": f"{TARGETS}:loss"}),
        _python(train={"step": f"{TARGETS}:step"}),
    ],
    ids=["scalar", "mapping", "train.loss", "train.step"],
)
def test_a_step_trains(spec: Spec) -> None:
    training = _training(spec)
    before = [parameter.clone() for parameter in training.model.parameters()]
    training.step(3)
    after = list(training.model.parameters())
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(parameter.grad is not None for parameter in after)


def test_steps_of_plain_sgd_are_those_of_a_plain_loop() -> None:
    training = _training(_python(returns="scalar"))
    mine = training_targets.Regression("scalar")
    mine.load_state_dict(training.model.state_dict())
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    torch.manual_seed(1)
    for _ in range(2):
        batch = {"x": torch.randn(5, 4), "y": torch.randn(5, 2)}
        optimizer.zero_grad()
        torch.autograd.backward(mine(**batch))
        optimizer.step()
    torch.manual_seed(1)
    for _ in range(2):
        training.step(5)
    for expected, found in zip(mine.parameters(), training.model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_a_custom_step_gets_the_documented_arguments() -> None:
    training_targets.CALLS.clear()
    training = _training(_python(train={"step": f"{TARGETS}:step"}), precision=Precision.BF16_AMP)
    training.step(3)
    (call,) = training_targets.CALLS
    assert call["optimizer"] is training.optimizer
    assert not call["scaled"]
    assert {name: tuple(item.shape) for name, item in call["batch"].items()} == {"x": (3, 4), "y": (3, 2)}


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        (_python(), "model", "returns no loss"),
        (_python(returns="constant"), "model", "does not depend on any trainable parameter"),
        (_python(train={"loss": f"{TARGETS}:unreduced"}), "train.loss", r"not a tensor of shape \[3, 2\]"),
        (_python(train={"loss": f"{TARGETS}:nothing"}), "train.loss", "not NoneType"),
    ],
)
def test_a_loss_that_cannot_be_used(spec: Spec, field: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        _training(spec).step(3)
    assert caught.value.field == field


def test_a_model_with_nothing_to_train() -> None:
    with pytest.raises(ModelError, match="no parameter that requires a gradient"):
        _training(_python(returns="scalar", frozen=True))


@pytest.mark.parametrize(
    ("precision", "weights", "outputs"),
    [
        (Precision.FP32, torch.float32, torch.float32),
        (Precision.BF16, torch.bfloat16, torch.bfloat16),
        (Precision.FP16, torch.float16, torch.float16),
        (Precision.BF16_AMP, torch.float32, torch.bfloat16),
        (Precision.FP16_AMP, torch.float32, torch.float16),
    ],
)
def test_precisions(precision: Precision, weights: torch.dtype, outputs: torch.dtype) -> None:
    training = _training(_python(train={"loss": f"{TARGETS}:loss"}), precision=precision)
    with training.autocast():
        assert training.forward(**training.batch(3)).dtype is outputs
    training.step(3)
    assert {parameter.dtype for parameter in training.model.parameters()} == {weights}
    assert training.scaler.is_enabled() == (precision is Precision.FP16_AMP)


def test_the_loss_is_scaled_for_fp16_alone_and_gradients_are_not_left_scaled() -> None:
    training = _training(_python(returns="scalar"), precision=Precision.FP16_AMP)
    training.step(64)
    assert training.scaler.get_scale() == 65_536.0
    assert all(
        (parameter.grad.abs() < 100).all() for parameter in training.model.parameters() if parameter.grad is not None
    )


def test_only_tf32_switches_tf32_on() -> None:
    def switches() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    matmul, cudnn = switches()
    try:
        for precision in Precision:
            _training(_python(returns="scalar"), precision=precision)
            assert switches() == (matmul or precision is Precision.TF32, cudnn)
            torch.backends.cuda.matmul.allow_tf32 = matmul
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def test_a_compiled_model_is_what_the_step_calls() -> None:
    training = _training(_python(returns="scalar"), compile=Compile.ON)
    assert isinstance(training.forward, torch._dynamo.eval_frame.OptimizedModule)
    assert training.forward._orig_mod is training.model


# Checkpointing


def test_full_checkpointing_as_each_library_does_it() -> None:
    own = _training(_python("Checkpointed", returns="scalar"), checkpointing=Checkpointing.FULL)
    assert own.model.checkpointed
    bert = _training(_transformers("bert", "masked-lm", TOKENS, **SMALL), checkpointing=Checkpointing.FULL)
    assert bert.model.is_gradient_checkpointing
    bert.step(2)
    vit = _library("timm", "vit_tiny_patch16_224", img_size=32, depth=1)
    timm = _training(vit, checkpointing=Checkpointing.FULL)
    assert timm.model.grad_checkpointing
    timm.step(2)


@pytest.mark.parametrize(
    ("spec", "mode"),
    [
        (_python(returns="scalar"), Checkpointing.FULL),
        (_python("Checkpointed", returns="scalar"), Checkpointing.SELECTIVE),
        (_python(returns="scalar"), Checkpointing.SELECTIVE),
    ],
)
def test_checkpointing_that_a_model_does_not_offer(spec: Spec, mode: Checkpointing) -> None:
    with pytest.raises(InvalidSpec, match=f"offers no {mode} checkpointing") as caught:
        _training(spec, checkpointing=mode)
    assert caught.value.field == "variants.checkpointing"


def test_a_model_of_timm_whose_switch_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"

    monkeypatch.setattr(training_targets.Checkpointed, "set_grad_checkpointing", refuse)
    with pytest.raises(InvalidSpec, match="gradient checkpointing not supported") as caught:
        _training(_python("Checkpointed", returns="scalar"), checkpointing=Checkpointing.FULL)
    assert caught.value.field == "variants.checkpointing"


# Optimizers


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd-momentum"])
def test_every_named_optimizer_takes_a_step(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = make_optimizer(OptimizerSpec(name=name, args={"lr": 0.5}), [weight])
    assert type(optimizer) is optimizer_class(name)
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward((weight * torch.arange(9.0).reshape(3, 3)).sum())
        optimizer.step()
    assert not torch.equal(weight, torch.ones(3, 3))


def test_sgd_with_momentum_keeps_a_buffer() -> None:
    spec = _python(returns="scalar", train={"optimizer": "sgd-momentum"})
    training = _training(spec)
    training.step(2)
    assert all("momentum_buffer" in state for state in training.optimizer.state.values())


def test_an_unknown_argument_of_an_optimizer() -> None:
    with pytest.raises(InvalidSpec) as caught:
        _training(_python(returns="scalar", train={"optimizer": {"name": "adamw", "weight_decy": 0.1}}))
    assert (caught.value.field, caught.value.suggestion) == ("train.optimizer.weight_decy", "weight_decay")


def test_an_argument_that_an_optimizer_refuses() -> None:
    with pytest.raises(InvalidSpec, match="Adam refused its arguments: Invalid learning rate") as caught:
        make_optimizer(OptimizerSpec(name="adam", args={"lr": -1.0}), [torch.nn.Parameter(torch.ones(1))])
    assert caught.value.field == "train.optimizer"


def test_an_optimizer_that_this_torch_lacks() -> None:
    with pytest.raises(InvalidSpec) as caught:
        optimizer_class("adamv")
    assert (caught.value.field, caught.value.suggestion) in {("train.optimizer", "adamw"), ("train.optimizer", "adam")}


# Targets


@pytest.mark.parametrize(
    ("target", "words", "suggestion"),
    [
        ("tests.no_such_module:f", "there is no module 'tests.no_such_module'", None),
        (f"{TARGETS}:Regresion", "has no 'Regresion'", "Regression"),
        (f"{TARGETS}:CONSTANT", "is not callable", None),
    ],
)
def test_targets_that_cannot_be_imported(target: str, words: str, suggestion: str | None) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        import_target(target, field="train.loss")
    assert (caught.value.field, caught.value.suggestion) == ("train.loss", suggestion)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import json5x_missing", "it imports 'json5x_missing', which is not installed"),
        ("import user_module_that", "it imports 'user_module_that', which is not installed"),
        ("raise ValueError('no licence')", "raised ValueError: no licence"),
        ("import sys; sys.exit(4)", "raised SystemExit: 4"),
    ],
)
def test_a_module_that_fails_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str) -> None:
    name = f"user_module_that_fails_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=words):
        import_target(f"{name}:f", field="model.target")
    assert name not in sys.modules


def test_a_target_that_makes_no_module() -> None:
    with pytest.raises(ModelError, match=r"returned str, not a torch\.nn\.Module"):
        build_model(_python("not_a_model"))


# Models by name


def test_transformers_trains_and_is_in_training_mode() -> None:
    training = _training(_transformers("gpt2", "causal-lm", TOKENS, n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    assert training.model.training
    training.step(2)
    batch = training.batch(2)
    assert batch["labels"] is batch["input_ids"]
    assert batch["input_ids"].shape == (2, 16)
    assert int(batch["input_ids"].max()) < 64


def test_a_key_that_the_model_reads_and_its_config_does_not_declare() -> None:
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "vocab_size": 64}
    model = build_model(_transformers("qwen3_moe", "causal-lm", TOKENS, head_dim=16, **small, **experts))
    assert model.get_submodule("model.layers.0.self_attn.q_proj").weight.shape == (4 * 16, 32)


@pytest.mark.parametrize(
    ("spec", "field", "suggestion"),
    [
        (_transformers("gpt2", "causal-lm", TOKENS, n_layerz=2), "model.config.n_layerz", "n_layer"),
        (_transformers("gtp2", "causal-lm", TOKENS), "model.model_type", "gpt2"),
        (_transformers("vit", "causal-lm", TOKENS), "model.task", None),
        (_library("timm", "resnet18", num_clases=4), "model.args.num_clases", "num_classes"),
        (_library("timm", "resnet81"), "model.name", "resnet18"),
        (_library("timm", "resnet18", checkpoint_path="x.pt"), "model.args.checkpoint_path", None),
        (_library("torchvision", "resnet18", num_clases=4), "model.args.num_clases", "num_classes"),
        (_library("torchvision", "resnet81"), "model.name", "resnet18"),
        (_library("torchvision", "resnet18", weights="DEFAULT"), "model.args.weights", None),
        (_python(return_="x"), "model.args.return_", "returns"),
    ],
)
def test_unknown_names_are_named_with_the_nearest(spec: Spec, field: str, suggestion: str | None) -> None:
    error = _refused(spec)
    assert error.field == field
    assert suggestion is None or error.suggestion == suggestion


def test_a_model_whose_backbone_would_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> None:
        pytest.fail("weights were asked for")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    build_model(_library("torchvision", "lraspp_mobilenet_v3_large"))


@pytest.mark.parametrize(("name", "args"), [("googlenet", {"init_weights": False}), ("squeezenet1_1", {})])
def test_torchvision_is_imported_beside_any_torch_and_trains(name: str, args: dict[str, Any]) -> None:
    """googlenet returns a named tuple in training."""
    training = _training(_library("torchvision", name, classes=7, **args))
    training.step(2)
    assert training.model(torch.randn(2, 3, 32, 32))[0].shape[-1] == 7


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("ssdlite320_mobilenet_v3_large", {"weights_backbone": None}, "takes boxes and labels of each image"),
        ("raft_small", {}, "takes two images and returns flows: use kind: tensors"),
        ("r3d_18", {}, r"takes images \[3, frames, height, width\] and returns logits: use kind: tensors"),
    ],
)
def test_torchvisions_models_of_more_than_images_say_what_they_take(name: str, args: dict[str, Any], said: str) -> None:
    training = _training(_library("torchvision", name, **args))
    with pytest.raises(InvalidSpec, match=said) as caught:
        training.batch(2)
    assert caught.value.field == "data.kind"


@pytest.mark.parametrize("name", ["fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_torchvisions_segmentation_learns_a_class_for_each_pixel(name: str) -> None:
    training = _training(_library("torchvision", name))
    labels = training.batch(2)["labels"]
    assert (labels.shape, int(labels.max()) < 21) == ((2, 32, 32), True)
    training.step(2)
    training.evaluate(2)


# Labels


def test_classes_of_the_data_are_those_of_the_model() -> None:
    config = {
        "image_size": 32,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    spec = _transformers("vit", "image-classification", {**IMAGES, "classes": 9}, **config)
    training = _training(spec)
    assert num_classes(training.model) == 9
    assert int(training.batch(200)["labels"].max()) == 8
    training.step(2)
    given = _transformers("vit", "image-classification", {**IMAGES, "classes": 3}, num_labels=6, **config)
    assert num_classes(build_model(given)) == 6
    assert int(_training(given).batch(200)["labels"].max()) == 2


def test_more_classes_than_the_model_has() -> None:
    names = {str(index): f"class {index}" for index in range(3)}
    config = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    error = _refused(_transformers("vit", "image-classification", {**IMAGES, "classes": 9}, id2label=names, **config))
    assert error.field == "data.classes"
    assert "at most the model's 3 classes, not 9" in error.message


@pytest.mark.parametrize(
    ("task", "config", "shape", "dtype"),
    [
        ("sequence-classification", {"num_labels": 5}, (4,), torch.int64),
        ("sequence-classification", {"num_labels": 1}, (4,), torch.float32),
        (
            "sequence-classification",
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            (4, 3),
            torch.float32,
        ),
        ("token-classification", {"num_labels": 5}, (4, 16), torch.int64),
        ("next-sentence-prediction", {}, (4,), torch.int64),
    ],
)
def test_labels_of_token_tasks(task: str, config: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    training = _training(_transformers("bert", task, TOKENS, **SMALL, **config))
    labels = training.batch(4)["labels"]
    assert (tuple(labels.shape), labels.dtype) == (shape, dtype)
    training.step(4)


def test_seq2seq_tokens() -> None:
    config = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 16, "vocab_size": 64}
    training = _training(_transformers("t5", "seq2seq-lm", TOKENS, decoder_start_token_id=0, **config))
    training.step(2)
    assert set(training.batch(2)) == {"input_ids", "labels"}


def test_images_have_the_channels_that_the_model_takes() -> None:
    timm = _library("timm", "resnet18", in_chans=1)
    assert _training(timm).batch(2)["pixel_values"].shape == (2, 1, 32, 32)
    regnet = _transformers(
        "regnet", "image-classification", IMAGES, num_channels=4, depths=[1], hidden_sizes=[8], groups_width=8
    )
    assert _training(regnet).batch(2)["pixel_values"].shape == (2, 4, 32, 32)


def test_tensors_have_the_range_that_the_spec_says() -> None:
    inputs = {
        "ids": {"shape": [50], "dtype": "int32", "low": 5, "high": 8},
        "mask": {"shape": [50], "dtype": "bool"},
        "half": {"shape": [], "dtype": "float16"},
        "flags": {"shape": [50], "dtype": "uint8"},
    }
    data = {"kind": "tensors", "inputs": inputs}
    spec = parse_spec({"model": {"source": "python", "target": f"{TARGETS}:Regression"}, "data": data})
    batch = make_batch(spec, torch.nn.Module(), 20, CPU)
    assert (batch["ids"].dtype, int(batch["ids"].min()), int(batch["ids"].max())) == (torch.int32, 5, 7)
    assert bool(batch["mask"].all())
    assert (batch["half"].dtype, batch["half"].shape) == (torch.float16, (20,))
    assert set(batch["flags"].flatten().tolist()) == {0, 1}


@pytest.mark.parametrize("looked_before", [False, True])
@pytest.mark.parametrize("task", ["causal-lm", "image-classification"])
def test_building_a_model_imports_no_library_of_other_tasks(tmp_path: Path, task: str, looked_before: bool) -> None:
    """They take seconds to import; the user's own code still finds them."""
    for library, module in {"sklearn": "metrics", "scipy": "optimize", "torchaudio": "sound"}.items():
        (tmp_path / library).mkdir()
        (tmp_path / library / "__init__.py").write_text("")
        (tmp_path / library / f"{module}.py").write_text("def roc_curve(): ...\ndef linear_sum_assignment(): ...\n")
    small = {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8} if task == "image-classification" else {}
    config = small or {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64}
    model = {"source": "transformers", "model_type": "resnet" if small else "gpt2", "task": task, "config": config}
    data = {"kind": "images", "size": 32, "classes": 2} if small else TOKENS
    looks = "".join(f"transformers.utils.is_{name}_available();" for name in ("sklearn", "scipy", "torchaudio"))
    code = (
        f"import sys, transformers.utils; {looks if looked_before else ''}\n"
        "from planner.specs.document import parse_spec; from planner.training import build_model\n"
        f"build_model(parse_spec({ {'model': model, 'data': data, 'train': {'optimizer': 'adamw'}}!r}))\n"
        "print(*sorted({'sklearn', 'scipy', 'torchaudio'} & sys.modules.keys()))\n"
        "print(transformers.utils.is_scipy_available())\n"
        "import sklearn.metrics, scipy.optimize; print(sklearn.__name__)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    imported, *others = done.stdout.splitlines()
    assert imported.split() == ([] if task == "causal-lm" else ["scipy", "torchaudio"])
    assert others == ["True", "sklearn"]
