"""Checksums of pages of files that have more of them than their inode's block has room for.

Most files here are small, and so is the room. fsck.ocfs2 and debugfs.ocfs2 judge every image at the
end. Crashes are in `t5_cluster/ocfs2`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from array import array

import pytest

from fs.block.device import BLOCK_BYTES
from fs.block.file import FileDevice
from fs.directpages import DirectPages
from fs.ocfs2 import attributes, checksumblocks, checksums
from fs.ocfs2.checksums import Capacity
from fs.ocfs2.filesystem import Ocfs2
from fs.vfs import Vfs
from tests.support.ocfs2 import Volume, debugfs, faults, problems, read
from tests.t3_fs.ocfs2.test_fs_checksums import change, file_of, verdicts

PAGE = BLOCK_BYTES
SMALL = Capacity(inside_pages=2, block_pages=3)
SHORT = SMALL._replace(chunks=4)
"""And memory has a part of a file only."""


@pytest.fixture
def volume(volume_with_attributes: Volume) -> Volume:
    """The one that all here are about."""
    return volume_with_attributes


def mount(volume: Volume, capacity: Capacity = SMALL) -> Vfs:
    """With little room for checksums."""
    device = FileDevice(volume.path)
    fs = Ocfs2(device, clock_ns=volume.clock, keep_checksums=True, checksums_capacity=capacity)
    vfs = Vfs(fs, DirectPages(fs, fs.checksums))
    volume.mounts.append(vfs)
    return vfs


def fill(vfs: Vfs, path: str, data: bytes) -> None:
    """A new file of any size."""
    handle = vfs.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for start in range(0, len(data), 64 * PAGE):
        vfs.write(handle, data[start : start + 64 * PAGE])
    vfs.close(handle)


def truncate(vfs: Vfs, path: str, size: int) -> None:
    """By name."""
    vfs.truncate(path, size)


def outside_blocks(vfs: Vfs, path: str) -> int:
    """Of a file's checksums; 0: it has no attribute."""
    assert isinstance(vfs.fs, Ocfs2)
    inode = file_of(vfs, path)[1]
    with vfs.fs.reading(inode):
        value = vfs.fs._volume.attributes.value(inode)
    assert (value is None) == (inode.attribute_block == 0)
    return value.clusters if value is not None else 0


def free_blocks(vfs: Vfs) -> int:
    """Of the volume."""
    return vfs.fs.statfs().blocks_free


def test_large_files_are_known_after_a_mount(volume: Volume) -> None:
    """To their last page; what has room in the inode's block is there."""
    rng = random.Random(1)
    vfs = volume.mount(keep_checksums=True)
    sizes = {"/inside": 470 * PAGE, "/outside": 500 * PAGE, "/two": 1100 * PAGE + 5}
    for path, size in sizes.items():
        fill(vfs, path, rng.randbytes(size))
    ino = vfs.stat("/two").st_ino
    volume.unmount()
    assert faults(volume.path) == []
    assert problems(volume.path) == []
    shown = debugfs(volume.path, f"xattr -v <{ino}>")
    assert "#0    4      0       14             12288" in shown
    vfs = volume.mount(keep_checksums=True)
    for path, size in sizes.items():
        assert verdicts(vfs, path) == [True] * -(-size // PAGE), path
    assert [outside_blocks(vfs, path) for path in sizes] == [0, 1, 3]


def test_changes_in_place_are_voided_first_and_known_after(volume: Volume) -> None:
    """One commit for many changes between two syncs, none for what is new, wherever it is."""
    vfs = mount(volume)
    fill(vfs, "/f", bytes(8 * PAGE))
    vfs.sync()
    checks, _ = file_of(vfs, "/f")
    change(vfs, "/f", 8 * PAGE, b"new" * PAGE)
    assert checks.voids == 0
    for offset in (7 * PAGE + 7, 0, 4 * PAGE - 1):
        change(vfs, "/f", offset, b"other")
    assert checks.voids == 1
    vfs.sync()
    change(vfs, "/f", 3 * PAGE, b"again")
    assert checks.voids == 2
    volume.unmount()
    assert verdicts(mount(volume), "/f") == [True] * 11


def test_a_commit_before_the_change_leaves_the_page_void(volume: Volume) -> None:
    """One that comes between `changing` and the data: others of the file are known again."""
    vfs = mount(volume)
    fill(vfs, "/f", bytes(6 * PAGE))
    vfs.sync()
    checks, inode = file_of(vfs, "/f")
    with vfs.fs.writing(inode):
        checks.changing(inode, 4 * PAGE + 1, 4 * PAGE + 2)
        vfs.fs.sync()
    volume.unmount()
    assert verdicts(mount(volume), "/f") == [True] * 4 + [None, True]


def test_pages_that_are_cut_off_leave_no_checksum_and_no_block(volume: Volume) -> None:
    """For those that come in their place; an empty file has no attribute, nor has one that went."""
    vfs = mount(volume)
    fill(vfs, "/kept", b"x")
    fill(vfs, "/f", b"x" * 40 * PAGE)
    vfs.sync()
    assert outside_blocks(vfs, "/f") >= 14
    truncate(vfs, "/f", 10 * PAGE)
    assert outside_blocks(vfs, "/f") == 4
    # As none of what was in these pages may come back, no checksum may.
    truncate(vfs, "/f", 14 * PAGE)
    assert verdicts(vfs, "/f") == [True] * 10 + [None] * 4
    volume.unmount()
    vfs = mount(volume)
    assert verdicts(vfs, "/f") == [True] * 10 + [None] * 4
    truncate(vfs, "/f", 0)
    assert outside_blocks(vfs, "/f") == 0
    change(vfs, "/f", 0, b"y" * 2 * PAGE)
    volume.unmount()
    vfs = mount(volume)
    assert outside_blocks(vfs, "/f") == 0
    assert verdicts(vfs, "/f") == [True] * 2
    change(vfs, "/f", 2 * PAGE, b"y" * 2 * PAGE)
    assert verdicts(vfs, "/f") == [True] * 4
    assert outside_blocks(vfs, "/f") == 2


@pytest.mark.parametrize("keep_checksums", [True, False])
def test_what_is_freed_is_free(volume: Volume, keep_checksums: bool) -> None:
    """A file takes its blocks of checksums along, whoever removes it; many in several steps."""
    vfs = mount(volume)
    fill(vfs, "/first", b"x" * 9 * PAGE)  # grows the allocators
    vfs.sync()
    free = free_blocks(vfs)
    fill(vfs, "/f", b"x" * 1000 * PAGE)
    assert outside_blocks(vfs, "/f") > attributes.CUT_BLOCKS_MAX
    if not keep_checksums:
        volume.unmount()
        vfs = volume.mount()
    vfs.unlink("/f")
    vfs.sync()
    assert free_blocks(vfs) == free


def test_a_long_file_is_cut_in_steps(volume: Volume) -> None:
    """Each of which leaves a whole file system."""
    vfs = mount(volume)
    fill(vfs, "/f", b"x" * 1200 * PAGE)
    assert outside_blocks(vfs, "/f") > attributes.CUT_BLOCKS_MAX
    truncate(vfs, "/f", 4 * PAGE + 1)
    assert outside_blocks(vfs, "/f") == 2
    volume.unmount()
    assert verdicts(mount(volume), "/f") == [True] * 5


def test_who_keeps_no_checksums_voids_those_of_what_it_changes(volume: Volume) -> None:
    """As Linux does. What was there is not believed again when the file's checksums are kept."""
    vfs = mount(volume)
    for path in ("/written", "/shorter", "/alone"):
        fill(vfs, path, bytes(7 * PAGE))
    volume.unmount()
    vfs = volume.mount()
    change(vfs, "/written", 5 * PAGE, b"x")
    truncate(vfs, "/shorter", 4 * PAGE)
    truncate(vfs, "/shorter", 7 * PAGE)
    volume.unmount()
    vfs = mount(volume)
    assert verdicts(vfs, "/written") == verdicts(vfs, "/shorter") == [None] * 7
    assert verdicts(vfs, "/alone") == [True] * 7
    for path in ("/written", "/shorter"):
        change(vfs, path, 0, bytes(PAGE))
    volume.unmount()
    vfs = mount(volume)
    for path in ("/written", "/shorter"):
        assert verdicts(vfs, path) == [True] + [None] * 6


def test_files_from_before_get_blocks_with_their_first_change(volume: Volume) -> None:
    """Or when they are to be saved; what was read before is stored as well."""
    vfs = volume.mount()
    for path in ("/changed", "/saved", "/read"):
        fill(vfs, path, bytes(7 * PAGE))
    volume.unmount()
    vfs = mount(volume)
    for path in ("/changed", "/saved", "/read"):
        checks, inode = file_of(vfs, path)
        with vfs.fs.reading(inode):
            for index in (0, 2, 6):
                checks.was_read(inode, index, memoryview(bytes(PAGE)))
    change(vfs, "/changed", 4 * PAGE, b"x")
    checks, inode = file_of(vfs, "/saved")
    with vfs.fs.writing(inode):
        checks.save(inode)
    volume.unmount()
    vfs = mount(volume)
    seen = [True, None, True, None, None, None, True]
    assert verdicts(vfs, "/saved") == seen
    assert verdicts(vfs, "/changed") == [True, None, True, None, True, None, True]
    assert verdicts(vfs, "/read") == [None] * 7


def test_memory_holds_a_part_of_a_file(volume: Volume) -> None:
    """What is too much of it goes to the blocks, and comes from there again."""
    vfs = mount(volume, SHORT)
    rng = random.Random(5)
    handle = vfs.open("/f", os.O_WRONLY | os.O_CREAT)
    for _ in range(10):
        vfs.write(handle, rng.randbytes(4 * PAGE))
    vfs.close(handle)
    for _ in range(50):
        change(vfs, "/f", rng.randrange(39 * PAGE), rng.randbytes(PAGE))
    assert verdicts(vfs, "/f") == [True] * 40
    inode = file_of(vfs, "/f")[1]
    assert inode.checksums is not None
    assert len(inode.checksums.chunks) <= SHORT.chunks
    volume.unmount()
    assert verdicts(mount(volume), "/f") == [True] * 40


def crashed(volume: Volume) -> Volume:
    """What a crash leaves now."""
    copy = volume.path.with_name("crashed")
    shutil.copyfile(volume.path, copy)
    return Volume(copy)


def test_without_room_in_the_transaction_nothing_is_known(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the file, and no data changes in place before the log says so. Later all is again."""
    vfs = mount(volume, SHORT)
    fill(vfs, "/f", bytes(20 * PAGE))
    vfs.sync()
    monkeypatch.setattr(checksums, "OTHERS_BLOCKS", 1 << 20)
    checks, _ = file_of(vfs, "/f")
    change(vfs, "/f", 20 * PAGE, b"x" * 15 * PAGE)
    assert checks.voids == 0
    assert verdicts(vfs, "/f")[15] is None
    change(vfs, "/f", 15 * PAGE, b"in place")
    assert checks.voids == 1
    copy = crashed(volume)
    assert False not in verdicts(mount(copy), "/f")
    copy.unmount()
    known = verdicts(vfs, "/f")
    assert False not in known
    assert known.count(None) > 20
    volume.unmount()
    vfs = mount(volume)
    assert verdicts(vfs, "/f") == known
    for page in range(0, 35, 5):
        change(vfs, "/f", page * PAGE, b"y" * 5 * PAGE)
    volume.unmount()
    assert verdicts(mount(volume), "/f") == [True] * 35


def test_a_commit_stores_more_than_a_transaction_has_room_for(volume: Volume) -> None:
    """In several then."""
    vfs = volume.mount()
    paths = [f"/{number}" for number in range(12)]
    for path in paths:
        fill(vfs, path, bytes(30 * PAGE))
    volume.unmount()
    vfs = mount(volume, Capacity(inside_pages=1, block_pages=1))
    for path in paths:
        checks, inode = file_of(vfs, path)
        with vfs.fs.writing(inode):
            for index in range(30):
                checks.was_read(inode, index, memoryview(bytes(PAGE)))
            checks.save(inode)
    vfs.sync()
    copy = crashed(volume)
    vfs = mount(copy, Capacity(inside_pages=1, block_pages=1))
    for path in paths:
        assert verdicts(vfs, path) == [True] * 30
    copy.unmount()


def test_nothing_is_said_of_pages_beyond_the_size(volume: Volume) -> None:
    """A commit may come in the middle of a write; what comes there later is something else."""
    vfs = mount(volume)
    fill(vfs, "/f", bytes(5 * PAGE))
    checks, inode = file_of(vfs, "/f")
    page = b"x" * PAGE
    with vfs.fs.writing(inode):
        [block] = vfs.fs.allocate_blocks(inode, 5, 1)
        vfs.fs.device.write(block, 1, page)
        checks.written(inode, 5, memoryview(page))
        vfs.fs.sync()
    copy = crashed(volume)
    again, inode = file_of(mount(copy), "/f")
    assert again.known(inode, 0, 6) == 0b011111
    copy.unmount()


def test_a_cut_that_fails_leaves_what_is_to_be_voided(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory has forgotten the pages then, and the disk has not."""
    vfs = mount(volume)
    fill(vfs, "/f", bytes(9 * PAGE))
    vfs.sync()
    checks, inode = file_of(vfs, "/f")
    fs = vfs.fs
    assert isinstance(fs, Ocfs2)

    def broken(*_words: object) -> bool:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fs._volume.space, "cut", broken)
    with pytest.raises(OSError, match="broken"):
        truncate(vfs, "/f", 7 * PAGE)
    with fs.writing(inode):
        checks.changing(inode, 7 * PAGE, 8 * PAGE)
        fs.sync()
        fs.device.write(fs.map_blocks(inode, 7, 1)[0], 1, b"x" * PAGE)
    copy = crashed(volume)
    assert verdicts(mount(copy), "/f") == [True] * 7 + [None] * 2
    copy.unmount()


def test_a_wide_change_voids_the_file(volume: Volume) -> None:
    """Without a look at each page; its own pages are known after."""
    vfs = mount(volume)
    fill(vfs, "/f", bytes(60 * PAGE))
    vfs.sync()
    checks, _ = file_of(vfs, "/f")
    change(vfs, "/f", 10 * PAGE, b"x" * 30 * PAGE)
    assert checks.voids == 1
    expected = [None] * 10 + [True] * 30 + [None] * 20
    assert verdicts(vfs, "/f") == expected
    volume.unmount()
    assert verdicts(mount(volume), "/f") == expected


def test_a_value_of_many_extents(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files that grow in turns break each other's: the root has room for one record."""
    monkeypatch.setattr(checksums, "AHEAD", 1 << 20)
    vfs = mount(volume, Capacity(inside_pages=1, block_pages=1))
    handles = [vfs.open(path, os.O_RDWR | os.O_CREAT) for path in ("/one", "/two")]
    for number in range(300):
        for handle in handles:
            vfs.pwrite(handle, b"x" * PAGE, number * PAGE)
    for handle in handles:
        vfs.close(handle)
    fs, inode = vfs.fs, file_of(vfs, "/one")[1]
    assert isinstance(fs, Ocfs2)
    value = fs._volume.attributes.value(inode)
    assert value is not None
    assert fs._volume.extents._root(value).depth == 2
    volume.unmount()
    assert faults(volume.path) == []
    assert problems(volume.path) == []
    vfs = mount(volume, Capacity(inside_pages=1, block_pages=1))
    assert verdicts(vfs, "/one") == verdicts(vfs, "/two") == [True] * 300
    truncate(vfs, "/one", 20 * PAGE)
    vfs.unlink("/two")


def test_data_comes_before_checksums_when_space_runs_out(volume: Volume) -> None:
    """A file that finds no block for its checksums is written all the same."""
    vfs = mount(volume)
    handle = vfs.open("/f", os.O_RDWR | os.O_CREAT)
    written = 0
    with contextlib.suppress(OSError):
        while True:
            written += vfs.write(handle, bytes(256 * PAGE if free_blocks(vfs) > 600 else PAGE))
    assert free_blocks(vfs) == 0
    change(vfs, "/f", 0, b"in place")
    vfs.close(handle)
    known = verdicts(vfs, "/f")
    assert written == len(known) * PAGE
    assert False not in known
    volume.unmount()
    known = verdicts(mount(volume), "/f")
    assert known[:-5].count(True) == len(known) - 5


def leave(vfs: Vfs, blocks: int) -> None:
    """So many free blocks of the disk."""
    handle = vfs.open("/rest", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while (room := free_blocks(vfs) - blocks) > 0:
        vfs.write(handle, bytes(min(room, 256) * PAGE))
    vfs.close(handle)


def test_a_block_that_comes_again_is_empty(volume: Volume) -> None:
    """It may have had the same place in the same file before."""
    vfs = mount(volume)
    fill(vfs, "/f", b"x")
    leave(vfs, 20 + 8)
    fill(vfs, "/f", b"x" * 20 * PAGE)
    vfs.sync()
    leave(vfs, 0)
    vfs.sync()
    fs, inode = vfs.fs, file_of(vfs, "/f")[1]
    assert isinstance(fs, Ocfs2)
    assert inode.checksums is not None
    before = bytearray(PAGE)
    values = array("Q", [7] * SMALL.block_pages)
    checksumblocks.write(before, inode.checksums.epoch, 4, values)
    freed = fs.map_blocks(inode, 12, 8)
    for number in (4, 5, 6):
        buffer = fs._volume.attributes.block(inode, number)
        assert buffer is not None
        freed.append(buffer.block)
    truncate(vfs, "/f", 12 * PAGE)
    vfs.sync()
    for block in freed:
        fs.device.write(block, 1, before)
    truncate(vfs, "/f", 15 * PAGE)
    assert outside_blocks(vfs, "/f") == 5
    volume.unmount()
    assert verdicts(mount(volume), "/f") == [True] * 12 + [None] * 3


def test_an_old_block_is_not_replayed_over_data(volume: Volume) -> None:
    """Blocks of checksums are journaled, and what was freed may be any file's next."""
    vfs = mount(volume)
    fill(vfs, "/f", b"")
    leave(vfs, 60)
    change(vfs, "/f", 0, b"x" * 30 * PAGE)
    vfs.sync()
    vfs.unlink("/f")
    vfs.sync()
    data = random.Random(6).randbytes((free_blocks(vfs) - 1) * PAGE)
    fill(vfs, "/g", data[:PAGE])
    with contextlib.suppress(OSError):
        for start in range(PAGE, len(data), PAGE):
            change(vfs, "/g", start, data[start : start + PAGE])
    vfs.sync()
    written = vfs.stat("/g").st_size
    assert written > 40 * PAGE
    copy = crashed(volume)
    assert read(mount(copy), "/g") == data[:written]
    copy.unmount()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_no_checksum_is_wrong(volume: Volume, seed: int) -> None:
    """Writes, cuts, commits and mounts in any order, some of them without checksums."""
    rng = random.Random(seed)
    contents = {"/a": b"", "/b": b""}
    vfs = mount(volume, SHORT)
    for path in contents:
        fill(vfs, path, b"")
    known = 0
    for _ in range(120):
        path = rng.choice(["/a", "/b"])
        data = contents[path]
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                offset = rng.randrange(len(data) + 1 + rng.choice((0, 2 * PAGE)))
                new = rng.randbytes(rng.choice((10, PAGE, 3 * PAGE, rng.randrange(1, 30 * PAGE))))
                new = new[: max(1, 60 * PAGE - offset)]
                change(vfs, path, offset, new)
                data = data.ljust(offset, b"\0")
                contents[path] = data[:offset] + new + data[offset + len(new) :]
            case 4 | 5:
                size = rng.choice((0, rng.randrange(len(data) + 1), len(data) + 5000))
                truncate(vfs, path, size)
                contents[path] = data[:size].ljust(size, b"\0")
            case 6:
                vfs.sync()
            case 7:
                volume.unmount()
                vfs = mount(volume, SHORT)
            case 8:
                volume.unmount()
                vfs = volume.mount()
                change(vfs, path, 0, b"from another")
                contents[path] = b"from another" + data[12:]
                volume.unmount()
                vfs = mount(volume, SHORT)
            case _:
                found = verdicts(vfs, path)
                assert False not in found, f"seed {seed}"
                known += found.count(True)
    volume.unmount()
    vfs = mount(volume, SHORT)
    for path, data in contents.items():
        assert read(vfs, path) == data
        assert False not in verdicts(vfs, path), f"seed {seed}"
    assert known > 30
