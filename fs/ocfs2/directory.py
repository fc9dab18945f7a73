"""Directories: files of 4 KiB blocks, each a chain of entries that fills the block.

    entry = inode's block u64, rec_len u16, name_len u8, file_type u8, name, padding to 4 bytes

Block 0 marks unused space; removing an entry adds its room to the one before it. Entries are
found by reading from the front: the profile has no indexed directories.

An image is not trusted: entries that leave the block, overlap or are misaligned, names with `/`
or NUL and numbers out of range are EUCLEAN.
"""

from __future__ import annotations

import errno
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from fs.block.device import BLOCK_BYTES
from fs.errors import corrupt, error
from fs.ocfs2.blocks import Buffer
from fs.ocfs2.dinode import Ocfs2Inode
from fs.ocfs2.extents import Extents
from fs.ocfs2.format import DIR_ENTRY, FILE_TYPES, KINDS, dir_entry_bytes
from fs.ocfs2.transaction import Transactions

NAMES_CACHED: Final = 4096
"""Names remembered for one directory."""
_ENTRY_BYTES_MIN: Final = dir_entry_bytes(1)


class Slot(NamedTuple):
    """One entry: where it is and what it says.

    `number`: which block of the directory; `before`: offset of the entry before it in the block.
    """

    buffer: Buffer
    number: int
    offset: int
    before: int | None
    length: int
    ino: int
    kind: int
    name: bytes


class Directories:
    """Reads and changes the entries of directories; the caller stores the inode."""

    def __init__(self, transactions: Transactions, extents: Extents, blocks: int) -> None:
        self._transactions = transactions
        self._extents = extents
        self._blocks = blocks

    def entries(self, directory: Ocfs2Inode) -> Iterator[Slot]:
        """All used entries, `.` and `..` too."""
        for index, buffer in self._buffers(directory):
            for slot in self._slots(directory, index, buffer):
                if slot.ino:
                    yield slot

    def find(self, directory: Ocfs2Inode, name: bytes) -> Slot | None:
        """The entry of `name`; blocks without its bytes are not taken apart."""
        for index, buffer in self._buffers(directory):
            if name in buffer.data:
                for slot in self._slots(directory, index, buffer):
                    if slot.ino and slot.name == name:
                        return slot
        return None

    def ino_of(self, directory: Ocfs2Inode, name: bytes) -> int | None:
        """The inode number behind a name, remembered if it was asked before."""
        ino = directory.names.get(name)
        if ino is None:
            slot = self.find(directory, name)
            if slot is None:
                return None
            ino = slot.ino
            self._remember(directory, name, ino)
        return ino

    def _remember(self, directory: Ocfs2Inode, name: bytes, ino: int) -> None:
        if len(directory.names) >= NAMES_CACHED:
            directory.names.clear()
        directory.names[name] = ino

    def _buffers(self, directory: Ocfs2Inode, first: int = 0) -> Iterator[tuple[int, Buffer]]:
        for index in range(first, directory.size // BLOCK_BYTES):
            block = self._extents.map(directory, index, 1)[0]
            if not block:
                raise corrupt(f"directory {directory.ino} has no block {index}")
            yield index, self._transactions.get(block, directory.ino)

    def _slots(self, directory: Ocfs2Inode, index: int, buffer: Buffer) -> Iterator[Slot]:
        data = buffer.data
        offset = 0
        before: int | None = None
        while offset < BLOCK_BYTES:
            if offset + DIR_ENTRY.size > BLOCK_BYTES:
                raise self._damage(directory, buffer, offset)
            ino, length, name_bytes, file_type = DIR_ENTRY.unpack_from(data, offset)
            used = DIR_ENTRY.size + name_bytes
            if (
                length < _ENTRY_BYTES_MIN
                or length & 3
                or offset + length > BLOCK_BYTES
                or used > length
            ):
                raise self._damage(directory, buffer, offset)
            name = bytes(data[offset + DIR_ENTRY.size : offset + used])
            if ino and (ino >= self._blocks or not name or b"/" in name or b"\0" in name):
                raise self._damage(directory, buffer, offset)
            yield Slot(
                buffer, index, offset, before, length, ino, KINDS.get(file_type & 7, 0), name
            )
            before = offset
            offset += length

    @staticmethod
    def _damage(directory: Ocfs2Inode, buffer: Buffer, offset: int) -> OSError:
        return corrupt(
            f"directory {directory.ino} has a bad entry at {offset} in block {buffer.block}"
        )

    def is_empty(self, directory: Ocfs2Inode) -> bool:
        """True when there is nothing but `.` and `..`."""
        return all(slot.name in (b".", b"..") for slot in self.entries(directory))

    # Changes, inside an operation

    def initialise(self, directory: Ocfs2Inode, parent_ino: int, block: int) -> None:
        """Write `.` and `..` into the first block of a new directory."""
        buffer = self._transactions.create(block, directory.ino)
        dot = dir_entry_bytes(1)
        self._put(buffer, 0, dot, directory.ino, stat.S_IFDIR, b".")
        self._put(buffer, dot, BLOCK_BYTES - dot, parent_ino, stat.S_IFDIR, b"..")
        directory.size = BLOCK_BYTES

    def add(
        self,
        directory: Ocfs2Inode,
        name: bytes,
        ino: int,
        kind: int,
        extend: Callable[[Ocfs2Inode], int],
    ) -> None:
        """Add an entry that is not there yet, where it fits, else in a new block.

        `extend` gives the directory one more cluster and returns its block.
        """
        self._transactions.touch(directory)
        needed = dir_entry_bytes(len(name))
        for index, buffer in self._buffers(directory, directory.room_block):
            for slot in self._slots(directory, index, buffer):
                used = dir_entry_bytes(len(slot.name)) if slot.ino else 0
                if slot.length - used < needed:
                    continue
                self._transactions.modify(buffer)
                if used:
                    struct.pack_into("<H", buffer.data, slot.offset + 8, used)
                self._put(buffer, slot.offset + used, slot.length - used, ino, kind, name)
                directory.room_block = index
                self._remember(directory, name, ino)
                return
        buffer = self._transactions.create(extend(directory), directory.ino)
        self._put(buffer, 0, BLOCK_BYTES, ino, kind, name)
        directory.room_block = directory.size // BLOCK_BYTES
        directory.size += BLOCK_BYTES
        self._remember(directory, name, ino)

    def remove(self, directory: Ocfs2Inode, name: bytes) -> None:
        """Remove an entry; ENOENT."""
        slot = self._found(directory, name)
        self._transactions.touch(directory)
        self._transactions.modify(slot.buffer)
        if slot.before is None:
            struct.pack_into("<Q", slot.buffer.data, slot.offset, 0)
        else:
            struct.pack_into(
                "<H", slot.buffer.data, slot.before + 8, slot.offset - slot.before + slot.length
            )
        directory.names.pop(name, None)
        directory.room_block = min(directory.room_block, slot.number)

    def replace(self, directory: Ocfs2Inode, name: bytes, ino: int, kind: int) -> None:
        """Let an entry name another inode; ENOENT."""
        slot = self._found(directory, name)
        self._transactions.touch(directory)
        self._transactions.modify(slot.buffer)
        self._put(slot.buffer, slot.offset, slot.length, ino, kind, name)
        self._remember(directory, name, ino)

    def _found(self, directory: Ocfs2Inode, name: bytes) -> Slot:
        slot = self.find(directory, name)
        if slot is None:
            raise error(errno.ENOENT, repr(name))
        return slot

    @staticmethod
    def _put(buffer: Buffer, offset: int, length: int, ino: int, kind: int, name: bytes) -> None:
        DIR_ENTRY.pack_into(buffer.data, offset, ino, length, len(name), FILE_TYPES[kind])
        start = offset + DIR_ENTRY.size
        buffer.data[start : start + len(name)] = name
