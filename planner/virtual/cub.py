"""Temporary memory of cub's algorithms, which sorts, scans and selections run on. Pure arithmetic: no torch.

Each formula was fitted to what torch 2.11 (CUDA 13) allocated on an H200 for 100 to 5,000,000 elements, and gives
those figures to the byte unless it says otherwise (``measurements/h200/kernels.json.gz``). The form is cub's: an array
of status words for the tiles that blocks work on, beside what an algorithm keeps of its own, each aligned to 256 bytes
(``cub::detail::AliasTemporaries``), and 255 bytes to align the whole.
"""

from __future__ import annotations

_ALIGNMENT = 256
_BINS = 256
_STATUS_PADDING = 32
"""Tile states before the first (``cub::ScanTileState``: a warp's worth)."""
_ONE_BLOCK = 256 * 9
"""Up to so many elements a sort takes one block, of 256 threads, and no memory: seen at 2,037, no more at 2,401."""
_SORT_TILES = {1: 5632, 2: 5632, 4: 5376, 8: 4608}
"""Elements for each tile, by the bytes of a key, where values have 8 bytes."""


def radix_sort_bytes(key_bytes: int, bits: int, count: int) -> int:
    """Sorting ``count`` keys, of which ``bits`` differ, with values of 8 bytes (``cub::DeviceRadixSort``).

    One pass for 8 bits; more than one takes a second copy of keys and values. Histograms are 8 bytes a bin, tile
    states 4.
    """
    if count <= _ONE_BLOCK:
        return 1
    passes = -(-bits // 8)
    buffers = _aligned(key_bytes * count) + _aligned(8 * count) if passes > 1 else 0
    tiles = -(-count // _SORT_TILES[key_bytes])
    return buffers + 8 * _BINS * passes + 4 * _BINS * tiles + 2 * _ALIGNMENT - 1


def select_bytes(count: int) -> int:
    """Listing which of ``count`` elements are nonzero (``cub::DeviceSelect``)."""
    return _tiles(8, count, 4224)


def count_bytes(count: int) -> int:
    """Counting the nonzero elements among ``count`` (``cub::DeviceReduce``): one block, or one partial sum for each."""
    return 1 if count <= 4096 else 21_503


def scan_bytes(element_bytes: int, count: int) -> int:
    """A running sum along one dimension (``cub::DeviceScan``); for types of 2 bytes within 512 bytes up to 1,000,000
    elements."""
    if element_bytes == 8:
        return _tiles(16, count, 896)
    if element_bytes == 4:
        return _tiles(8, count, 1920)
    return 1279 + 2 * max(0, count - 100_000) // 1000


def unique_by_key_bytes(count: int) -> int:
    """First elements of equal runs among ``count`` (``cub::DeviceSelect::UniqueByKey``); the tile's size is known to
    lie between 4,167 and 4,848 (trace of wav2vec2-bert)."""
    return _tiles(16, count, 4608)


def _tiles(status_bytes: int, count: int, tile: int) -> int:
    return _aligned(status_bytes * (-(-count // tile) + _STATUS_PADDING)) + 2 * _ALIGNMENT - 1


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
