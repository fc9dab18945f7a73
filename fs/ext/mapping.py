"""Which block holds page n of a file.

12 direct pointers, then trees of indirect blocks of depth 1, 2 and 3:

    pages 0..11             pointers[0..11]
    next 1024               pointers[12] -> block of 1024 pointers
    next 1024^2             pointers[13] -> 1024 -> 1024
    next 1024^3             pointers[14] -> 1024 -> 1024 -> 1024

A pointer of 0 is a hole, at every level. Everything is answered in runs: one indirect block is
looked up once for all pages that it maps. The depth bounds every walk, so a tree that points at
itself can't hang us; freeing a block twice is found by the bitmap.
"""

from __future__ import annotations

import errno
import struct

from fs.buffers import Buffer, Buffers
from fs.errors import error
from fs.ext.allocator import Allocator
from fs.ext.group import Groups
from fs.ext.inode import BLOCK_SECTORS, DIRECT, FILE_PAGES_MAX, ExtInode
from fs.ext.super import POINTERS, Superblock
from fs.runs import runs

_WORD = struct.Struct("<I")


class BlockMap:
    """Maps, allocates and frees the blocks of inodes.

    Changes `pointers` and `sectors` of the inode; the caller stores the inode.
    """

    def __init__(
        self, buffers: Buffers, superblock: Superblock, groups: Groups, allocator: Allocator
    ) -> None:
        self._buffers = buffers
        self._super = superblock
        self._groups = groups
        self._allocator = allocator

    def map(self, inode: ExtInode, index: int, count: int) -> list[int]:
        """Block numbers of `count` pages from `index`, 0 for holes.

        EUCLEAN for a number outside the image.
        """
        blocks: list[int] = []
        while count > 0:
            slot, offsets = _path(index)
            if not offsets:
                length = min(count, DIRECT - index)
                part = inode.pointers[index : index + length]
            else:
                length = min(count, POINTERS - offsets[-1])
                leaf = self._leaf(inode, slot, offsets)
                part = (
                    list(struct.unpack_from(f"<{length}I", leaf.data, offsets[-1] * 4))
                    if leaf
                    else [0] * length
                )
            if max(part) >= self._super.blocks:
                raise self._super.damage(
                    f"inode {inode.ino} has block {max(part)} of {self._super.blocks}"
                )
            blocks += part
            index += length
            count -= length
        return blocks

    def _leaf(self, inode: ExtInode, slot: int, offsets: tuple[int, ...]) -> Buffer | None:
        block = inode.pointers[slot]
        for offset in offsets[:-1]:
            if not block:
                return None
            (block,) = _WORD.unpack_from(self._indirect(inode, block).data, offset * 4)
        return self._indirect(inode, block) if block else None

    def _indirect(self, inode: ExtInode, block: int) -> Buffer:
        if block >= self._super.blocks or self._groups.holds_metadata(block, 1):
            raise self._super.damage(f"inode {inode.ino} has an indirect block in block {block}")
        return self._buffers.get(block)

    def allocate(self, inode: ExtInode, index: int, count: int) -> list[int]:
        """Fill the holes among `count` pages from `index`.

        ENOSPC and EFBIG before anything is changed.
        """
        if index + count > FILE_PAGES_MAX:
            raise error(errno.EFBIG)
        blocks = self.map(inode, index, count)
        holes = blocks.count(0)
        if not holes:
            return blocks
        if holes + self._missing_indirect(inode, index, blocks) > self._super.free_blocks:
            raise error(errno.ENOSPC, "no free block")
        before = self.map(inode, index - 1, 1)[0] if index else 0
        goal = before + 1 if before else self._groups.of_inode(inode.ino).first_block + 1
        for run in runs(blocks):
            if run.block:
                goal = run.block + run.length
                continue
            goal = self._fill(
                inode, index, blocks, range(run.position, run.position + run.length), goal
            )
        return blocks

    def _fill(self, inode: ExtInode, index: int, blocks: list[int], holes: range, goal: int) -> int:
        """Allocate blocks for the positions `holes` of `blocks`.

        Returns the goal for what follows.
        """
        position = holes.start
        while position < holes.stop:
            slot, offsets = _path(index + position)
            room = min(holes.stop - position, POINTERS - offsets[-1] if offsets else DIRECT - slot)
            leaf: Buffer | None = None
            if offsets:
                leaf, goal = self._leaf_for_write(inode, slot, offsets, goal)
            block, length = self._allocator.allocate_run(goal, room)
            fresh = list(range(block, block + length))
            if leaf is None:
                inode.pointers[slot : slot + length] = fresh
            else:
                struct.pack_into(f"<{length}I", leaf.data, offsets[-1] * 4, *fresh)
                self._buffers.dirty(leaf)
            blocks[position : position + length] = fresh
            inode.sectors += length * BLOCK_SECTORS
            goal = block + length
            position += length
        return goal

    def _leaf_for_write(
        self, inode: ExtInode, slot: int, offsets: tuple[int, ...], goal: int
    ) -> tuple[Buffer, int]:
        """The last indirect block on the way to a page; the ones that are missing are made."""
        if not inode.pointers[slot]:
            inode.pointers[slot], goal = self._new_indirect(inode, goal)
        node = self._indirect(inode, inode.pointers[slot])
        for offset in offsets[:-1]:
            (block,) = _WORD.unpack_from(node.data, offset * 4)
            if not block:
                block, goal = self._new_indirect(inode, goal)
                _WORD.pack_into(node.data, offset * 4, block)
                self._buffers.dirty(node)
            node = self._indirect(inode, block)
        return node, goal

    def _new_indirect(self, inode: ExtInode, goal: int) -> tuple[int, int]:
        block, _one = self._allocator.allocate_run(goal, 1)
        self._buffers.zeroed(block)
        inode.sectors += BLOCK_SECTORS
        return block, block + 1

    def _missing_indirect(self, inode: ExtInode, index: int, blocks: list[int]) -> int:
        """How many indirect blocks must be made to fill the holes in `blocks`."""
        missing: set[tuple[int, ...]] = set()
        position = 0
        while position < len(blocks):
            slot, offsets = _path(index + position)
            span = POINTERS - offsets[-1] if offsets else DIRECT - slot
            if offsets and 0 in blocks[position : position + span]:
                block = inode.pointers[slot]
                for depth in range(len(offsets)):
                    if not block:
                        missing.add((slot, *offsets[:depth]))
                    elif depth + 1 < len(offsets):
                        (block,) = _WORD.unpack_from(
                            self._indirect(inode, block).data, offsets[depth] * 4
                        )
            position += span
        return len(missing)

    def truncate(self, inode: ExtInode, keep: int) -> None:
        """Free the blocks of pages from `keep` on, and indirect blocks that then map nothing."""
        doomed = [block for block in inode.pointers[min(keep, DIRECT) : DIRECT] if block]
        for slot in range(min(keep, DIRECT), DIRECT):
            inode.pointers[slot] = 0
        self._free(inode, doomed)
        start = DIRECT
        for depth in (1, 2, 3):
            slot = DIRECT + depth - 1
            kept = max(keep - start, 0)
            start += POINTERS**depth
            block = inode.pointers[slot]
            if not block or keep >= start:
                continue
            if self._prune(inode, block, depth, kept):
                inode.pointers[slot] = 0
                self._free(inode, [block])

    def _prune(self, inode: ExtInode, block: int, depth: int, keep: int) -> bool:
        """Free what an indirect block maps from its page `keep` on; True when it then maps nothing.

        Pointers are cleared before what they point at is freed, so that an error on the way leaks
        blocks instead of leaving them in use and free.
        """
        node = self._indirect(inode, block)
        first, inside = divmod(keep, POINTERS ** (depth - 1))
        pointers = struct.unpack_from(f"<{POINTERS}I", node.data)
        start = first + 1 if inside else first
        if inside and pointers[first] and self._prune(inode, pointers[first], depth - 1, inside):
            start = first
        doomed = [pointer for pointer in pointers[start:] if pointer]
        if doomed:
            node.data[start * 4 :] = bytes((POINTERS - start) * 4)
            self._buffers.dirty(node)
        if depth > 1:
            for child in doomed:
                self._prune(inode, child, depth - 1, 0)
        self._free(inode, doomed)
        return not any(pointers[:start])

    def _free(self, inode: ExtInode, blocks: list[int]) -> None:
        for run in runs(blocks):
            self._allocator.free_run(run.block, run.length)
            inode.sectors = max(0, inode.sectors - run.length * BLOCK_SECTORS)


def _path(index: int) -> tuple[int, tuple[int, ...]]:
    """The way to page `index`: a slot of `pointers`, then an offset in each indirect block."""
    if index < DIRECT:
        return index, ()
    index -= DIRECT
    if index < POINTERS:
        return DIRECT, (index,)
    index -= POINTERS
    if index < POINTERS**2:
        return DIRECT + 1, divmod(index, POINTERS)
    index -= POINTERS**2
    if index < POINTERS**3:
        high, rest = divmod(index, POINTERS**2)
        return DIRECT + 2, (high, *divmod(rest, POINTERS))
    raise error(errno.EFBIG)
