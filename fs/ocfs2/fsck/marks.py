"""A bit for each cluster of a volume: who owns it is remembered as "somebody"."""

from __future__ import annotations

from collections.abc import Iterator

_ALL = 0xFF


class Marks:
    """`bits` bits, all clear. 2^32 of them are 512 MiB, as a volume of 16 TiB needs."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._bytes = bytearray(-(-bits // 8))

    def __contains__(self, bit: int) -> bool:
        return bool(self._bytes[bit >> 3] >> (bit & 7) & 1)

    def mark(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Set bits; yields the runs (start, count) that were clear before.

        `start .. start + count - 1` must be inside. Runs to the end even if it isn't used up.
        """
        return iter(self._mark(start, count))

    def _mark(self, start: int, count: int) -> list[tuple[int, int]]:
        low, high = start >> 3, (start + count + 7) >> 3
        old = int.from_bytes(self._bytes[low:high], "little")
        mask = ((1 << count) - 1) << (start & 7)
        self._bytes[low:high] = (old | mask).to_bytes(high - low, "little")
        return [(low * 8 + at, length) for at, length in runs(mask & ~old)]

    def window(self, start: int, count: int) -> int:
        """Bits as a number, the first one lowest; `start` is a multiple of 8."""
        data = self._bytes[start >> 3 : (start + count + 7) >> 3]
        return int.from_bytes(data, "little") & ((1 << count) - 1)


def runs(bits: int) -> list[tuple[int, int]]:
    """The runs (start, count) of ones in a number, lowest first."""
    found = []
    data = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
    start: int | None = None
    for index, byte in enumerate(data):
        base = index * 8
        if byte == (0 if start is None else _ALL):
            continue
        for bit in range(8):
            if byte >> bit & 1:
                if start is None:
                    start = base + bit
            elif start is not None:
                found.append((start, base + bit - start))
                start = None
    if start is not None:
        found.append((start, len(data) * 8 - start))
    return found
