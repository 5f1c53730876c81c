"""Operator calls that repeat are answered as the first one was, and only where the answer must be the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.virtual_child import Process


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


def test_a_repeated_view_shares_the_storage_of_its_own_tensor(process: Process) -> None:
    code = """
first, second = torch.empty(4, 6, device=device), torch.empty(4, 6, device=device)
views = [item.t()[1:, ::2] for item in (first, second)]
result = [
    [view.untyped_storage()._cdata == item.untyped_storage()._cdata for item in (first, second)] for view in views
] + [[list(view.shape), list(view.stride()), view.storage_offset()] for view in views]
"""
    one, two, first, second = process.run(code)
    assert (one, two) == ([True, False], [False, True])
    assert first == second == [[5, 2], [1, 12], 1]


def test_a_repeated_result_is_allocated_and_freed_again(process: Process) -> None:
    code = """
x = torch.empty(1000, device=device)
for _ in range(3):
    y = x * 2.0
    del y
result = [len(trace.sizes), len(trace.events)]
"""
    assert process.run(code) == [4, 7]


def test_a_repeated_kernel_takes_its_temporaries_again(process: Process) -> None:
    code = """
x = torch.empty(4096, 768, device=device, dtype=torch.bfloat16)
sums = []
for _ in range(2):
    before = len(trace.sizes)
    x.sum(0)
    sums.append(list(trace.sizes[before:]))
result = sums
"""
    first, second = process.run(code)
    assert first == second
    assert 25_165_824 in first, "the recorded buffer of partial sums"


def test_equal_numbers_of_other_types_make_other_dtypes(process: Process) -> None:
    code = """
x = torch.empty(4, device=device, dtype=torch.int64)
result = [str((x + number).dtype) for number in (1, 1.0, True)]
"""
    assert process.run(code) == ["torch.int64", "torch.float32", "torch.int64"]


def test_an_operator_that_changes_its_argument_does_so_every_time(process: Process) -> None:
    code = """
found = []
for _ in range(2):
    x = torch.empty(2, 3, device=device)
    x.t_()
    y = torch.empty(0, device=device).resize_(5, 7)
    found.append([list(x.shape), list(y.shape)])
result = found
"""
    assert process.run(code) == [[[3, 2], [5, 7]]] * 2


def test_a_known_mask_is_looked_at_every_time(process: Process) -> None:
    code = """
x = torch.empty(4, 3, device=device)
masks = [torch.tensor(mask, device=device) for mask in ([True, False, False, True], [True, True, True, False])]
result = [list(x[mask].shape) for mask in masks]
"""
    assert process.run(code) == [[2, 3], [3, 3]]


def test_a_known_value_is_forgotten_when_it_is_written_over(process: Process) -> None:
    code = """
found = []
for _ in range(2):
    counter = torch.zeros(1, device=device)
    counter += torch.empty(1, device=device)
    try:
        found.append(counter.item())
    except Exception as error:
        found.append(type(error).__name__)
result = found
"""
    assert process.run(code) == ["ModelError", "ModelError"]


def test_copies_of_known_numbers_have_each_its_own(process: Process) -> None:
    code = """
found = []
for numbers in ([1.0, 2.0], [3.0, 5.0]):
    given = torch.tensor(numbers)
    copy = given.to(device)
    found.append([copy.sum().item(), list(copy.nonzero().shape), copy.unsqueeze(0)[0, 1].item()])
found.append(list(torch.tensor([0.0, 1.0]).to(device).nonzero().shape))
result = found
"""
    assert process.run(code) == [[3.0, [2, 1], 2.0], [8.0, [2, 1], 5.0], [1, 1]]


def test_zeros_like_a_weight_are_known_until_something_unknown_is_written(process: Process) -> None:
    code = """
weight = torch.empty(3, 4, device=device)
first, second = torch.zeros_like(weight), torch.zeros_like(weight)
view = first[1:]
first += 2.0
weights = [torch.zeros_like(weight), torch.empty(3, 4, device=device)]
torch._foreach_lerp_(weights[:1], weights[1:], 0.5)
try:
    written = weights[0].sum().item()
except Exception as error:
    written = type(error).__name__
result = [first.sum().item(), view.sum().item(), second.sum().item(), torch.ones_like(weight).sum().item(), written]
"""
    assert process.run(code) == [24.0, 16.0, 0.0, 12.0, "ModelError"]


def test_kernels_for_lists_allocate_what_they_return_and_no_more(process: Process) -> None:
    code = """
tensors = [torch.empty(2, 3, device=device), torch.empty(5, 4, device=device).t()]
before = len(trace.sizes)
roots = torch._foreach_sqrt(tensors)
torch._foreach_mul_(roots, tensors)
torch._foreach_add_(roots, 1.0)
mixed = torch._foreach_sqrt([torch.ones(4, device=device, dtype=torch.int64), tensors[0][:, ::2]])
result = [
    list(trace.sizes[before:]),
    [[list(item.shape), list(item.stride()), str(item.dtype)] for item in (*roots, *mixed)],
]
"""
    sizes, layouts = process.run(code)
    assert sizes == [24, 80, 32, 16, 16]
    assert layouts == [
        [[2, 3], [3, 1], "torch.float32"],
        [[4, 5], [1, 4], "torch.float32"],
        [[4], [1], "torch.float32"],
        [[2, 2], [2, 1], "torch.float32"],
    ]


def test_numbers_of_a_list_become_a_tensor_with_values(process: Process) -> None:
    code = """
found = []
for numbers in ([1, 2, 3], [4, 5, 6]):
    made = torch.tensor(numbers)
    moved = made.to(device)
    found.append([made.tolist(), moved.sum().item(), torch.tensor(numbers, device=device)[2].item()])
result = found
"""
    assert process.run(code) == [[[1, 2, 3], 6, 3], [[4, 5, 6], 15, 6]]


def test_repeated_zeros_have_values_a_storage_and_a_default_type_of_their_own(process: Process) -> None:
    code = """
first, second = torch.zeros(3, device=device), torch.zeros(3, device=device)
first += 1.0
torch.set_default_dtype(torch.float64)
third = torch.zeros(3, device=device)
torch.set_default_dtype(torch.float32)
storages = {item.untyped_storage()._cdata for item in (first, second, third)}
result = [first.sum().item(), second.sum().item(), len(storages), str(third.dtype), str(torch.zeros(3).device)]
"""
    assert process.run(code) == [3.0, 0.0, 3, "torch.float64", "cpu"]


def test_a_repeated_view_of_a_parameter_is_differentiable_and_follows_what_is_written(process: Process) -> None:
    code = """
found = []
for _ in range(3):
    weight = torch.nn.Parameter(torch.empty(2, 3, device=device))
    view = weight.t()
    (view * 2.0).sum().backward()
    with torch.no_grad():
        view.mul_(2.0)
    found.append([list(weight.grad.shape), view._base is weight, weight._version])
result = found
"""
    first, *others = process.run(code)
    assert first[:2] == [[2, 3], True]
    assert others == [first, first]


def test_a_tensor_of_inference_mode_stays_one(process: Process) -> None:
    code = """
found = []
for _ in range(2):
    with torch.inference_mode():
        frozen = torch.empty(2, 3, device=device)
    weight = torch.nn.Parameter(torch.empty(3, 2, device=device))
    try:
        frozen.t() * weight
        found.append("none")
    except RuntimeError as error:
        found.append("inference" in str(error).lower())
result = found
"""
    assert process.run(code) == [True, True]


def test_meta_kernels_give_the_layouts_that_the_fake_mode_gives(process: Process) -> None:
    code = """
import functools
from torch.utils._python_dispatch import _pop_mode_temporarily
from planner.virtual.recorder import _BY_META_KERNEL
from planner.virtual.repeats import by_meta_kernel

def new(*shape, dtype=torch.float32):
    return torch.empty(shape, device=device, dtype=dtype)

x, image = new(3, 6, 8).transpose(1, 2), new(2, 3, 4, 5)
mask, matrix, low = new(3, 8, 6, dtype=torch.bool), new(6, 8).t(), new(8, 6, dtype=torch.bfloat16)
w, mean = new(6), new(3, 8, 1)
scores, labels, one = new(8, 6), new(8, dtype=torch.int64), new()
samples = {
    "_log_softmax": [(x, -1, False), (low, 0, False)],
    "_softmax": [(x, 1, False), (low, -1, False)],
    "_safe_softmax": [(x, -1)],
    "_softmax_backward_data": [(x, x, -1, torch.float32)],
    "_to_copy": [
        (x,), (x, dict(dtype=torch.bfloat16)), (x, dict(device=torch.device("cpu"))),
        (x[:, ::2], dict(dtype=torch.half)),
        (image, dict(memory_format=torch.channels_last)), (image.expand(2, 3, 4, 5)[:, :1], dict(dtype=torch.half)),
    ],
    "_unsafe_view": [(low, [4, 12]), (new(3, 1, 8), [3, 8])],
    "addmm": [(new(5), matrix, new(6, 5)), (new(8, 5), matrix, new(6, 5), dict(beta=0.5))],
    "as_strided": [(x, [3, 5], [48, 1], 2), (x[1:], [2, 6], [6, 1])],
    "bmm": [(x, new(3, 6, 5))],
    "expand": [(mean, [3, 8, 6]), (x[:, :1], [3, 8, 6]), (w, [2, -1])],
    "mm": [(matrix, new(6, 5)), (low, low.t())],
    "native_dropout": [(x, 0.1, True), (x, 0.0, True), (low, 0.5, True)],
    "native_dropout_backward": [(x, mask, 1.5), (low, mask[0], 1.0)],
    "native_layer_norm": [(x, [6], w, w, 1e-5), (x, [6], None, None, 1e-5)],
    "nll_loss_backward": [(one, scores, labels, None, reduction, -100, one) for reduction in (1, 2)],
    "nll_loss_forward": [(scores, labels, None, reduction, -100) for reduction in (0, 1, 2)],
    "silu_backward": [(x, x), (x, new(3, 8, 6))],
    "slice_backward": [(new(3, 2, 6), [3, 8, 6], 1, 2, 6, 2)],
    "t": [(matrix,), (w,), (low[2:],)],
    "tanh_backward": [(x, x), (low, low)],
    "threshold_backward": [(x, x, 0), (new(3, 8, 6), x, 0)],
    "unsqueeze": [(x, 1), (x[:, 2:], -1), (w, 0)],
    "view": [(image, [6, 20]), (x, [3, 2, 4, 6]), (image[1:], [1, -1]), (new(2, 1, 4), [2, 4]), (mean, [1, 24])],
}

def layouts(found, given):
    items = (found,) if isinstance(found, torch.Tensor) else found
    return [
        item if item is None else [
            list(item.shape), list(item.stride()), item.storage_offset(), str(item.dtype), str(item.device),
            item.untyped_storage()._cdata == given.untyped_storage()._cdata,
        ]
        for item in items
    ]

result = [sorted(samples) == sorted(func._overloadpacket.__name__ for func in _BY_META_KERNEL)]
with _pop_mode_temporarily():
    for func in _BY_META_KERNEL:
        for sample in samples[func._overloadpacket.__name__]:
            named = sample[-1] if isinstance(sample[-1], dict) else {}
            args = sample[: len(sample) - bool(named)]
            expected, found = (call(*args, **named) for call in (func, functools.partial(by_meta_kernel, func)))
            result.append([str(func), layouts(expected, args[0]), layouts(found, args[0])])
"""
    has_samples_for_all, *compared = process.run(code)
    assert has_samples_for_all
    assert len(compared) > 30
    for operator, expected, found in compared:
        assert found == expected, operator
