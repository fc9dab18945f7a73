"""What is written stays, space comes back, and e2fsck and debugfs agree after every test."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable

import pytest

from fs.ext.filesystem import LINKS_MAX
from fs.inode import Inode
from fs.vfs import Vfs
from tests.t3_fs.images import BLOCK, Image, MakeImage, read, vfs_tree, write


def fails(code: int, call: Callable[[], object]) -> None:
    """The call raises `OSError` with this errno."""
    with pytest.raises(OSError) as caught:  # noqa: PT011
        call()
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


def inode(vfs: Vfs, path: str) -> Inode:
    """The inode of a path."""
    handle = vfs.open(path)
    try:
        return vfs.inode_of(handle)
    finally:
        vfs.close(handle)


def test_contents_survive_a_remount(image: Image) -> None:
    """Files, directories and links are there after unmount and mount."""
    vfs = image.mount()
    rng = random.Random(3)
    vfs.mkdir("/directory")
    expected: dict[str, object] = {"/lost+found": None, "/directory": None}
    for size in (0, 1, BLOCK, BLOCK + 1, 13 * BLOCK, 30 * BLOCK + 7):
        path = f"/directory/{size}"
        data = rng.randbytes(size)
        write(vfs, path, data)
        expected[path] = data
    vfs.symlink("directory/1", "/short")
    vfs.symlink("t" * 4095, "/long")
    vfs.link("/directory/1", "/hard")
    expected |= {"/short": "directory/1", "/long": "t" * 4095}
    expected["/hard"] = expected["/directory/1"]
    image.unmount()
    assert vfs_tree(image.mount()) == expected


@pytest.mark.parametrize(
    "page", [0, 11, 12, 12 + 1023, 12 + 1024, 12 + 1024 + 1024**2 - 1, 12 + 1024 + 1024**2]
)
def test_a_page_at_each_depth_of_the_map(image: Image, vfs: Vfs, page: int) -> None:
    """One page far behind a hole is read back; cutting it off gives every block back."""
    before = vfs.statfs().blocks_free
    handle = vfs.open("/file", os.O_CREAT | os.O_RDWR)
    assert vfs.pwrite(handle, b"far away", page * BLOCK + 5) == 8
    assert vfs.pread(handle, 100, page * BLOCK) == bytes(5) + b"far away"
    depth = 0 if page < 12 else 1 if page < 12 + 1024 else 2 if page < 12 + 1024 + 1024**2 else 3
    vfs.fsync(handle)
    assert vfs.fstat(handle).st_blocks == (1 + depth) * 8
    assert vfs.statfs().blocks_free == before - 1 - depth
    vfs.ftruncate(handle, page * BLOCK)
    assert vfs.fstat(handle).st_blocks == 0
    assert vfs.statfs().blocks_free == before
    vfs.ftruncate(handle, BLOCK)
    assert vfs.pread(handle, BLOCK, 0) == bytes(BLOCK)
    vfs.close(handle)


def test_truncate_inside_the_tree_keeps_what_is_before(image: Image) -> None:
    """Cutting at every interesting page keeps the pages before it and frees all behind it."""
    vfs = image.mount()
    pages = [0, 11, 12, 500, 1035, 1036, 1037, 2060, 2061, 3000]
    for cut in pages:
        before = vfs.statfs().blocks_free
        handle = vfs.open("/file", os.O_CREAT | os.O_RDWR)
        for page in pages:
            vfs.pwrite(handle, b"page %d" % page, page * BLOCK)
        vfs.ftruncate(handle, cut * BLOCK + 3)
        for page in pages:
            text = b"page %d" % page
            expected = text if page < cut else text[:3] if page == cut else b""
            assert vfs.pread(handle, len(text), page * BLOCK) == expected
        vfs.ftruncate(handle, 3001 * BLOCK)
        for page in pages:
            expected = b"page %d" % page if page < cut else b""
            assert vfs.pread(handle, BLOCK, page * BLOCK) == (
                (expected or (b"pag" if page == cut else b"")).ljust(BLOCK, b"\0")
            )
        vfs.close(handle)
        vfs.unlink("/file")
        assert vfs.statfs().blocks_free == before


def test_a_file_beyond_2_gib_sets_large_file(make_image: MakeImage) -> None:
    """The feature is set by the first file that needs it, as Linux does."""
    image = make_image(options=("-O", "^large_file,^resize_inode"))
    assert "large_file" not in image.field("Filesystem features")
    vfs = image.mount()
    handle = vfs.open("/file", os.O_CREAT | os.O_RDWR)
    vfs.pwrite(handle, b"x", 1 << 31)
    vfs.fsync(handle)
    vfs.close(handle)
    image.unmount()
    assert "large_file" in image.field("Filesystem features")
    assert image.e2fsck().returncode == 0
    image.mount().unlink("/file")


def test_the_largest_file(vfs: Vfs) -> None:
    """The last byte can be written, the next is EFBIG."""
    limit = vfs.fs.file_bytes_max
    handle = vfs.open("/file", os.O_CREAT | os.O_RDWR)
    assert vfs.pwrite(handle, b"abc", limit - 2) == 2
    assert vfs.pread(handle, 9, limit - 2) == b"ab"
    fails(errno.EFBIG, lambda: vfs.pwrite(handle, b"c", limit))
    fails(errno.EFBIG, lambda: vfs.ftruncate(handle, limit + 1))
    vfs.close(handle)
    vfs.unlink("/file")


def test_an_unlinked_open_file_lives_until_its_last_close(vfs: Vfs) -> None:
    """It is read and written without a name; the last close gives its space back."""
    before = vfs.statfs()
    write(vfs, "/file", b"a" * 100_000)
    first, second = vfs.open("/file", os.O_RDWR), vfs.open("/file")
    vfs.unlink("/file")
    fails(errno.ENOENT, lambda: vfs.stat("/file"))
    vfs.pwrite(first, b"b", 0)
    vfs.close(first)
    assert vfs.pread(second, 2, 0) == b"ba"
    assert vfs.statfs() != before
    vfs.close(second)
    assert vfs.statfs() == before


def test_unmount_frees_files_without_names(image: Image) -> None:
    """An open, unlinked file leaves no orphan on a cleanly unmounted image."""
    vfs = image.mount()
    before = vfs.statfs()
    write(vfs, "/file", b"a" * 100_000)
    vfs.open("/file")
    vfs.unlink("/file")
    image.unmount()
    assert image.e2fsck().returncode == 0
    assert image.mount().statfs() == before


def test_a_file_replaced_by_rename_while_open_lives_on(vfs: Vfs) -> None:
    """The handle keeps the old content, the name has the new one."""
    write(vfs, "/old", b"old")
    write(vfs, "/new", b"new")
    handle = vfs.open("/old")
    vfs.rename("/new", "/old")
    assert vfs.read(handle, 9) == b"old"
    assert read(vfs, "/old") == b"new"
    vfs.close(handle)


def test_a_used_again_inode_number_has_another_key(image: Image) -> None:
    """The file key differs each time, after a remount too; old pages are never taken for new."""
    vfs = image.mount()
    keys = set()
    for number in range(20):
        write(vfs, "/file", b"x")
        keys.add(inode(vfs, "/file").key)
        if number % 5 == 0:
            image.unmount()
            vfs = image.mount()
            assert inode(vfs, "/file").key in keys
        vfs.unlink("/file")
    assert len(keys) == 20
    assert len({key.ino for key in keys}) == 1


def test_one_inode_object_while_it_is_held(vfs: Vfs) -> None:
    """A page cache may use the object as the identity of the file."""
    write(vfs, "/file", b"x")
    held = inode(vfs, "/file")
    for number in range(1500):
        vfs.link("/file", f"/link{number}") if number < 5 else vfs.lstat("/lost+found")
    assert inode(vfs, "/link3") is held


def test_no_space_changes_nothing(make_image: MakeImage) -> None:
    """A full image gives short writes, then ENOSPC, and everything works again after a removal."""
    image = make_image(blocks=256)
    vfs = image.mount()
    handle = vfs.open("/file", os.O_CREAT | os.O_RDWR)
    written = vfs.write(handle, b"x" * (300 * BLOCK))
    assert 0 < written < 300 * BLOCK
    while vfs.statfs().blocks_free:
        vfs.write(handle, b"y" * BLOCK)
    assert vfs.statfs().blocks_free == 0
    tree = vfs_tree(vfs)
    fails(errno.ENOSPC, lambda: vfs.pwrite(handle, b"z", vfs.fstat(handle).st_size))
    fails(errno.ENOSPC, lambda: vfs.mkdir("/directory"))
    fails(errno.ENOSPC, lambda: vfs.symlink("z" * 100, "/link"))
    assert vfs_tree(vfs) == tree
    vfs.symlink("z" * 59, "/link")
    write(vfs, "/empty", b"")
    fails(errno.ENOSPC, lambda: write(vfs, "/empty", b"1"))
    vfs.ftruncate(handle, 0)
    write(vfs, "/empty", b"1")
    vfs.close(handle)


def test_no_inode_left(make_image: MakeImage) -> None:
    """ENOSPC when the inodes are used up, and a removed file makes room for one."""
    vfs = make_image(options=("-N", "16")).mount()
    free = vfs.statfs().inodes_free
    for number in range(free):
        write(vfs, f"/file{number}", b"")
    fails(errno.ENOSPC, lambda: write(vfs, "/more", b""))
    fails(errno.ENOSPC, lambda: vfs.mkdir("/more"))
    vfs.unlink("/file0")
    vfs.mkdir("/more")


def test_a_directory_that_can_not_grow(make_image: MakeImage) -> None:
    """A new name that needs a new directory block on a full image is ENOSPC, its inode is free."""
    image = make_image(blocks=256)
    vfs = image.mount()
    vfs.mkdir("/d")
    for number in range(15):
        write(vfs, f"/d/{number}{'n' * 250}", b"")
    handle = vfs.open("/fill", os.O_CREAT | os.O_WRONLY)
    while vfs.statfs().blocks_free:
        vfs.write(handle, b"x" * BLOCK * max(1, vfs.statfs().blocks_free - 3))
    vfs.close(handle)
    before = vfs.statfs()
    fails(errno.ENOSPC, lambda: write(vfs, f"/d/{'m' * 250}", b""))
    fails(errno.ENOSPC, lambda: vfs.link("/fill", f"/d/{'m' * 250}"))
    fails(errno.ENOSPC, lambda: vfs.rename("/fill", f"/d/{'m' * 250}"))
    assert vfs.statfs() == before
    assert "fill" in vfs.listdir("/")


def test_many_groups_fill_up(make_image: MakeImage) -> None:
    """Files go over group boundaries, and every block of every group comes back."""
    vfs = make_image(blocks=4096, options=("-g", "512")).mount()
    before = vfs.statfs()
    for number in range(6):
        vfs.mkdir(f"/d{number}")
        write(vfs, f"/d{number}/file", bytes([number]) * (550 * BLOCK))
    for number in range(6):
        assert read(vfs, f"/d{number}/file") == bytes([number]) * (550 * BLOCK)
        vfs.unlink(f"/d{number}/file")
        vfs.rmdir(f"/d{number}")
    assert vfs.statfs() == before


def test_links_have_a_limit(vfs: Vfs) -> None:
    """EMLINK for one name too many; the limit itself is set on the inode to save 32,000 links."""
    write(vfs, "/file", b"")
    vfs.mkdir("/directory")
    file, directory = inode(vfs, "/file"), inode(vfs, "/directory")
    file.nlink = directory.nlink = LINKS_MAX
    fails(errno.EMLINK, lambda: vfs.link("/file", "/more"))
    fails(errno.EMLINK, lambda: vfs.mkdir("/directory/more"))
    vfs.mkdir("/other")
    fails(errno.EMLINK, lambda: vfs.rename("/other", "/directory/other"))
    file.nlink, directory.nlink = 1, 2


def test_names_have_a_limit(vfs: Vfs) -> None:
    """255 bytes are a name, 256 are ENAMETOOLONG."""
    write(vfs, "/" + "n" * 255, b"x")
    fails(errno.ENAMETOOLONG, lambda: write(vfs, "/" + "n" * 256, b"x"))
    fails(errno.ENAMETOOLONG, lambda: vfs.stat("/" + "n" * 256))
    fails(errno.ENAMETOOLONG, lambda: vfs.stat("/a" * 2048))
    fails(errno.ENAMETOOLONG, lambda: vfs.symlink("t" * 4096, "/link"))


def test_links_that_never_end(vfs: Vfs) -> None:
    """A loop of symbolic links is ELOOP, for walking and for creating."""
    vfs.symlink("b", "/a")
    vfs.symlink("a", "/b")
    fails(errno.ELOOP, lambda: vfs.stat("/a"))
    fails(errno.ELOOP, lambda: vfs.open("/a", os.O_CREAT | os.O_WRONLY))


def test_a_directory_moves_with_its_dots(vfs: Vfs) -> None:
    """`..` follows a move to another directory, so do the link counts of both parents."""
    for path in ("/a", "/b", "/a/moved", "/a/moved/below"):
        vfs.mkdir(path)
    vfs.rename("/a/moved", "/b/moved")
    assert (vfs.stat("/a").st_nlink, vfs.stat("/b").st_nlink) == (2, 3)
    assert vfs.stat("/b/moved/..").st_ino == vfs.stat("/b").st_ino
    fails(errno.EINVAL, lambda: vfs.rename("/b", "/b/moved/below/b"))
    fails(errno.ENOTEMPTY, lambda: vfs.rename("/b/moved/below", "/b"))
    vfs.rename("/b/moved/below", "/a")
    assert vfs.stat("/b/moved").st_nlink == 2


def test_a_few_buffers_are_enough(image: Image) -> None:
    """With the smallest buffer cache everything works, more slowly."""
    vfs = image.mount(buffer_blocks=8)
    rng = random.Random(4)
    expected: dict[str, object] = {"/lost+found": None}
    for number in range(60):
        directory = f"/d{number % 7}"
        if directory not in expected:
            vfs.mkdir(directory)
            expected[directory] = None
        data = rng.randbytes(rng.randrange(3 * BLOCK))
        write(vfs, f"{directory}/{number}", data)
        expected[f"{directory}/{number}"] = data
    assert vfs_tree(vfs) == expected
    image.unmount()
    assert vfs_tree(image.mount()) == expected


def test_state_says_whether_the_image_was_unmounted(image: Image) -> None:
    """Not clean while mounted, clean after unmount, and the mount is counted."""
    assert image.field("Filesystem state") == "clean"
    assert image.field("Mount count") == "0"
    image.mount().sync()
    assert image.field("Filesystem state") == "not clean"
    image.unmount()
    assert image.field("Filesystem state") == "clean"
    assert image.field("Mount count") == "1"


def test_an_image_that_was_not_unmounted_stays_marked(image: Image) -> None:
    """A later clean unmount doesn't hide that e2fsck should look at it, as with Linux."""
    copy = image.path.with_name("copy")
    image.mount().sync()
    copy.write_bytes(image.path.read_bytes())
    image.unmount()
    image.path.write_bytes(copy.read_bytes())
    vfs = image.mount()
    write(vfs, "/file", b"x")
    image.unmount()
    assert image.field("Filesystem state") == "not clean"
    image.e2fsck("-fy")
    assert image.field("Filesystem state") == "clean"


def test_times_follow_changes(vfs: Vfs) -> None:
    """Writing changes mtime and ctime, linking ctime only, a new entry the directory's times."""
    write(vfs, "/file", b"x")
    first = vfs.stat("/file")
    vfs.link("/file", "/link")
    second = vfs.stat("/file")
    assert second.st_mtime_ns == first.st_mtime_ns
    assert second.st_ctime_ns > first.st_ctime_ns
    root = vfs.stat("/")
    vfs.truncate("/file", 0)
    assert vfs.stat("/file").st_mtime_ns > first.st_mtime_ns
    assert vfs.stat("/").st_mtime_ns == root.st_mtime_ns
    vfs.unlink("/link")
    assert vfs.stat("/").st_mtime_ns > root.st_mtime_ns


@pytest.mark.parametrize("options", [(), ("-I", "128"), ("-O", "^filetype"), ("-r", "0")])
def test_a_storm_of_small_changes(make_image: MakeImage, options: tuple[str, ...]) -> None:
    """Directories that grow and shrink and files of many sizes, on every layout of inodes."""
    vfs = make_image(blocks=2048, options=options).mount()
    rng = random.Random(5)
    names: dict[str, bytes] = {}
    for _ in range(600):
        name = f"/{rng.randrange(80):03}" + "p" * rng.randrange(100)
        match rng.randrange(4):
            case 0 | 1:
                names[name] = rng.randbytes(rng.choice((0, 10, 5000, 60_000)))
                write(vfs, name, names[name])
            case 2 if names:
                gone = rng.choice(sorted(names))
                vfs.unlink(gone)
                del names[gone]
            case 3 if names:
                old = rng.choice(sorted(names))
                vfs.rename(old, name)
                names[name] = names.pop(old)
    assert {f"/{name}" for name in vfs.listdir("/")} == {*names, "/lost+found"}
    assert all(read(vfs, name) == data for name, data in names.items())
