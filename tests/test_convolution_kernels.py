"""Convolutions: the layout of their results, and what they allocate in which order, as recorded on an H200."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from planner.virtual import composites, convolution_kernels
from planner.virtual.architecture import Architecture
from planner.virtual.kernels import Kernels
from planner.virtual.rules import Call
from planner.virtual.trace import Formula

aten = torch.ops.aten
HOPPER = Architecture(compute_capability=(9, 0), num_sms=132, torch_version=(2, 11))
LAST = torch.channels_last


def _meta(*shape: int, last: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.empty(shape, dtype=dtype, device="meta")
    return made.contiguous(memory_format=LAST) if last else made


def _options(kernel: int = 3, stride: int = 1, groups: int = 1, transposed: bool = False, beyond: int = 0) -> Any:
    return [stride, stride], [kernel // 2] * 2, [1, 1], transposed, [beyond, beyond], groups


def _steps(packet: Any, args: Any, outputs: int) -> list[tuple[str, int]]:
    steps = Kernels(HOPPER).of_call(Call(packet, args, {}, [0] * outputs))
    return [(kind, value.size() if isinstance(value, Formula) else value) for kind, value in steps]


def _order(packet: Any, args: Any, outputs: int = 3) -> list[str]:
    """``output 0``, ``copy``, ``free`` in order, without workspaces and sums, which are not what is asked here."""
    found: list[str] = []
    for kind, value in _steps(packet, args, outputs):
        if kind == "workspace":
            found.append("workspace")
        elif kind == "free" and found[-1] == "workspace":
            found.pop()
        elif kind in ("output", "free"):
            found.append(f"output {value}" if kind == "output" else "free")
        elif kind == "temporary" and "output 2" not in found:
            found.append("copy")
    return found


def _backward(grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, *options: Any, bias: bool = True) -> Any:
    return grad, inputs, weight, [weight.shape[0]] if bias else None, *options, [True, True, bias]


def test_channels_last_images_and_weights_give_results_like_them() -> None:
    """As ConvNeXt ran: its layer norm then finds pixels after one another and copies nothing."""
    images, weight = _meta(2, 8, 6, 6, last=True), _meta(8, 8, 3, 3)
    assert convolution_kernels.result(images, weight, None, *_options()).is_contiguous(memory_format=LAST)
    by_weight = convolution_kernels.result(_meta(2, 8, 6, 6), weight.contiguous(memory_format=LAST), None, *_options())
    assert by_weight.is_contiguous(memory_format=LAST)
    plain = convolution_kernels.result(_meta(2, 8, 6, 6), weight, None, *_options())
    assert plain.is_contiguous()
    found = convolution_kernels.gradients(*_backward(plain, images, weight, *_options()))
    assert [item.is_contiguous(memory_format=LAST) for item in found[:2] if item is not None] == [True, True]
    assert [item.shape for item in found if item is not None] == [images.shape, weight.shape, (8,)]


def test_a_pooled_image_of_channels_last_stays_one() -> None:
    """One pixel is contiguous in both layouts: its strides decide."""
    pooled = torch.empty_strided((2, 8, 1, 1), (8, 1, 8, 8), device="meta")
    assert convolution_kernels.runs_channels_last(pooled, _meta(8, 8, 1, 1))
    assert not convolution_kernels.runs_channels_last(_meta(2, 8, 1, 1), _meta(8, 8, 1, 1))
    assert not convolution_kernels.runs_channels_last(pooled.double(), _meta(8, 8, 1, 1).double())


def test_weights_are_copied_after_the_result_is_there() -> None:
    args = (_meta(2, 8, 6, 6, last=True), _meta(8, 8, 3, 3), None, *_options())
    assert _order(aten.convolution, args, 1)[:2] == ["output 0", "copy"]


def test_a_slice_of_a_gradient_is_copied_for_each_and_before_the_weights_gradient() -> None:
    """DenseNet: what was joined comes back as slices."""
    grad = _meta(2, 16, 6, 6)[:, :8]
    args = _backward(grad, _meta(2, 8, 6, 6), _meta(8, 8, 3, 3), *_options(), bias=False)
    assert _order(aten.convolution_backward, args) == ["output 0", "copy", "free", "copy", "output 1", "free"]


def test_a_gradient_of_the_other_layout_is_copied_once() -> None:
    args = _backward(_meta(2, 8, 6, 6), _meta(2, 8, 6, 6, last=True), _meta(8, 8, 1, 1), *_options(1), bias=False)
    found = _order(aten.convolution_backward, args)
    assert found == ["copy", "output 0", "output 1", "free"]


def test_a_transposed_convolutions_gradient_is_copied_once_and_summed_after_it() -> None:
    """The U-Net: 32 MiB that were gone before the bias's sum."""
    grad = _meta(2, 16, 12, 12)[:, :8]
    args = _backward(grad, _meta(2, 8, 6, 6), _meta(8, 8, 2, 2), *_options(1, 2, transposed=True))
    assert _order(aten.convolution_backward, args) == ["copy", "output 0", "output 1", "free", "output 2"]


def test_a_transposed_sequence_keeps_its_copy_to_the_end() -> None:
    """wav2vec2's convolution of positions."""
    inputs = _meta(2, 6, 8).transpose(1, 2)
    args = _backward(_meta(2, 8, 6), inputs, _meta(8, 8, 3), [1], [1], [1], False, [0], 1)
    assert _order(aten.convolution_backward, args) == ["copy", "output 0", "output 1", "output 2"]


def test_a_gradient_that_comes_frame_by_frame_is_copied_once() -> None:
    """wav2vec2 of 4 s at batch size 11, recorded on an H200: 4,483,072 bytes before both gradients and freed after."""
    grad = _meta(11, 199, 512).transpose(1, 2)
    options = [2], [0], [1], False, [0], 1
    args = _backward(grad, _meta(11, 512, 399), _meta(512, 512, 2), *options, bias=False)
    assert _order(aten.convolution_backward, args) == ["copy", "output 0", "output 1", "free"]
    assert _steps(aten.convolution_backward, args, 3)[0] == ("temporary", 4_483_072)


@pytest.mark.parametrize(
    ("dtype", "c", "kernel", "stride", "own"),
    [
        (torch.bfloat16, 96, 3, 1, True),
        (torch.float16, 96, 3, 1, False),
        (torch.float16, 16, 3, 1, True),
        (torch.float16, 96, 7, 1, True),
        (torch.float16, 96, 3, 2, True),  # recorded in mobilenetv3
        (torch.float16, 512, 3, 2, False),
        (torch.float16, 256, 5, 2, False),
    ],
)
def test_pytorchs_own_depthwise_kernel_begins_with_the_weights(
    dtype: torch.dtype, c: int, kernel: int, stride: int, own: bool
) -> None:
    """In float16 cuDNN runs what PyTorch's list of sizes says."""
    images, weight = _meta(4, c, 28, 28, dtype=dtype), _meta(c, 1, kernel, kernel, dtype=dtype)
    grad = _meta(4, c, 28 // stride, 28 // stride, dtype=dtype)
    args = _backward(grad, images, weight, *_options(kernel, stride, groups=c), bias=False)
    found = [step for step in _order(aten.convolution_backward, args) if step.startswith("output")]
    assert found == (["output 1", "output 0"] if own else ["output 0", "output 1"])


def test_a_transposed_convolution_has_its_output_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def watched(**layer: Any) -> Any:
        asked.append(layer)
        return convolution_kernels.workspace_bytes(**layer)

    monkeypatch.setattr(convolution_kernels, "_workspace_bytes", lambda layer, n: watched(n=n, **layer).bytes)
    args = (_meta(2, 8, 6, 6), _meta(8, 4, 3, 3), None, *_options(3, 2, transposed=True, beyond=1))
    _steps(aten.convolution, args, 1)
    assert {layer["input_size"] for layer in asked} == {(12, 12)}


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_contiguous_input_of_four_dimensions_becomes_one_product(contiguous: bool) -> None:
    """Recorded in ConvNeXt: cuBLASLt's workspace came with its first block's linear layer."""
    inputs = torch.empty(2, 3, 4, 8) if contiguous else torch.empty(2, 8, 3, 4).permute(0, 2, 3, 1)
    with torch.profiler.profile() as profile:
        composites._linear(inputs, torch.empty(5, 8), torch.empty(5))
    assert ("aten::addmm" in {event.name for event in profile.events()}) == contiguous
