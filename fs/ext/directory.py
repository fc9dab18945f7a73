"""Directories: files of 4 KiB blocks, each a chain of entries that fills the block.

    entry = inode u32, rec_len u16, name_len u8, file_type u8, name, padding to a multiple of 4

Inode 0 marks unused space; removing an entry adds its room to the one before it in the block. An
indexed directory (dir_index) reads as the same chains: its inner nodes look like one unused
entry, its root like `..` with a long record. Reading linearly is therefore right for both. Before
the first change the index flag of the inode is cleared, which turns the index into plain free
space, a state that e2fsck and Linux take for an ordinary unindexed directory.

An image is not trusted: records that leave the block, overlap or are misaligned, names with `/`
or NUL, inode numbers out of range and holes are EUCLEAN.
"""

from __future__ import annotations

import errno
import stat
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from fs.block.device import BLOCK_BYTES
from fs.buffers import Buffer, Buffers
from fs.errors import error
from fs.ext.inode import FLAG_INDEX, ExtInode
from fs.ext.mapping import BlockMap
from fs.ext.super import Superblock

NAME_BYTES_MAX: Final = 255
_HEAD: Final = struct.Struct("<IHBB")
_HEAD_BYTES: Final = 8
_RECORD_BYTES_MIN: Final = 12

_KINDS: Final = (
    0,
    stat.S_IFREG,
    stat.S_IFDIR,
    stat.S_IFCHR,
    stat.S_IFBLK,
    stat.S_IFIFO,
    stat.S_IFSOCK,
    stat.S_IFLNK,
)
"""stat's kind by `file_type`."""


class Slot(NamedTuple):
    """One record: where it is and what it says.

    `before` is the offset of the record before it in the block.
    """

    buffer: Buffer
    offset: int
    before: int | None
    length: int
    ino: int
    kind: int
    name: bytes


class Directories:
    """Reads and changes the entries of directories.

    The caller stores the directory's inode after a change.
    """

    def __init__(self, buffers: Buffers, superblock: Superblock, block_map: BlockMap) -> None:
        self._buffers = buffers
        self._super = superblock
        self._map = block_map

    def entries(self, directory: ExtInode) -> Iterator[Slot]:
        """All used records, `.` and `..` too."""
        for buffer in self._blocks(directory):
            for slot in self._slots(directory, buffer):
                if slot.ino:
                    yield slot

    def find(self, directory: ExtInode, name: bytes) -> Slot | None:
        """The record of `name`.

        Blocks that don't contain its bytes are passed over without taking them apart.
        """
        for buffer in self._blocks(directory):
            if name in buffer.data:
                for slot in self._slots(directory, buffer):
                    if slot.ino and slot.name == name:
                        return slot
        return None

    def _blocks(self, directory: ExtInode) -> Iterator[Buffer]:
        pages = directory.size // BLOCK_BYTES
        for index in range(pages):
            block = self._map.map(directory, index, 1)[0]
            if not block:
                raise self._super.damage(f"directory {directory.ino} has a hole at page {index}")
            yield self._buffers.get(block)

    def _slots(self, directory: ExtInode, buffer: Buffer) -> Iterator[Slot]:
        data = buffer.data
        offset = 0
        before: int | None = None
        while offset < BLOCK_BYTES:
            if offset + _HEAD_BYTES > BLOCK_BYTES:
                raise self._damage(directory, buffer, offset)
            ino, length, name_bytes, file_type = _HEAD.unpack_from(data, offset)
            if not self._super.has_filetype:
                name_bytes, file_type = name_bytes | file_type << 8, 0
            used = _HEAD_BYTES + name_bytes
            if (
                length < _RECORD_BYTES_MIN
                or length & 3
                or offset + length > BLOCK_BYTES
                or used > length
            ):
                raise self._damage(directory, buffer, offset)
            name = bytes(data[offset + _HEAD_BYTES : offset + used])
            if ino and (ino > self._super.inodes or not name or b"/" in name or b"\0" in name):
                raise self._damage(directory, buffer, offset)
            yield Slot(
                buffer, offset, before, length, ino, _KINDS[file_type] if file_type < 8 else 0, name
            )
            before = offset
            offset += length

    def _damage(self, directory: ExtInode, buffer: Buffer, offset: int) -> OSError:
        return self._super.damage(
            f"directory {directory.ino} has a bad entry at {offset} in block {buffer.block}"
        )

    def is_empty(self, directory: ExtInode) -> bool:
        """True when there is nothing but `.` and `..`."""
        return all(slot.name in (b".", b"..") for slot in self.entries(directory))

    def initialise(self, directory: ExtInode, parent_ino: int) -> None:
        """Give a new directory its first block, with `.` and `..`; ENOSPC."""
        block = self._map.allocate(directory, 0, 1)[0]
        buffer = self._buffers.zeroed(block)
        self._put(buffer, 0, 12, directory.ino, stat.S_IFDIR, b".")
        self._put(buffer, 12, BLOCK_BYTES - 12, parent_ino, stat.S_IFDIR, b"..")
        directory.size = BLOCK_BYTES

    def add(self, directory: ExtInode, name: bytes, ino: int, kind: int) -> None:
        """Add an entry that is not there yet, in the first room that fits, else in a new block.

        ENOSPC.
        """
        needed = _room(name)
        for buffer in self._blocks(directory):
            for slot in self._slots(directory, buffer):
                used = _room(slot.name) if slot.ino else 0
                if slot.length - used < needed:
                    continue
                if used:
                    struct.pack_into("<H", buffer.data, slot.offset + 4, used)
                self._put(buffer, slot.offset + used, slot.length - used, ino, kind, name)
                directory.flags &= ~FLAG_INDEX
                return
        block = self._map.allocate(directory, directory.size // BLOCK_BYTES, 1)[0]
        self._put(self._buffers.zeroed(block), 0, BLOCK_BYTES, ino, kind, name)
        directory.size += BLOCK_BYTES
        directory.flags &= ~FLAG_INDEX

    def remove(self, directory: ExtInode, name: bytes) -> None:
        """Remove an entry; ENOENT."""
        slot = self._found(directory, name)
        if slot.before is None:
            struct.pack_into("<I", slot.buffer.data, slot.offset, 0)
        else:
            struct.pack_into(
                "<H", slot.buffer.data, slot.before + 4, slot.offset - slot.before + slot.length
            )
        self._buffers.dirty(slot.buffer)
        directory.flags &= ~FLAG_INDEX

    def replace(self, directory: ExtInode, name: bytes, ino: int, kind: int) -> None:
        """Let an entry name another inode; ENOENT."""
        slot = self._found(directory, name)
        self._put(slot.buffer, slot.offset, slot.length, ino, kind, name)
        directory.flags &= ~FLAG_INDEX

    def _found(self, directory: ExtInode, name: bytes) -> Slot:
        slot = self.find(directory, name)
        if slot is None:
            raise error(errno.ENOENT, repr(name))
        return slot

    def _put(
        self, buffer: Buffer, offset: int, length: int, ino: int, kind: int, name: bytes
    ) -> None:
        file_type = _KINDS.index(kind) if self._super.has_filetype else 0
        _HEAD.pack_into(buffer.data, offset, ino, length, len(name), file_type)
        buffer.data[offset + _HEAD_BYTES : offset + _HEAD_BYTES + len(name)] = name
        self._buffers.dirty(buffer)


def _room(name: bytes) -> int:
    return (_HEAD_BYTES + len(name) + 3) & ~3
