"""Extent trees: which clusters of the disk hold which clusters of a file or an attribute's value.

The root is the list in the inode's block, or that of a `Value`, which has room for one record. A
tree of depth 0 has data extents there; above that the records name extent blocks ("EXBLK01"), and
the leaves are chained from left to right.

A volume without the sparse feature has files without holes: cluster n of a file exists for all
n < `clusters`. So a tree only ever grows and shrinks at its right edge, and that is all that is
written here: `append` and `truncate`. A hole that is met is damage, and so is an unwritten or
shared extent, whose features the volume lacks.

Every walk is bounded by the depth of the tree (`TREE_DEPTH_MAX`) and by depths that must fall by
one with each step, so a tree that points at itself ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fs.errors import corrupt
from fs.ocfs2.blocks import Buffer
from fs.ocfs2.dinode import Dinodes, Ocfs2Inode
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.format import (
    BLOCK_EXTENTS,
    DINODE_EXTENTS,
    EXTENT_BLOCK_LIST_OFFSET,
    EXTENT_BLOCK_SIGNATURE,
    EXTENT_LIST_HEADER_BYTES,
    ID2_OFFSET,
    LEAF_CLUSTERS_MAX,
    RECORD_BYTES,
    TREE_DEPTH_MAX,
    VALUE_EXTENTS,
    Dinode,
    ExtentBlock,
    ExtentListHeader,
    ExtentRecord,
    ValueRoot,
    read_extent,
    write_extent,
)
from fs.ocfs2.transaction import Transactions


class NodeAllocator(Protocol):
    """Where extent blocks come from."""

    def allocate_node(self) -> tuple[int, int, int]:
        """A block, the slot of its allocator and its bit there."""
        ...

    def free_node(self, block: int, slot: int, bit: int) -> None:
        """Give an extent block back."""
        ...


@dataclass(slots=True)
class Value:
    """The value of an attribute of inode `ino`, outside the block that has the root at `offset`."""

    ino: int
    block: int
    offset: int
    clusters: int

    @property
    def list_offset(self) -> int:
        """Of the root's extent list."""
        return self.offset + ValueRoot.STRUCT.size


class Node(NamedTuple):
    """One list of a tree, checked."""

    buffer: Buffer
    offset: int
    depth: int
    room: int
    used: int

    def record(self, index: int) -> ExtentRecord:
        """Record `index`."""
        return read_extent(self.buffer.data, self.offset, index, leaf=not self.depth)

    def first(self, index: int) -> int:
        """`record(index).first`, faster."""
        at = self.offset + 16 + index * 16
        return int.from_bytes(self.buffer.data[at : at + 4], "little")


class Extents:
    """Maps, appends and removes the clusters of inodes; the caller stores the inode."""

    def __init__(self, transactions: Transactions, dinodes: Dinodes, blocks: int) -> None:
        self._transactions = transactions
        self._dinodes = dinodes
        self._blocks = blocks

    # Reading

    def _root(self, inode: Ocfs2Inode | Value) -> Node:
        if isinstance(inode, Value):
            buffer = self._transactions.get(inode.block, inode.ino)
            node = self._node(inode, buffer, inode.list_offset, VALUE_EXTENTS)
        elif inode.flags & (InodeFlag.BITMAP | InodeFlag.DEALLOC):
            raise corrupt(f"inode {inode.ino} is an allocator and has no extents")
        else:
            node = self._node(inode, self._dinodes.buffer(inode), ID2_OFFSET, DINODE_EXTENTS)
        if node.depth > TREE_DEPTH_MAX:
            raise corrupt(f"inode {inode.ino} has an extent tree of depth {node.depth}")
        return node

    def _node(self, inode: Ocfs2Inode | Value, buffer: Buffer, offset: int, room: int) -> Node:
        head = ExtentListHeader.read(buffer.data, offset)
        if not 0 < head.count <= room or head.used > head.count:
            raise corrupt(
                f"inode {inode.ino}: extent list in block {buffer.block} has {head.used} records"
                f" of {head.count}"
            )
        return Node(buffer, offset, head.depth, head.count, head.used)

    def _child(self, inode: Ocfs2Inode | Value, parent: Node, index: int) -> Node:
        block = parent.record(index).block
        if not 0 < block < self._blocks:
            raise corrupt(f"inode {inode.ino} has an extent block in block {block}")
        buffer = self._transactions.get(block, inode.ino)
        head = ExtentBlock.read(buffer.data)
        if (
            head.signature != EXTENT_BLOCK_SIGNATURE
            or head.block != block
            or head.fs_generation != self._dinodes.fs_generation
        ):
            raise corrupt(f"inode {inode.ino}: block {block} is no extent block of this volume")
        node = self._node(inode, buffer, EXTENT_BLOCK_LIST_OFFSET, BLOCK_EXTENTS)
        if node.depth != parent.depth - 1:
            raise corrupt(f"inode {inode.ino}: extent block {block} has depth {node.depth}")
        return node

    def _leaf_of(self, inode: Ocfs2Inode | Value, cluster: int) -> Node:
        node = self._root(inode)
        while node.depth:
            index = self._search(node, cluster)
            if index < 0:
                raise corrupt(f"inode {inode.ino} has a hole at cluster {cluster}")
            node = self._child(inode, node, index)
        return node

    @staticmethod
    def _search(node: Node, cluster: int) -> int:
        """The last record that begins at or before `cluster`, -1: none."""
        low, high = 0, node.used
        while low < high:
            middle = (low + high) // 2
            if node.first(middle) <= cluster:
                low = middle + 1
            else:
                high = middle
        return low - 1

    def map(self, inode: Ocfs2Inode | Value, index: int, count: int) -> list[int]:
        """Block numbers of `count` clusters from `index`; 0 beyond the last one."""
        blocks: list[int] = []
        inside = max(0, min(count, inode.clusters - index))
        while len(blocks) < inside:
            cluster = index + len(blocks)
            leaf = self._leaf_of(inode, cluster)
            at = self._search(leaf, cluster)
            while at >= 0 and at < leaf.used and len(blocks) < inside:
                cluster = index + len(blocks)
                record = self._checked(inode, leaf.record(at))
                skip = cluster - record.first
                if skip < 0 or skip >= record.clusters:
                    raise corrupt(f"inode {inode.ino} has a hole at cluster {cluster}")
                length = min(record.clusters - skip, inside - len(blocks))
                blocks += range(record.block + skip, record.block + skip + length)
                at += 1
            if at < 0:
                raise corrupt(f"inode {inode.ino} has a hole at cluster {cluster}")
        return blocks + [0] * (count - len(blocks))

    def _checked(self, inode: Ocfs2Inode | Value, record: ExtentRecord) -> ExtentRecord:
        if record.flags:
            raise corrupt(f"inode {inode.ino} has an extent with flags {record.flags:#x}")
        if (
            not record.clusters
            or record.block < 1
            or (record.block + record.clusters > self._blocks)
        ):
            raise corrupt(
                f"inode {inode.ino} has {record.clusters} clusters in block {record.block}"
            )
        return record

    def _right_edge(self, inode: Ocfs2Inode | Value) -> list[Node]:
        """The lists from the root to the last leaf."""
        path = [self._root(inode)]
        while path[-1].depth:
            if not path[-1].used:
                raise corrupt(f"inode {inode.ino} has an empty inner extent list")
            path.append(self._child(inode, path[-1], path[-1].used - 1))
        return path

    # Growing

    def append(
        self, inode: Ocfs2Inode | Value, block: int, count: int, allocator: NodeAllocator
    ) -> None:
        """Clusters `block .. block+count-1` of the disk follow the file's last one."""
        while count:
            step = min(count, LEAF_CLUSTERS_MAX)
            self._append(inode, block, step, allocator)
            self._set_clusters(inode, inode.clusters + step)
            block += step
            count -= step

    def _append(
        self, inode: Ocfs2Inode | Value, block: int, count: int, allocator: NodeAllocator
    ) -> None:
        path = self._right_edge(inode)
        leaf = path[-1]
        if leaf.used:
            last = self._checked(inode, leaf.record(leaf.used - 1))
            if last.first + last.clusters != inode.clusters:
                raise corrupt(f"inode {inode.ino} has extents to {last.first + last.clusters}")
            if last.block + last.clusters == block and (last.clusters + count <= LEAF_CLUSTERS_MAX):
                self._put(leaf, leaf.used - 1, last._replace(clusters=last.clusters + count))
                self._widen(inode, path[:-1], inode.clusters + count)
                return
        elif inode.clusters:
            raise corrupt(f"inode {inode.ino} lacks the extents of {inode.clusters} clusters")
        if leaf.used == leaf.room:
            path = self._add_leaf(inode, path, allocator)
            leaf = path[-1]
        self._put(leaf, leaf.used, ExtentRecord(inode.clusters, count, block))
        self._widen(inode, path[:-1], inode.clusters + count)

    def _put(self, node: Node, index: int, record: ExtentRecord) -> None:
        self._transactions.modify(node.buffer)
        write_extent(node.buffer.data, node.offset, index, record)
        if index == node.used:
            self._set_used(node, index + 1)

    def _set_used(self, node: Node, used: int) -> None:
        self._transactions.modify(node.buffer)
        head = ExtentListHeader.read(node.buffer.data, node.offset)
        head.used = used
        head.write_into(node.buffer.data, node.offset)

    def _widen(self, inode: Ocfs2Inode | Value, inner: list[Node], end: int) -> None:
        """The last record of each inner list ends at cluster `end` now."""
        for node in inner:
            used = ExtentListHeader.read(node.buffer.data, node.offset).used
            last = node.record(used - 1)
            if last.first >= end:
                raise corrupt(f"inode {inode.ino} has a subtree at {last.first} of {end} clusters")
            self._put(node, used - 1, last._replace(clusters=end - last.first))

    def _add_leaf(
        self, inode: Ocfs2Inode | Value, path: list[Node], allocator: NodeAllocator
    ) -> list[Node]:
        """Room for a record at the right edge; the new path to it."""
        old_leaf = path[-1]
        level = len(path) - 2
        while level >= 0 and path[level].used == path[level].room:
            level -= 1
        if level < 0:
            path = self._deepen(inode, path[0], allocator)
            if not path[-1].depth:
                return path  # a block has room for more records than the root had
            level = 1
        # From the leaf upwards, so that each new block can be named by the one above it.
        below = 0
        fresh: list[Node] = []
        for depth in range(path[level].depth):
            node = self._new_block(inode, depth, allocator)
            if below:
                self._put(node, 0, ExtentRecord(inode.clusters, 0, below))
                node = node._replace(used=1)
            fresh.insert(0, node)
            below = node.buffer.block
        above = path[level]
        self._put(above, above.used, ExtentRecord(inode.clusters, 0, below))
        self._chain(inode, old_leaf, fresh[-1])
        return [*path[:level], above._replace(used=above.used + 1), *fresh]

    def _chain(self, inode: Ocfs2Inode | Value, old_leaf: Node, leaf: Node) -> None:
        self._set_next_leaf(old_leaf.buffer, leaf.buffer.block)
        self._set_last(inode, leaf.buffer.block)

    def _set_next_leaf(self, buffer: Buffer, block: int) -> None:
        self._transactions.modify(buffer)
        head = ExtentBlock.read(buffer.data)
        head.next_leaf = block
        head.write_into(buffer.data)

    def _set_clusters(self, inode: Ocfs2Inode | Value, clusters: int) -> None:
        if isinstance(inode, Ocfs2Inode):
            self._dinodes.set_clusters(inode, clusters)
            return
        inode.clusters = clusters
        buffer = self._transactions.get(inode.block, inode.ino)
        self._transactions.modify(buffer)
        root = ValueRoot.read(buffer.data, inode.offset)
        root.clusters = clusters
        root.write_into(buffer.data, inode.offset)

    def _set_last(self, inode: Ocfs2Inode | Value, block: int) -> None:
        if isinstance(inode, Value):
            buffer = self._transactions.get(inode.block, inode.ino)
            self._transactions.modify(buffer)
            root = ValueRoot.read(buffer.data, inode.offset)
            root.last_extent_block = block
            root.write_into(buffer.data, inode.offset)
            return
        buffer = self._dinodes.buffer(inode)
        self._transactions.modify(buffer)
        raw = Dinode.read(buffer.data)
        raw.last_extent_block = block
        raw.write_into(buffer.data)

    def _deepen(
        self, inode: Ocfs2Inode | Value, root: Node, allocator: NodeAllocator
    ) -> list[Node]:
        """Move the root's records into a new block below it; the tree is one level deeper.

        Returns the path from the root to the new block, or to the old right edge below it.
        """
        if root.depth >= TREE_DEPTH_MAX:
            raise corrupt(f"inode {inode.ino} needs a deeper extent tree")
        node = self._new_block(inode, root.depth, allocator)
        size = root.used * 16
        node.buffer.data[node.offset + 16 : node.offset + 16 + size] = root.buffer.data[
            root.offset + 16 : root.offset + 16 + size
        ]
        self._set_used(node, root.used)
        self._transactions.modify(root.buffer)
        records = root.offset + EXTENT_LIST_HEADER_BYTES
        size = root.room * RECORD_BYTES
        root.buffer.data[records : records + size] = bytes(size)
        head = ExtentListHeader(depth=root.depth + 1, count=root.room, used=1)
        head.write_into(root.buffer.data, root.offset)
        write_extent(
            root.buffer.data, root.offset, 0, ExtentRecord(0, inode.clusters, node.buffer.block)
        )
        if not root.depth:
            self._set_last(inode, node.buffer.block)
        return [
            root._replace(depth=root.depth + 1, used=1),
            node._replace(used=root.used),
        ]

    def _new_block(self, inode: Ocfs2Inode | Value, depth: int, allocator: NodeAllocator) -> Node:
        block, slot, bit = allocator.allocate_node()
        buffer = self._transactions.create(block, inode.ino)
        ExtentBlock(
            suballoc_slot=slot, suballoc_bit=bit, fs_generation=self._dinodes.fs_generation,
            block=block,
        ).write_into(buffer.data)  # fmt: skip
        ExtentListHeader(depth=depth, count=BLOCK_EXTENTS).write_into(
            buffer.data, EXTENT_BLOCK_LIST_OFFSET
        )
        return Node(buffer, EXTENT_BLOCK_LIST_OFFSET, depth, BLOCK_EXTENTS, 0)

    # Shrinking

    def truncate(
        self, inode: Ocfs2Inode | Value, clusters: int, allocator: NodeAllocator, records_max: int
    ) -> list[tuple[int, int]]:
        """Take clusters from `clusters` on away, at most `records_max` extents in one call.

        Returns the (block, count) that the caller frees. When `inode.clusters` is still too many
        afterwards, it calls again.
        """
        taken: list[tuple[int, int]] = []
        while inode.clusters > clusters and len(taken) < records_max:
            path = self._right_edge(inode)
            leaf = path[-1]
            if not leaf.used:
                raise corrupt(f"inode {inode.ino} lacks the extents of {inode.clusters} clusters")
            last = self._checked(inode, leaf.record(leaf.used - 1))
            end = last.first + last.clusters
            if end != inode.clusters:
                raise corrupt(f"inode {inode.ino} has extents to {end} of {inode.clusters}")
            keep = max(0, clusters - last.first)
            taken.append((last.block + keep, last.clusters - keep))
            self._set_clusters(inode, last.first + keep)
            if keep:
                self._put(leaf, leaf.used - 1, last._replace(clusters=keep))
                self._widen(inode, path[:-1], inode.clusters)
            else:
                self._remove_last(inode, path, allocator)
        return taken

    def _remove_last(
        self, inode: Ocfs2Inode | Value, path: list[Node], allocator: NodeAllocator
    ) -> None:
        """The last record of the last leaf goes, and each list that is empty then."""
        level = len(path) - 1
        while True:
            node = path[level]
            self._clear_record(node, node.used - 1)
            if node.used > 1 or not level:
                break
            head = ExtentBlock.read(node.buffer.data)
            allocator.free_node(node.buffer.block, head.suballoc_slot, head.suballoc_bit)
            level -= 1
        if level == len(path) - 1:
            self._widen(inode, path[:-1], inode.clusters)
            return
        if not level and path[0].used == 1:
            ExtentListHeader(count=path[0].room).write_into(path[0].buffer.data, path[0].offset)
            self._set_last(inode, 0)
            return
        edge = self._right_edge(inode)
        self._widen(inode, edge[:-1], inode.clusters)
        self._set_next_leaf(edge[-1].buffer, 0)
        self._set_last(inode, edge[-1].buffer.block)

    def _clear_record(self, node: Node, index: int) -> None:
        self._transactions.modify(node.buffer)
        write_extent(node.buffer.data, node.offset, index, ExtentRecord(0, 0, 0))
        self._set_used(node, index)
