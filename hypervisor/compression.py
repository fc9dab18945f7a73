"""Compression of single pages: codecs behind one interface, and when it is not worth trying.

A compressed page is kept if it fits a class of `slab`, which saves a fifth of a frame at least; if
not the page is *poor* and stays raw (Xen counted `compress_poor`, and kept whatever was a byte
shorter than a frame).  LZ4 is what every page gets: 6 us for a put, 2 us for a get, where Xen's
LZO1X took 8 and 7.  LZ4HC takes 40 us and saves a tenth more; it is read as fast as LZ4, so it is
for pages that have lain long enough (`recompress`).

Pages of one guest are much alike.  After POOR_STREAK poor pages in a row only every SAMPLE_EVERY-th
is tried until one is good again, which bounds what a guest of films and photographs costs.

`decompress` never writes more than a page, and says None for whatever does not give exactly one:
guests can't put compressed bytes here, but memory has been known to rot.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import lz4.block

from hypervisor.slab import BACK_BYTES, SIZE_MAX, class_bytes
from ipc.abi import PAGE_BYTES


class Codec(NamedTuple):
    """`number` is what an entry's location says; `compress` and `decompress` are of one page."""

    number: int
    name: str
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes | memoryview], bytes]


_lz4_decompress: Final = partial(lz4.block.decompress, uncompressed_size=PAGE_BYTES)

NONE: Final = Codec(0, "none", bytes, bytes)
LZ4: Final = Codec(1, "lz4", partial(lz4.block.compress, store_size=False), _lz4_decompress)
LZ4HC: Final = Codec(
    2,
    "lz4hc",
    partial(lz4.block.compress, mode="high_compression", compression=9, store_size=False),
    _lz4_decompress,
)
CODECS: Final = (NONE, LZ4, LZ4HC)
"""By number."""

POOR_STREAK: Final = 16
SAMPLE_EVERY: Final = 16


def decompress(number: int, data: bytes | memoryview) -> bytes | None:
    """The page that codec `number` made `data` of; None if it is damaged."""
    try:
        page = CODECS[number].decompress(data)
    except lz4.block.LZ4BlockError:
        return None
    return page if len(page) == PAGE_BYTES else None


def recompress(page: bytes, length: int) -> bytes | None:
    """The page in fewer bytes, by LZ4HC; None if it would take the same class that it takes with
    `length` bytes."""
    data = LZ4HC.compress(page)
    return data if 0 < class_bytes(len(data)) < class_bytes(length) else None


class Compressor:
    """Compresses the pages of one guest, and counts."""

    __slots__ = ("_streak", "kept", "poor", "skipped")

    def __init__(self) -> None:
        self.kept = 0
        self.poor = 0
        self.skipped = 0
        """Pages that were not tried because those before them were poor."""
        self._streak = 0

    def compress(self, page: bytes) -> bytes | None:
        """The page by LZ4; None if it is to be stored raw.  `page` is a private copy, never the
        window: the codec reads it more than once."""
        if self._streak >= POOR_STREAK:
            self._streak += 1
            if self._streak % SAMPLE_EVERY:
                self.skipped += 1
                return None
        data = LZ4.compress(page)
        if len(data) + BACK_BYTES <= SIZE_MAX:
            self.kept += 1
            self._streak = 0
            return data
        self.poor += 1
        if self._streak < POOR_STREAK:
            self._streak += 1
        return None
