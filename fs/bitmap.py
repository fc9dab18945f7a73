"""Bitmaps of one block: a set bit is in use.

Bit n is bit `n % 8` (lowest first) of byte `n // 8`.
"""

from __future__ import annotations

import re

_NOT_FULL = re.compile(rb"[^\xff]")


def is_set(bits: bytearray, position: int) -> bool:
    """True when the bit is set."""
    return bool(bits[position >> 3] >> (position & 7) & 1)


def find_clear(bits: bytearray, start: int, end: int) -> int | None:
    """The first clear bit in `[start, end)`, or None.

    Full bytes are skipped by the regular expression engine.
    """
    position = start
    while position < end:
        if position & 7 == 0:
            found = _NOT_FULL.search(bits, position >> 3, (end + 7) >> 3)
            if found is None:
                return None
            position = found.start() << 3
        while position < end:
            if not bits[position >> 3] >> (position & 7) & 1:
                return position
            position += 1
            if position & 7 == 0:
                break
    return None


def clear_run(bits: bytearray, start: int, end: int) -> int:
    """Length of the run of clear bits that begins at `start`, at most up to `end`."""
    position = start
    while position < end and not bits[position >> 3] >> (position & 7) & 1:
        position += 1
    return position - start


def set_run(bits: bytearray, start: int, count: int) -> None:
    """Set `count` bits from `start`."""
    for position in range(start, start + count):
        bits[position >> 3] |= 1 << (position & 7)


def reset_run(bits: bytearray, start: int, count: int) -> int:
    """Clear `count` bits from `start`; returns how many of them were set before."""
    found = 0
    for position in range(start, start + count):
        mask = 1 << (position & 7)
        if bits[position >> 3] & mask:
            found += 1
            bits[position >> 3] &= ~mask
    return found
