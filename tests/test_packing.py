"""Specs on their way to processes of this program."""

import subprocess
import sys
from pathlib import Path

import pytest

from planner.specs.document import parse_spec
from planner.specs.files import read_document
from planner.specs.packing import packed, unpacked

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["gpt2-s1024.yaml", "unet.yaml", "leaking.yaml"])
def test_a_spec_comes_out_as_it_went_in(name):
    spec = parse_spec(read_document(EXAMPLES / name))
    again = unpacked(packed(spec))
    assert (again, again.hash) == (spec, spec.hash)


@pytest.mark.parametrize("module", ["planner.runtime.child", "planner.virtual.child"])
def test_a_process_that_is_waited_for_imports_nothing_that_checks_documents(module):
    code = f"import sys, {module}; print(sorted({{'pydantic', 'yaml', 'torch'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
