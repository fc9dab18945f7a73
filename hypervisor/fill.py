"""Same-filled pages: one 64-bit word over and over, most often zero.  They need no frame.

A put must look at every page for the few that are of this kind (10 to 20 % of swap, next to none of
a file cache), so looking has to cost next to nothing.  `candidates` reads two bytes a page, for a
whole extent at once; what is left is tested word by word, and few pages but the right ones pass.
They are then copied out of the window and `pattern_of` decides on the copy, because the guest may
write to the window at any time.

Linux's zswap does the same for one page (last word first); Xen only dropped trailing zeros.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from ipc.abi import PAGE_BYTES

_WORD_BYTES: Final = 8
_WORDS: Final = PAGE_BYTES // _WORD_BYTES
_LAST: Final = _WORDS - 1
_FEW: Final = 8
"""So many pages are looked at faster one by one."""


def candidates(words: memoryview, slot: int, count: int) -> int:
    """Which of `count` pages of a window may be same-filled: bit i is the page in `slot` + i.

    `words` is a window's slots as 64-bit words.
    """
    bitmap = 0
    if count <= _FEW:
        at = slot * _WORDS
        for page in range(count):
            if words[at] == words[at + _LAST]:
                bitmap |= 1 << page
            at += _WORDS
        return bitmap
    octets = words.cast("B")
    start = slot * PAGE_BYTES
    end = start + count * PAGE_BYTES
    first = int.from_bytes(octets[start:end:PAGE_BYTES].tobytes(), "little")
    start += PAGE_BYTES - _WORD_BYTES
    last = int.from_bytes(octets[start:end:PAGE_BYTES].tobytes(), "little")
    differences = (first ^ last).to_bytes(count, "little")
    page = differences.find(0)
    while page >= 0:
        at = (slot + page) * _WORDS
        if words[at] == words[at + _LAST]:
            bitmap |= 1 << page
        page = differences.find(0, page + 1)
    return bitmap


def pattern_of(page: bytes) -> int | None:
    """The word of which a page consists; None if it is not of one word."""
    word = page[:_WORD_BYTES]
    if word != page[-_WORD_BYTES:] or page != word * _WORDS:
        return None
    return int.from_bytes(word, "little")


@lru_cache(maxsize=16)
def page_of(pattern: int) -> bytes:
    """The page that consists of this word."""
    return pattern.to_bytes(_WORD_BYTES, "little") * _WORDS
