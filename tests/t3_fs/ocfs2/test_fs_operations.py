"""Every operation of the file system, and every way in which it says no."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from fs.vfs import Vfs
from tests.support.ocfs2 import BLOCK, Volume, read, vfs_tree, write
from tests.t3_fs.ocfs2.conftest import MakeVolume


def refused(code: int) -> AbstractContextManager[pytest.ExceptionInfo[OSError]]:
    """The operation inside fails with this errno."""
    return pytest.raises(OSError, match=os.strerror(code))


def test_what_was_written_is_there_after_a_new_mount(volume: Volume) -> None:
    """Files of all sizes around a block, directories, links."""
    vfs = volume.mount()
    sizes = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 300 * BLOCK + 7)
    vfs.mkdir("/d")
    for size in sizes:
        write(vfs, f"/d/{size}", os.urandom(1) * size)
    vfs.symlink("d", "/link")
    vfs.symlink("t" * 4000, "/slow")
    vfs.link("/d/1", "/hard")
    before = vfs_tree(vfs)
    volume.unmount()
    after = volume.mount()
    assert vfs_tree(after) == before
    assert after.stat("/hard").st_nlink == 2
    assert after.stat("/link").st_ino == after.stat("/d").st_ino
    assert after.stat("/d/0").st_blocks == 0


def test_times_modes_and_counts(vfs: Vfs) -> None:
    """`stat` of a directory counts its subdirectories; times move with changes."""
    vfs.mkdir("/d", 0o700)
    before = vfs.stat("/d")
    vfs.mkdir("/d/e")
    after = vfs.stat("/d")
    assert (before.st_nlink, after.st_nlink) == (2, 3)
    assert after.st_mtime_ns > before.st_mtime_ns
    assert stat.S_IMODE(after.st_mode) == 0o700
    assert vfs.stat("/").st_nlink == 4  # with lost+found
    vfs.rmdir("/d/e")
    assert vfs.stat("/d").st_nlink == 2


def test_refusals(vfs: Vfs) -> None:
    """The errno of Linux for each, and nothing changed."""
    vfs.mkdir("/d")
    vfs.mkdir("/d/e")
    write(vfs, "/f", b"x")
    before = vfs_tree(vfs)
    with refused(errno.EEXIST):
        vfs.mkdir("/d")
    with refused(errno.EEXIST):
        vfs.symlink("x", "/f")
    with refused(errno.ENOTEMPTY):
        vfs.rmdir("/d")
    with refused(errno.ENOTDIR):
        vfs.rmdir("/f")
    with refused(errno.EISDIR):
        vfs.unlink("/d")
    with refused(errno.ENOENT):
        vfs.unlink("/none")
    with refused(errno.EPERM):
        vfs.link("/d", "/g")
    with refused(errno.EINVAL):
        vfs.rename("/d", "/d/e/x")
    with refused(errno.ENOTEMPTY):
        vfs.rename("/d/e", "/d")
    with refused(errno.EISDIR):
        vfs.rename("/f", "/d")
    with refused(errno.ENOTDIR):
        vfs.rename("/d", "/f")
    with refused(errno.ENAMETOOLONG):
        vfs.mkdir("/" + "n" * 256)
    with refused(errno.ENAMETOOLONG):
        vfs.symlink("t" * BLOCK, "/l")
    with refused(errno.EFBIG):
        vfs.truncate("/f", vfs.fs.file_bytes_max + 1)
    with refused(errno.EINVAL):
        vfs.readlink("/f")
    assert vfs_tree(vfs) == before


def test_rename_over_things(vfs: Vfs) -> None:
    """A file over a file, a directory over an empty one, to itself, to another name of itself."""
    for name in ("a", "b", "c"):
        vfs.mkdir(f"/{name}")
        write(vfs, f"/{name}/f", name.encode())
    vfs.mkdir("/empty")
    vfs.link("/a/f", "/a/g")
    vfs.rename("/a/f", "/a/g")
    assert vfs.listdir("/a") == ["f", "g"]
    vfs.rename("/a/f", "/b/f")
    assert read(vfs, "/b/f") == b"a"
    vfs.rename("/c", "/empty")
    assert vfs.listdir("/empty") == ["f"]
    vfs.rename("/empty", "/b/moved")
    assert vfs.stat("/b/moved/..").st_ino == vfs.stat("/b").st_ino
    assert vfs.stat("/b").st_nlink == 3
    vfs.rename("/b/moved", "/b/moved")
    vfs.rename("/b/moved/f", "/a/f")
    assert read(vfs, "/a/f") == b"c"


def test_a_file_has_no_holes(vfs: Vfs) -> None:
    """A write far behind the end, or a larger size, fills with zeros what lies between."""
    write(vfs, "/junk", b"\xff" * 200 * BLOCK)
    vfs.unlink("/junk")
    vfs.sync()  # its blocks may be used again now
    handle = vfs.open("/f", os.O_RDWR | os.O_CREAT)
    vfs.pwrite(handle, b"head", 0)
    vfs.pwrite(handle, b"tail", 50 * BLOCK + 5)
    assert vfs.fstat(handle).st_blocks == 51 * 8
    assert vfs.pread(handle, 51 * BLOCK, 0) == b"head".ljust(50 * BLOCK + 5, b"\0") + b"tail"
    vfs.ftruncate(handle, 3)
    vfs.ftruncate(handle, 120 * BLOCK + 1)
    assert vfs.fstat(handle).st_blocks == 121 * 8
    assert vfs.pread(handle, 121 * BLOCK, 0) == b"hea".ljust(120 * BLOCK + 1, b"\0")
    vfs.close(handle)


def test_a_removed_file_lives_until_the_last_close(volume: Volume) -> None:
    """Its blocks come back only then, and it is an orphan on the disk meanwhile."""
    vfs = volume.mount()
    free = vfs.statfs().blocks_free
    handle = vfs.open("/f", os.O_RDWR | os.O_CREAT)
    vfs.write(handle, b"x" * 10 * BLOCK)
    vfs.unlink("/f")
    vfs.sync()
    assert vfs.statfs().blocks_free == free - 10
    assert vfs.pread(handle, 5, 10 * BLOCK - 5) == b"xxxxx"
    vfs.close(handle)
    assert vfs.statfs().blocks_free == free


def test_many_names_and_removing_them(vfs: Vfs) -> None:
    """A directory of many blocks; names of different lengths use the room of removed ones."""
    vfs.mkdir("/d")
    names = [f"{number:03}" + "n" * (number % 200) for number in range(400)]
    for name in names:
        write(vfs, f"/d/{name}", b"")
    assert vfs.listdir("/d") == names
    size = vfs.stat("/d").st_size
    assert size >= 10 * BLOCK
    for name in names[::2]:
        vfs.unlink(f"/d/{name}")
    for name in names[::2]:
        write(vfs, f"/d/{name}", b"")
    assert sorted(vfs.listdir("/d")) == names
    assert vfs.stat("/d").st_size == size
    for name in names:
        vfs.unlink(f"/d/{name}")
    vfs.rmdir("/d")


def test_inode_groups_are_added(vfs: Vfs) -> None:
    """More inodes than the first group of the slot holds."""
    vfs.mkdir("/d")
    for number in range(1100):
        vfs.symlink("x", f"/d/{number}")
    inodes = {vfs.lstat(f"/d/{number}").st_ino for number in range(1100)}
    assert len(inodes) == 1100
    assert max(inodes) - min(inodes) >= 1024


def test_no_space_changes_nothing(make_image: MakeVolume) -> None:
    """ENOSPC of each operation, and everything is as before; after a removal there is room."""
    volume = make_image(16)
    vfs = volume.mount()
    vfs.mkdir("/d")
    write(vfs, "/small", b"s")
    handle = vfs.open("/big", os.O_RDWR | os.O_CREAT)
    while vfs.statfs().blocks_free:
        vfs.write(handle, b"b" * min(64, vfs.statfs().blocks_free) * BLOCK)
    before = vfs_tree(vfs)
    with refused(errno.ENOSPC):
        vfs.write(handle, b"b")
    with refused(errno.ENOSPC):
        vfs.mkdir("/d/e")
    with refused(errno.ENOSPC):
        vfs.symlink("t" * 4000, "/l")
    with refused(errno.ENOSPC):
        vfs.truncate("/small", 2 * BLOCK)
    assert vfs_tree(vfs) == before
    write(vfs, "/empty", b"")  # inodes are left
    vfs.ftruncate(handle, 10 * BLOCK)
    vfs.mkdir("/d/e")
    write(vfs, "/d/f", b"f" * 100 * BLOCK)  # what was freed is used, after a commit
    vfs.close(handle)


def test_an_extent_tree_grows_and_shrinks(make_image: MakeVolume) -> None:
    """Two files that grow in turns have an extent for each block: trees of depth 1."""
    volume = make_image(64)
    vfs = volume.mount()
    vfs.mkdir("/d")
    inode = vfs.fs.create(vfs.fs.lookup(vfs.fs.root, b"d"), b"a", 0o644)
    other = vfs.fs.create(vfs.fs.lookup(vfs.fs.root, b"d"), b"b", 0o644)
    for index in range(800):
        vfs.fs.allocate_blocks(inode, index, 1)
        vfs.fs.allocate_blocks(other, index, 1)
    blocks = vfs.fs.map_blocks(inode, 0, 801)
    assert blocks[800] == 0
    assert len(set(blocks[:800])) == 800
    for index, block in enumerate(blocks[:800]):
        vfs.fs.device.write(block, 1, b"%08d" % index * 512)
    inode.size = other.size = 800 * BLOCK
    vfs.fs.write_inode(inode)
    vfs.fs.write_inode(other)
    data = read(vfs, "/d/a")
    assert data == b"".join(b"%08d" % index * 512 for index in range(800))
    vfs.truncate("/d/b", 0)
    for size in (600 * BLOCK, 256 * BLOCK + 9, 243 * BLOCK, 3 * BLOCK):
        vfs.truncate("/d/a", size)
        assert read(vfs, "/d/a") == data[:size]


def test_a_read_only_mount_changes_nothing(volume: Volume) -> None:
    """Every change is EROFS and not a byte of the image differs."""
    write(volume.mount(), "/f", b"x")
    volume.unmount()
    before = volume.path.read_bytes()
    vfs = volume.mount(read_only=True)
    changes: list[Callable[[], object]] = [
        lambda: vfs.mkdir("/d"),
        lambda: vfs.unlink("/f"),
        lambda: vfs.truncate("/f", 0),
        lambda: vfs.rename("/f", "/g"),
        lambda: vfs.link("/f", "/g"),
        lambda: write(vfs, "/g", b""),
    ]
    for change in changes:
        with refused(errno.EROFS):
            change()
    assert read(vfs, "/f") == b"x"
    volume.unmount()
    assert volume.path.read_bytes() == before


def test_freed_blocks_wait_for_the_commit(vfs: Vfs) -> None:
    """Else new data could lie in a file that a power cut brings back."""

    def blocks_of(name: bytes) -> set[int]:
        inode = vfs.fs.lookup(vfs.fs.root, name)
        return set(vfs.fs.map_blocks(inode, 0, 600))

    write(vfs, "/old", b"o" * 600 * BLOCK)
    vfs.sync()
    old = blocks_of(b"old")
    vfs.unlink("/old")
    # The search begins at the front again, where the old file was.
    vfs.fs._volume.space.clusters._places.clear()  # type: ignore[attr-defined]
    write(vfs, "/new", b"n" * 600 * BLOCK)
    assert not old & blocks_of(b"new")
    vfs.sync()
    vfs.fs._volume.space.clusters._places.clear()  # type: ignore[attr-defined]
    write(vfs, "/after", b"a" * 600 * BLOCK)
    assert old == blocks_of(b"after")
