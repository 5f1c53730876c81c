"""``PYTORCH_ALLOC_CONF`` as PyTorch reads it."""

import pytest

from planner.allocator import AllocatorConfig, conf_from_environment, fraction_limit_bytes, normalised_conf, parse_conf
from planner.errors import InvalidArgument
from planner.units import GIB, MIB

DEFAULTS = AllocatorConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", DEFAULTS),
        ("backend:native", DEFAULTS),
        ("pinned_use_background_threads:True,release_lock_on_cudamalloc:True", DEFAULTS),
        ("expandable_segments:True", AllocatorConfig(expandable_segments=True)),
        ("max_split_size_mb:64", AllocatorConfig(max_split_bytes=64 * MIB)),
        ("max_split_size_mb:64,max_split_size_mb:80", AllocatorConfig(max_split_bytes=80 * MIB)),
        (
            "garbage_collection_threshold:0.6, expandable_segments : True",
            AllocatorConfig(garbage_collection_threshold=0.6, expandable_segments=True),
        ),
        (
            # PyTorch reads large_segment_size_mb first, wherever it stands; the rounding of oversize blocks follows it.
            "max_split_size_mb:40,large_segment_size_mb:40",
            AllocatorConfig(
                max_split_bytes=40 * MIB, large_segment_bytes=40 * MIB, max_non_split_rounding_bytes=40 * MIB
            ),
        ),
        ("max_non_split_rounding_mb:128", AllocatorConfig(max_non_split_rounding_bytes=128 * MIB)),
        ("per_process_memory_fraction:0.5", AllocatorConfig(per_process_memory_fraction=0.5)),
        ("roundup_power2_divisions:8", AllocatorConfig(roundup_power2_divisions=(8,) * 16)),
        (
            "roundup_power2_divisions:[256:1,512:2,>:4]",
            AllocatorConfig(roundup_power2_divisions=(1,) * 9 + (2,) + (4,) * 6),
        ),
        (
            # 128 and 512 MiB are not named, so they are not rounded.
            "roundup_power2_divisions:[64:8,256:4,1024:4,>:1]",
            AllocatorConfig(roundup_power2_divisions=(8,) * 7 + (0, 4, 0, 4) + (1,) * 5),
        ),
        ("roundup_power2_divisions:[1024:0],", AllocatorConfig()),
    ],
)
def test_reads_what_pytorch_reads(text: str, expected: AllocatorConfig):
    assert parse_conf(text) == expected


@pytest.mark.parametrize(
    ("text", "field", "suggestion"),
    [
        ("max_split_size:64", "PYTORCH_ALLOC_CONF", "max_split_size_mb"),
        ("expandable_segment:True", "PYTORCH_ALLOC_CONF", "expandable_segments"),
        ("max_split_size_mb", "PYTORCH_ALLOC_CONF", None),
        ("max_split_size_mb=64", "PYTORCH_ALLOC_CONF", None),
        ("max_split_size_mb:64;expandable_segments:True", "PYTORCH_ALLOC_CONF", None),
        ("roundup_power2_divisions:[256:1", "PYTORCH_ALLOC_CONF", None),
        ("max_split_size_mb:19", "PYTORCH_ALLOC_CONF.max_split_size_mb", "20"),
        ("max_split_size_mb:30,large_segment_size_mb:40", "PYTORCH_ALLOC_CONF.max_split_size_mb", "40"),
        ("max_split_size_mb:64MB", "PYTORCH_ALLOC_CONF.max_split_size_mb", None),
        ("max_non_split_rounding_mb:10", "PYTORCH_ALLOC_CONF.max_non_split_rounding_mb", "20"),
        ("large_segment_size_mb:10", "PYTORCH_ALLOC_CONF.large_segment_size_mb", "20"),
        ("expandable_segments:true", "PYTORCH_ALLOC_CONF.expandable_segments", "True"),
        ("garbage_collection_threshold:1.0", "PYTORCH_ALLOC_CONF.garbage_collection_threshold", "0.8"),
        ("garbage_collection_threshold:much", "PYTORCH_ALLOC_CONF.garbage_collection_threshold", None),
        ("per_process_memory_fraction:1.5", "PYTORCH_ALLOC_CONF.per_process_memory_fraction", "1.0"),
        ("roundup_power2_divisions:3", "PYTORCH_ALLOC_CONF.roundup_power2_divisions", "4"),
        ("roundup_power2_divisions:0", "PYTORCH_ALLOC_CONF.roundup_power2_divisions", "4"),
        ("roundup_power2_divisions:[250:1]", "PYTORCH_ALLOC_CONF.roundup_power2_divisions", "4"),
        ("roundup_power2_divisions:[256]", "PYTORCH_ALLOC_CONF.roundup_power2_divisions", None),
        ("backend:cudaMallocAsync", "PYTORCH_ALLOC_CONF.backend", "native"),
        ("backend:jemalloc", "PYTORCH_ALLOC_CONF.backend", "native"),
    ],
)
def test_refuses_what_pytorch_refuses(text: str, field: str, suggestion: str | None):
    with pytest.raises(InvalidArgument) as caught:
        parse_conf(text)
    assert caught.value.field == field
    if suggestion is not None:
        assert caught.value.suggestion == suggestion


def test_async_backend_says_why():
    with pytest.raises(InvalidArgument, match=r"driver.*cannot model"):
        parse_conf("backend:cudaMallocAsync")


@pytest.mark.parametrize(
    ("divisions", "size", "rounded"),
    [
        ("", 1, 512),
        ("", 512, 512),
        ("", 513, 1024),
        ("", 3 * MIB + 1, 3 * MIB + 512),
        # PyTorch's own example: 1200 between 1024 and 2048 in 4 steps of 256 would be 1280, but steps begin at 512 x 4.
        ("4", 1200, 1536),
        ("4", 2049, 2560),
        ("4", 4096, 4096),
        ("4", 5 * MIB + 1, 6 * MIB),
        ("4", 5 * MIB, 5 * MIB),
        ("[256:1,512:2,>:4]", 300 * MIB + 5, 300 * MIB + 512),
        ("[256:1,512:2,>:4]", 513 * MIB, 768 * MIB),
        ("[256:1,512:2,>:4]", 1025 * MIB, 1280 * MIB),
        ("[256:1,512:2,>:4]", 65 * GIB, 80 * GIB),
    ],
)
def test_rounding(divisions: str, size: int, rounded: int):
    config = parse_conf(f"roundup_power2_divisions:{divisions}" if divisions else "")
    assert config.round_size(size) == rounded


@pytest.mark.parametrize(
    ("rounded", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (125_018_112, 120 * MIB),  # bert-large's word embeddings, as recorded
    ],
)
def test_segment_size(rounded: int, segment: int):
    assert DEFAULTS.segment_size(rounded) == segment


def test_limit_of_a_fraction():
    total = 150_754_820_096
    assert fraction_limit_bytes(0.5, total) == 75_377_410_048
    assert fraction_limit_bytes(1.0, total) is None
    assert parse_conf("per_process_memory_fraction:0.25").limit_bytes(total) == total // 4


def test_environment_is_read_in_pytorchs_order():
    assert conf_from_environment({}) == ""
    both = {"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_CUDA_ALLOC_CONF": "b:2"}
    assert conf_from_environment(both) == "b:2"
    assert conf_from_environment({"PYTORCH_ALLOC_CONF": "a:1"}) == "a:1"


def test_normalised_conf_compares_equal():
    normal = "expandable_segments:True,max_split_size_mb:64"
    assert normalised_conf("max_split_size_mb:64, expandable_segments:True") == normal
    assert normalised_conf("expandable_segments:True,max_split_size_mb:64,") == normal
    assert normalised_conf("") == ""
    with pytest.raises(InvalidArgument):
        normalised_conf("nonsense:1")
