"""Workspaces of cuDNN's convolutions: against recorded allocator events, the measurements, and the rules' limits."""

from __future__ import annotations

import math
from importlib import util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import InvalidArgument
from planner.virtual import convolutions
from planner.virtual.convolutions import workspace_bytes
from planner.virtual.plans import Layer, Recipe, Tensors, copied, decode_line, encode_line, features, runs, together

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benchmark():
    spec = util.spec_from_file_location("benchmarks_convolutions", ROOT / "benchmarks" / "convolutions.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(benchmark):
    """What PyTorch's convolutions were seen to allocate."""
    return benchmark.measured()


@pytest.fixture(scope="module")
def answers(benchmark):
    """What cuDNN answered."""
    return benchmark.answers()


def square(direction, n, c, k, kernel, stride, padding, size, **rest):
    given = {"dtype": "bfloat16", "channels_last": False, "groups": 1, "dilation": (1, 1), **rest}
    return workspace_bytes(
        direction=direction, n=n, c=c, k=k, kernel=(kernel,) * 2, stride=(stride,) * 2, padding=(padding,) * 2,
        input_size=(size,) * 2, **given,
    )  # fmt: skip


def of_row(row, **rest):
    tensors, given = row.tensors, {name: getattr(row.layer, name) for name in Layer.__dataclass_fields__}
    given |= {"dtype": tensors.dtype, "channels_last": tensors.channels_last}
    return workspace_bytes(**{**given, "n": row.n, "direction": row.direction, **rest})


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        (("forward", 4, 3, 64, 7, 2, 3, 224), 9683984),
        (("forward", 4, 64, 64, 3, 1, 1, 56), 3285008),
        (("forward", 4, 64, 64, 1, 1, 0, 56), 272),
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


def test_what_torch_allocated_is_found_within_the_allocators_rounding(measured, benchmark):
    """None of it is in the table: that is what cuDNN answered when it was asked as PyTorch asks it."""
    tried = [(row, of_row(row)) for row in measured[::23]]
    known = [(row, found) for row, found in tried if found.exact]
    assert len(known) > 800
    for row, found in known:
        assert benchmark.error(row.bytes, found, rounded=True) == 0, (row, found)


def test_table_is_what_cudnn_answered(answers, benchmark):
    for row in answers[::1999]:
        found = of_row(row)
        assert (found.bytes, found.exact) == (row.bytes, True), row
    assert benchmark.TABLE.stat().st_size < 3_000_000


def test_changes_between_asked_batch_sizes_are_known_to_the_sample():
    """A layer of inception-v3: cuDNN was asked at 64, 96, 256 and 384 first, and then where its answers change."""
    found = {n: square("dgrad", n, 768, 192, 1, 1, 0, 17) for n in (88, 89, 280, 281)}
    copies = (768 + 192) * 17 * 17 * 2
    sizes = {n: workspace.bytes for n, workspace in found.items()}
    assert sizes == {88: 0, 89: 89 * copies + 147, 280: 280 * copies + 147, 281: 0}
    assert all(workspace.exact for workspace in found.values())


def test_table_has_the_changes_that_were_found(benchmark):
    for (key, layer), column in list(benchmark.changes().items())[::2999]:
        kind, direction = key.split(" ")
        tensors = benchmark.TABLE_OF[kind]
        for n, recipe in column.items():
            row = benchmark.Row(layer, n, tensors, direction, recipe.bytes(layer, n, tensors))
            assert of_row(row).bytes == row.bytes, (key, layer, n)


def test_layers_kept_from_the_table_lie_in_their_intervals(answers, benchmark):
    chosen = [row for row in answers if row.tensors == Tensors("bfloat16", False) and row.direction == "dgrad"]
    tried = list(benchmark.held_out([row for row in chosen if row.n in (8, 32)], "layer", every=20))
    assert len(tried) > 500
    close = [abs(row.bytes - found.bytes) <= 1 << 20 for row, found in tried]
    inside = [found.low <= row.bytes <= found.high for row, found in tried]
    assert sum(close) >= 0.9 * len(close)
    assert sum(inside) >= 0.85 * len(inside)


@pytest.mark.parametrize(
    ("part", "close", "inside"),
    [("popular at 224", 0.985, 0.97), ("U-Nets", 0.985, 0.97), ("speech", 0.98, 0.97), ("not in the table", 0.9, 0.9)],
)
def test_what_cudnn_answered_at_random_batch_sizes_is_found(benchmark, part, close, inside):
    """None of it is in the table."""
    tried = list(benchmark.told(benchmark.at_random()[part][::4]))
    assert len(tried) == 1000
    assert sum(abs(row.bytes - found.bytes) <= max(1 << 20, row.bytes // 100) for row, found in tried) >= 1000 * close
    assert sum(found.low <= row.bytes <= found.high for row, found in tried) >= 1000 * inside


def test_a_batch_size_between_two_asked_for_scales_the_copies():
    at_6, at_7, at_8 = (square("forward", n, 64, 64, 3, 1, 1, 56) for n in (6, 7, 8))
    assert at_8.bytes - at_7.bytes == at_7.bytes - at_6.bytes == 64 * 2 * 56 * 56 * 2
    assert all(found.exact for found in (at_6, at_7, at_8))  # the same on both sides
    assert at_7.low == at_7.bytes == at_7.high


def test_past_the_largest_batch_asked_for_the_copies_go_on():
    at_1024, at_2048 = (square("forward", n, 64, 64, 3, 1, 1, 28) for n in (1024, 2048))
    assert at_2048.bytes - at_1024.bytes == 1024 * 2 * 64 * 28 * 28 * 2


@pytest.mark.parametrize(("c", "side", "recorded"), [(96, 56, 48_473_719), (192, 28, 19_869_712), (384, 14, 0)])
def test_depthwise_weights_in_float32_and_nhwc_take_what_convnext_was_recorded_to(c, side, recorded):
    """The trace of convnext-tiny in fp32 at batch size 4 in measurements/h200/peaks.json.gz."""
    assert square("wgrad", 4, c, c, 7, 1, 3, side, groups=c, channels_last=True, dtype="float32").bytes == recorded


@pytest.mark.parametrize(("c", "kernel", "recorded"), [(192, 5, 2_457_600), (24, 3, 2_359_296), (6, 3, 18_432)])
def test_depthwise_weights_in_nhwc_take_a_product_for_each_sample(c, kernel, recorded):
    n, size = {192: (16, 32), 24: (256, 120), 6: (2, 56)}[c]
    found = square("wgrad", n, c, c, kernel, 1, kernel // 2, size, groups=c, channels_last=True)
    assert found.bytes == recorded
    assert square("forward", n, c, c, kernel, 1, kernel // 2, size, groups=c, channels_last=True).bytes == 0
    assert square("wgrad", n, c, c, kernel, 1, kernel // 2, size, groups=c).bytes == 0


@pytest.mark.parametrize(
    ("direction", "c", "k", "kernel", "stride", "side", "asked", "answered"),
    [
        ("forward", 128, 64, 3, 1, 256, (256, 257, 385, 700), 6_442_598_547),
        ("dgrad", 64, 64, 3, 1, 256, (512, 513, 1030), 8_590_008_467),
        ("wgrad", 64, 128, 2, 2, 256, (512, 513, 700), 6_444_089_855),
        ("forward", 96, 96, 3, 1, 224, (512, 700, 1030), 8_574_240_915),
    ],
)
def test_of_more_than_2_to_31_elements_so_many_samples_are_copied_at_a_time(
    direction, c, k, kernel, stride, side, asked, answered
):
    """Answers of cuDNN 9.19 on an H200; 377 samples of a U-Net were the most on an H100, 385 without this."""
    for n in asked:
        assert square(direction, n, c, k, kernel, stride, kernel // 2 if stride == 1 else 0, side).bytes == answered


@pytest.mark.parametrize(
    ("dtype", "c", "k", "groups", "width"),
    [("bfloat16", 72, 72, 3, 32), ("float32", 48, 120, 4, 32), ("bfloat16", 336, 336, 2, 256)],
)
def test_groups_of_channels_are_padded_to_a_power_of_two(dtype, c, k, groups, width):
    layer, tensors = Layer(c, k, groups, (3, 3), (1, 1), (1, 1), (1, 1), (14, 14)), Tensors(dtype, False)
    parts, size = copied(layer, 8, tensors), tensors.element_bytes
    assert parts["I"] == parts["O"] == 8 * groups * width * 14 * 14 * size
    assert parts["W"] == groups * width * width * 9 * size


def test_groups_between_those_asked_for_take_such_copies():
    """regnety_032 at 288 pixels, batch size 5: cuDNN was asked at 4 and 8, where it copies padded groups."""
    at_4, at_5, at_8 = (square("dgrad", n, 72, 72, 3, 1, 1, 72, groups=3) for n in (4, 5, 8))
    assert 4 * (at_5.bytes - at_4.bytes) == at_8.bytes - at_4.bytes == 4 * 2 * 96 * 72 * 72 * 2


def test_neighbours_without_answers_do_not_count(benchmark):
    """Of the layers nearest to this one none was asked about in float32; the next ones were."""
    near = [Layer(64, 64 + 8 * step, 1, (3, 3), (1, 1), (1, 1), (1, 1), (56, 56)) for step in range(40)]
    far = [Layer(64, 512 + 8 * step, 1, (3, 3), (1, 1), (1, 1), (1, 1), (56, 56)) for step in range(8)]
    rows = [benchmark.Row(layer, 8, Tensors("bfloat16", False), "forward", 0) for layer in near]
    rows += [benchmark.Row(layer, 8, Tensors("float32", False), "forward", 512) for layer in far]
    table = benchmark.build(rows)
    asked = Layer(65, 64, 1, (3, 3), (1, 1), (1, 1), (1, 1), (56, 56))
    assert [recipe.extra for _, recipe in table.alike(Tensors("float32", False), "forward", asked, 8)] == [512] * 6
    assert [recipe.extra for _, recipe in table.alike(Tensors("bfloat16", False), "forward", asked, 8)] == [0] * 6


def test_groups_as_wide_are_the_most_similar_ones():
    """224 channels in 16 groups of 14 and 7: padded like 16 and 8, not like the layers with as many channels."""
    own, wide, many = (
        features(Layer(c, k, groups, (3, 3), (1, 1), (1, 1), (1, 1), (10, 10)))
        for c, k, groups in ((224, 112, 16), (256, 128, 16), (224, 112, 2))
    )
    assert math.dist(own, wide) < math.dist(own, many)


def test_an_unknown_layer_is_never_exact_and_has_the_size_of_its_copies():
    found = square("forward", 8, 72, 136, 3, 1, 1, 40)
    inputs, outputs, weights = 8 * 72 * 1600 * 2, 8 * 136 * 1600 * 2, 72 * 136 * 9 * 2
    assert not found.exact
    assert found.low <= inputs + outputs + weights + 16 <= found.high
    assert found.bytes == inputs + outputs + weights + 16


def test_channels_that_fill_no_16_bytes_are_padded():
    layer = Layer(3, 10, 1, (3, 3), (1, 1), (1, 1), (1, 1), (8, 8))
    assert copied(layer, 1, Tensors("bfloat16", False))["i"] == 8 * 64 * 2
    assert copied(layer, 1, Tensors("float32", False))["i"] == 4 * 64 * 4
    assert copied(layer, 1, Tensors("bfloat16", False))["o"] == 16 * 64 * 2


def test_far_from_every_layer_asked_for_the_interval_is_that_of_all_copies():
    found = square("forward", 2, 64, 64, 11, 1, 45, 56, dilation=(9, 9))
    copies = 2 * 2 * 64 * 56 * 56 * 2 + 64 * 64 * 9 * 2
    assert found.low == 0
    assert found.high >= copies


def test_half_precision_has_its_own_answers_and_bfloat16s_where_it_has_none(answers, benchmark):
    """A layer of which cuDNN was asked in both; in float16 the stem's kernel needs no copies here."""
    rows = {(row.tensors.dtype, row.layer, row.n): row for row in answers if row.direction == "forward"}
    own = [row for (dtype, *_), row in rows.items() if dtype == "float16" and not row.tensors.channels_last][::997]
    assert len(own) > 50
    for row in own:
        assert of_row(row).bytes == row.bytes
    both = [row for row in own if ("bfloat16", row.layer, row.n) in rows]
    assert any(row.bytes != rows["bfloat16", row.layer, row.n].bytes for row in both)


def test_1d_convolutions_are_nchw_whatever_their_strides():
    shape = {"n": 4, "c": 512, "k": 512, "groups": 1, "kernel": (3,), "stride": (2,), "padding": (1,), "dilation": (1,)}
    last, first = (
        workspace_bytes(direction="forward", dtype="bfloat16", channels_last=last, input_size=(3000,), **shape)
        for last in (True, False)
    )
    assert last == first
    assert last.bytes == 4 * 512 * 3000 * 2 + 4 * 512 * 1500 * 2 + 512 * 512 * 3 * 2 + 16


@pytest.mark.parametrize("rest", [{"compute_capability": (8, 0)}, {"dtype": "float64"}])
def test_what_was_not_measured_is_not_exact(rest):
    found = square("forward", 4, 64, 64, 3, 1, 1, 56, **rest)
    assert not found.exact
    assert found.low == 0
    assert found.high >= found.bytes
    assert found.high >= 2 * 4 * 64 * 56 * 56 * 2  # both copies


@pytest.mark.parametrize(
    ("change", "field", "suggestion"),
    [
        ({"direction": "foward"}, "direction", "forward"),
        ({"dtype": "bfloat"}, "dtype", "bfloat16"),
        ({"groups": 5}, "groups", None),
        ({"groups": 0}, "groups", "1"),
        ({"n": -1}, "n", "0"),
        ({"stride": (1,)}, "stride", None),
        ({"stride": (0, 1)}, "stride", "1"),
    ],
)
def test_bad_arguments_name_the_field(measured, change, field, suggestion):
    arguments = {"direction": "forward", **change}
    with pytest.raises(InvalidArgument) as caught:
        of_row(measured[0], **arguments)
    assert caught.value.field == field
    if suggestion:
        assert caught.value.suggestion == suggestion


def test_no_samples_or_no_output_take_nothing():
    assert square("forward", 0, 64, 64, 3, 1, 1, 56).bytes == 0
    assert square("forward", 4, 64, 64, 7, 1, 0, 3).bytes == 0


sizes = st.integers(1, 300)


@given(
    direction=st.sampled_from(convolutions.DIRECTIONS), dtype=st.sampled_from(sorted(convolutions.ELEMENT_BYTES)),
    last=st.booleans(), n=st.integers(1, 300), groups=st.sampled_from((1, 2, 8)), c=sizes, k=sizes,
    kernel=st.integers(1, 7), stride=st.integers(1, 3), dilation=st.integers(1, 2), dimensions=st.integers(1, 3),
    size=st.integers(1, 40),
)  # fmt: skip
def test_every_shape_has_a_size_within_its_interval(
    direction, dtype, last, n, groups, c, k, kernel, stride, dilation, dimensions, size
):
    found = workspace_bytes(
        direction=direction, dtype=dtype, channels_last=last, n=n, c=c * groups, k=k * groups, groups=groups,
        kernel=(kernel,) * dimensions, stride=(stride,) * dimensions, padding=(kernel // 2,) * dimensions,
        dilation=(dilation,) * dimensions, input_size=(size,) * dimensions,
    )  # fmt: skip
    assert 0 <= found.low <= found.bytes <= found.high


@given(st.builds(Recipe, st.sampled_from(("", "i", "iow", "w")), st.booleans(), st.integers(0, 1 << 30)))
def test_recipes_survive_the_table(recipe):
    assert Recipe.decode(recipe.encode()) == recipe


def test_layers_survive_the_table():
    layer = Layer(64, 128, 2, (3, 1), (1, 2), (1, 0), (1, 1), (56, 57))
    assert Layer.parse(layer.text) == layer


columns = st.dictionaries(
    st.integers(1, 40), st.sampled_from((Recipe("iow"), Recipe("", True, 272), Recipe(extra=5), Recipe()))
).map(lambda column: dict(sorted(column.items())))


@given(columns)
def test_lines_of_recipes_survive_the_table(column):
    """A run of equal ones is its ends."""
    read = decode_line(*encode_line(column))
    assert read == runs(column)
    assert list(read) == sorted(read)


def test_a_line_has_the_ends_of_runs_and_what_is_not_known_between_them():
    column = {1: Recipe("iow"), 2: Recipe("iow"), 64: Recipe("iow"), 65: Recipe("io"), 96: Recipe(extra=5)}
    assert encode_line(column) == ("-64,-65,96", "iow,io,++5")
    assert encode_line({}) == ("", "")


def test_what_another_dtype_answered_counts_only_where_both_agree():
    """Asked in its own, the change is at 71; the other's change there, at 76, is not another one."""
    io, iow, none = Recipe("io"), Recipe("iow"), Recipe()
    own = {1: io, 70: io, 71: iow, 256: iow}
    other = {1: io, 20: none, 21: io, 75: io, 76: iow, 200: none, 256: iow}
    assert together(own, other) == {1: io, 20: none, 21: io, 70: io, 71: iow, 200: none, 256: iow}
    assert together({}, other) == other
    assert together(own, {}) == own


@given(st.sampled_from(("io", "iow", "iw")), st.integers(1, 64), st.integers(0, 1 << 10))
def test_an_explanation_rebuilds_the_answer(benchmark, copies, n, extra):
    layer, tensors = Layer(64, 128, 1, (3, 3), (1, 1), (1, 1), (1, 1), (28, 28)), Tensors("bfloat16", False)
    recipe = Recipe(copies, extra=extra)
    row = benchmark.Row(layer, n, tensors, "forward", recipe.bytes(layer, n, tensors))
    assert benchmark.explain(row) == recipe
