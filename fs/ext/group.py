"""Block groups: where each group keeps its bitmaps and inode table, and what is free in it.

A descriptor is 32 bytes (`bg_block_bitmap`, `bg_inode_bitmap`, `bg_inode_table`, free blocks,
free inodes, used directories), in the blocks after the superblock. Without flex_bg all three
areas lie inside their own group; that is checked at mount, so that nothing later reads outside
the image.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fs.block.device import BLOCK_BYTES
from fs.buffers import Buffers
from fs.errors import ImageError
from fs.ext.super import Superblock

_DESCRIPTOR = struct.Struct("<3I3H")
_DESCRIPTOR_BYTES = 32


@dataclass(slots=True)
class Group:
    """One group: first block, length, the places of its metadata, and its free counts."""

    number: int
    first_block: int
    blocks: int
    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    free_blocks: int
    free_inodes: int
    used_dirs: int


class Groups:
    """All groups of a file system. Raises `ImageError` when a descriptor is impossible."""

    def __init__(self, buffers: Buffers, superblock: Superblock) -> None:
        self._buffers = buffers
        self._super = superblock
        self.table_blocks = -(-superblock.group_inodes * superblock.inode_bytes // BLOCK_BYTES)
        self._groups = [self._load(number) for number in range(superblock.groups)]

    def __getitem__(self, number: int) -> Group:
        """The group `number`."""
        return self._groups[number]

    def __len__(self) -> int:
        """Number of groups."""
        return len(self._groups)

    def _load(self, number: int) -> Group:
        block, offset = divmod(number * _DESCRIPTOR_BYTES, BLOCK_BYTES)
        fields: tuple[int, ...] = _DESCRIPTOR.unpack_from(self._buffers.get(1 + block).data, offset)
        first = number * self._super.group_blocks
        group = Group(
            number, first, min(self._super.group_blocks, self._super.blocks - first), *fields
        )
        start = first + self._head_blocks(number)
        end = first + group.blocks
        inside = all(
            start <= place <= end - length
            for place, length in (
                (group.block_bitmap, 1),
                (group.inode_bitmap, 1),
                (group.inode_table, self.table_blocks),
            )
        )
        if not inside:
            raise ImageError(
                f"has metadata of group {number} outside of that group; repair it with e2fsck"
            )
        if group.free_blocks > group.blocks or group.free_inodes > self._super.group_inodes:
            raise ImageError(f"has impossible free counts in group {number}; repair it with e2fsck")
        return group

    def _head_blocks(self, number: int) -> int:
        """Blocks of superblock, descriptors and room to grow at the start of a group."""
        if not self._super.group_has_copy(number):
            return 0
        head: int = 1 + self._super.gdt_blocks + self._super.reserved_gdt_blocks
        return head

    def store(self, group: Group) -> None:
        """Record the free counts of `group`."""
        block, offset = divmod(group.number * _DESCRIPTOR_BYTES, BLOCK_BYTES)
        buffer = self._buffers.get(1 + block)
        struct.pack_into(
            "<3H", buffer.data, offset + 12, group.free_blocks, group.free_inodes, group.used_dirs
        )
        self._buffers.dirty(buffer)

    def of_block(self, block: int) -> Group:
        """The group that holds `block`."""
        return self._groups[block // self._super.group_blocks]

    def of_inode(self, ino: int) -> Group:
        """The group that holds inode `ino`."""
        return self._groups[(ino - 1) // self._super.group_inodes]

    def holds_metadata(self, block: int, count: int) -> bool:
        """True when any of the blocks belongs to the fixed metadata of its group.

        Never free, never a file's.
        """
        group = self.of_block(block)
        end = block + count
        return (
            block < group.first_block + self._head_blocks(group.number)
            or block <= group.block_bitmap < end
            or block <= group.inode_bitmap < end
            or (block < group.inode_table + self.table_blocks and group.inode_table < end)
        )
