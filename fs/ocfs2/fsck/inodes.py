"""Pass 1: every inode of every allocator, the extent tree behind it, and its attributes."""

from __future__ import annotations

import stat

from fs.block.device import BLOCK_BYTES
from fs.ocfs2.attributes import attributes_in
from fs.ocfs2.flags import DynFeature, InodeFlag
from fs.ocfs2.format import (
    ATTRIBUTE_BLOCK_SIGNATURE,
    ATTRIBUTES_INDEXED,
    ATTRIBUTES_OFFSET,
    BLOCK_EXTENTS,
    DINODE_EXTENTS,
    DINODE_SIGNATURE,
    EXTENT_BLOCK_LIST_OFFSET,
    EXTENT_BLOCK_SIGNATURE,
    EXTENT_UNWRITTEN,
    FAST_SYMLINK_BYTES_MAX,
    FILE_TYPES,
    ID2_OFFSET,
    TREE_DEPTH_MAX,
    VALUE_EXTENTS,
    AttributeBlock,
    AttributesHeader,
    Dinode,
    ExtentBlock,
    ExtentListHeader,
    ValueRoot,
    name_hash,
    read_extent,
)
from fs.ocfs2.fsck.marks import runs
from fs.ocfs2.fsck.volume import READ_BLOCKS, CheckedVolume, File, Group

_NO_EXTENTS = InodeFlag.CHAIN | InodeFlag.LOCAL_ALLOC | InodeFlag.DEALLOC
_SPECIAL = (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)


class Inodes:
    """Looks at inodes; what it accepts is in `volume.files` afterwards."""

    def __init__(self, volume: CheckedVolume) -> None:
        self._volume = volume
        self._found = volume.found

    def check_group(self, group: Group, slot: int) -> None:
        """All bits of a group of an inode allocator."""
        volume = self._volume
        for start, count in runs(group.bitmap):
            for bit in range(start, start + count):
                if bit and volume.is_block(group.block + bit):
                    self._check(group.block + bit, slot, group.block)
        free = ~group.bitmap & ((1 << group.bits) - 1)
        for start, count in runs(free):
            for at in range(start, start + count, READ_BLOCKS):
                self._check_free(group.block + at, min(READ_BLOCKS, start + count - at))

    def _check_free(self, block: int, count: int) -> None:
        """Blocks that nobody uses must not hold inodes that are in use."""
        data = self._volume.read(block, count)
        for number in range(count):
            at = number * BLOCK_BYTES
            if not data.startswith(DINODE_SIGNATURE, at):
                continue
            raw = Dinode.read(data, at)
            here = (raw.block, raw.fs_generation) == (
                block + number,
                self._volume.super.fs_generation,
            )
            if here and raw.flags & InodeFlag.VALID:
                self._found.add(
                    "INODE_ALLOC_REPAIR",
                    f"inode {block + number}",
                    "it is marked valid, but its allocator says that it is free.",
                )

    def _check(self, block: int, slot: int, group: int) -> None:
        volume, place = self._volume, f"inode {block}"
        if block in volume.files:
            self._found.add("INODE_DUPLICATE", place, "two allocators have it.")
            return
        data, raw = volume.dinode(block)
        if not volume.check_head(raw, block, slot, group):
            return
        if not raw.flags & InodeFlag.VALID:
            self._found.add("INODE_FLAGS", place, "it is in use, but not marked valid.")
        if raw.dtime_s:
            self._found.add("INODE_NZ_DTIME", place, "it is in use, but has a time of deletion.")
        attributes = raw.dyn_features == DynFeature.HAS_XATTR and volume.super.has_attributes
        if (
            (raw.dyn_features and not attributes)
            or raw.refcount_block
            or attributes != bool(raw.xattr_block)
        ):
            self._found.add(
                "INODE_FLAGS", place, f"it uses features ({raw.dyn_features:#x}) the volume hasn't."
            )
        nlink = raw.nlink | raw.nlink_high << 16
        file = File(raw.mode, nlink, raw.flags, raw.size)
        volume.files[block] = file
        if attributes:
            self._check_attributes(place, raw.xattr_block)
        kind = stat.S_IFMT(raw.mode)
        if kind not in FILE_TYPES:
            self._found.add("INODE_MODE", place, f"its mode is {raw.mode:#o}.")
            return
        if raw.flags & InodeFlag.SYSTEM and raw.flags & _NO_EXTENTS:
            return  # Their own passes look at them.
        if kind in _SPECIAL:
            if raw.clusters:
                self._found.add("INODE_MODE", place, "it is a special file and has clusters.")
            return
        if kind == stat.S_IFLNK and raw.clusters == 0:
            self._check_fast_symlink(place, data, raw)
            return
        tree = _Tree(volume, place, kind == stat.S_IFREG)
        tree.walk(data, raw)
        if kind in (stat.S_IFDIR, stat.S_IFLNK) or raw.flags & InodeFlag.SYSTEM:
            file.extents = tree.own
        self._check_size(place, kind, raw, tree)
        if kind == stat.S_IFLNK:
            self._check_symlink(place, raw, file)

    def _check_attributes(self, place: str, block: int) -> None:
        volume = self._volume
        if not volume.is_block(block):
            self._found.add(
                "XATTR_BLOCK", place, f"its attributes are said to be in block {block}."
            )
            return
        data = volume.read(block)
        head = AttributeBlock.read(data)
        if (
            head.signature != ATTRIBUTE_BLOCK_SIGNATURE
            or head.block != block
            or head.fs_generation != volume.super.fs_generation
        ):
            self._found.add("XATTR_BLOCK", place, f"block {block} is none of its attributes.")
            return
        if block in volume.extent_blocks:
            self._found.add("EB_DUPLICATE", place, f"its attribute block {block} is another's too.")
            return
        volume.extent_blocks[block] = head.suballoc_slot, head.suballoc_bit
        if head.flags & ATTRIBUTES_INDEXED:
            self._found.add("XATTR_INDEX", place, "its attributes are in an index: not checked.")
            return
        areas: list[tuple[int, int]] = []
        try:
            found = list(attributes_in(data))
        except ValueError as reason:
            self._found.add("XATTR_ENTRY", place, f"{reason}.")
            return
        if not found:
            self._found.add("XATTR_ENTRY", place, f"its attribute block {block} is empty.")
        for one in found:
            areas.append((one.start, one.end))
            if name_hash(volume.super.uuid_hash, one.name) != one.entry.name_hash:
                self._found.add("XATTR_HASH", place, f"attribute {one.name!r} has another's hash.")
            if one.root is not None:
                self._check_value(place, data, one.root, one.entry.value_bytes)
        ends = [ATTRIBUTES_OFFSET + AttributesHeader.STRUCT.size * (len(found) + 1)]
        for start, end in sorted(areas):
            if start < ends[-1]:
                self._found.add("XATTR_ENTRY", place, f"two of its attributes are at {start}.")
            ends.append(end)

    def _check_value(self, place: str, data: bytearray, root: int, size: int) -> None:
        raw = ValueRoot.read(data, root)
        tree = _Tree(self._volume, f"{place}, value of an attribute", is_regular=False)
        tree.walk_value(data, root, raw)
        if tree.whole and not tree.clusters == tree.end == raw.clusters == -(-size // BLOCK_BYTES):
            self._found.add(
                "XATTR_VALUE",
                place,
                f"an attribute of {size} bytes has {tree.clusters} clusters, says {raw.clusters}.",
            )
        if tree.whole and not tree.clusters:
            self._found.add("XATTR_VALUE", place, "an attribute outside has no cluster.")

    def _check_size(self, place: str, kind: int, raw: Dinode, tree: _Tree) -> None:
        if not tree.whole:
            return
        if tree.clusters != raw.clusters:
            self._found.add(
                "INODE_CLUSTERS",
                place,
                f"it says {raw.clusters} clusters, but has {tree.clusters}.",
            )
        if kind == stat.S_IFDIR:
            if tree.end == 0:
                self._found.add("DIR_ZERO", place, "it is a directory without a block.")
            elif raw.size == 0 or raw.size % BLOCK_BYTES:
                self._found.add("INODE_SIZE", place, f"a directory can't have {raw.size} bytes.")
        if raw.size > tree.end * BLOCK_BYTES:
            self._found.add(
                "INODE_SIZE", place, f"it says {raw.size} bytes and ends after {tree.end} clusters."
            )

    def _check_fast_symlink(self, place: str, data: bytearray, raw: Dinode) -> None:
        if raw.size > FAST_SYMLINK_BYTES_MAX:
            self._found.add(
                "LINK_FAST_DATA", place, f"a target of {raw.size} bytes has no cluster."
            )
            return
        length = data.find(0, ID2_OFFSET) - ID2_OFFSET
        if length < 0:
            self._found.add("LINK_NULLTERM", place, "its target has no end.")
        elif length != raw.size:
            self._found.add(
                "LINK_SIZE", place, f"it says {raw.size} bytes, its target has {length}."
            )

    def _check_symlink(self, place: str, raw: Dinode, file: File) -> None:
        if raw.size > BLOCK_BYTES or -(-raw.size // BLOCK_BYTES) > raw.clusters:
            self._found.add("LINK_BLOCKS", place, f"it has {raw.clusters} clusters.")
            return
        for _number, block in self._volume.blocks_of(file):
            target = self._volume.read(block)
            length = target.find(0)
            if length != raw.size and not (length < 0 and raw.size == BLOCK_BYTES):
                self._found.add(
                    "LINK_SIZE", place, f"it says {raw.size} bytes, its target has {length}."
                )
            break


class _Tree:
    """One walk over an extent tree.

    `whole` stays true while all of it could be read; `own` are the runs that nobody had before.
    """

    def __init__(self, volume: CheckedVolume, place: str, is_regular: bool) -> None:
        self._volume = volume
        self._found = volume.found
        self._place = place
        self._is_regular = is_regular
        self._leaves: list[tuple[int, int]] = []
        self.whole = True
        self.clusters = 0
        self.end = 0
        self.own: list[tuple[int, int, int]] = []

    def walk(self, data: bytearray, raw: Dinode) -> None:
        """The tree whose root is in an inode."""
        head = ExtentListHeader.read(data)
        if head.depth > TREE_DEPTH_MAX:
            self._bad("EXTENT_LIST_DEPTH", f"its extent tree has depth {head.depth}.")
            self.whole = False
            return
        self._list(data, ID2_OFFSET, DINODE_EXTENTS, head.depth)
        self._check_leaves(raw.last_extent_block)

    def walk_value(self, data: bytearray, root: int, raw: ValueRoot) -> None:
        """The tree whose root is in an attribute block."""
        offset = root + ValueRoot.STRUCT.size
        head = ExtentListHeader.read(data, offset)
        if head.depth > TREE_DEPTH_MAX:
            self._bad("EXTENT_LIST_DEPTH", f"its extent tree has depth {head.depth}.")
            self.whole = False
            return
        self._list(data, offset, VALUE_EXTENTS, head.depth)
        self._check_leaves(raw.last_extent_block)

    def _bad(self, code: str, text: str) -> None:
        self._found.add(code, self._place, text)

    def _list(self, data: bytearray, offset: int, room: int, depth: int) -> None:
        head = ExtentListHeader.read(data, offset)
        if head.count != room:
            self._bad("EXTENT_LIST_COUNT", f"an extent list claims room for {head.count} records.")
        if head.used > room:
            self._bad("EXTENT_LIST_FREE", f"an extent list claims to use {head.used} records.")
        used = min(head.used, room)
        if depth and used == 0:
            self._bad("EXTENT_LIST_FREE", "an inner node of its extent tree is empty.")
        empty = 0
        for index in range(used):
            record = read_extent(data, offset, index, leaf=depth == 0)
            if depth:
                self._inner(record.first, record.clusters, record.block, depth, index == used - 1)
            elif record.clusters == 0:
                # Linux leaves empty records only at the start of a list.
                empty += index > 0
            else:
                self._leaf(record.first, record.clusters, record.block, record.flags)
        if empty:
            self._bad("EXTENT_LIST_FREE", f"{empty} records of an extent list are empty.")

    def _inner(self, first: int, clusters: int, block: int, depth: int, is_last: bool) -> None:
        volume = self._volume
        if not volume.is_block(block):
            self._bad("EXTENT_BLKNO_RANGE", f"its extent tree goes on in block {block}.")
            self.whole = False
            return
        if block in volume.extent_blocks:
            self._bad("EB_DUPLICATE", f"its extent block {block} is in a tree already.")
            self.whole = False
            return
        data = volume.read(block)
        raw = ExtentBlock.read(data)
        if raw.signature != EXTENT_BLOCK_SIGNATURE:
            self._bad("EXTENT_EB_INVALID", f"block {block} of its tree is no extent block.")
            self.whole = False
            return
        volume.extent_blocks[block] = raw.suballoc_slot, raw.suballoc_bit
        if raw.block != block:
            self._bad("EB_BLKNO", f"extent block {block} says that it is in block {raw.block}.")
        if raw.fs_generation != volume.super.fs_generation:
            self._bad("EB_GEN", f"extent block {block} has generation {raw.fs_generation:#x}.")
        head = ExtentListHeader.read(data, EXTENT_BLOCK_LIST_OFFSET)
        if head.depth != depth - 1:
            self._bad("EXTENT_LIST_DEPTH", f"extent block {block} has depth {head.depth}.")
        if depth == 1:
            self._leaves.append((block, raw.next_leaf))
        before = self.end
        self._list(data, EXTENT_BLOCK_LIST_OFFSET, BLOCK_EXTENTS, depth - 1)
        if self.end > before and before > first:
            self._bad("EXTENT_OVERLAP", f"extent block {block} begins before cluster {before}.")
        # The last record of a node may promise more or less: files grow at the right edge.
        if self.end > first + clusters and not is_last:
            self._bad(
                "EXTENT_OVERLAP",
                f"extent block {block} ends with cluster {self.end - 1} and not with"
                f" {first + clusters - 1}.",
            )

    def _leaf(self, first: int, count: int, block: int, flags: int) -> None:
        volume = self._volume
        if first < self.end:
            self._bad(
                "EXTENT_OVERLAP", f"the extent at its cluster {first} begins before {self.end}."
            )
        elif first > self.end:
            self._bad("NO_HOLES", f"it has a hole before its cluster {first}.")
        self.end = max(self.end, first + count)
        self.clusters += count
        if flags & EXTENT_UNWRITTEN:
            self._bad("EXTENT_MARKED_UNWRITTEN", f"the extent at its cluster {first} is unwritten.")
        if flags & ~EXTENT_UNWRITTEN:
            self._bad(
                "EXTENT_MARKED_REFCOUNTED",
                f"the extent at its cluster {first} has flags {flags:#x}.",
            )
        if not volume.is_block(block):
            self._bad("EXTENT_BLKNO_RANGE", f"its cluster {first} is said to be in block {block}.")
            return
        if block + count > volume.blocks:
            self._bad(
                "EXTENT_CLUSTERS_OVERRUN",
                f"the extent at its cluster {first} goes beyond the end of the volume.",
            )
            count = volume.blocks - block
        for start, length in volume.own(self._place, "DUP_CLUSTERS_CLONE", block, count):
            self.own.append((first + start - block, start, length))

    def _check_leaves(self, last_said: int) -> None:
        if not self.whole:
            return
        blocks = [block for block, _next in self._leaves]
        for (block, behind), right in zip(self._leaves, [*blocks[1:], 0], strict=False):
            if behind != right:
                self._bad("EB_NEXT_LEAF", f"the leaf after {block} is {right} and not {behind}.")
        last = blocks[-1] if blocks else 0
        if last_said != last:
            self._bad("EB_NEXT_LEAF", f"its last leaf is {last} and not {last_said}.")
