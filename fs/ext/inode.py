"""Inodes on the disk: 128 or 256 bytes each, in the inode table of their group.

Field offsets after Linux's `Documentation/filesystems/ext4/inodes.rst`. `store` packs our fields
over what is there and leaves other bytes (extended attributes behind the fixed part, for example)
as they were; the obsolete words `i_osd1` and `i_faddr` become 0.

Generation: the number in `i_generation` stays on the disk when an inode is freed, and the next
use of the slot gets the number after it. Linux draws a new number from a counter; going on from
the slot's own needs no state and is what makes `FileKey` differ each time an inode number is used
again.

Times: 32 bits of seconds, and with 256-byte inodes nanoseconds and two more bits of seconds
(until 2446).
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass, field
from typing import Final

from fs.block.device import BLOCK_BYTES
from fs.buffers import Buffer, Buffers
from fs.ext.group import Groups
from fs.ext.super import POINTERS, Superblock
from fs.inode import SECTOR_BYTES, Inode

POINTERS_IN_INODE: Final = 15
FAST_LINK_BYTES_MAX: Final = POINTERS_IN_INODE * 4 - 1
FLAG_INDEX: Final = 0x1000
FLAGS_NOT_KNOWN: Final = 0x0800 | 0x80000 | 0x200000 | 0x10000000
"""encrypted, extents, ea_inode, inline data: none may occur in an image whose features we know."""
EXTRA_BYTES: Final = 32
"""`i_extra_isize` of the inodes that we make, as mke2fs has it."""
DIRECT: Final = 12
BLOCK_SECTORS: Final = BLOCK_BYTES // SECTOR_BYTES
_TREE_PAGES: Final = DIRECT + POINTERS + POINTERS**2 + POINTERS**3
_SECTORS_PAGES: Final = (1 << 32) // BLOCK_SECTORS - 1
"""What `i_blocks` (32 bits of sectors) can count, data and indirect blocks together."""
FILE_PAGES_MAX: Final = min(
    _TREE_PAGES, _SECTORS_PAGES - (3 + POINTERS + _SECTORS_PAGES // POINTERS + 1)
)
"""Pages of the largest file, just below 2 TiB.

All of its sectors can be counted, whatever is a hole.
"""

_FIXED = struct.Struct("<HHIIIIIHHII4x15IIIII")
_HIGH_IDS: Final = 120
"""Offset of the upper 16 bits of owner and group."""
_NS: Final = 1_000_000_000
_KINDS: Final = {
    stat.S_IFREG,
    stat.S_IFDIR,
    stat.S_IFLNK,
    stat.S_IFCHR,
    stat.S_IFBLK,
    stat.S_IFIFO,
    stat.S_IFSOCK,
}


@dataclass(slots=True, eq=False)
class ExtInode(Inode):
    """An inode with what only ext knows.

    `pointers` are the 15 words of `i_block` (block numbers, or the text of a short symbolic link),
    `file_acl` is the block of extended attributes.
    """

    flags: int = 0
    file_acl: int = 0
    dtime_s: int = 0
    crtime_ns: int | None = None
    pointers: list[int] = field(default_factory=lambda: [0] * POINTERS_IN_INODE)

    @property
    def is_fast_symlink(self) -> bool:
        """True when the link's text is in `pointers`.

        It has no blocks but that of its attributes.
        """
        own = self.sectors - (BLOCK_SECTORS if self.file_acl else 0)
        return self.is_symlink and own == 0

    @property
    def has_blocks(self) -> bool:
        """True when `pointers` are block numbers."""
        return self.is_file or self.is_dir or (self.is_symlink and not self.is_fast_symlink)


class InodeTable:
    """Reads and writes inodes through the buffer cache."""

    def __init__(self, buffers: Buffers, superblock: Superblock, groups: Groups) -> None:
        self._buffers = buffers
        self._super = superblock
        self._groups = groups

    def valid(self, ino: int) -> bool:
        """True for the root and for every number that a directory may name."""
        return ino == 2 or self._super.first_ino <= ino <= self._super.inodes

    def _slot(self, ino: int) -> tuple[Buffer, int]:
        assert 0 < ino <= self._super.inodes
        index = (ino - 1) % self._super.group_inodes
        block, offset = divmod(index * self._super.inode_bytes, BLOCK_BYTES)
        return self._buffers.get(self._groups.of_inode(ino).inode_table + block), offset

    def load(self, ino: int) -> ExtInode:
        """The inode `ino`.

        EUCLEAN when its number is out of range, it is not in use or makes no sense.
        """
        if not self.valid(ino):
            raise self._super.damage(f"inode number {ino} of {self._super.inodes}")
        buffer, offset = self._slot(ino)
        mode, uid, size, atime, ctime, mtime, dtime, gid, nlink, sectors, flags, *rest = (
            _FIXED.unpack_from(buffer.data, offset)
        )
        pointers, (generation, file_acl, size_high, _faddr) = (
            rest[:POINTERS_IN_INODE],
            rest[POINTERS_IN_INODE:],
        )
        uid_high, gid_high = struct.unpack_from("<HH", buffer.data, offset + _HIGH_IDS)
        if stat.S_ISREG(mode):
            size |= size_high << 32
        inode = ExtInode(
            ino, generation, mode, nlink, uid | uid_high << 16, gid | gid_high << 16, size, sectors,
            atime_ns=self._time_ns(buffer, offset, atime, 0x8C),
            mtime_ns=self._time_ns(buffer, offset, mtime, 0x88),
            ctime_ns=self._time_ns(buffer, offset, ctime, 0x84),
            flags=flags, file_acl=file_acl, dtime_s=dtime, pointers=pointers,
        )  # fmt: skip
        self._check(inode)
        return inode

    def _check(self, inode: ExtInode) -> None:
        wrong = ""
        if inode.nlink == 0:
            wrong = "is not in use"
        elif stat.S_IFMT(inode.mode) not in _KINDS:
            wrong = f"has the unknown mode {inode.mode:#o}"
        elif inode.flags & FLAGS_NOT_KNOWN:
            wrong = f"has flags {inode.flags & FLAGS_NOT_KNOWN:#x} of features not in the image"
        elif inode.file_acl >= self._super.blocks:
            wrong = f"has its attributes in block {inode.file_acl} of {self._super.blocks}"
        elif inode.size > FILE_PAGES_MAX * BLOCK_BYTES:
            wrong = f"has {inode.size} bytes, more than any file can have"
        elif inode.is_dir and (
            inode.size % BLOCK_BYTES or inode.size > inode.sectors * SECTOR_BYTES or inode.size == 0
        ):
            wrong = f"is a directory of {inode.size} bytes in {inode.sectors} sectors"
        elif inode.is_symlink and not 0 < inode.size < (
            FAST_LINK_BYTES_MAX + 1 if inode.is_fast_symlink else BLOCK_BYTES
        ):
            wrong = f"is a symbolic link of {inode.size} bytes"
        elif inode.is_dir and inode.size // BLOCK_BYTES > self._super.blocks:
            wrong = (
                f"is a directory of {inode.size} bytes in an image of {self._super.blocks} blocks"
            )
        if wrong:
            raise self._super.damage(f"inode {inode.ino} {wrong}")

    def store(self, inode: ExtInode) -> None:
        """Record `inode` in its slot."""
        buffer, offset = self._slot(inode.ino)
        size_high = (
            inode.size >> 32 if inode.is_file else _FIXED.unpack_from(buffer.data, offset)[-2]
        )
        _FIXED.pack_into(
            buffer.data, offset,
            inode.mode, inode.uid & 0xFFFF, inode.size & 0xFFFFFFFF,
            _seconds(inode.atime_ns), _seconds(inode.ctime_ns), _seconds(inode.mtime_ns),
            inode.dtime_s, inode.gid & 0xFFFF, inode.nlink, inode.sectors, inode.flags,
            *inode.pointers, inode.generation, inode.file_acl, size_high, 0,
        )  # fmt: skip
        struct.pack_into("<HH", buffer.data, offset + _HIGH_IDS, inode.uid >> 16, inode.gid >> 16)
        self._store_extra(buffer, offset, inode)
        self._buffers.dirty(buffer)

    def _store_extra(self, buffer: Buffer, offset: int, inode: ExtInode) -> None:
        room = self._extra_bytes(buffer, offset)
        fields = [(0x84, inode.ctime_ns), (0x88, inode.mtime_ns), (0x8C, inode.atime_ns)]
        if inode.crtime_ns is not None:
            fields.append((0x94, inode.crtime_ns))
            if room >= 0x94 - 128:
                struct.pack_into("<I", buffer.data, offset + 0x90, _seconds(inode.crtime_ns))
        for place, time_ns in fields:
            if place + 4 - 128 <= room:
                struct.pack_into("<I", buffer.data, offset + place, _extra(time_ns))

    def clear(self, ino: int) -> int:
        """Prepare the slot of a number that was just allocated: all zeros.

        Returns the generation for its new use.
        """
        buffer, offset = self._slot(ino)
        generation: int = struct.unpack_from("<I", buffer.data, offset + 100)[0]
        buffer.data[offset : offset + self._super.inode_bytes] = bytes(self._super.inode_bytes)
        if self._super.inode_bytes > 128:
            struct.pack_into(
                "<H", buffer.data, offset + 128, min(EXTRA_BYTES, self._super.inode_bytes - 128)
            )
        self._buffers.dirty(buffer)
        return (generation + 1) & 0xFFFFFFFF

    def _extra_bytes(self, buffer: Buffer, offset: int) -> int:
        """Bytes behind the first 128 that hold fixed fields (`i_extra_isize`)."""
        if self._super.inode_bytes == 128:
            return 0
        untrusted_extra: int = struct.unpack_from("<H", buffer.data, offset + 128)[0]
        return min(untrusted_extra, self._super.inode_bytes - 128)

    def _time_ns(self, buffer: Buffer, offset: int, low: int, place: int) -> int:
        seconds = low - (1 << 32) if low & 1 << 31 else low
        if place + 4 - 128 > self._extra_bytes(buffer, offset):
            return seconds * _NS
        extra: int
        (extra,) = struct.unpack_from("<I", buffer.data, offset + place)
        return (seconds + ((extra & 3) << 32)) * _NS + (extra >> 2)


def _seconds(time_ns: int) -> int:
    return (time_ns // _NS) & 0xFFFFFFFF


def _extra(time_ns: int) -> int:
    seconds, rest_ns = divmod(time_ns, _NS)
    low = seconds & 0xFFFFFFFF
    signed = low - (1 << 32) if low & 1 << 31 else low
    return rest_ns << 2 | (seconds - signed >> 32) & 3
