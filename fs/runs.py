"""Runs of neighbouring blocks in a block map: what can be read or written at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """`count` pages from `position` on (an index into the map) that start at `block`; block 0 is a hole."""

    position: int
    block: int
    count: int


def runs(blocks: Sequence[int]) -> Iterator[Run]:
    """Cut the answer of `FileSystem.map_blocks` into runs; a run of holes has block 0."""
    start = 0
    for position in range(1, len(blocks) + 1):
        first = blocks[start]
        step = position - start if first else 0
        if position < len(blocks) and blocks[position] == first + step:
            continue
        yield Run(start, first, position - start)
        start = position
