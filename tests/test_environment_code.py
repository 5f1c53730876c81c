"""The hash of the user's own code: it changes with the code, and with nothing else; the code is never run."""

import shutil
import sys
from pathlib import Path

import pytest

from planner.environment import code_hash, predicted_environment
from planner.errors import ModelError
from planner.gpus import find_gpu
from planner.specs.document import parse_spec
from planner.specs.model import Spec
from planner.user_code import find_user_code

DATA = {"kind": "tensors", "inputs": {"x": {"shape": [4], "dtype": "float32"}}}


def spec_of(target: str = "mine:Net", **train: str) -> Spec:
    return parse_spec({"model": {"source": "python", "target": target}, "data": DATA, "train": train})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package, a module that imports a sibling, and files that are no part of either."""
    folder = tmp_path / "project"
    for path, text in {
        "mine.py": "import os\nimport torch\nimport layers\nraise RuntimeError('must never run')\n",
        "layers.py": "WIDTH = 4\n",
        "unrelated.py": "X = 1\n",
        "package/__init__.py": "raise RuntimeError('must never run')\n",
        "package/models/unet.py": "from ..blocks import Block\n",
        "package/blocks.py": "Block = None\n",
        "package/notes.txt": "not code",
        "package/__pycache__/blocks.cpython-311.pyc": "junk",
    }.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_no_target_no_hash() -> None:
    model = {"source": "transformers", "model_type": "gpt2", "task": "causal-lm"}
    assert code_hash(parse_spec({"model": model, "data": {"kind": "tokens", "sequence_length": 8}})) is None


@pytest.mark.parametrize(
    ("target", "edited", "changes"),
    [
        ("mine:Net", "mine.py", True),
        ("mine:Net", "layers.py", True),
        ("mine:Net", "unrelated.py", False),
        ("mine:Net", "package/blocks.py", False),
        ("package.models.unet:UNet", "package/blocks.py", True),
        ("package.models.unet:UNet", "package/models/unet.py", True),
        ("package.models.unet:UNet", "package/notes.txt", False),
        ("package.models.unet:UNet", "package/__pycache__/blocks.cpython-311.pyc", False),
        ("package.models.unet:UNet", "mine.py", False),
    ],
)
def test_the_hash_follows_the_code(project: Path, target: str, edited: str, changes: bool) -> None:
    before = code_hash(spec_of(target), project)
    assert code_hash(spec_of(target), project) == before
    with (project / edited).open("a") as file:
        file.write("# edited\n")
    assert (code_hash(spec_of(target), project) != before) is changes


def test_loss_and_step_count_too(project: Path) -> None:
    hashes = {
        code_hash(spec_of(), project),
        code_hash(spec_of(loss="unrelated:loss"), project),
        code_hash(spec_of(step="package.blocks:step"), project),
    }
    assert len(hashes) == 3


def test_a_new_or_renamed_file_of_the_package_changes_it(project: Path) -> None:
    hashes = [code_hash(spec_of("package:N"), project)]
    (project / "package" / "new.py").touch()
    hashes.append(code_hash(spec_of("package:N"), project))
    (project / "package" / "new.py").rename(project / "package" / "newer.py")
    hashes.append(code_hash(spec_of("package:N"), project))
    assert len(set(hashes)) == 3


def test_where_the_code_lies_does_not_matter(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(project, copy)
    for target in ("mine:Net", "package.models.unet:UNet"):
        assert code_hash(spec_of(target), copy) == code_hash(spec_of(target), project)


def test_the_code_is_never_run(project: Path) -> None:
    code_hash(spec_of(), project)
    code_hash(spec_of("package.models.unet:UNet"), project)
    assert not {"mine", "layers", "package"} & sys.modules.keys()
    assert str(project) not in sys.path


def test_imports_are_told_apart_from_ones_own_modules(project: Path) -> None:
    code = find_user_code(spec_of(), project)
    assert code is not None
    assert code.imports == {"os", "torch"}


def test_modules_that_import_each_other_and_code_that_is_no_python(project: Path) -> None:
    (project / "layers.py").write_text("import mine\n")
    (project / "mine.py").write_text("import layers\ndef broken(:\n")
    assert code_hash(spec_of(), project)


def test_a_folder_without_init_is_a_package_too(project: Path) -> None:
    (project / "package" / "__init__.py").unlink()
    before = code_hash(spec_of("package.models.unet:UNet"), project)
    (project / "package" / "blocks.py").write_text("Block = 1\n")
    assert code_hash(spec_of("package.models.unet:UNet"), project) != before


def test_the_current_folder_comes_first(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert code_hash(spec_of()) == code_hash(spec_of(), project)


def test_installed_code_counts_and_its_imports_do_not() -> None:
    code = find_user_code(spec_of("yaml:YAMLObject"))
    assert code is not None
    assert code.imports == frozenset()


def test_a_missing_module_names_the_one_that_was_meant(project: Path) -> None:
    with pytest.raises(ModelError) as caught:
        code_hash(spec_of("mien:Net"), project)
    assert str(caught.value) == "model.target: there is no module 'mien' here (did you mean 'mine'?)"
    with pytest.raises(ModelError) as caught:
        predicted_environment(spec_of(loss="lozz.x:f"), find_gpu("h200"), project)
    assert (caught.value.field, caught.value.message) == ("train.loss", "there is no module 'lozz' here")
