"""Spec files: three formats, and one line about whatever is wrong with a file."""

import json
from pathlib import Path

import pytest

from planner.errors import InvalidArgument, InvalidSpec
from planner.specs.document import load_spec
from planner.specs.files import MAX_FILE_BYTES, parse_text

YAML = """\
model: {source: transformers, model_type: gpt2, task: causal-lm}
data: {kind: tokens, sequence_length: 8}
train: {optimizer: {name: adamw, lr: 1e-4}}
"""
TOML = """\
data = {kind = "tokens", sequence_length = 8}
[model]
source = "transformers"
model_type = "gpt2"
task = "causal-lm"
[train.optimizer]
name = "adamw"
lr = 1e-4
"""
JSON = json.dumps(
    {
        "train": {"optimizer": {"lr": 0.0001, "name": "adamw"}},
        "data": {"kind": "tokens", "sequence_length": 8},
        "model": {"source": "transformers", "model_type": "gpt2", "task": "causal-lm"},
    }
)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_three_formats_say_the_same(tmp_path: Path) -> None:
    texts = {"a.yaml": YAML, "b.yml": YAML, "c.json": JSON, "d.toml": TOML, "e.YAML": "\ufeff" + YAML}
    specs = [load_spec(write(tmp_path, name, text)) for name, text in texts.items()]
    assert len({spec.hash for spec in specs}) == 1
    assert all(spec == specs[0] for spec in specs)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "model: {source: timm\ndata: 5\n", "line 2, column 5: did not find expected ',' or '}'"),
        ("a.yaml", "name: a\nmodel: {}\nname: b\n", "line 3, column 1: the key 'name' is given twice"),
        ("a.yaml", "model: {source: timm, source: python}", "line 1, column 23: the key 'source' is given twice"),
        (
            "a.yaml",
            "model: !!python/object:os.system {}",
            "line 1, column 8: could not determine a constructor for the ",
        ),
        ("a.yaml", "a: 1\n--- \nb: 2\n", "line 2, column 1: but found another document"),
        ("a.yaml", "", "is empty"),
        ("a.yaml", "# nothing but a comment\n", "is empty"),
        ("a.yaml", "- model\n", "must hold a mapping with the keys model and data"),
        ("a.yaml", "[" * 5000, "is nested too deep"),
        ("a.json", '{"model": 1,\n "data": }', "line 2, column 10: expecting value"),
        ("a.json", '{"name": "a", "name": "b"}', "the key 'name' is given twice"),
        ("a.json", "", "is empty"),
        ("a.json", "[1]", "must hold a mapping with the keys model and data"),
        ("a.json", "[" * 100_000, "is nested too deep"),
        ("a.json", "1" * 5000, "Exceeds the limit"),
        ("a.toml", "model = \n", "Invalid value (at line 1, column 9)"),
        ("a.toml", "", "is empty"),
        ("a.toml", "a" + ".a" * 5000 + " = 1", "is nested too deep"),
    ],
)
def test_malformed_text_is_one_line_that_says_where(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(InvalidSpec) as caught:
        load_spec(path)
    assert caught.value.field == str(path)
    assert caught.value.message.startswith(message)
    assert "\n" not in str(caught.value)


def test_merge_keys_work_and_cannot_multiply_without_end(tmp_path: Path) -> None:
    merged = parse_text(b"a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n", ".yaml", field="a")
    assert merged["b"] == {"x": 1, "y": 3}
    bomb = "a0: &a0 {x: 1, y: 2}\n" + "".join(
        f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}\n" for level in range(1, 30)
    )
    with pytest.raises(InvalidSpec, match="too many merged keys"):
        parse_text(bomb.encode(), ".yaml", field="a")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(InvalidSpec, match=r"is not UTF-8 text \(byte 6\)"):
        load_spec(path)


def test_a_file_too_large_to_be_a_spec(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(InvalidSpec, match="is larger than 1048576 bytes"):
        load_spec(path)


def test_a_missing_file_names_the_one_that_was_meant(tmp_path: Path) -> None:
    meant = write(tmp_path, "gpt2-s1024.yaml", YAML)
    with pytest.raises(InvalidArgument) as caught:
        load_spec(tmp_path / "gpt2-1024.yaml")
    assert (caught.value.message, caught.value.suggestion) == ("No such file or directory", str(meant))
    with pytest.raises(InvalidArgument, match=r"No such file or directory$"):
        load_spec(tmp_path / "nowhere" / "gpt2.yaml")


def test_a_folder_is_no_spec(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").mkdir()
    with pytest.raises(InvalidArgument, match="Is a directory"):
        load_spec(tmp_path / "a.yaml")


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.symlink_to(path)
    with pytest.raises(InvalidArgument, match="Too many levels of symbolic links"):
        load_spec(path)


def test_an_unknown_suffix_lists_those_that_are_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"a spec is a file that ends in \.yaml, \.yml, \.json, \.toml"):
        load_spec(write(tmp_path, "a.txt", YAML))


def test_text_from_elsewhere_is_read_by_the_same_rules() -> None:
    assert parse_text(YAML.encode(), ".yaml", field="body") == parse_text(TOML.encode(), ".toml", field="body") | {
        "train": {"optimizer": {"name": "adamw", "lr": "1e-4"}}
    }
    with pytest.raises(InvalidSpec, match=r"^body: is empty$"):
        parse_text(b"", ".json", field="body")
