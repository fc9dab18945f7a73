"""Extent trees of depth 2 and more: read, grown, cut and removed by us, judged by the real tools.

A file needs 61237 extents before its tree has to be that deep, if every list is full. So the trees
here are made out of lists that are not, which the format allows (Linux leaves such lists behind
when it inserts or removes in the middle of a file): each list outside of the right edge has one
record, and each list on it is full, so that the next extent deepens the tree. fsck.ocfs2 judges
what was made before any of our code meets it. With CRASH_CLUSTER=1 a file is fragmented until its
tree is deep in earnest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.format import (
    BLOCK_EXTENTS,
    DINODE_EXTENTS,
    EXTENT_BLOCK_LIST_OFFSET,
    ID2_OFFSET,
    Dinode,
    ExtentBlock,
    ExtentListHeader,
    ExtentRecord,
    write_extent,
)
from fs.ocfs2.names import wants_child
from fs.vfs import Vfs
from tests.support.ocfs2 import ALL, BLOCK, Volume, debugfs, faults, problems, read
from tests.t3_fs.ocfs2.conftest import MakeVolume

FILE = "/deep"
STEP = 100
"""Extents in one operation."""


def fragment(vfs: Vfs, extents: int, *, with_data: bool = True) -> None:
    """`FILE` grows by so many clusters, each of which lies two behind the one before."""
    fs = vfs.fs
    assert isinstance(fs, Ocfs2)
    volume = fs._volume
    inode = fs.lookup(fs.root, FILE[1:].encode())

    def grow() -> None:
        volume.touch(inode)
        goal = volume.extents.map(inode, inode.clusters - 1, 1)[0] + 2 if inode.clusters else 0
        for _ in range(min(STEP, end - inode.clusters)):
            found = volume.space.clusters.allocate(1, goal)
            volume.extents.append(inode, found.block, 1, volume.space)
            goal = found.block + 2
        volume.dinodes.store(inode)

    end = inode.clusters + extents
    while inode.clusters < end:
        volume.run([wants_child(inode), volume.space.wants_clusters], grow)
    for number in range(inode.size // BLOCK, end if with_data else 0):
        (block,) = fs.map_blocks(inode, number, 1)
        fs.device.write(block, 1, page(number))
    inode.size = inode.clusters * BLOCK
    fs.write_inode(inode)


def page(number: int) -> bytes:
    """What a page of a fragmented file holds."""
    return b"%016d" % number * (BLOCK // 16)


def contents(pages: int) -> bytes:
    """What a fragmented file holds."""
    return b"".join(page(number) for number in range(pages))


class Tree:
    """The extents of `FILE`, in a tree that is full where the next extent goes.

    Made in two steps: `take_blocks` while the volume is mounted, `write` when it is not.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.blocks: list[tuple[int, int, int]] = []
        """Block, slot and bit of each extent block."""

    @property
    def extents(self) -> int:
        """So many are needed: one for each list outside of the edge, and a full last leaf."""
        return (DINODE_EXTENTS - 1) + (self.depth - 1) * (BLOCK_EXTENTS - 1) + BLOCK_EXTENTS

    def take_blocks(self, vfs: Vfs) -> None:
        """Extent blocks: those that the file has, and more from the allocator."""
        fs = vfs.fs
        assert isinstance(fs, Ocfs2)
        volume = fs._volume
        inode = fs.lookup(fs.root, FILE[1:].encode())
        assert inode.clusters == self.extents
        root = volume.extents._root(inode)
        assert root.depth == 1
        for number in range(root.used):
            block = root.record(number).block
            head = ExtentBlock.read(volume.transactions.get(block, inode.ino).data)
            self.blocks.append((block, head.suballoc_slot, head.suballoc_bit))
        # A list off the edge has one block of each depth below the list on the edge that names it.
        wanted = (DINODE_EXTENTS - 1) * self.depth + (BLOCK_EXTENTS - 1) * sum(range(self.depth))
        wanted += self.depth

        def take() -> None:
            for _ in range(min(STEP, wanted - len(self.blocks))):
                self.blocks.append(volume.space.allocate_node())

        while len(self.blocks) < wanted:
            volume.run([wants_child(inode), volume.space.wants_clusters], take)
        self.ino = inode.ino
        self.disk = fs.map_blocks(inode, 0, inode.clusters)
        self.fs_generation = volume.super.fs_generation

    def write(self, path: Path) -> None:
        """Put the tree into the image."""
        with path.open("r+b") as self._file:
            self._free = iter(self.blocks)
            self._extents = iter(
                ExtentRecord(number, 1, block) for number, block in enumerate(self.disk)
            )
            self._leaves: list[tuple[int, bytearray]] = []
            root = bytearray(self._read(self.ino))
            records = list(self._children(self.depth, DINODE_EXTENTS, edge=True))
            root[ID2_OFFSET:] = bytes(BLOCK - ID2_OFFSET)
            _fill(root, ID2_OFFSET, ExtentListHeader(depth=self.depth), records)
            for (block, data), after in zip(self._leaves, [*self._leaves[1:], None], strict=True):
                leaf = replace(ExtentBlock.read(data), next_leaf=after[0] if after else 0)
                leaf.write_into(data)
                self._write(block, data)
            replace(Dinode.read(root), last_extent_block=self._leaves[-1][0]).write_into(root)
            self._write(self.ino, root)
            assert not list(self._extents)
            assert not list(self._free)

    def _children(self, depth: int, room: int, *, edge: bool) -> Iterator[ExtentRecord]:
        """The records of a list."""
        count = room if edge else 1
        if not depth:
            for _ in range(count):
                yield next(self._extents)
            return
        for number in range(count):
            yield self._block(depth - 1, edge=edge and number == count - 1)

    def _block(self, depth: int, *, edge: bool) -> ExtentRecord:
        """An extent block; the record that stands for it."""
        block, slot, bit = next(self._free)
        records = list(self._children(depth, BLOCK_EXTENTS, edge=edge))
        data = bytearray(BLOCK)
        ExtentBlock(
            suballoc_slot=slot, suballoc_bit=bit, fs_generation=self.fs_generation, block=block
        ).write_into(data)
        header = ExtentListHeader(depth=depth, count=BLOCK_EXTENTS)
        _fill(data, EXTENT_BLOCK_LIST_OFFSET, header, records)
        if depth:
            self._write(block, data)
        else:
            self._leaves.append((block, data))
        clusters = sum(record.clusters for record in records)
        return ExtentRecord(records[0].first, clusters, block)

    def _read(self, block: int) -> bytes:
        self._file.seek(block * BLOCK)
        return self._file.read(BLOCK)

    def _write(self, block: int, data: bytearray) -> None:
        self._file.seek(block * BLOCK)
        self._file.write(data)


def _fill(
    data: bytearray, offset: int, header: ExtentListHeader, records: list[ExtentRecord]
) -> None:
    replace(header, used=len(records)).write_into(data, offset)
    for number, record in enumerate(records):
        write_extent(data, offset, number, record)


def depth_of(vfs: Vfs) -> int:
    """Of the tree of `FILE`."""
    fs = vfs.fs
    assert isinstance(fs, Ocfs2)
    inode = fs.lookup(fs.root, FILE[1:].encode())
    with fs.reading(inode):
        return fs._volume.extents._root(inode).depth


def debugfs_depth(path: Path) -> int:
    """The same, by debugfs.ocfs2."""
    found = re.search(r"Tree Depth: (\d+)", debugfs(path, f"stat {FILE}"))
    assert found
    return int(found[1])


def judged(volume: Volume, folder: Path) -> Vfs:
    """Both checkers and debugfs.ocfs2 are content with what is there; mounted again."""
    volume.judge(folder)
    return volume.mount()


def prepare(volume: Volume, depth: int) -> None:
    """Leave `FILE` with a full tree of this depth, and everything unmounted."""
    vfs = volume.mount()
    vfs.close(vfs.open(FILE, os.O_CREAT | os.O_WRONLY))
    tree = Tree(depth)
    fragment(vfs, tree.extents)
    tree.take_blocks(vfs)
    volume.unmount()
    tree.write(volume.path)
    assert faults(volume.path) == []
    assert problems(volume.path) == []
    assert debugfs_depth(volume.path) == depth


@pytest.mark.parametrize("depth", [1, 2])
def test_a_full_tree_gets_deeper_and_gives_everything_back(
    make_image: MakeVolume, tmp_path: Path, depth: int
) -> None:
    """By one level with one extent; cut to each of its parts, grown again, removed."""
    volume = make_image(64)
    prepare(volume, depth)
    vfs = volume.mount()
    full = Tree(depth).extents
    assert read(vfs, FILE) == contents(full)
    fragment(vfs, 1)
    assert depth_of(vfs) == depth + 1
    fragment(vfs, 2 * BLOCK_EXTENTS)
    whole = full + 1 + 2 * BLOCK_EXTENTS
    vfs = judged(volume, tmp_path / "grown")
    assert debugfs_depth(volume.path) == depth + 1
    data = contents(whole)
    assert read(vfs, FILE) == data

    # Inside the last leaf, its first extent, the last of the old edge, inside an old sparse list.
    for pages in (whole - 5, full + 1, full, DINODE_EXTENTS + 100, 100):
        vfs.truncate(FILE, pages * BLOCK - 7)
        assert read(vfs, FILE) == data[: pages * BLOCK - 7]
    vfs = judged(volume, tmp_path / "cut")
    assert read(vfs, FILE) == data[: 100 * BLOCK - 7]
    vfs.truncate(FILE, 200 * BLOCK)
    assert read(vfs, FILE) == data[: 100 * BLOCK - 7].ljust(200 * BLOCK, b"\0")

    vfs.unlink(FILE)
    vfs = judged(volume, tmp_path / "empty")
    assert vfs.listdir("/") == ["lost+found"]


@pytest.mark.timeout(600)
def test_full_lists_are_cut_in_bounded_operations(make_image: MakeVolume) -> None:
    """As fragmentation makes them: what is cut or removed has several full leaves."""
    depth = 2 if ALL else 1
    volume = make_image(600 if ALL else 64)
    vfs = volume.mount()
    vfs.close(vfs.open(FILE, os.O_CREAT | os.O_WRONLY))
    while depth_of(vfs) < depth:
        fragment(vfs, 1000, with_data=False)
    inode = vfs.fs.lookup(vfs.fs.root, FILE[1:].encode())
    pages = inode.size // BLOCK
    blocks = vfs.fs.map_blocks(inode, 0, pages + 1)
    assert len(set(blocks[:-1])) == pages
    assert blocks[-1] == 0
    volume.unmount()
    assert faults(volume.path) == []
    assert debugfs_depth(volume.path) == depth
    vfs = volume.mount()
    vfs.truncate(FILE, (pages // 2) * BLOCK)
    assert depth_of(vfs) == depth
    inode = vfs.fs.lookup(vfs.fs.root, FILE[1:].encode())
    assert vfs.fs.map_blocks(inode, 0, pages // 2 + 1) == [*blocks[: pages // 2], 0]
    volume.unmount()
    assert faults(volume.path) == []
    vfs = volume.mount()
    vfs.unlink(FILE)
