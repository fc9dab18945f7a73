"""Checksums of a large file's pages: blocks of the inode's attribute (`fs.ocfs2.attributes`).

    0       epoch, number of the block within the attribute
    16      checksums of 510 pages

Whether they count says the trailer in the inode's block (`checksumarea`), with the epoch that they
must have. A block of another epoch holds none: it is from before somebody changed the file who did
not know of it, or from before a crash, and nobody has to go and clear it.
"""

from __future__ import annotations

import struct
from array import array
from typing import Final

from fs.block.device import BLOCK_BYTES
from fs.ocfs2.checksumarea import CHECKSUM_BYTES

_HEAD: Final = struct.Struct("<QQ")
PAGES: Final = (BLOCK_BYTES - _HEAD.size) // CHECKSUM_BYTES
"""Whose checksums have room in a block."""


def read(block: bytearray, epoch: int, number: int, pages: int) -> array[int]:
    """The checksums of a block's pages; 0: not known."""
    values: array[int] = array("Q")
    if _HEAD.unpack_from(block) == (epoch, number):
        values.frombytes(block[_HEAD.size : _HEAD.size + pages * CHECKSUM_BYTES])
    else:
        values.frombytes(bytes(pages * CHECKSUM_BYTES))
    return values


def write(block: bytearray, epoch: int, number: int, values: array[int]) -> None:
    """These and no others."""
    content = _HEAD.pack(epoch, number) + values.tobytes()
    block[:] = content.ljust(BLOCK_BYTES, b"\0")


def shorten(block: bytearray, pages: int) -> None:
    """Forget the checksums of pages from `pages` on, counted in the block."""
    start = _HEAD.size + pages * CHECKSUM_BYTES
    block[start:] = bytes(BLOCK_BYTES - start)
