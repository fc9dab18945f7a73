"""Checksums of pages in the inodes' blocks: what they cover, and when they are void.

fsck.ocfs2 and debugfs.ocfs2 judge every image at the end. Crashes are in `t5_cluster/ocfs2`.
"""

from __future__ import annotations

import os
import random

import pytest

from fs.block.device import BLOCK_BYTES
from fs.ocfs2 import checksumarea as area
from fs.ocfs2.checksums import Checksums
from fs.ocfs2.dinode import Ocfs2Inode, own
from fs.ocfs2.filesystem import Ocfs2
from fs.vfs import Vfs
from tests.support.ocfs2 import Volume, read, write

PAGE = BLOCK_BYTES
COVERED = 476
"""Pages of a file of one extent whose checksums have room."""


def file_of(vfs: Vfs, path: str) -> tuple[Checksums, Ocfs2Inode]:
    """Checksums of the mount, and a file in it."""
    assert isinstance(vfs.fs, Ocfs2)
    assert vfs.fs.checksums is not None
    return vfs.fs.checksums, vfs.fs.iget(vfs.stat(path).st_ino)


def verdicts(vfs: Vfs, path: str) -> list[bool | None]:
    """For each page of a file: whether the disk's content has the checksum, None without one."""
    checksums, inode = file_of(vfs, path)
    found: list[bool | None] = []
    with vfs.fs.reading(inode):
        for index in range(-(-inode.size // PAGE)):
            page = vfs.pages.read(inode, index * PAGE, PAGE).ljust(PAGE, b"\0")
            known = checksums.known(inode, index, 1)
            found.append(checksums.matches(inode, index, memoryview(page)) if known else None)
    return found


def change(vfs: Vfs, path: str, offset: int, data: bytes) -> None:
    """Write somewhere into a file."""
    handle = vfs.open(path, os.O_RDWR)
    try:
        vfs.pwrite(handle, data, offset)
    finally:
        vfs.close(handle)


def test_a_file_is_known_after_a_mount(volume: Volume) -> None:
    """Of any size up to what has room; and not beyond."""
    rng = random.Random(1)
    sizes = {"/empty": 0, "/byte": 1, "/page": PAGE, "/odd": 3 * PAGE + 5, "/large": 500 * PAGE}
    vfs = volume.mount(keep_checksums=True)
    for path, size in sizes.items():
        write(vfs, path, rng.randbytes(size))
    volume.unmount()
    vfs = volume.mount(keep_checksums=True)
    for path, size in sizes.items():
        pages = -(-size // PAGE)
        covered = min(pages, COVERED)
        assert verdicts(vfs, path) == [True] * covered + [None] * (pages - covered), path


def test_a_page_of_another_place_does_not_pass(volume: Volume) -> None:
    """Equal bytes as another page, in another file, and in the next file with the same number."""
    vfs = volume.mount(keep_checksums=True)
    write(vfs, "/a", bytes(PAGE) * 2)
    write(vfs, "/b", bytes(PAGE))
    checksums, a = file_of(vfs, "/a")
    _, b = file_of(vfs, "/b")
    assert a.checksums is not None
    assert b.checksums is not None
    b.checksums.salt = a.checksums.salt
    values = {*a.checksums.chunks[0][:2], *b.checksums.chunks[0][:1]}
    b.generation += 1
    checksums.written(b, 0, memoryview(bytes(PAGE)))
    b.generation -= 1
    assert len(values | {*b.checksums.chunks[0][:1]}) == 4
    checksums.written(b, 0, memoryview(bytes(PAGE)))


def test_a_wrong_page_does_not_pass(volume: Volume) -> None:
    """Not even with one wrong bit."""
    vfs = volume.mount(keep_checksums=True)
    data = random.Random(2).randbytes(PAGE)
    write(vfs, "/f", data)
    checksums, inode = file_of(vfs, "/f")
    for bit in (0, PAGE * 4, PAGE * 8 - 1):
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        assert not checksums.matches(inode, 0, memoryview(wrong))
    assert checksums.matches(inode, 0, memoryview(data))


def test_changes_in_place_are_voided_first_and_known_after(volume: Volume) -> None:
    """One commit for many changes of a file between two syncs, none for what is new."""
    vfs = volume.mount(keep_checksums=True)
    write(vfs, "/f", bytes(8 * PAGE))
    vfs.sync()
    checksums, _ = file_of(vfs, "/f")
    change(vfs, "/f", 8 * PAGE, b"new" * PAGE)
    change(vfs, "/f", 11 * PAGE, b"behind the end")
    change(vfs, "/f", 11 * PAGE + 14, b"and more of that")
    assert checksums.voids == 0
    for offset in (0, 3 * PAGE + 7, 5 * PAGE - 1, 7):
        change(vfs, "/f", offset, b"other")
    assert checksums.voids == 1
    handle = vfs.open("/f", os.O_RDWR)
    vfs.sync()
    vfs.ftruncate(handle, 2 * PAGE + 10)
    assert checksums.voids == 2
    vfs.ftruncate(handle, 6 * PAGE)
    vfs.close(handle)
    volume.unmount()
    vfs = volume.mount(keep_checksums=True)
    # What was filled with zeros beneath the page cache nobody has seen yet.
    assert verdicts(vfs, "/f") == [True] * 3 + [None] * 3


def test_a_commit_before_the_change_leaves_the_page_void(volume: Volume) -> None:
    """One that comes between `changing` and the data: others of the file are known again."""
    vfs = volume.mount(keep_checksums=True)
    write(vfs, "/f", bytes(3 * PAGE))
    vfs.sync()
    checksums, inode = file_of(vfs, "/f")
    with vfs.fs.writing(inode):
        checksums.changing(inode, PAGE + 1, PAGE + 2)
        vfs.fs.sync()
    assert verdicts(vfs, "/f") == [True, None, True]
    volume.unmount()
    assert verdicts(volume.mount(keep_checksums=True), "/f") == [True, None, True]


def test_pages_that_are_cut_off_leave_no_checksum(volume: Volume) -> None:
    """For those that come in their place."""
    vfs = volume.mount(keep_checksums=True)
    write(vfs, "/f", b"x" * 5 * PAGE)
    vfs.sync()
    vfs.truncate("/f", 2 * PAGE)
    vfs.truncate("/f", 4 * PAGE)
    checksums, _ = file_of(vfs, "/f")
    assert verdicts(vfs, "/f") == [True] * 2 + [None] * 2
    assert checksums.voids == 0
    volume.unmount()
    vfs = volume.mount(keep_checksums=True)
    assert verdicts(vfs, "/f") == [True] * 2 + [None] * 2


def test_who_keeps_no_checksums_voids_those_of_what_it_changes(volume: Volume) -> None:
    """As Linux does; by the inode's times. Files that were left alone keep theirs."""
    vfs = volume.mount(keep_checksums=True)
    for path in ("/written", "/longer", "/shorter", "/mode", "/alone"):
        write(vfs, path, bytes(2 * PAGE))
    volume.unmount()
    vfs = volume.mount()
    change(vfs, "/written", 5, b"x")
    change(vfs, "/longer", 2 * PAGE, b"x" * PAGE)
    handle = vfs.open("/shorter", os.O_RDWR)
    vfs.ftruncate(handle, PAGE)
    vfs.close(handle)
    vfs.link("/mode", "/linked")
    volume.unmount()
    vfs = volume.mount(keep_checksums=True)
    assert verdicts(vfs, "/written") == [None] * 2
    assert verdicts(vfs, "/longer") == [None] * 3
    assert verdicts(vfs, "/shorter") == [None]
    assert verdicts(vfs, "/mode") == [None] * 2
    assert verdicts(vfs, "/alone") == [True] * 2
    change(vfs, "/written", 0, bytes(2 * PAGE))
    assert verdicts(vfs, "/written") == [True] * 2


def test_extents_win_over_checksums(volume: Volume) -> None:
    """Two files that grow in turns have an extent a page: first checksums lose their room, then
    even the trailer, and then the records move out and there is room again."""
    vfs = volume.mount(keep_checksums=True)
    assert isinstance(vfs.fs, Ocfs2)
    checksums = vfs.fs.checksums
    assert checksums is not None
    rng = random.Random(3)
    pages = [rng.randbytes(PAGE) for _ in range(260)]
    handles = [vfs.open(path, os.O_RDWR | os.O_CREAT) for path in ("/one", "/two")]
    known = []
    for number, page in enumerate(pages):
        for handle in handles:
            vfs.pwrite(handle, page, number * PAGE)
        if number in (150, 200, 242, 259):
            vfs.sync()
            inode = vfs.inode_of(handles[0])
            trailer = area.closed(vfs.fs._volume.dinodes.buffer(own(inode)).data)
            known.append(None if trailer is None else trailer.count)
            assert vfs.pread(handles[0], PAGE, 0) == pages[0]
        if number == 201:
            # What the log still has of a page must be void before the page changes.
            voids = checksums.voids
            vfs.pwrite(handles[0], pages[0], 0)
            assert checksums.voids == voids + 1
    assert known == [151, (area.TRAILER_OFFSET - 0xD0 - 201 * 16) // 8, None, 260]
    for handle in handles:
        vfs.close(handle)
    volume.unmount()
    vfs = volume.mount(keep_checksums=True)
    assert read(vfs, "/one") == read(vfs, "/two") == b"".join(pages)
    assert verdicts(vfs, "/two") == [True] * 260


def test_the_disk_is_right(volume: Volume) -> None:
    """What it holds is never refused, and known from then on; but it is counted."""
    vfs = volume.mount(keep_checksums=True)
    write(vfs, "/f", bytes(PAGE))
    checksums, inode = file_of(vfs, "/f")
    rotten = memoryview(b"\1" + bytes(PAGE - 1))
    assert not checksums.matches(inode, 0, rotten)
    checksums.was_read(inode, 0, rotten)
    assert checksums.matches(inode, 0, rotten)
    assert checksums.contradicted == 1
    checksums.was_read(inode, 0, rotten)
    assert checksums.contradicted == 1


@pytest.mark.parametrize("read_only", [False, True])
def test_what_was_read_is_known_to_this_mount(volume: Volume, read_only: bool) -> None:
    """Of files without checksums, as long as it lasts; a write stores what is known."""
    write(volume.mount(), "/f", bytes(3 * PAGE))
    volume.unmount()
    vfs = volume.mount(keep_checksums=True, read_only=read_only)
    checksums, inode = file_of(vfs, "/f")
    assert verdicts(vfs, "/f") == [None] * 3
    checksums.was_read(inode, 1, memoryview(bytes(PAGE)))
    assert verdicts(vfs, "/f") == [None, True, None]
    if not read_only:
        change(vfs, "/f", 0, b"x")
    volume.unmount()
    vfs = volume.mount(keep_checksums=True)
    assert verdicts(vfs, "/f") == ([None] * 3 if read_only else [True, True, None])
