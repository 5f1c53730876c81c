"""Good specs: defaults, shorthands, equal hashes for equal work, and round trips."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import InvalidSpec
from planner.specs.document import load_spec, parse_spec, spec_document
from planner.specs.model import DataKind, ModelSource, OptimizerSpec, Spec, TensorInput
from planner.specs.optimizers import OPTIMIZERS, UNSUPPORTED
from planner.specs.sections import SpecDocument
from planner.specs.tasks import AUTO_CLASSES, data_kinds
from planner.specs.values import DTYPE_ALIASES, DTYPES, INTEGER_RANGES
from planner.specs.variants import Checkpointing, Compile, Precision, Variant

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))
MODEL = {"source": "transformers", "model_type": "gpt2", "task": "causal-lm"}
DATA = {"kind": "tokens", "sequence_length": 8}


def parse(text: str) -> Spec:
    return parse_spec(yaml.safe_load(text))


def of(**sections: object) -> Spec:
    return parse_spec({"model": MODEL, "data": DATA} | sections)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load_and_survive_json(path: Path) -> None:
    spec = load_spec(path)
    document = json.loads(json.dumps(spec_document(spec), allow_nan=False))
    assert parse_spec(document) == spec
    assert parse_spec(document).hash == spec.hash


def test_the_examples_say_what_they_say() -> None:
    by_name = {path.stem: load_spec(path) for path in EXAMPLES}
    gpt2 = by_name["gpt2-s1024"]
    assert (gpt2.model.source, gpt2.model.name, gpt2.model.task) == (ModelSource.TRANSFORMERS, "gpt2", "causal-lm")
    assert dict(gpt2.model.config) == {"use_cache": False}
    assert (gpt2.data.kind, gpt2.data.sequence_length) == (DataKind.TOKENS, 1024)
    assert len(gpt2.variants.product()) == 6
    t5 = by_name["t5-base-s512"]
    assert t5.data.inputs["labels"] == TensorInput(shape=(128,), dtype="int64", low=0, high=32000)
    resnet = by_name["resnet50-224"]
    assert resnet.train.optimizer == OptimizerSpec(name="sgd", args={"lr": 0.01, "momentum": 0.9})
    assert (resnet.data.size, resnet.data.classes) == (224, 1000)
    unet = by_name["unet"]
    assert (unet.model.source, unet.model.name, dict(unet.model.config)) == (
        ModelSource.PYTHON,
        "unet_model:UNet",
        {"c": 64, "classes": 21},
    )


def test_defaults() -> None:
    spec = of()
    assert spec.name is None
    assert spec.train.optimizer == OptimizerSpec(name="adamw")
    assert (spec.train.loss, spec.train.step) == (None, None)
    assert spec.variants.product() == (Variant(),)
    assert Variant().as_dict() == {"precision": "fp32", "checkpointing": "none", "compile": "off"}


def test_an_empty_section_is_one_left_out() -> None:
    text = f"{{model: {json.dumps(MODEL)}, data: {json.dumps(DATA)}, train: , variants: {{compile: }}}}"
    assert yaml.safe_load(text)["train"] is None
    assert parse(text) == of()


def test_the_sweep_keeps_the_users_order() -> None:
    spec = of(variants={"precision": ["bf16-amp", "fp32"], "checkpointing": ["full", "none"]})
    assert [(str(item.precision), str(item.checkpointing)) for item in spec.variants.product()] == [
        ("bf16-amp", "full"),
        ("bf16-amp", "none"),
        ("fp32", "full"),
        ("fp32", "none"),
    ]


def test_yaml_on_and_off_are_booleans_and_still_mean_on_and_off() -> None:
    text = f"{{model: {json.dumps(MODEL)}, data: {json.dumps(DATA)}, variants: {{compile: [off, on]}}}}"
    assert yaml.safe_load(text)["variants"]["compile"] == [False, True]
    assert parse(text).variants.compile == (Compile.OFF, Compile.ON)
    assert of(variants={"compile": True}).variants.compile == (Compile.ON,)


def test_a_number_with_an_exponent_is_a_number_where_yaml_reads_text() -> None:
    config = yaml.safe_load("{layer_norm_epsilon: 1e-5, name: '12'}")
    optimizer = yaml.safe_load("{name: adamw, lr: 1e-4, betas: [0.9, '0.95'], foreach: false}")
    assert (config["layer_norm_epsilon"], optimizer["lr"]) == ("1e-5", "1e-4")
    spec = of(model=MODEL | {"config": config}, train={"optimizer": optimizer})
    assert dict(spec.model.config) == {"layer_norm_epsilon": 1e-5, "name": "12"}
    assert dict(spec.train.optimizer.args) == {"lr": 1e-4, "betas": [0.9, 0.95], "foreach": False}


def test_optimizer_shorthands() -> None:
    assert of(train={"optimizer": "sgd-momentum"}) == of(train={"optimizer": {"name": "sgd", "momentum": 0.9}})
    kept = of(train={"optimizer": {"name": "sgd-momentum", "momentum": 0.5, "lr": 0.1}})
    assert dict(kept.train.optimizer.args) == {"momentum": 0.5, "lr": 0.1}


def test_timm_and_torchvision_take_either_name_of_a_key() -> None:
    images = {"kind": "images", "size": 32, "classes": 10}
    for source in ("timm", "torchvision"):
        model = {"source": source, "name": "resnet18", "args": {"num_classes": 10}}
        other = {"source": source, "model_type": "resnet18", "config": {"num_classes": 10}}
        assert of(model=model, data=images) == of(model=other, data=images)
        assert of(model=model, data=images).model.source == source


def test_integer_inputs_default_to_zero_or_one() -> None:
    tensors = {
        "kind": "tensors",
        "inputs": {"mask": {"shape": [8], "dtype": "long"}, "x": {"shape": [], "dtype": "half"}},
    }
    inputs = of(data=tensors).data.inputs
    assert inputs["mask"] == TensorInput(shape=(8,), dtype="int64", low=0, high=2)
    assert inputs["x"] == TensorInput(shape=(), dtype="float16", low=0, high=None)


def test_a_custom_loss_lets_any_data_go_with_any_task() -> None:
    model = {"source": "transformers", "model_type": "t5", "task": "text-encoding"}
    assert of(model=model, train={"loss": "mine:loss"}).train.loss == "mine:loss"
    assert of(train={"step": "mine.train:Loop.step"}).train.step == "mine.train:Loop.step"


def test_equal_work_has_an_equal_hash_however_it_is_written() -> None:
    written_out = {
        "variants": {"compile": ["off"], "checkpointing": ["none"], "precision": ["fp32"]},
        "train": {"optimizer": {"name": "adamw"}},
        "data": dict(reversed(DATA.items())),
        "model": dict(reversed(MODEL.items())) | {"config": {}},
    }
    assert parse_spec(written_out) == of()
    assert parse_spec(written_out).hash == of().hash
    labels = {"1": "cat", "2": "dog"}
    integer_keys = of(model=MODEL | {"config": {"id2label": {2: "dog", 1: "cat"}}})
    assert integer_keys.hash == of(model=MODEL | {"config": {"id2label": labels}}).hash
    assert of(variants={"precision": "bf16"}).variants == of(variants={"precision": ["bf16"]}).variants


def test_the_hash_is_of_the_work_alone() -> None:
    assert of(name="a", variants={"precision": ["bf16"]}).hash == of(name="b").hash
    different = [
        of(),
        of(model=MODEL | {"model_type": "gpt_neo"}),
        of(model=MODEL | {"config": {"n_layer": 6}}),
        of(data=DATA | {"sequence_length": 9}),
        of(train={"optimizer": "sgd"}),
        of(train={"optimizer": {"name": "adamw", "lr": 0.1}}),
        of(train={"loss": "a:b"}),
        of(train={"step": "a:b"}),
    ]
    assert len({spec.hash for spec in different}) == len(different)


def test_the_hash_of_a_known_spec_stays_the_same() -> None:
    """Stored evidence is found by it: a change of this value orphans every stored answer."""
    assert of().hash == "2b718fe17f5f399537a44118f4e5e0c9b8a396a2812d324623f082584c10c79a"


def test_a_spec_shares_nothing_with_the_document_it_came_from() -> None:
    model = MODEL | {"config": {"rope": {"theta": 1.0}}}
    spec = of(model=model)
    before = spec.hash
    model["config"]["rope"]["theta"] = 2.0
    spec.model.arguments()["rope"]["theta"] = 3.0
    spec_document(spec)["model"]["config"]["rope"]["theta"] = 4.0
    assert spec.hash == before


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=4),
    max_leaves=12,
)
configs = st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), json_values, max_size=5)
targets = st.from_regex(r"[a-z]{3,9}x(\.[a-z]{3,9}x)?:[A-Z][a-z]{1,8}", fullmatch=True)


def axis(kind: type) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from([str(item) for item in kind]), min_size=1, unique=True)


@st.composite
def tensor_inputs(draw: st.DrawFn) -> dict[str, object]:
    dtype = draw(st.sampled_from([*DTYPES, *DTYPE_ALIASES]))
    entry: dict[str, object] = {"shape": draw(st.lists(st.integers(1, 64), max_size=4)), "dtype": dtype}
    integers = INTEGER_RANGES.get(DTYPE_ALIASES.get(dtype, dtype))
    if integers and draw(st.booleans()):
        entry["low"] = draw(st.integers(integers[0], integers[1] - 1))
        entry["high"] = draw(st.integers(entry["low"] + 1, integers[1]))
    return entry


@st.composite
def documents(draw: st.DrawFn) -> dict[str, object]:
    tensors = {
        "kind": "tensors",
        "inputs": draw(st.dictionaries(st.sampled_from(["x", "labels", "mask"]), tensor_inputs(), min_size=1)),
    }
    images = {"kind": "images", "size": draw(st.integers(1, 999)), "classes": draw(st.integers(1, 9))}
    tokens = {"kind": "tokens", "sequence_length": draw(st.integers(1, 9999))}
    args = draw(configs.filter(lambda value: not {"num_labels", "num_classes"} & value.keys()))
    source = draw(st.sampled_from(ModelSource))
    if source is ModelSource.TRANSFORMERS:
        task = draw(st.sampled_from(sorted(AUTO_CLASSES)))
        model = {"source": "transformers", "model_type": "m", "task": task, "config": args}
        fitting = [item for item in (tokens, images, tensors) if item["kind"] in data_kinds(task)]
    elif source is ModelSource.PYTHON:
        model = {"source": "python", "target": draw(targets), "args": args}
        fitting = [images, tensors]
    else:
        model = {"source": str(source), "name": "net", "args": args}
        fitting = [images, tensors]
    document: dict[str, object] = {"model": model, "data": draw(st.sampled_from(fitting))}
    document["train"] = {"optimizer": {"name": draw(st.sampled_from(OPTIMIZERS)), "lr": draw(st.floats(0, 1))}}
    document["variants"] = {
        "precision": draw(axis(Precision)),
        "checkpointing": draw(axis(Checkpointing)),
        "compile": draw(axis(Compile)),
    }
    return document


def shuffled(value: object, draw: st.DrawFn) -> object:
    if isinstance(value, dict):
        return {key: shuffled(value[key], draw) for key in draw(st.permutations(list(value)))}
    return [shuffled(item, draw) for item in value] if isinstance(value, list) else value


@given(documents())
def test_every_spec_survives_being_written_out(document: dict[str, object]) -> None:
    spec = parse_spec(document)
    again = parse_spec(json.loads(json.dumps(spec_document(spec), allow_nan=False)))
    assert again == spec
    assert again.hash == spec.hash
    assert spec_document(again) == spec_document(spec)


@given(st.data())
def test_the_order_of_keys_does_not_matter(data: st.DataObject) -> None:
    document = data.draw(documents())
    other = shuffled(document, data.draw)
    assert parse_spec(other).hash == parse_spec(document).hash


def test_the_tasks_are_those_of_transformers() -> None:
    """Compared with the library's source, which is quicker to read than to import."""
    package = find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parent / "models" / "auto" / "modeling_auto.py").read_text()
    assert set(AUTO_CLASSES.values()) == set(re.findall(r"^class (AutoModelFor\w+)\(", source, re.MULTILINE))


def test_the_optimizers_are_those_of_torch() -> None:
    package = find_spec("torch")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parent / "optim" / "__init__.py").read_text()
    exported = set(re.findall(r'^    "([A-Z]\w+)",$', source, re.MULTILINE)) - {"Optimizer"}
    assert {name.lower() for name in exported} == {*OPTIMIZERS, *UNSUPPORTED} - {"sgd-momentum"}


def test_the_json_schema_names_every_section() -> None:
    schema = SpecDocument.model_json_schema()
    assert set(schema["properties"]) == {"name", "model", "data", "train", "variants", "search"}
    assert {"TransformersModel", "TensorInputSection", "VariantsSection"} <= schema["$defs"].keys()


def test_what_an_old_spec_did_not_say_leaves_its_hash_alone() -> None:
    plain = of()
    assert (
        of(train={"accumulation_steps": 1, "routing": "balanced", "ema": False, "evaluation": False}).hash == plain.hash
    )
    assert of(train={"global_batch_size": 512}, search={"multiple_of": 8}).hash == plain.hash
    different = [
        of(train={"accumulation_steps": 2}), of(train={"clip_grad_norm": 1.0}), of(train={"ema": True}),
        of(train={"freeze": "wte.*"}), of(train={"evaluation": True}), of(train={"evaluation": {"batch_size": 2}}),
        of(train={"routing": "worst"}), of(data={"kind": "tokens", "lengths": [16, 1024]}),
    ]  # fmt: skip
    assert len({plain.hash, *(spec.hash for spec in different)}) == len(different) + 1


def test_questions_beside_the_largest_batch_size() -> None:
    assert of().question() == {}
    spec = of(train={"global_batch_size": 512}, search={"multiple_of": 8, "max_batch_size": 64, "headroom": "5%"})
    assert spec.question() == {
        "global_batch_size": 512, "multiple_of": 8, "max_batch_size": 64, "headroom": {"bytes": 0, "share": 0.05},
    }  # fmt: skip
    assert spec.search.headroom.of(1000) == 50
    assert of(search={"headroom": "2GiB"}).search.headroom.of(1) == 2 << 30


def test_lengths_as_a_list_a_distribution_or_a_file(tmp_path: Path) -> None:
    assert of(data={"kind": "tokens", "lengths": [7, 5, 7, 2000]}).data.lengths == ((5, 1), (7, 2), (2000, 1))
    cut = of(data={"kind": "tokens", "lengths": [5, 7, 2000], "sequence_length": 7}).data
    assert (cut.lengths, cut.sequence_length) == (((5, 1), (7, 2)), 7)
    drawn = {"distribution": "lognormal", "mean": 300, "std": 200, "min": 8, "max": 1024}
    data = of(data={"kind": "tokens", "lengths": drawn}).data
    mean = sum(length * count for length, count in data.lengths) / sum(count for _, count in data.lengths)
    assert data.sequence_length == data.lengths[-1][0] == 1024
    assert data.lengths[0][0] >= 8
    assert abs(mean - 300) < 15
    (tmp_path / "lengths.txt").write_text("5\n7\n\n7\n2000\n")
    (tmp_path / "spec.json").write_text(
        json.dumps({"model": MODEL, "data": {"kind": "tokens", "lengths": {"file": "lengths.txt"}}})
    )
    assert load_spec(tmp_path / "spec.json").data.lengths == ((5, 1), (7, 2), (2000, 1))
    (tmp_path / "lengths.txt").write_text("5\n7.5\n")
    with pytest.raises(InvalidSpec, match=r"line 2 of .* is no length") as caught:
        load_spec(tmp_path / "spec.json")
    assert caught.value.field == "data.lengths.file"


def test_further_axes_are_shown_where_they_differ() -> None:
    axes = {"allocator": ["default", "expandable_segments:True"], "parallelism": ["single", "ddp"], "gpus": 2}
    variants = of(variants=axes).variants.product()
    assert [variant.label() for variant in variants] == [
        "fp32", "fp32 + ddp on 2 GPUs", "fp32 + expandable_segments:True",
        "fp32 + expandable_segments:True + ddp on 2 GPUs",
    ]  # fmt: skip
    assert variants[0].as_dict() == {"precision": "fp32", "checkpointing": "none", "compile": "off"}
    assert all(Variant.from_dict(variant.as_dict()) == variant for variant in variants)


def test_everything_that_a_spec_can_say_survives_json() -> None:
    spec = of(
        data={"kind": "tokens", "lengths": [16, 24, 24]},
        train={
            "optimizer": {"name": "sgd", "lr": 0.1}, "accumulation_steps": 4, "clip_grad_norm": 1.0, "ema": 0.99,
            "freeze": ["wte.*"], "evaluation": {"batch_size": 3}, "routing": "worst", "global_batch_size": 64,
        },
        variants={
            "sdpa": ["math", "flash"], "optimizer_implementation": "fused", "memory_format": "channels-last",
            "loss": "chunked", "allocator": "expandable_segments:True", "parallelism": ["single", "fsdp2"], "gpus": 2,
        },
        search={"multiple_of": 8, "max_batch_size": 64, "headroom": "7.5%"},
    )  # fmt: skip
    again = parse_spec(json.loads(json.dumps(spec_document(spec), allow_nan=False)))
    assert again == spec
    assert (again.hash, again.question()) == (spec.hash, spec.question())
