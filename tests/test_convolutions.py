"""Workspaces of cuDNN's convolutions: against recorded allocator events, the measurements, and the rules' own limits."""

from __future__ import annotations

import gzip
import json
from importlib import util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import InvalidArgument
from planner.virtual import convolutions
from planner.virtual.convolutions import Layer, Recipe, Tensors, workspace_bytes

ROOT = Path(__file__).parents[1]


def benchmark():
    spec = util.spec_from_file_location("benchmarks_convolutions", ROOT / "benchmarks" / "convolutions.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def square(
    direction, n, c, k, kernel, stride, padding, size, *, dtype="bfloat16", channels_last=False, groups=1, **rest
):
    return workspace_bytes(
        direction=direction, dtype=dtype, channels_last=channels_last, n=n, c=c, k=k, groups=groups,
        kernel=(kernel,) * 2, stride=(stride,) * 2, padding=(padding,) * 2, dilation=(1, 1), input_size=(size,) * 2, **rest,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        (("forward", 4, 3, 64, 7, 2, 3, 224), 9683984),
        (("forward", 4, 64, 64, 3, 1, 1, 56), 3285008),
        (("forward", 4, 128, 128, 3, 2, 1, 56), 4309008),
        (("forward", 4, 256, 512, 1, 2, 0, 56), 9633808),
        (("forward", 4, 128, 128, 3, 1, 1, 28), 1900560),
        (("dgrad", 4, 256, 256, 3, 1, 1, 14), 1982480),
        (("wgrad", 4, 512, 512, 3, 2, 1, 14), 5722128),
        (("wgrad", 4, 64, 256, 1, 1, 0, 56), 262144),
    ],
)
def test_requests_recorded_in_resnet50_are_met_to_the_byte(arguments, recorded):
    found = square(*arguments)
    assert (found.bytes, found.exact) == (recorded, True)
    assert found.low == found.high == recorded
