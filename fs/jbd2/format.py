"""The journal's superblock, and what all of its blocks have in common. Big endian throughout.

Journal block 0 is the superblock, `first .. blocks - 1` are the log, which is a ring. Every
block that describes something starts with the same header:

    0   u32  magic c03b3998
    4   u32  kind of block
    8   u32  sequence number: the transaction that it belongs to

Superblock (kind 4; kind 3 is the older version, which ends after `errno`):

    12  u32  block size             48  16 B  uuid of the file system
    16  u32  blocks in the journal  64  u32   file systems that use it
    20  u32  first block of the log 80  u8    kind of checksum (4 is crc32c)
    24  u32  first sequence number  84  u32   fast commit blocks
    28  u32  start of the log; 0 means that the log is empty
    32  i32  error that the file system should hear of, negative
    36  u32  compatible, 40 u32 incompatible, 44 u32 read-only compatible features
    252 u32  crc32c of the 1024 bytes, this field taken as 0

Names of features are those of `dumpe2fs`. Fast commits are refused: their records are ext4's and
not jbd2's. The field numbers come from Linux's `Documentation/filesystems/ext4/journal.rst`.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

from crc32c import crc32c

from fs.block.device import BLOCK_BYTES
from fs.errors import ImageError, corrupt, error

MAGIC: Final = 0xC03B3998
MAGIC_BYTES: Final = MAGIC.to_bytes(4, "big")

DESCRIPTOR: Final = 1
COMMIT: Final = 2
SUPERBLOCK_V1: Final = 3
SUPERBLOCK_V2: Final = 4
REVOKE: Final = 5

COMPAT_CHECKSUM: Final = 0x01
INCOMPAT_REVOKE: Final = 0x01
INCOMPAT_64BIT: Final = 0x02
INCOMPAT_ASYNC_COMMIT: Final = 0x04
INCOMPAT_CSUM_V2: Final = 0x08
INCOMPAT_CSUM_V3: Final = 0x10
INCOMPAT_FAST_COMMIT: Final = 0x20

COMPAT: Final = {COMPAT_CHECKSUM: "journal_checksum"}
INCOMPAT: Final = {
    INCOMPAT_REVOKE: "journal_incompat_revoke",
    INCOMPAT_64BIT: "journal_64bit",
    INCOMPAT_ASYNC_COMMIT: "journal_async_commit",
    INCOMPAT_CSUM_V2: "journal_checksum_v2",
    INCOMPAT_CSUM_V3: "journal_checksum_v3",
    INCOMPAT_FAST_COMMIT: "fast_commit",
}
COMPAT_KNOWN: Final = COMPAT_CHECKSUM
INCOMPAT_KNOWN: Final = (
    INCOMPAT_REVOKE | INCOMPAT_64BIT | INCOMPAT_ASYNC_COMMIT | INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3
)

BLOCKS_MIN: Final = 16
"""Blocks of the smallest journal that we write. Linux refuses less than 1024."""

_SUPER_BYTES: Final = 1024
_CRC32C: Final = 4
_ALL_ONES: Final = 0xFFFF_FFFF

HEADER: Final = struct.Struct(">III")
_GEOMETRY: Final = struct.Struct(">5Ii")
_GEOMETRY_OFFSET: Final = 12
_FEATURES: Final = struct.Struct(">III16sI")
_FEATURES_OFFSET: Final = 36
_CHECKSUM_KIND_OFFSET: Final = 80
_CHECKSUM_OFFSET: Final = 252
_WORD: Final = struct.Struct(">I")


def checksum(seed: int, *parts: bytes | bytearray | memoryview) -> int:
    """Linux's crc32c of `parts`: not inverted at the end, so that it can be a seed again."""
    value = seed ^ _ALL_ONES
    for part in parts:
        value = crc32c(part, value)
    return value ^ _ALL_ONES


def uuid_seed(uuid: bytes) -> int:
    """What all checksums of a journal but its superblock's start from."""
    return checksum(_ALL_ONES, uuid)


def following(tid: int, steps: int = 1) -> int:
    """The sequence number after `tid`; they wrap at 2^32."""
    return (tid + steps) & _ALL_ONES


def header(kind: int, tid: int) -> bytes:
    """The first 12 bytes of a block."""
    return HEADER.pack(MAGIC, kind, tid)


def feature_names(compat: int, incompat: int, ro_compat: int) -> list[str]:
    """Names of the bits set, as word and number where a bit has no name."""
    words: tuple[tuple[str, int, dict[int, str]], ...] = (
        ("compat", compat, COMPAT),
        ("incompat", incompat, INCOMPAT),
        ("ro", ro_compat, {}),
    )
    return [
        names.get(1 << bit, f"{word}:{1 << bit:#x}")
        for word, bits, names in words
        for bit in range(32)
        if bits & 1 << bit
    ]


class Superblock:
    """A checked superblock; change `sequence`, `start`, `error_code`, `incompat` and `pack()` it.

    Bytes that we don't know of stay as they were. `capacity_blocks` is what the area holds.
    EUCLEAN for damage; `ImageError` names features that are not supported.
    """

    kind: int
    block_bytes: int
    blocks: int
    first: int
    sequence: int
    start: int
    error_code: int
    compat: int
    incompat: int
    ro_compat: int
    uuid: bytes
    users: int

    def __init__(self, untrusted: bytes | bytearray, capacity_blocks: int) -> None:
        self._raw = bytearray(untrusted)
        magic, self.kind, _ = HEADER.unpack_from(self._raw)
        if magic != MAGIC or self.kind not in (SUPERBLOCK_V1, SUPERBLOCK_V2):
            raise corrupt("the journal has no superblock")
        self.block_bytes, self.blocks, self.first, self.sequence, self.start, self.error_code = (
            _GEOMETRY.unpack_from(self._raw, _GEOMETRY_OFFSET)
        )
        self.compat, self.incompat, self.ro_compat, self.uuid, self.users = _FEATURES.unpack_from(
            self._raw, _FEATURES_OFFSET
        )
        if self.kind == SUPERBLOCK_V1:
            self.compat = self.incompat = self.ro_compat = 0
        self._check_features()
        self._check_geometry(capacity_blocks)

    def _check_features(self) -> None:
        unknown = feature_names(
            self.compat & ~COMPAT_KNOWN, self.incompat & ~INCOMPAT_KNOWN, self.ro_compat
        )
        if unknown:
            raise ImageError(
                f"has a journal with features that are not supported: {', '.join(unknown)};"
                " let Linux or e2fsck empty it, and switch them off"
            )
        kinds = (
            bool(self.compat & COMPAT_CHECKSUM),
            bool(self.incompat & INCOMPAT_CSUM_V2),
            bool(self.incompat & INCOMPAT_CSUM_V3),
        )
        if sum(kinds) > 1:
            raise corrupt("the journal claims checksums of two versions")
        if self.has_crc32c:
            if self._raw[_CHECKSUM_KIND_OFFSET] != _CRC32C:
                raise corrupt(
                    f"the journal's checksums are of kind {self._raw[_CHECKSUM_KIND_OFFSET]}"
                )
            (found,) = _WORD.unpack_from(self._raw, _CHECKSUM_OFFSET)
            if found != self._checksum():
                raise corrupt("the journal's superblock has a wrong checksum")

    def _check_geometry(self, capacity_blocks: int) -> None:
        wrong = ""
        if self.block_bytes != BLOCK_BYTES:
            wrong = f"blocks of {self.block_bytes} bytes"
        elif self.blocks > capacity_blocks:
            wrong = f"{self.blocks} blocks in a file of {capacity_blocks}"
        elif not 0 < self.first < self.blocks:
            wrong = f"a log from {self.first} to {self.blocks}"
        elif self.start and not self.first <= self.start < self.blocks:
            wrong = f"a log that starts at {self.start} of {self.first}..{self.blocks - 1}"
        if wrong:
            raise corrupt(f"the journal's superblock says {wrong}")

    @property
    def has_crc32c(self) -> bool:
        """True with checksums of version 2 or 3, which are on every block."""
        return bool(self.incompat & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3))

    @property
    def log_blocks(self) -> int:
        """Blocks of the ring."""
        return self.blocks - self.first

    def advance(self, index: int, steps: int) -> int:
        """The block `steps` after `index` in the ring."""
        return self.first + (index - self.first + steps) % self.log_blocks

    def upgrade(self) -> None:
        """Make a version 1 superblock one of version 2, which has features."""
        if self.kind == SUPERBLOCK_V1:
            self.kind = SUPERBLOCK_V2
            self._raw[_FEATURES_OFFSET:_SUPER_BYTES] = bytes(_SUPER_BYTES - _FEATURES_OFFSET)
            self.uuid, self.users = bytes(16), 1

    def pack(self) -> bytes:
        """The whole block as it belongs on the device."""
        raw = self._raw
        HEADER.pack_into(raw, 0, MAGIC, self.kind, 0)
        _GEOMETRY.pack_into(
            raw,
            _GEOMETRY_OFFSET,
            self.block_bytes,
            self.blocks,
            self.first,
            self.sequence,
            self.start,
            self.error_code,
        )
        if self.kind == SUPERBLOCK_V2:
            _FEATURES.pack_into(
                raw,
                _FEATURES_OFFSET,
                self.compat,
                self.incompat,
                self.ro_compat,
                self.uuid,
                self.users,
            )
        if self.has_crc32c:
            _WORD.pack_into(raw, _CHECKSUM_OFFSET, self._checksum())
        return bytes(raw)

    def _checksum(self) -> int:
        start = memoryview(self._raw)[:_CHECKSUM_OFFSET]
        end = memoryview(self._raw)[_CHECKSUM_OFFSET + 4 : _SUPER_BYTES]
        return checksum(_ALL_ONES, start, bytes(4), end)


def empty_superblock(
    blocks: int, uuid: bytes, *, compat: int = 0, incompat: int = 0, started: bool = False
) -> Superblock:
    """The superblock of an empty log.

    `started` writes start 1 instead of 0, as mkfs.ocfs2 does: a log that has to be looked through
    and that turns out to hold nothing.
    """
    if blocks < BLOCKS_MIN:
        raise error(errno.EINVAL, f"a journal needs at least {BLOCKS_MIN} blocks, not {blocks}")
    if len(uuid) != 16:
        raise error(errno.EINVAL, f"a uuid has 16 bytes, not {len(uuid)}")
    raw = bytearray(BLOCK_BYTES)
    HEADER.pack_into(raw, 0, MAGIC, SUPERBLOCK_V2, 0)
    _GEOMETRY.pack_into(raw, _GEOMETRY_OFFSET, BLOCK_BYTES, blocks, 1, 1, int(started), 0)
    _FEATURES.pack_into(raw, _FEATURES_OFFSET, compat, incompat, 0, uuid, 1)
    if incompat & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3):
        raw[_CHECKSUM_KIND_OFFSET] = _CRC32C
        start = memoryview(raw)[:_SUPER_BYTES]
        _WORD.pack_into(raw, _CHECKSUM_OFFSET, checksum(_ALL_ONES, start))
    return Superblock(raw, blocks)
