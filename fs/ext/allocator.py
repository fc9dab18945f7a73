"""Free blocks and free inodes.

Bitmaps, group counts and superblock counts are always changed together.

Placement is the classic ext2 idea in its simplest form: a file's blocks follow each other,
starting in the group of its inode; a file's inode is in its directory's group; a directory goes
to the group with most free blocks. No reservation windows and no preallocation: one writer per
image doesn't interleave enough to need them. Blocks reserved for root are open to all, because
everything in a guest runs as root.
"""

from __future__ import annotations

import errno

from fs import bitmap
from fs.buffers import Buffers
from fs.errors import error
from fs.ext.group import Group, Groups
from fs.ext.super import Superblock


class Allocator:
    """Gives out and takes back block and inode numbers."""

    def __init__(self, buffers: Buffers, superblock: Superblock, groups: Groups) -> None:
        self._buffers = buffers
        self._super = superblock
        self._groups = groups

    def allocate_run(self, goal: int, count: int) -> tuple[int, int]:
        """Take up to `count` neighbouring blocks, at `goal` or as near behind it as possible.

        Returns the first block and how many; ENOSPC when there is none.
        """
        if not 0 < goal < self._super.blocks:
            goal = 1
        first = self._groups.of_block(goal)
        # The goal's group comes twice: first from the goal on, at the end from its beginning.
        for step in range(len(self._groups) + 1):
            group = self._groups[(first.number + step) % len(self._groups)]
            if not group.free_blocks:
                continue
            found = self._take_run(group, goal - group.first_block if step == 0 else 0, count)
            if found is not None:
                return found
        if self._super.free_blocks:
            raise self._super.damage(
                f"{self._super.free_blocks} free blocks are counted, the bitmaps have none"
            )
        raise error(errno.ENOSPC, "no free block")

    def _take_run(self, group: Group, start: int, count: int) -> tuple[int, int] | None:
        buffer = self._buffers.get(group.block_bitmap)
        position = bitmap.find_clear(buffer.data, start, group.blocks)
        if position is None:
            return None
        limit = min(group.blocks, position + count)
        length = min(bitmap.clear_run(buffer.data, position, limit), group.free_blocks)
        block = group.first_block + position
        if self._groups.holds_metadata(block, length):
            raise self._super.damage(
                f"bitmap of group {group.number} says that its own metadata is free"
            )
        bitmap.set_run(buffer.data, position, length)
        self._buffers.dirty(buffer)
        self._count_blocks(group, -length)
        return block, length

    def free_run(self, block: int, count: int) -> None:
        """Give back `count` blocks from `block` on.

        EUCLEAN when one was free already or can't belong to a file.
        """
        if block < 1 or block + count > self._super.blocks:
            raise self._super.damage(
                f"blocks {block}..{block + count - 1} of {self._super.blocks} to be freed"
            )
        while count:
            group = self._groups.of_block(block)
            length = min(count, group.first_block + group.blocks - block)
            if self._groups.holds_metadata(block, length):
                raise self._super.damage(
                    f"blocks {block}..{block + length - 1} of a file are group metadata"
                )
            buffer = self._buffers.get(group.block_bitmap)
            freed = bitmap.reset_run(buffer.data, block - group.first_block, length)
            self._buffers.dirty(buffer)
            self._buffers.forget(block, length)
            self._count_blocks(group, freed)
            if freed != length:
                raise self._super.damage(
                    f"{length - freed} of the blocks {block}..{block + length - 1} are free already"
                )
            block += length
            count -= length

    def _count_blocks(self, group: Group, change: int) -> None:
        group.free_blocks += change
        self._super.free_blocks += change
        if (
            group.free_blocks > group.blocks
            or not 0 <= self._super.free_blocks <= self._super.blocks
        ):
            group.free_blocks = min(group.free_blocks, group.blocks)
            self._super.free_blocks = min(max(self._super.free_blocks, 0), self._super.blocks)
            raise self._super.damage(
                f"free block counts of group {group.number} don't agree with its bitmap"
            )
        self._groups.store(group)

    def allocate_inode(self, parent_ino: int, is_dir: bool) -> int:
        """Take an inode number for a new file in the directory `parent_ino`; ENOSPC."""
        for group in self._inode_groups(parent_ino, is_dir):
            buffer = self._buffers.get(group.inode_bitmap)
            start = self._super.first_ino - 1 if group.number == 0 else 0
            position = bitmap.find_clear(buffer.data, start, self._super.group_inodes)
            if position is None:
                continue
            bitmap.set_run(buffer.data, position, 1)
            self._buffers.dirty(buffer)
            self._count_inodes(group, -1, is_dir)
            return group.number * self._super.group_inodes + position + 1
        raise error(errno.ENOSPC, "no free inode")

    def _inode_groups(self, parent_ino: int, is_dir: bool) -> list[Group]:
        """Groups with free inodes, best first."""
        home = self._groups.of_inode(parent_ino).number
        groups = [
            self._groups[(home + step) % len(self._groups)] for step in range(len(self._groups))
        ]
        free = [group for group in groups if group.free_inodes]
        if is_dir:
            free.sort(key=lambda group: -group.free_blocks)
        return free

    def free_inode(self, ino: int, is_dir: bool) -> None:
        """Give an inode number back."""
        group = self._groups.of_inode(ino)
        buffer = self._buffers.get(group.inode_bitmap)
        freed = bitmap.reset_run(buffer.data, (ino - 1) % self._super.group_inodes, 1)
        if not freed:
            raise self._super.damage(f"inode {ino} is free already")
        self._buffers.dirty(buffer)
        self._count_inodes(group, 1, is_dir)

    def _count_inodes(self, group: Group, change: int, is_dir: bool) -> None:
        group.free_inodes += change
        self._super.free_inodes += change
        if is_dir:
            group.used_dirs = min(max(group.used_dirs - change, 0), 0xFFFF)
        if (
            group.free_inodes > self._super.group_inodes
            or not 0 <= self._super.free_inodes <= self._super.inodes
        ):
            group.free_inodes = min(group.free_inodes, self._super.group_inodes)
            self._super.free_inodes = min(max(self._super.free_inodes, 0), self._super.inodes)
            raise self._super.damage(
                f"free inode counts of group {group.number} don't agree with its bitmap"
            )
        self._groups.store(group)
