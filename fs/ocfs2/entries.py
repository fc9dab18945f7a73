"""The blocks of a directory that is made with all of its entries at once."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from itertools import pairwise

from fs.block.device import BLOCK_BYTES
from fs.ocfs2.format import DIR_ENTRY, FILE_TYPES, dir_entry_bytes


def packed(own: int, parent: int, entries: Iterable[tuple[int, bytes, int]]) -> list[bytearray]:
    """Blocks of a directory: "." and "..", then `entries` (block, name, mode)."""
    pending = [(own, b".", stat.S_IFDIR), (parent, b"..", stat.S_IFDIR), *entries]
    blocks: list[bytearray] = []
    offsets: list[int] = []
    offset = BLOCK_BYTES
    for block, name, mode in pending:
        if offset + dir_entry_bytes(len(name)) > BLOCK_BYTES:
            blocks.append(bytearray(BLOCK_BYTES))
            offset = 0
        DIR_ENTRY.pack_into(blocks[-1], offset, block, 0, len(name), FILE_TYPES[stat.S_IFMT(mode)])
        blocks[-1][offset + DIR_ENTRY.size : offset + DIR_ENTRY.size + len(name)] = name
        offsets.append((len(blocks) - 1) * BLOCK_BYTES + offset)
        offset += dir_entry_bytes(len(name))
    for here, behind in pairwise([*offsets, len(blocks) * BLOCK_BYTES]):
        # The last entry of a block reaches to its end.
        end = min(behind, (here // BLOCK_BYTES + 1) * BLOCK_BYTES)
        length = (end - here).to_bytes(2, "little")
        at = here % BLOCK_BYTES + 8
        blocks[here // BLOCK_BYTES][at : at + 2] = length
    return blocks
