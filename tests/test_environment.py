"""The environment of the evidence: read without importing what it describes."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import planner
from planner.environment import (
    allocator_conf,
    library_versions,
    local_gpus,
    measured_environment,
    predicted_environment,
    torch_build,
)
from planner.errors import DeviceUnavailable
from planner.gpus import find_gpu
from planner.specs.document import load_spec, parse_spec
from planner.specs.model import Spec
from planner.trials import Source
from tests.environment_fakes import Card, FakeNvml

ROOT = Path(__file__).parent.parent
IMAGES = {"kind": "images", "size": 32, "classes": 10}


def spec_of(**model: str) -> Spec:
    return parse_spec({"model": model, "data": IMAGES})


def test_torch_is_described_without_being_imported() -> None:
    assert torch_build().version == torch.__version__
    assert torch_build().cuda == torch.version.cuda


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import json, pathlib, sys\n"
        "from planner.environment import predicted_environment\n"
        "from planner.gpus import find_gpu\n"
        "from planner.specs.document import load_spec\n"
        "env = predicted_environment(load_spec(pathlib.Path('gpt2-s1024.yaml')), find_gpu('h200'))\n"
        "heavy = {'torch', 'transformers', 'timm', 'torchvision', 'sqlalchemy', 'numpy'} & set(sys.modules)\n"
        "print(json.dumps([env.torch_version, env.library_versions, sorted(heavy)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "examples",
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == [torch.__version__, {"transformers": version("transformers")}, []]


def test_no_torch_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(DeviceUnavailable, match="torch is not installed here"):
        torch_build()


def test_a_broken_torch_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(DeviceUnavailable, match=r"incomplete: version\.py cannot be read"):
        torch_build()


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("from typing import Optional\n__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n", "13.0"),
        ("__version__ = '2.11.0+cu130'\ncuda = '13.0'\nhip = None\n", "13.0"),
        ("__version__ = '2.11.0+cu130'\ncuda = None\n", None),
    ],
)
def test_either_form_of_torchs_version_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, cuda: str | None
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert (torch_build().version, torch_build().cuda) == ("2.11.0+cu130", cuda)


def test_a_prediction_names_no_card() -> None:
    environment = predicted_environment(load_spec(ROOT / "examples" / "resnet50-224.yaml"), find_gpu("a100-80gb"))
    assert environment.source is Source.PREDICTED
    assert (environment.gpu, environment.total_bytes) == ("a100-80gb", find_gpu("a100-80gb").total_bytes)
    assert (environment.gpu_name, environment.gpu_uuid, environment.driver_version) == (None, None, None)
    assert environment.planner_version == planner.__version__
    assert environment.code_hash is None
    assert environment.hostname
    assert environment.python_version == ".".join(map(str, sys.version_info[:3]))


def test_a_measurement_names_the_card() -> None:
    (local,) = local_gpus({}, FakeNvml([Card("GPU-1")]))
    environment = measured_environment(spec_of(source="timm", name="resnet18"), local.gpu, local)
    assert environment.source is Source.MEASURED
    assert (environment.gpu, environment.gpu_name, environment.gpu_uuid) == ("h200", "NVIDIA H200", "GPU-1")
    assert (environment.driver_version, environment.total_bytes) == ("580.159.04", local.total_bytes)


def test_the_key_tells_apart_what_matters_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, gpu = spec_of(source="timm", name="resnet18"), find_gpu("h200")
    (one, two) = local_gpus({}, FakeNvml([Card("GPU-1"), Card("GPU-2")]))
    assert measured_environment(spec, gpu, one).key() == measured_environment(spec, gpu, two).key()
    assert measured_environment(spec, gpu, one).key() != predicted_environment(spec, gpu).key()
    before = predicted_environment(spec, gpu).key()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert predicted_environment(spec, gpu).key() != before


@pytest.mark.parametrize(
    ("model", "libraries"),
    [
        ({"source": "timm", "name": "resnet18"}, ["timm"]),
        ({"source": "torchvision", "name": "resnet18"}, ["torchvision"]),
        ({"source": "transformers", "model_type": "vit", "task": "image-classification"}, ["transformers"]),
    ],
)
def test_libraries_of_each_source(model: dict[str, str], libraries: list[str]) -> None:
    assert library_versions(spec_of(**model)) == {name: version(name) for name in libraries}


def test_libraries_that_the_users_code_imports(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import numpy, timm.layers\nfrom layers import Block\n")
    (tmp_path / "layers.py").write_text("def late():\n    from transformers import GPT2Model\n")
    spec = spec_of(source="python", target="mine:Net")
    assert library_versions(spec, tmp_path) == {name: version(name) for name in ("timm", "transformers")}


@pytest.mark.parametrize(
    ("environ", "normalised"),
    [
        ({}, ""),
        ({"PYTORCH_ALLOC_CONF": ""}, ""),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64, expandable_segments : True"},
            "expandable_segments:True,max_split_size_mb:64",
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_CUDA_ALLOC_CONF": "b:2"}, "b:2"),
        ({"PYTORCH_ALLOC_CONF": "a:1,b:2,a:3,"}, "a:3,b:2"),
        (
            {"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:[256:1, 512:2,>:8],garbage_collection_threshold:0.8"},
            "garbage_collection_threshold:0.8,roundup_power2_divisions:[256:1,512:2,>:8]",
        ),
    ],
)
def test_allocator_settings_are_normalised(environ: dict[str, str], normalised: str) -> None:
    assert allocator_conf(environ) == normalised
