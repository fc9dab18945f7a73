"""What all passes of the checker share: the device, what was found, and who owns what.

Work is bounded by the volume: an inode, an extent block or a group is looked at once, whoever
names it how often, and contents are read only of clusters that nobody owned before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.ocfs2.format import (
    DINODE_SIGNATURE,
    FIRST_GROUP_BLOCK,
    INVALID_SLOT,
    SUPER_BLOCK,
    Dinode,
)
from fs.ocfs2.fsck.marks import Marks
from fs.ocfs2.fsck.problems import Findings
from fs.ocfs2.super import Superblock

READ_BLOCKS: Final = 256


@dataclass(slots=True)
class Group:
    """A group descriptor that was accepted, and its bitmap as a number (first bit lowest)."""

    block: int
    bits: int
    bitmap: int


@dataclass(slots=True)
class File:
    """An inode in use, as later passes need it."""

    mode: int
    nlink: int
    flags: int
    size: int
    extents: list[tuple[int, int, int]] = field(default_factory=list)
    """First cluster in the file, first block, count; only what nobody owned before."""


class CheckedVolume:
    """State of one check."""

    def __init__(self, device: BlockDevice, superblock: Superblock, found: Findings) -> None:
        self.device = device
        self.super = superblock
        self.blocks = superblock.blocks
        self.found = found
        self.owned = Marks(self.blocks)
        for _run in self.owned.mark(0, FIRST_GROUP_BLOCK + 1):
            pass
        self.reserved = Marks(self.blocks)
        """Clusters that nobody needs to own though the global bitmap has them: local allocs'."""
        self.files: dict[int, File] = {}
        self.system: dict[bytes, int] = {}
        self.extent_blocks: dict[int, tuple[int, int]] = {}
        """Extent blocks that trees have: slot and bit of their allocator."""
        self._unreadable: set[int] = set()

    def read(self, block: int, count: int = 1) -> bytearray:
        """Blocks of the device; zeros for those that can't be read (which is a problem)."""
        data = bytearray(count * BLOCK_BYTES)
        try:
            self.device.read(block, count, memoryview(data))
        except OSError as reason:
            if count > 1:
                return bytearray().join(self.read(block + n) for n in range(count))
            if block not in self._unreadable:
                self._unreadable.add(block)
                self.found.add("READ_ERROR", f"block {block}", f"it can't be read: {reason}.")
        return data

    def is_block(self, block: int) -> bool:
        """True when a structure may lie in this block."""
        return SUPER_BLOCK < block < self.blocks

    def own(self, what: str, code: str, start: int, count: int) -> list[tuple[int, int]]:
        """Note an owner of clusters (inside the volume); the runs that had none before."""
        new = list(self.owned.mark(start, count))
        if sum(length for _at, length in new) != count:
            self.found.add(
                code,
                what,
                f"of its clusters {start} to {start + count - 1} some belong to somebody else too.",
            )
        return new

    def dinode(self, block: int) -> tuple[bytearray, Dinode]:
        """The inode block, not checked."""
        data = self.read(block)
        return data, Dinode.read(data)

    def check_head(self, raw: Dinode, block: int, slot: int, group: int) -> bool:
        """Check what all inodes have; False when it is no inode of this volume at all.

        `slot` and `group` are those of the allocator that has it.
        """
        place = f"inode {block}"
        if raw.signature != DINODE_SIGNATURE:
            self.found.add(
                "INODE_ALLOC_REPAIR", place, "its allocator says it is in use, but it is no inode."
            )
            return False
        owner = "the global allocator" if slot == INVALID_SLOT else f"slot {slot}"
        where = (
            f"it says that it is bit {raw.suballoc_bit} of slot {raw.suballoc_slot} (group"
            f" {raw.suballoc_group}), and is bit {block - group} of {owner}, group {group}."
        )
        sound = (
            (
                raw.fs_generation == self.super.fs_generation,
                "INODE_GEN",
                f"its volume generation is {raw.fs_generation:#x}.",
            ),
            (raw.block == block, "INODE_BLKNO", f"it says that it is in block {raw.block}."),
            (
                raw.suballoc_slot == slot
                and raw.suballoc_bit == block - group
                and raw.suballoc_group in (0, group),
                "INODE_SUBALLOC",
                where,
            ),
        )
        for is_sound, code, text in sound:
            if not is_sound:
                self.found.add(code, place, text)
        return True

    def blocks_of(self, file: File) -> Iterable[tuple[int, int]]:
        """Number in the file and block, of what is the file's own."""
        for first, block, count in file.extents:
            for step in range(count):
                yield first + step, block + step
