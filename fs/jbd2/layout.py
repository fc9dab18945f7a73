"""Descriptor, revoke and commit blocks, in every form that features can give them.

Descriptor block: header, then a tag for each block image that follows it in the log:

    8 bytes   u32 block, u16 checksum, u16 flags                      no features
    12 bytes  the same and u32 high half of the block                 journal_64bit
    10, 14    the two above and two unused bytes                      journal_checksum_v2
    16 bytes  u32 block, u32 flags, u32 high half, u32 checksum       journal_checksum_v3

A tag without SAME_UUID is followed by a uuid of 16 bytes: the first one of each block. An image
that starts with the journal's own magic number is stored with 0 there and the flag ESCAPE, so
that no image can be taken for a block of the journal.

Revoke block: header, u32 bytes used, then blocks of 4 or (journal_64bit) 8 bytes.

Commit block: header, u8 kind and u8 size of checksum, 2 bytes, checksum u32 at 16, u64 seconds
at 48, u32 nanoseconds at 56.

Checksums: version 1 is one crc32 (big endian bit order) over all descriptors and images, kept in
the commit block. Versions 2 and 3 are crc32c, start from the uuid, and are on each block: in the
last 4 bytes of descriptor and revoke blocks, in the tag for an image (the sequence number comes
before the image; version 2 keeps the low half), and in the commit block for itself.

What is read here is not to be trusted: a damaged block gives wrong tags or EUCLEAN, never more
than fit the block.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fs.block.device import BLOCK_BYTES, Bytes
from fs.errors import corrupt
from fs.jbd2.format import (
    COMMIT,
    COMPAT_CHECKSUM,
    DESCRIPTOR,
    HEADER,
    INCOMPAT_64BIT,
    INCOMPAT_CSUM_V2,
    INCOMPAT_CSUM_V3,
    MAGIC_BYTES,
    REVOKE,
    checksum,
    header,
    uuid_seed,
)

FLAG_ESCAPE: Final = 1
FLAG_SAME_UUID: Final = 2
FLAG_LAST: Final = 8

_TAG: Final = struct.Struct(">IHH")
_TAG3: Final = struct.Struct(">IIII")
_WORD: Final = struct.Struct(">I")
_COMMIT_TIME: Final = struct.Struct(">QI")
_COMMIT_TIME_OFFSET: Final = 48
_COMMIT_CHECKSUM_OFFSET: Final = 16
_KIND_CRC32: Final = 1
_UUID_BYTES: Final = 16
_TAIL_BYTES: Final = 4
_REVOKE_HEAD_BYTES: Final = 16

_REVERSED: Final = bytes(int(f"{n:08b}"[::-1], 2) for n in range(256))


@dataclass(frozen=True, slots=True)
class Tag:
    """An image in the log: which block it is of."""

    block: int
    escaped: bool
    checksum: int = 0


def escape(image: bytes) -> tuple[bytes, bool]:
    """The image as it goes into the log, and whether it had to be changed for that."""
    if image[:4] == MAGIC_BYTES:
        return bytes(4) + image[4:], True
    return image, False


def unescape(stored: bytearray, tag: Tag) -> bytearray:
    """The image again, in place."""
    if tag.escaped:
        stored[:4] = MAGIC_BYTES
    return stored


class Crc32:
    """The checksum of version 1, over one transaction."""

    def __init__(self) -> None:
        self._state = 0

    def add(self, block: Bytes) -> None:
        """Go on with a block."""
        # zlib computes the same polynomial with the bits of each byte the other way around.
        self._state = zlib.crc32(bytes(block).translate(_REVERSED), self._state)

    @property
    def value(self) -> int:
        """The checksum of everything so far."""
        return int(f"{self._state ^ 0xFFFF_FFFF:032b}"[::-1], 2)


class Layout:
    """The form of one journal's blocks, as its features and uuid give it."""

    def __init__(self, compat: int, incompat: int, uuid: bytes) -> None:
        self._wide = bool(incompat & INCOMPAT_64BIT)
        self._v2 = bool(incompat & INCOMPAT_CSUM_V2)
        self._v3 = bool(incompat & INCOMPAT_CSUM_V3)
        self._uuid = uuid
        self._seed = uuid_seed(uuid)
        self.has_crc32 = bool(compat & COMPAT_CHECKSUM)
        self.has_crc32c = self._v2 or self._v3
        self.block_limit = 1 << (64 if self._wide else 32)
        """First block number that has no room in a tag."""
        self.tag_bytes = 16 if self._v3 else 8 + 4 * self._wide + 2 * self._v2
        self._end = BLOCK_BYTES - (_TAIL_BYTES if self.has_crc32c else 0)
        self.tags_max = (self._end - HEADER.size - _UUID_BYTES) // self.tag_bytes
        self._record = struct.Struct(">Q" if self._wide else ">I")
        self.records_max = (self._end - _REVOKE_HEAD_BYTES) // self._record.size

    def image_checksum(self, tid: int, stored: Bytes) -> int:
        """What the tag says of an image, 0 without such checksums."""
        if not self.has_crc32c:
            return 0
        value = checksum(self._seed, _WORD.pack(tid), stored)
        return value if self._v3 else value & 0xFFFF

    def descriptor(self, tid: int, tags: Sequence[Tag]) -> bytes:
        """A descriptor block of at most `tags_max` tags."""
        parts = [header(DESCRIPTOR, tid)]
        for number, tag in enumerate(tags):
            flags = (
                FLAG_ESCAPE * tag.escaped
                | FLAG_SAME_UUID * (number > 0)
                | FLAG_LAST * (number == len(tags) - 1)
            )
            parts.append(self._pack_tag(tag, flags))
            if number == 0:
                parts.append(self._uuid)
        return self._sealed(b"".join(parts))

    def _pack_tag(self, tag: Tag, flags: int) -> bytes:
        low, high = tag.block & 0xFFFF_FFFF, tag.block >> 32
        if self._v3:
            return _TAG3.pack(low, flags, high, tag.checksum)
        raw = _TAG.pack(low, tag.checksum, flags) + (_WORD.pack(high) if self._wide else b"")
        return raw.ljust(self.tag_bytes, b"\0")

    def tags(self, untrusted: bytes | bytearray) -> list[Tag]:
        """The tags of a descriptor block."""
        found = []
        offset = HEADER.size
        while offset + self.tag_bytes <= self._end:
            if self._v3:
                low, flags, high, value = _TAG3.unpack_from(untrusted, offset)
                if not self._wide:
                    high = 0
            else:
                low, value, flags = _TAG.unpack_from(untrusted, offset)
                high = _WORD.unpack_from(untrusted, offset + 8)[0] if self._wide else 0
            found.append(Tag(high << 32 | low, bool(flags & FLAG_ESCAPE), value))
            if flags & FLAG_LAST:
                break
            offset += self.tag_bytes + (0 if flags & FLAG_SAME_UUID else _UUID_BYTES)
        return found

    def revoke(self, tid: int, blocks: Sequence[int]) -> bytes:
        """A revoke block of at most `records_max` records."""
        used = _REVOKE_HEAD_BYTES + len(blocks) * self._record.size
        records = b"".join(map(self._record.pack, blocks))
        return self._sealed(header(REVOKE, tid) + _WORD.pack(used) + records)

    def revoked(self, untrusted: bytes | bytearray) -> list[int]:
        """The blocks that a revoke block names; EUCLEAN when its length is impossible."""
        (used,) = _WORD.unpack_from(untrusted, HEADER.size)
        if used > self._end:
            raise corrupt(f"a revoke block of the journal claims {used} bytes")
        count = max(0, used - _REVOKE_HEAD_BYTES) // self._record.size
        end = _REVOKE_HEAD_BYTES + count * self._record.size
        records = memoryview(untrusted)[_REVOKE_HEAD_BYTES:end]
        return [block for (block,) in self._record.iter_unpack(records)]

    def commit(self, tid: int, now_ns: int, crc32: Crc32) -> bytes:
        """A commit block."""
        raw = bytearray(BLOCK_BYTES)
        raw[: HEADER.size] = header(COMMIT, tid)
        _COMMIT_TIME.pack_into(raw, _COMMIT_TIME_OFFSET, *divmod(now_ns, 10**9))
        if self.has_crc32:
            raw[12:14] = bytes((_KIND_CRC32, 4))
            _WORD.pack_into(raw, _COMMIT_CHECKSUM_OFFSET, crc32.value)
        if self.has_crc32c:
            _WORD.pack_into(raw, _COMMIT_CHECKSUM_OFFSET, checksum(self._seed, raw))
        return bytes(raw)

    def is_commit_sound(self, untrusted: Bytes, crc32: Crc32) -> bool:
        """False when a commit block's checksum is wrong."""
        (found,) = _WORD.unpack_from(untrusted, _COMMIT_CHECKSUM_OFFSET)
        if self.has_crc32:
            kind = bytes(untrusted[12:14])
            # Linux may leave the checksum out.
            absent = kind == b"\0\0" and found == 0
            return absent or (kind == bytes((_KIND_CRC32, 4)) and found == crc32.value)
        if self.has_crc32c:
            at = _COMMIT_CHECKSUM_OFFSET
            view = memoryview(untrusted)
            return bool(found == checksum(self._seed, view[:at], bytes(4), view[at + 4 :]))
        return True

    def is_sealed(self, untrusted: bytes | bytearray) -> bool:
        """False when the checksum at the end of a descriptor or revoke block is wrong."""
        if not self.has_crc32c:
            return True
        (found,) = _WORD.unpack_from(untrusted, self._end)
        return bool(found == checksum(self._seed, memoryview(untrusted)[: self._end], bytes(4)))

    def _sealed(self, content: bytes) -> bytes:
        block = content.ljust(self._end, b"\0")
        if self.has_crc32c:
            block += _WORD.pack(checksum(self._seed, block, bytes(4)))
        return block
