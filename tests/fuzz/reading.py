"""What the fuzz targets have in common: bytes taken as numbers, and what a finding is."""

from __future__ import annotations


class Finding(Exception):
    """Something that must never happen did."""


def hold(condition: bool, what: str) -> None:
    """Raise `Finding` unless the condition holds."""
    if not condition:
        raise Finding(what)


class Reader:
    """Takes bytes as numbers; zeros once they have run out."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not taken yet."""
        return len(self._data) - self._at

    def byte(self) -> int:
        """One byte."""
        return self.take(1)[0]

    def take(self, count: int) -> bytes:
        """`count` bytes."""
        taken = self._data[self._at : self._at + count].ljust(count, b"\0")
        self._at += count
        return taken
