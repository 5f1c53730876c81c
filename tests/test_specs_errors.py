"""Bad specs: each one gives exactly one error, with the field's path, the reason and the nearest valid name."""

import pytest
import yaml

from planner.errors import InvalidSpec
from planner.specs.document import parse_spec
from planner.specs.plain import MAX_DEPTH, MAX_VALUES
from planner.throughput import accumulations

GOOD = {
    "model": {"source": "transformers", "model_type": "gpt2", "task": "causal-lm"},
    "data": {"kind": "tokens", "sequence_length": 8},
}
PRECISIONS = "fp32, tf32, fp16-amp, bf16-amp, bf16, fp16"
DTYPES = "uint8, int8, int16, int32, int64, float16, bfloat16, float32, float64, complex64, complex128, bool"


def error_of(document: object) -> InvalidSpec:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(document)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("5", "model: must be a mapping, not 5"),
        ("{sorce: timm, name: x}", "model.sorce: unknown key (did you mean 'source'?)"),
        ("{name: x}", "model.source: is required; one of transformers, timm, torchvision, python"),
        (
            "{source: tim, name: x}",
            "model.source: 'tim' is not a source of model; valid: transformers, timm, torchvision, python "
            "(did you mean 'timm'?)",
        ),
        (
            "{source: [timm]}",
            'model.source: ["timm"] is not a source of model; valid: transformers, timm, torchvision, python',
        ),
        ("{source: transformers, model_type: gpt2}", "model.task: is required"),
        (
            "{source: transformers, model_typ: gpt2, task: causal-lm}",
            "model.model_typ: unknown key (did you mean 'model_type'?)",
        ),
        (
            "{source: transformers, name: gpt2, task: causal-lm}",
            "model.name: is a key of source: timm and torchvision, not of source: transformers "
            "(did you mean 'model_type'?)",
        ),
        (
            "{source: transformers, model_type: org/gpt2, task: causal-lm}",
            "model.model_type: 'org/gpt2' is a repository; nothing is downloaded: name the model type, "
            "for example gpt2 or llama",
        ),
        (
            "{source: transformers, model_type: gpt2, task: causal-lm, config: [1]}",
            "model.config: must be a mapping, not [1]",
        ),
        (
            "{source: transformers, model_type: gpt2, task: causal-lm, config: {a: {b: [1, .inf]}}}",
            "model.config.a.b[1]: must be a finite number, not inf",
        ),
        (
            "{source: transformers, model_type: gpt2, task: causal-lm, config: {since: 2024-01-01}}",
            "model.config.since: a date is not a value that a spec can hold; put it in quotes",
        ),
        (
            "{source: transformers, model_type: gpt2, task: causal-lm, config: {id2label: {1: a, '1': b}}}",
            "model.config.id2label.1: the key is given twice",
        ),
        (
            "{source: transformers, model_type: gpt2, task: causal-lm, config: {yes: 1}}",
            "model.config: a key must be text, not True; put it in quotes",
        ),
        (
            "{source: transformers, model_type: gpt2, task: causal-lm, config: {n: 9223372036854775808}}",
            "model.config.n: is an integer of more than 64 bits",
        ),
        (
            "{source: timm, name: x, task: causal-lm}",
            "model.task: is a key of source: transformers, not of source: timm",
        ),
        (
            "{source: timm, name: x, model_type: y}",
            "model.model_type: says the same as another key here; keep one of them",
        ),
        ("{source: timm, model_type: 5}", "model.model_type: must be text, not 5; put it in quotes"),
        ("{source: timm, name: x, arg: {}}", "model.arg: unknown key (did you mean 'args'?)"),
        ("{source: torchvision, name: ' '}", "model.name: must be a name"),
        (
            "{source: python, target: my.models.UNet}",
            "model.target: 'my.models.UNet' is not of the form package.module:name (did you mean 'my.models:UNet'?)",
        ),
        ("{source: python, target: unet}", "model.target: 'unet' is not of the form package.module:name"),
        ("{source: python, target: 'a:b-c'}", "model.target: 'a:b-c' is not of the form package.module:name"),
        ("{source: python, target: 'a:class'}", "model.target: 'a:class' is not of the form package.module:name"),
        (
            "{source: python, config: {}, target: 'a:b'}",
            "model.config: is a key of source: transformers and timm and torchvision, not of source: python "
            "(did you mean 'args'?)",
        ),
        (
            "{source: python, target: 'a:b'}",
            "data.kind: tokens is only for source: transformers, whose config says how many there are; "
            "use kind: tensors (did you mean 'tensors'?)",
        ),
        (
            "{source: transformers, model_type: vit, task: image-classification}",
            "data.kind: tokens cannot say all that the task image-classification needs; use kind: images or tensors "
            "(did you mean 'images'?)",
        ),
    ],
)
def test_model_errors(model: str, message: str) -> None:
    assert str(error_of(GOOD | {"model": yaml.safe_load(model)})) == message


def test_a_wrong_task_names_the_nearest_and_lists_all() -> None:
    error = error_of(GOOD | {"model": GOOD["model"] | {"task": "causallm"}})
    assert (error.field, error.suggestion) == ("model.task", "causal-lm")
    assert error.message.startswith("'causallm' is not a task; valid: audio-classification, ")
    assert "masked-lm, " in error.message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{kind: tokens}", "data.sequence_length: is required (or lengths, where samples differ)"),
        (
            "{kind: token, sequence_length: 8}",
            "data.kind: 'token' is not a kind of data; valid: tokens, images, tensors (did you mean 'tokens'?)",
        ),
        ("{knd: tokens}", "data.knd: unknown key (did you mean 'kind'?)"),
        ("{kind: tokens, sequence_length: '8'}", "data.sequence_length: must be a whole number, not '8'"),
        ("{kind: tokens, sequence_length: true}", "data.sequence_length: must be a whole number, not true"),
        ("{kind: tokens, sequence_length: 8.0}", "data.sequence_length: must be a whole number, not 8.0"),
        ("{kind: tokens, sequence_length: 0}", "data.sequence_length: must be at least 1, not 0"),
        ("{kind: tokens, sequence_length: 99999999}", "data.sequence_length: must be at most 16777216, not 99999999"),
        ("{kind: tokens, seq_length: 8}", "data.seq_length: unknown key (did you mean 'sequence_length'?)"),
        (
            "{kind: tokens, sequence_length: 8, size: 3}",
            "data.size: is a key of kind: images, not of kind: tokens",
        ),
        ("{kind: images, size: 0}", "data.size: must be at least 1, not 0"),
        (
            "{kind: images, size: 4}",
            "data.kind: images cannot say all that the task causal-lm needs; use kind: tokens or tensors "
            "(did you mean 'tokens'?)",
        ),
        ("{kind: tensors}", "data.inputs: is required"),
        ("{kind: tensors, inputs: {}}", "data.inputs: must name at least one input"),
        ("{kind: tensors, inputs: [x]}", 'data.inputs: must be a mapping, not ["x"]'),
        ("{kind: tensors, inputs: {x: 3}}", "data.inputs.x: must be a mapping, not 3"),
        (
            "{kind: tensors, inputs: {x-y: {shape: [3], dtype: bool}}}",
            "data.inputs.x-y: an input's name must be a Python keyword argument",
        ),
        (
            "{kind: tensors, inputs: {pixel_values: {shap: [3], dtype: float32}}}",
            "data.inputs.pixel_values.shap: unknown key (did you mean 'shape'?)",
        ),
        ("{kind: tensors, inputs: {x: {shape: 3, dtype: bool}}}", "data.inputs.x.shape: must be a list, not 3"),
        (
            "{kind: tensors, inputs: {x: {shape: [3, 0], dtype: bool}}}",
            "data.inputs.x.shape[1]: must be at least 1, not 0",
        ),
        (
            "{kind: tensors, inputs: {x: {shape: [3, a], dtype: bool}}}",
            "data.inputs.x.shape[1]: must be a whole number, not 'a'",
        ),
        (
            "{kind: tensors, inputs: {x: {shape: [1048576, 1048576, 2], dtype: bool}}}",
            "data.inputs.x.shape: one sample would have 2199023255552 elements; the most is 1099511627776",
        ),
        (
            "{kind: tensors, inputs: {x: {shape: [3], dtype: flaot32}}}",
            f"data.inputs.x.dtype: 'flaot32' is not a dtype; valid: {DTYPES} (did you mean 'float32'?)",
        ),
        (
            "{kind: tensors, inputs: {x: {shape: [3], dtype: float32, high: 3}}}",
            "data.inputs.x.high: is only for integer inputs, and this one is float32",
        ),
        (
            "{kind: tensors, inputs: {x: {shape: [3], dtype: int64, low: 3}}}",
            "data.inputs.x.high: is required beside low",
        ),
        (
            "{kind: tensors, inputs: {x: {shape: [3], dtype: int64, low: 3, high: 3}}}",
            "data.inputs.x.high: must be more than low (3), not 3",
        ),
        (
            "{kind: tensors, inputs: {x: {shape: [3], dtype: int64, high: 0}}}",
            "data.inputs.x.high: must be more than low (0), not 0",
        ),
        (
            "{kind: tensors, inputs: {x: {shape: [3], dtype: uint8, high: 300}}}",
            "data.inputs.x.high: must be at most 256 for uint8, not 300",
        ),
        (
            "{kind: tensors, inputs: {x: {shape: [3], dtype: uint8, low: -1, high: 3}}}",
            "data.inputs.x.low: must be at least 0 for uint8, not -1",
        ),
    ],
)
def test_data_errors(data: str, message: str) -> None:
    assert str(error_of(GOOD | {"data": yaml.safe_load(data)})) == message


OPTIMIZERS = "adadelta, adafactor, adagrad, adam, adamax, adamw, asgd, nadam, radam, rmsprop, rprop, sgd, sgd-momentum"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "train: {optimizer: adamzw}",
            f"train.optimizer: 'adamzw' is not an optimizer; valid: {OPTIMIZERS} (did you mean 'adamw'?)",
        ),
        (
            "train: {optimizer: {name: adamzw}}",
            f"train.optimizer.name: 'adamzw' is not an optimizer; valid: {OPTIMIZERS} (did you mean 'adamw'?)",
        ),
        (
            "train: {optimizer: lbfgs}",
            "train.optimizer: lbfgs is not supported: it needs a closure that evaluates the model several times in one "
            "step; write that step yourself and name it in train.step",
        ),
        ("train: {optimizer: {nam: sgd, lr: 1}}", "train.optimizer.nam: unknown key (did you mean 'name'?)"),
        ("train: {optimizer: {lr: 1}}", "train.optimizer.name: is required"),
        ("train: {optimizer: [adam]}", 'train.optimizer: must be a mapping, not ["adam"]'),
        ("train: {optimiser: adam}", "train.optimiser: unknown key (did you mean 'optimizer'?)"),
        ("train: {loss: loss}", "train.loss: 'loss' is not of the form package.module:name"),
        (
            "train: {loss: 'a:b', step: 'a:c'}",
            "train.loss: has no effect beside train.step, which replaces the whole step",
        ),
        (
            "variants: {precision: bf16amp}",
            f"variants.precision: 'bf16amp' is not a precision; valid: {PRECISIONS} (did you mean 'bf16-amp'?)",
        ),
        (
            "variants: {precision: [fp32, FP16]}",
            f"variants.precision[1]: 'FP16' is not a precision; valid: {PRECISIONS} (did you mean 'fp16'?)",
        ),
        ("variants: {precision: 16}", f"variants.precision: 16 is not a precision; valid: {PRECISIONS}"),
        ("variants: {precision: []}", "variants.precision: must not be empty; leave it out for the default"),
        ("variants: {precision: [fp32, fp32]}", "variants.precision: 'fp32' is listed twice"),
        ("variants: {compile: [off, 'off']}", "variants.compile: 'off' is listed twice"),
        ("variants: {precison: fp32}", "variants.precison: unknown key (did you mean 'precision'?)"),
        (
            "variants: {checkpointing: off}",
            "variants.checkpointing: false is not a kind of checkpointing; valid: none, full, selective",
        ),
        ("variants: [fp32]", 'variants: must be a mapping, not ["fp32"]'),
        ("name: 5", "name: must be text, not 5; put it in quotes"),
        ("name: ''", "name: must be printable text"),
        ("varians: {}", "varians: unknown key (did you mean 'variants'?)"),
        ("zzz: 1", "zzz: unknown key; valid: name, model, data, train, variants, search"),
        ("optimizer: adamw", "optimizer: is a key of train (did you mean 'train.optimizer'?)"),
        ("train: {precision: bf16}", "train.precision: is a key of variants (did you mean 'variants.precision'?)"),
        ("variants: {optimizer: sgd}", "variants.optimizer: is a key of train (did you mean 'train.optimizer'?)"),
        ("sequence_length: 8", "sequence_length: is a key of data (did you mean 'data.sequence_length'?)"),
        (
            "train: {batch_size: 8}",
            "train.batch_size: is said beside a spec, not in it: --batch-size N, or batch_size over HTTP",
        ),
        ("gpu: h200", "gpu: is said beside a spec, not in it: --gpu NAME, or gpu over HTTP"),
        ("variants: {gpu: 2}", "variants.gpu: unknown key (did you mean 'gpus'?)"),
        (
            "train: {learning_rate: 0.1}",
            "train.learning_rate: is an argument of the optimizer: optimizer: {name: ..., lr: ...} "
            "(did you mean 'train.optimizer.lr'?)",
        ),
    ],
)
def test_other_errors(more: str, message: str) -> None:
    assert str(error_of(GOOD | yaml.safe_load(more))) == message


def test_a_misspelt_section_is_reported_rather_than_the_missing_one() -> None:
    assert str(error_of({"modle": GOOD["model"], "data": GOOD["data"]})) == "modle: unknown key (did you mean 'model'?)"
    assert str(error_of({"model": GOOD["model"]})) == "data: is required"
    assert str(error_of({})) == "model: is required"


def test_images_of_a_model_of_ones_own_need_a_number_of_classes() -> None:
    document = {"model": {"source": "python", "target": "m:M"}, "data": {"kind": "images", "size": 8}}
    assert str(error_of(document)) == "data.classes: is required with source: python"


def test_labels_beyond_the_models_classes_are_refused_before_they_reach_a_gpu() -> None:
    document = {
        "model": {"source": "timm", "name": "resnet18", "args": {"num_classes": 10}},
        "data": {"kind": "images", "size": 8, "classes": 11},
    }
    assert str(error_of(document)) == "data.classes: must be at most the model's 10 classes, not 11"


@pytest.mark.parametrize("document", [[], "gpt2", 5, None])
def test_a_spec_is_a_mapping(document: object) -> None:
    assert error_of(document).message.startswith("a spec must be a mapping with the keys model and data, not ")


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def in_config(value: object) -> dict[str, object]:
    return GOOD | {"model": GOOD["model"] | {"config": {"x": value}}}


def test_absurd_documents_are_refused() -> None:
    assert parse_spec(in_config(nested(MAX_DEPTH - 3))).model.config["x"] == nested(MAX_DEPTH - 3)
    assert "nested more than" in error_of(in_config(nested(MAX_DEPTH))).message
    assert "more than 20000 values" in error_of(in_config([0] * MAX_VALUES)).message
    assert "more than 10000 characters" in error_of(in_config("x" * 20_000)).message
    assert "not text" in error_of(in_config("\ud800")).message
    assert "not text" in error_of(in_config("a\0b")).message
    loop: list[object] = []
    loop.append(loop)
    assert "nested more than" in error_of(in_config(loop)).message


def test_shared_values_cannot_multiply_without_end() -> None:
    """What YAML aliases make of a few lines ("a billion laughs")."""
    value: object = ["lol"]
    for _ in range(15):
        value = [value] * 10
    assert "more than 20000 values" in error_of(in_config(value)).message


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("train: {clip_grad_norm: 0}", "train.clip_grad_norm: must be more than 0, not 0"),
        ("train: {ema: 1.5}", "train.ema: must be less than 1, not 1.5"),
        ("train: {evaluation: {batchsize: 2}}", "train.evaluation.batchsize: unknown key (did you mean 'batch_size'?)"),
        (
            "train: {routing: wrost}",
            "train.routing: 'wrost' is not a routing; valid: balanced, worst (did you mean 'worst'?)",
        ),
        (
            "train: {step: 'a:b', ema: true}",
            "train.ema: has no effect beside train.step, which replaces the whole step",
        ),
        (
            "variants: {allocator: ['expandable_segment:True']}",
            "variants.allocator[0]: 'expandable_segment' is not a setting of PyTorch's allocator "
            "(did you mean 'expandable_segments'?)",
        ),
        (
            "variants: {gpus: 2}",
            "variants.gpus: 2 GPUs need a variant that uses them: parallelism: [ddp] or [fsdp2]",
        ),
        (
            "variants: {parallelism: [ddp]}",
            "variants.gpus: ddp needs more than 1 GPU: say how many (did you mean '2'?)",
        ),
        ("search: {multiple: 8}", "search.multiple: unknown key (did you mean 'multiple_of'?)"),
        (
            "search: {multiple_of: 8, max_batch_size: 4}",
            "search.max_batch_size: must be at least search.multiple_of (8), not 4 (did you mean '8'?)",
        ),
        (
            "{train: {global_batch_size: 7}, search: {multiple_of: 8}}",
            "train.global_batch_size: must be a multiple of search.multiple_of (8), not 7 (did you mean '8'?)",
        ),
        (
            "train: {global_batch_size: 7, accumulation_steps: 2}",
            "train.global_batch_size: must be a multiple of train.accumulation_steps (2), not 7; "
            "the nearest are 6 and 8 (did you mean '6'?)",
        ),
        (
            "{train: {global_batch_size: 90, accumulation_steps: 2}, search: {multiple_of: 4}, "
            "variants: {parallelism: [single, ddp], gpus: 4}}",
            "train.global_batch_size: must be a multiple of search.multiple_of (4) times train.accumulation_steps (2) "
            "times variants.gpus (4), not 90; the nearest are 64 and 96 (did you mean '96'?)",
        ),
        (
            "{train: {global_batch_size: 512, accumulation_steps: 2}, search: {multiple_of: 8, max_batch_size: 30}}",
            "train.global_batch_size: 512 in 2 accumulation steps takes micro-batches of more than "
            "search.max_batch_size (30) (did you mean '48'?)",
        ),
        (
            "{train: {global_batch_size: 7, accumulation_steps: 9}, search: {multiple_of: 2147483647}}",
            "train.global_batch_size: must be a multiple of search.multiple_of (2147483647) times "
            "train.accumulation_steps (9), not 7",
        ),
        ("search: {headroom: 100%}", "search.headroom: '100%' is not from 0% to below 100%"),
        ("search: {headroom: 7.5}", "search.headroom: 7.5 is neither bytes, such as 2GiB, nor a share, such as 5%"),
        (
            "data: {kind: tokens, lengths: {distribution: lognormal, mean: 300, max: 1024}}",
            "data.lengths.std: is required for a lognormal distribution",
        ),
        (
            "data: {kind: tokens, lengths: {distribution: uniform, min: 9, max: 8}}",
            "data.lengths.min: must be at most max (8), not 9",
        ),
        (
            "data: {kind: tokens, lengths: {distribution: uniform, maxx: 8}}",
            "data.lengths.maxx: unknown key (did you mean 'max'?)",
        ),
        (
            "data: {kind: tokens, lengths: {lengths: [3, 4], counts: [1]}}",
            "data.lengths.counts: must have as many numbers as lengths (2), not 1",
        ),
        (
            "data: {kind: tokens, lengths: {file: lengths.txt}}",
            "data.lengths.file: is read by the command line only; here give the lengths themselves",
        ),
    ],
)
def test_errors_of_further_keys(section: str, message: str) -> None:
    assert str(error_of(GOOD | yaml.safe_load(section))) == message


@pytest.mark.parametrize(
    "section",
    [
        "{train: {global_batch_size: 7}, search: {max_batch_size: 2}}",
        "{train: {global_batch_size: 48, accumulation_steps: 2}, search: {multiple_of: 8, max_batch_size: 30}}",
        "{train: {global_batch_size: 6, accumulation_steps: 3}, variants: {parallelism: [fsdp2], gpus: 2}}",
    ],
)
def test_a_global_batch_size_that_equal_micro_batches_make(section: str) -> None:
    """What is an error above is one for its arithmetic alone: every way of these reaches its size."""
    spec = parse_spec(GOOD | yaml.safe_load(section))
    ways = [
        accumulations(
            spec.train.global_batch_size or 0, spec.search.max_batch_size or 64, gpus=variant.gpus,
            multiple_of=spec.search.multiple_of, steps=spec.train.accumulation_steps if "steps" in section else None,
        )
        for variant in spec.variants.product()
    ]  # fmt: skip
    assert all(list(each) for each in ways)
