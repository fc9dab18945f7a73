"""Extended attributes of inodes: those of others, room for ours, damage that our checker sees."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from fs.block.device import BLOCK_BYTES
from fs.ocfs2 import attributes
from fs.ocfs2.attributes import Attributes, attributes_in
from fs.ocfs2.checksums import Capacity
from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.format import (
    ATTRIBUTE_LOCAL,
    AttributeBlock,
    AttributeEntry,
    AttributesHeader,
    ExtentListHeader,
    Structure,
    ValueRoot,
)
from fs.vfs import Vfs
from tests.support.ocfs2 import Volume, faults, problems
from tests.t3_fs.ocfs2.test_fs_checksums import change, file_of, verdicts
from tests.t3_fs.ocfs2.test_fs_large_checksums import (
    fill,
    free_blocks,
    mount,
    truncate,
)

PAGE = BLOCK_BYTES
SMALL = Capacity(inside_pages=2, block_pages=3)
SHORT = SMALL._replace(chunks=4)
"""And memory has a part of a file only."""


@pytest.fixture
def volume(volume_with_attributes: Volume) -> Volume:
    """The one that all here are about."""
    return volume_with_attributes


def add_foreign(vfs: Vfs, path: str, name: bytes, *, outside: bool) -> None:
    """An attribute as Linux might have set it."""
    assert isinstance(vfs.fs, Ocfs2)
    volume = vfs.fs._volume
    inode = file_of(vfs, path)[1]

    def body() -> None:
        with pytest.MonkeyPatch.context() as other:
            other.setattr(attributes, "NAME", name)
            volume.attributes.extend(inode, 2)
            if not outside:
                cut_to_local(volume.attributes, inode)
        volume.dinodes.store(inode)

    with vfs.fs.writing(inode):
        volume.run([volume.space.wants_clusters], body)


def cut_to_local(own: Attributes, inode: Any) -> None:
    """Its value lies in the attribute block."""
    value = own.value(inode)
    assert value is not None
    own._space.cut(value, 0, 9)
    buffer = own._block(inode)
    one = next(one for one in attributes_in(buffer.data) if one.root == value.offset)
    at = 0x40 + one.number * AttributeEntry.STRUCT.size
    one.entry.kind |= ATTRIBUTE_LOCAL
    one.entry.value_bytes = 4
    one.entry.write_into(buffer.data, at)


def names(vfs: Vfs, path: str) -> list[bytes]:
    """Of a file's attributes."""
    assert isinstance(vfs.fs, Ocfs2)
    inode = file_of(vfs, path)[1]
    if not inode.attribute_block:
        return []
    block = vfs.fs._volume.attributes._block(inode).data
    assert AttributesHeader.read(block).count
    return [one.name for one in attributes_in(block)]


@pytest.mark.parametrize("ours_first", [True, False])
def test_attributes_of_others_are_left_alone(volume: Volume, ours_first: bool) -> None:
    """And freed with their inode."""
    vfs = mount(volume)
    fill(vfs, "/first", b"x" * 9 * PAGE)
    vfs.sync()
    free = free_blocks(vfs)
    fill(vfs, "/f", b"x" * (9 if ours_first else 1) * PAGE)
    add_foreign(vfs, "/f", b"local", outside=False)
    add_foreign(vfs, "/f", b"remote", outside=True)
    change(vfs, "/f", 0, b"x" * 9 * PAGE)
    ours = [b"tmem.checksums"]
    theirs = [b"local", b"remote"]
    assert names(vfs, "/f") == (ours + theirs if ours_first else theirs + ours)
    volume.unmount()
    assert faults(volume.path) == []
    assert problems(volume.path) == []
    vfs = mount(volume)
    assert verdicts(vfs, "/f") == [True] * 9
    truncate(vfs, "/f", 0)
    assert names(vfs, "/f") == theirs
    volume.unmount()
    assert faults(volume.path) == []
    assert problems(volume.path) == []
    vfs = mount(volume)
    vfs.unlink("/f")
    vfs.sync()
    assert free_blocks(vfs) == free


def test_an_attribute_block_without_room_leaves_pages_unknown(volume: Volume) -> None:
    """There may be many attributes of others."""
    vfs = mount(volume)
    fill(vfs, "/f", b"x")
    with contextlib.suppress(AssertionError):
        while True:
            add_foreign(vfs, "/f", b"attribute %03d" % len(names(vfs, "/f")), outside=False)
    assert 30 < len(names(vfs, "/f")) < 60
    change(vfs, "/f", 0, b"x" * 9 * PAGE)
    assert b"tmem.checksums" not in names(vfs, "/f")
    assert verdicts(vfs, "/f") == [True] * 9
    volume.unmount()
    assert verdicts(mount(volume), "/f") == [True] * 2 + [None] * 7


DAMAGES: dict[str, tuple[type[Structure], int, dict[str, object]]] = {
    "signature": (AttributeBlock, 0, {"signature": b"XATTR02\0"}),
    "block": (AttributeBlock, 0, {"block": 5}),
    "generation": (AttributeBlock, 0, {"fs_generation": 5}),
    "suballocator": (AttributeBlock, 0, {"suballoc_bit": 5}),
    "count": (AttributesHeader, 0x30, {"count": 0xFFFF}),
    "empty": (AttributesHeader, 0x30, {"count": 0}),
    "name": (AttributeEntry, 0x40, {"name_offset": 4040}),
    "over the header": (AttributeEntry, 0x40, {"name_offset": 8}),
    "hash": (AttributeEntry, 0x40, {"name_hash": 8}),
    "size": (AttributeEntry, 0x40, {"value_bytes": 5 * PAGE}),
    "clusters": (ValueRoot, 4048, {"clusters": 9}),
    "no clusters": (ValueRoot, 4048, {"clusters": 0}),
    "last leaf": (ValueRoot, 4048, {"last_extent_block": 9}),
    "depth": (ExtentListHeader, 4064, {"depth": 1}),
    "records": (ExtentListHeader, 4064, {"count": 2}),
    "none used": (ExtentListHeader, 4064, {"used": 0}),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_seen(volume: Volume, what: str) -> None:
    """By our checker; a mount may find it, and works with all else."""
    vfs = mount(volume)
    fill(vfs, "/f", bytes(6 * PAGE))
    fill(vfs, "/other", bytes(6 * PAGE))
    block = file_of(vfs, "/f")[1].attribute_block
    volume.unmount()
    volume.judged = False
    structure, offset, fields = DAMAGES[what]
    with volume.path.open("r+b") as image:
        image.seek(block * PAGE)
        data = bytearray(image.read(PAGE))
        assert data.find(b"tmem.checksums") == 4048 - 16
        raw = structure.read(data, offset)
        for name, value in fields.items():
            assert getattr(raw, name) != value
            setattr(raw, name, value)
        raw.write_into(data, offset)
        image.seek(block * PAGE)
        image.write(data)
    assert problems(volume.path)
    vfs = mount(volume)
    for work in (
        lambda: verdicts(vfs, "/f"),
        lambda: change(vfs, "/f", 0, b"x"),
        lambda: change(vfs, "/f", 6 * PAGE, bytes(9 * PAGE)),
        lambda: truncate(vfs, "/f", PAGE),
        lambda: vfs.unlink("/f"),
        vfs.sync,
    ):
        with contextlib.suppress(OSError):
            work()
    change(vfs, "/other", 0, b"x" * 9 * PAGE)
    assert verdicts(vfs, "/other") == [True] * 9
