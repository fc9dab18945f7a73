"""Damaged metadata gives EUCLEAN, EIO or a refusal; never a hang or another exception."""

from __future__ import annotations

import errno
import random
import re
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fs.block.device import BlockDevice
from fs.block.faulty import FaultyDevice
from fs.errors import ImageError
from tests.support.damage import attempt, read_ends, used_hard
from tests.support.tools import need_tool
from tests.t3_fs.images import BLOCK, Image, MakeImage, write

KNOWN = ("/deep", "/deep/file0", "/link", "/big")


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """A little of everything."""
    root = tmp_path / "tree"
    (root / "deep/er").mkdir(parents=True)
    for number in range(30):
        (root / f"deep/file{number}").write_bytes(b"%d" % number * 1000)
    with (root / "big").open("wb") as file:
        file.seek((12 + 1024 + 2) * BLOCK)
        file.write(b"end")
    (root / "link").symlink_to("deep/file1")
    (root / "long").symlink_to("t" * 200)
    return root


def metadata_blocks(image: Image) -> list[int]:
    """Superblock, descriptors, bitmaps, inode tables, and blocks of directories and maps."""
    stats = image.debugfs("stats")
    match = re.search(r"block bitmap at (\d+), inode bitmap at (\d+), inode table at (\d+)", stats)
    assert match is not None
    bitmap, inodes, table = map(int, match.groups())
    blocks = [0, 1, bitmap, inodes, table, table + 1, table + 2]
    for name in ("/", "/deep", "/long", "/lost+found"):
        blocks += [int(word) for word in image.debugfs(f"blocks {name}").split()][:1]
    indirect = re.findall(r"\((?:IND|DIND|TIND)\):(\d+)", image.debugfs("stat /big"))
    return blocks + [int(word) for word in indirect]


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_in_metadata(make_image: MakeImage, small_tree: Path, seed: int) -> None:
    """40 images a seed, each with a few bits of metadata flipped."""
    rng = random.Random(seed)
    image = make_image(tree=small_tree, blocks=512)
    image.judged = False
    places = metadata_blocks(image)
    assert len(places) >= 13
    good = image.path.read_bytes()
    survived = 0
    for _ in range(40):
        raw = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            # Most of a block is unused; the first quarter and used entries are hit more often.
            offset = rng.choice(
                (rng.randrange(BLOCK), rng.randrange(200), 1024 + rng.randrange(264))
            )
            raw[rng.choice(places) * BLOCK + offset] ^= 1 << rng.randrange(8)
        image.path.write_bytes(raw)
        try:
            vfs = image.mount()
        except ImageError:
            continue
        survived += 1
        used_hard(vfs, KNOWN)
        attempt(vfs.unmount)
        image.mounts.clear()
    assert survived > 10


@pytest.mark.parametrize("seed", range(3))
def test_garbage_blocks(make_image: MakeImage, small_tree: Path, seed: int) -> None:
    """20 images a seed, each with one metadata block full of noise, zeros or ones."""
    rng = random.Random(seed)
    image = make_image(tree=small_tree, blocks=512)
    image.judged = False
    places = metadata_blocks(image)
    good = image.path.read_bytes()
    for number in range(20):
        raw = bytearray(good)
        place = places[number % len(places)] * BLOCK
        noise = rng.choice((rng.randbytes(BLOCK), bytes(BLOCK), b"\xff" * BLOCK))
        raw[place : place + BLOCK] = noise
        image.path.write_bytes(raw)
        try:
            vfs = image.mount()
        except ImageError:
            continue
        used_hard(vfs, KNOWN)
        attempt(vfs.unmount)
        image.mounts.clear()


def patch(image: Image, path: str, field: str, value: str) -> None:
    """Change a field of an inode with debugfs."""
    command = [need_tool("debugfs"), "-w", "-R", f"sif {path} {field} {value}", str(image.path)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/big", "block[DIND]", "99999999"),
        ("/big", "block[DIND]", "1"),
        ("/big", "size", "0x7fffffffffffffff"),
        ("/deep", "block[0]", "0"),
        ("/deep", "block[0]", "99999999"),
        ("/deep", "size", "1000"),
        ("/deep", "size", "0x7ffff000"),
        ("/deep", "links_count", "0"),
        ("/deep", "mode", "0"),
        ("/deep", "flags", "0x80000"),
        ("/long", "block[0]", "0"),
        ("/long", "size", "5000"),
        ("/link", "size", "0"),
    ],
)
def test_a_bad_inode_is_euclean(
    make_image: MakeImage, small_tree: Path, path: str, field: str, value: str
) -> None:
    """The file is refused, the rest still works, and the image is marked for e2fsck."""
    image = make_image(tree=small_tree, blocks=512)
    image.judged = False
    patch(image, path, field, value)
    vfs = image.mount()
    uses: dict[str, Callable[[str], object]] = {
        "/deep": vfs.listdir,
        "/big": partial(read_ends, vfs),
        "/long": vfs.readlink,
        "/link": vfs.readlink,
    }
    with pytest.raises(OSError) as caught:  # noqa: PT011
        uses[path](path)
    assert caught.value.errno == errno.EUCLEAN
    assert "lost+found" in vfs.listdir("/")
    image.unmount()
    assert "with errors" in image.field("Filesystem state")


def test_errors_remount_read_only_when_the_image_asks(
    make_image: MakeImage, small_tree: Path
) -> None:
    """`errors=remount-ro` stops all changes after the first damage."""
    image = make_image(tree=small_tree, blocks=512, options=("-e", "remount-ro"))
    image.judged = False
    patch(image, "/deep", "block[0]", "0")
    vfs = image.mount()
    vfs.mkdir("/before")
    with pytest.raises(OSError, match="needs cleaning"):
        vfs.listdir("/deep")
    with pytest.raises(OSError, match="Read-only"):
        vfs.mkdir("/after")
    image.unmount()
    assert "with errors" in image.field("Filesystem state")


def test_directories_in_a_loop_end(make_image: MakeImage, small_tree: Path) -> None:
    """A directory that contains its parent is walked once, and moves are refused."""
    image = make_image(tree=small_tree, blocks=512)
    image.judged = False
    raw = bytearray(image.path.read_bytes())
    vfs = image.mount(read_only=True)
    deep = vfs.stat("/deep").st_ino
    block = vfs.fs.map_blocks(vfs.fs.iget(vfs.stat("/deep/er").st_ino), 0, 1)[0]
    image.unmount()
    name = b"loop"
    struct.pack_into("<IHBB", raw, block * BLOCK + 12, deep, 12, 2, 2)
    struct.pack_into("<IHBB", raw, block * BLOCK + 24, deep, BLOCK - 24, len(name), 2)
    raw[block * BLOCK + 32 : block * BLOCK + 36] = name
    image.path.write_bytes(raw)
    vfs = image.mount()
    with pytest.raises(OSError, match="needs cleaning"):
        list(vfs.walk())
    assert vfs.stat("/deep/er/loop/er/loop/er").st_ino == vfs.stat("/deep/er").st_ino
    assert vfs.lstat("/deep" + "/er/loop" * 400).st_ino == deep


def test_a_block_that_belongs_to_two_files_is_found(make_image: MakeImage, tmp_path: Path) -> None:
    """Freeing it the second time is EUCLEAN, not a wrong count."""
    root = tmp_path / "two"
    root.mkdir()
    for name in ("one", "two"):
        (root / name).write_bytes(b"x" * BLOCK)
    image = make_image(tree=root)
    image.judged = False
    block = image.debugfs("blocks /one").split()[0]
    patch(image, "/two", "block[0]", block)
    vfs = image.mount()
    vfs.unlink("/one")
    with pytest.raises(OSError, match="needs cleaning"):
        vfs.unlink("/two")


def test_a_read_error_is_eio_and_passes(image: Image) -> None:
    """A bad sector under an inode table is EIO for its files only, and gone when the disk is."""
    devices: list[FaultyDevice] = []

    def stack(device: BlockDevice) -> BlockDevice:
        devices.append(FaultyDevice(device, random.Random(0)))
        return devices[0]

    vfs = image.mount(stack=stack, buffer_blocks=8)
    write(vfs, "/file", b"x" * 30 * BLOCK)
    handle = vfs.open("/file")
    blocks = vfs.fs.map_blocks(vfs.inode_of(handle), 0, 30)
    devices[0].bad_reads.add(blocks[20])
    assert vfs.pread(handle, BLOCK, 0) == b"x" * BLOCK
    with pytest.raises(OSError, match="Input/output"):
        vfs.pread(handle, BLOCK, 20 * BLOCK)
    devices[0].bad_reads.clear()
    assert vfs.pread(handle, BLOCK, 20 * BLOCK) == b"x" * BLOCK
