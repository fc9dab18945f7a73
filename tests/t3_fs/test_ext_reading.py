"""Images that mke2fs makes are read as what was put into them."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from fs.block.counting import CountingDevice
from fs.block.device import BlockDevice
from tests.support.tools import need_tool
from tests.t3_fs.images import BLOCK, MakeImage, host_tree, vfs_tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Every kind of thing that mke2fs copies, with files that need each depth of indirection."""
    rng = random.Random(1)
    root = tmp_path / "tree"
    (root / "deep/er/and/deeper").mkdir(parents=True)
    for size in (0, 1, 59, BLOCK - 1, BLOCK, BLOCK + 1, 12 * BLOCK, 12 * BLOCK + 1):
        (root / f"file{size}").write_bytes(rng.randbytes(size))
    (root / "deep/indirect").write_bytes(rng.randbytes(20 * BLOCK))
    with (root / "deep/double").open("wb") as file:
        file.seek((12 + 1024 + 3) * BLOCK)
        file.write(b"behind a hole" * 1000)
    (root / "short").symlink_to("deep/er")
    (root / "long").symlink_to("x" * 300)
    (root / "fast").symlink_to("y" * 59)
    (root / "slow").symlink_to("z" * 60)
    (root / "hard").hardlink_to(root / "file59")
    for number in range(300):
        (root / f"deep/er/a-rather-long-name-for-a-file-{number}").write_bytes(b"%d" % number)
    return root


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-I", "128"),
        ("-r", "0"),
        ("-O", "^filetype"),
        ("-O", "^dir_index,^resize_inode,^sparse_super,^large_file,^ext_attr"),
        ("-g", "512"),
    ],
)
def test_a_tree_is_read_as_it_was_put_in(
    make_image: MakeImage, tree: Path, options: tuple[str, ...]
) -> None:
    """Contents, links and directories are those of the source tree."""
    vfs = make_image(blocks=4096, tree=tree, options=options).mount(read_only=True)
    expected = host_tree(tree) | {"/lost+found": None}
    assert vfs_tree(vfs) == expected


def test_stat_tells_what_the_source_has(make_image: MakeImage, tree: Path) -> None:
    """Mode, links, size and time survive."""
    vfs = make_image(blocks=4096, tree=tree).mount(read_only=True)
    for name in ("file4097", "hard", "short", "deep"):
        ours, theirs = vfs.lstat(name), (tree / name).lstat()
        assert (ours.st_mode, ours.st_nlink) == (theirs.st_mode, theirs.st_nlink)
        assert ours.st_mtime_ns // 10**9 == int(theirs.st_mtime)
        if name != "deep":
            assert ours.st_size == theirs.st_size


def test_an_indexed_directory_is_read_and_can_be_changed(make_image: MakeImage, tree: Path) -> None:
    """e2fsck -D builds an index; reading ignores it, the first change turns it into plain space."""
    image = make_image(blocks=4096, tree=tree)
    image.e2fsck("-fyD")
    assert "(indexed)" in image.debugfs("htree_dump /deep/er") or "Root node" in image.debugfs(
        "htree_dump /deep/er"
    )
    vfs = image.mount()
    assert len(vfs.listdir("/deep/er")) == 301
    for number in range(0, 300, 3):
        vfs.unlink(f"/deep/er/a-rather-long-name-for-a-file-{number}")
    for number in range(200):
        vfs.mkdir(f"/deep/er/new-directory-{number}")
    assert len(vfs.listdir("/deep/er")) == 401


def test_a_read_only_mount_writes_nothing(make_image: MakeImage, tree: Path) -> None:
    """The image has the same bytes after a read-only mount."""
    image = make_image(blocks=4096, tree=tree)
    before = image.path.read_bytes()
    vfs = image.mount(read_only=True)
    vfs_tree(vfs)
    for change in (
        lambda: vfs.mkdir("/new"),
        lambda: vfs.unlink("/file1"),
        lambda: vfs.open("/file1", os.O_WRONLY),
        lambda: vfs.open("/new", os.O_CREAT | os.O_WRONLY),
        lambda: vfs.truncate("/file1", 0),
        lambda: vfs.rename("/file1", "/file2"),
        lambda: vfs.link("/file1", "/file2"),
        lambda: vfs.symlink("a", "/b"),
        lambda: vfs.rmdir("/deep/er/and/deeper"),
    ):
        with pytest.raises(OSError, match="Read-only"):
            change()
    image.unmount()
    assert image.path.read_bytes() == before


def test_a_shared_attribute_block_loses_one_user_at_a_time(
    make_image: MakeImage, tmp_path: Path
) -> None:
    """Files whose attributes fill a block can be removed; the block goes with the last."""
    root = tmp_path / "attributes"
    root.mkdir()
    for name in ("one", "two"):
        (root / name).write_bytes(b"x")
        try:
            os.setxattr(root / name, "user.big", b"v" * 1500)
        except OSError:
            pytest.skip("the temporary directory has no extended attributes")
    image = make_image(tree=root)
    assert "user.big" in image.debugfs("ea_list /one")
    vfs = image.mount()
    before = vfs.statfs().blocks_free
    vfs.unlink("/one")
    vfs.unlink("/two")
    assert vfs.statfs().blocks_free >= before + 3


def test_runs_of_blocks_are_read_at_once(make_image: MakeImage, tmp_path: Path) -> None:
    """A contiguous file of 2 MiB takes few reads, not one per block."""
    from fs.block.counting import CountingDevice

    root = tmp_path / "big"
    root.mkdir()
    (root / "file").write_bytes(random.Random(2).randbytes(512 * BLOCK))
    counters: list[CountingDevice] = []

    def count(device: BlockDevice) -> CountingDevice:
        counters.append(CountingDevice(device))
        return counters[-1]

    vfs = make_image(blocks=2048, tree=root).mount(read_only=True, stack=count)
    handle = vfs.open("/file")
    reads, pages = counters[0].reads, counters[0].read_pages
    vfs.read(handle, 512 * BLOCK)
    assert counters[0].read_pages - pages <= 512 + 3
    assert counters[0].reads - reads <= 12


def test_mke2fs_is_the_real_one() -> None:
    """The images come from e2fsprogs."""
    answer = subprocess.run([need_tool("mke2fs"), "-V"], capture_output=True, text=True, check=True)
    assert "mke2fs" in answer.stderr
