"""Where checksums of a file's pages lie on the disk: in its inode's block, behind the extents.
Those of a larger file are outside (`checksumblocks`); here is what says whether they count then.

    0xC0            extent list: header, records from the front
    ...             free
    ... - 8         checksum of page 1, of page 0; downwards from the trailer
    last 64 bytes   trailer: signature, salt, count, state, the inode's mtime and ctime, epoch

An inode's block has room for 243 extent records, and a file needs one or a few. What lies behind
the last one in use means nothing to OCFS2: Linux and fsck.ocfs2 look at `l_next_free_rec` records
and never further. A record that comes to lie over a checksum wins: then all are void (`closed`) and
stored again as far as there is `room`.

**The area is void unless its times are the inode's.** Linux, and a mount of ours that keeps no
checksums, change data without telling this area, but not without changing the inode's mtime.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from typing import ClassVar, Final

from fs.block.device import BLOCK_BYTES
from fs.ocfs2.format import (
    EXTENT_LIST_HEADER_BYTES,
    ID2_OFFSET,
    RECORD_BYTES,
    Dinode,
    ExtentListHeader,
    Structure,
)

SIGNATURE: Final = b"TMEMSUM1"
CHECKSUM_BYTES: Final = 8
SALT_BYTES: Final = 16
TRAILER_BYTES: Final = 64
TRAILER_OFFSET: Final = BLOCK_BYTES - TRAILER_BYTES
CLOSED: Final = 1
"""The checksums are those of what the disk holds; any other state: they are void."""
OPEN: Final = 2
OUTSIDE: Final = 3
"""As CLOSED, and they are in blocks of the trailer's epoch."""
_RECORDS_OFFSET: Final = ID2_OFFSET + EXTENT_LIST_HEADER_BYTES


@dataclass(slots=True)
class Trailer(Structure):
    """At the end of the block."""

    STRUCT: ClassVar = struct.Struct("<8s16sIIQQIIQ")
    OFFSET: ClassVar[int] = TRAILER_OFFSET

    signature: bytes = SIGNATURE
    salt: bytes = bytes(SALT_BYTES)
    count: int = 0
    state: int = OPEN
    mtime_s: int = 0
    ctime_s: int = 0
    mtime_nsec: int = 0
    ctime_nsec: int = 0
    epoch: int = 0

    def is_of(self, inode: Dinode) -> bool:
        """Whether nobody has changed the inode without knowing of checksums."""
        return (
            self.signature == SIGNATURE
            and self.mtime_s == inode.mtime_s
            and self.mtime_nsec == inode.mtime_nsec
            and self.ctime_s == inode.ctime_s
            and self.ctime_nsec == inode.ctime_nsec
        )

    def stamp(self, inode: Dinode) -> None:
        """Make it the inode's as it is now."""
        self.mtime_s, self.mtime_nsec = inode.mtime_s, inode.mtime_nsec
        self.ctime_s, self.ctime_nsec = inode.ctime_s, inode.ctime_nsec


def room(block: bytearray) -> int:
    """Pages whose checksums have room behind the extent records; below 0: not even the trailer."""
    head = ExtentListHeader.read(block)
    return (TRAILER_OFFSET - _RECORDS_OFFSET - head.used * RECORD_BYTES) // CHECKSUM_BYTES


def closed(block: bytearray) -> Trailer | None:
    """The trailer, if the checksums are valid."""
    trailer = Trailer.read(block)
    if trailer.signature != SIGNATURE or trailer.state not in (CLOSED, OUTSIDE):
        return None
    if (trailer.state == OUTSIDE) != bool(trailer.epoch):
        return None
    if not trailer.is_of(Dinode.read(block)) or trailer.count > room(block):
        return None
    return trailer


def read(block: bytearray, trailer: Trailer) -> array[int]:
    """The checksums of pages 0, 1, ...; 0: not known."""
    values: array[int] = array("Q")
    values.frombytes(block[TRAILER_OFFSET - trailer.count * CHECKSUM_BYTES : TRAILER_OFFSET])
    values.reverse()
    return values


def write(block: bytearray, trailer: Trailer, values: array[int]) -> None:
    """Valid checksums for the inode as the block has it; there must be room.

    With an epoch in the trailer they are outside, and none of them here.
    """
    trailer.count = len(values)
    trailer.state = OUTSIDE if trailer.epoch else CLOSED
    trailer.stamp(Dinode.read(block))
    trailer.write_into(block)
    backwards = values[::-1]
    start = TRAILER_OFFSET - trailer.count * CHECKSUM_BYTES
    block[start:TRAILER_OFFSET] = backwards.tobytes()


def shorten(block: bytearray, pages: int) -> None:
    """Forget the checksums of pages from `pages` on."""
    trailer = Trailer.read(block)
    if trailer.signature == SIGNATURE and pages < trailer.count:
        trailer.count = pages
        trailer.write_into(block)


def void(block: bytearray) -> None:
    """The checksums hold no more."""
    trailer = Trailer.read(block)
    if trailer.signature == SIGNATURE:
        trailer.state = OPEN
        trailer.write_into(block)


def follow(block: bytearray, before: Dinode, now: Dinode) -> None:
    """The inode's times change with the knowledge of whoever keeps the checksums."""
    trailer = Trailer.read(block)
    if trailer.is_of(before):
        trailer.stamp(now)
        trailer.write_into(block)
