"""Runs of neighbouring blocks: what can be read, written or freed at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """`length` blocks from `block` on, found at `position` of the list; block 0 is a hole."""

    position: int
    block: int
    length: int


def runs(blocks: Sequence[int]) -> Iterator[Run]:
    """Cut a list of block numbers (such as `FileSystem.map_blocks` answers) into runs.

    Holes form runs of block 0.
    """
    start = 0
    for position in range(1, len(blocks) + 1):
        first = blocks[start]
        step = position - start if first else 0
        if position < len(blocks) and blocks[position] == first + step:
            continue
        yield Run(start, first, position - start)
        start = position
