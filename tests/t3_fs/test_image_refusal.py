"""An image that can't be used is refused with one line that names it, says why and what to do."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from fs.block.file import FileDevice
from fs.errors import ImageError
from fs.mount import mount_image
from tests.t3_fs.images import Clock, MakeImage


def refusal(path: Path) -> str:
    """The line with which the image is refused, writable and read-only alike."""
    lines = []
    for read_only in (False, True):
        with pytest.raises(ImageError) as caught:
            mount_image(path, clock_ns=Clock(), read_only=read_only)
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert "\n" not in lines[0]
    assert lines[0].startswith(f"image {path}: ")
    return lines[0]


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("ext4", (), "has_journal, extents, 64bit, flex_bg, huge_file, dir_nlink, extra_isize"),
        ("ext4", (), "metadata_csum"),
        ("ext3", (), "has_journal"),
        ("ext2", ("-O", "extents"), "extents"),
        ("ext2", ("-O", "meta_bg,^resize_inode"), "meta_bg"),
        ("ext2", ("-O", "sparse_super2,^resize_inode"), "sparse_super2"),
        ("ext2", ("-O", "quota"), "quota"),
        ("ext2", ("-O", "inline_data"), "inline_data"),
        ("ext2", ("-O", "mmp"), "mmp"),
    ],
)
def test_unknown_features_are_named(
    make_image: MakeImage, kind: str, options: tuple[str, ...], named: str
) -> None:
    """Every feature that we don't know is in the line by its name."""
    image = make_image(kind=kind, blocks=4096, options=options)
    image.judged = False
    line = refusal(image.path)
    assert named in line
    assert "mke2fs -t ext2" in line


def test_a_feature_without_a_name_is_given_by_number(make_image: MakeImage) -> None:
    """Bits that nobody has named yet are refused too."""
    image = make_image()
    image.judged = False
    raw = bytearray(image.path.read_bytes())
    struct.pack_into("<I", raw, 1024 + 96, struct.unpack_from("<I", raw, 1024 + 96)[0] | 1 << 30)
    image.path.write_bytes(raw)
    assert "incompat:0x40000000" in refusal(image.path)


@pytest.mark.parametrize(("size", "text"), [(1024, "1024-byte"), (2048, "2048-byte")])
def test_other_block_sizes(make_image: MakeImage, size: int, text: str) -> None:
    """Only 4 KiB blocks are a page."""
    image = make_image(block_bytes=size)
    image.judged = False
    line = refusal(image.path)
    assert text in line
    assert "mke2fs -b 4096" in line


def test_a_truncated_image(make_image: MakeImage) -> None:
    """A file shorter than its file system says both lengths."""
    image = make_image()
    image.judged = False
    os.truncate(image.path, 1000 * 4096)
    assert "has 1024 blocks, the file only 1000" in refusal(image.path)


def test_things_that_are_no_image(tmp_path: Path) -> None:
    """Missing, a directory, empty, zeros, text, a pipe."""
    assert "no such file" in refusal(tmp_path / "missing")
    assert "mke2fs" in refusal(tmp_path / "missing")
    (tmp_path / "directory").mkdir()
    assert "is a directory" in refusal(tmp_path / "directory")
    (tmp_path / "empty").write_bytes(b"")
    assert "only 0 bytes" in refusal(tmp_path / "empty")
    (tmp_path / "zeros").write_bytes(bytes(1 << 20))
    assert "is not an ext2 file system" in refusal(tmp_path / "zeros")
    (tmp_path / "text").write_bytes(b"not a file system\n" * 1000)
    assert "is not an ext2 file system" in refusal(tmp_path / "text")
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in refusal(tmp_path / "pipe")


def test_an_image_in_use(make_image: MakeImage) -> None:
    """One writer alone, or several readers."""
    image = make_image()
    image.mount()
    assert "in use by another guest" in refusal(image.path)
    image.unmount()
    first, second = image.mount(read_only=True), image.mount(read_only=True)
    assert first.listdir("/") == second.listdir("/")
    with pytest.raises(ImageError, match="in use"):
        FileDevice(image.path)


def test_a_refused_image_is_not_held(make_image: MakeImage) -> None:
    """After a refusal the file is closed and its lock given back."""
    image = make_image(kind="ext4", blocks=4096)
    image.judged = False
    refusal(image.path)
    FileDevice(image.path).close()


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (0, "<I", 12345),  # inodes
        (4, "<I", 0),  # blocks
        (4, "<I", 0xFFFFFFFF),
        (20, "<I", 1),  # first data block
        (24, "<I", 31),  # block size
        (32, "<I", 0),  # blocks per group
        (32, "<I", 7),
        (32, "<I", 40960),
        (40, "<I", 0),  # inodes per group
        (40, "<I", 0xFFFFFFFF),
        (76, "<I", 9),  # revision
        (84, "<I", 0),  # first inode
        (88, "<H", 0),  # inode size
        (88, "<H", 129),
        (88, "<H", 8192),
        (206, "<H", 0xFFFF),  # reserved descriptor blocks
        (4096 - 1024, "<I", 0),  # group 0: block bitmap
        (4096 - 1024 + 8, "<I", 1 << 31),  # inode table
        (4096 - 1024 + 12, "<H", 0xFFFF),  # free blocks
    ],
)
def test_impossible_geometry(make_image: MakeImage, offset: int, form: str, value: int) -> None:
    """Each field that everything else is computed from is checked at mount."""
    image = make_image()
    image.judged = False
    raw = bytearray(image.path.read_bytes())
    struct.pack_into(form, raw, 1024 + offset, value)
    image.path.write_bytes(raw)
    refusal(image.path)
