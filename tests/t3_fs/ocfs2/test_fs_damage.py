"""Damaged volumes: one clear error, never a crash, never endless work."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fs.errors import ImageError
from fs.ocfs2.format import (
    DINODE_SIGNATURE,
    EXTENT_BLOCK_SIGNATURE,
    GROUP_SIGNATURE,
    Dinode,
    ExtentListHeader,
)
from fs.vfs import Vfs
from tests.support.ocfs2 import ALL, BLOCK, Volume, make_volume, read, write
from tests.t3_fs.ocfs2.conftest import MakeVolume

SECONDS_MAX = 60
"""Far more than any case takes; endless work ends here."""
CASES = 60 if ALL else 8
"""In each of three parts."""
VALUES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails when what is inside takes too long."""

    def ring(*_: object) -> None:
        raise AssertionError(f"more than {SECONDS_MAX} s of work")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS_MAX)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def populated(make_image: MakeVolume) -> Volume:
    """A volume with something of everything."""
    volume = make_image()
    volume.judged = False
    vfs = volume.mount()
    vfs.mkdir("/d")
    vfs.mkdir("/d/e")
    for number in range(40):
        write(vfs, f"/d/{number:050}", b"x" * number)
    write(vfs, "/f", b"f" * 40 * BLOCK)
    vfs.symlink("d", "/short")
    vfs.symlink("t" * 4000, "/long")
    one = vfs.fs.create(vfs.fs.root, b"one", 0o644)
    two = vfs.fs.create(vfs.fs.root, b"two", 0o644)
    for index in range(260):  # an extent for each block: trees of depth 1
        vfs.fs.allocate_blocks(one, index, 1)
        vfs.fs.allocate_blocks(two, index, 1)
    for inode in (one, two):
        inode.size = 260 * BLOCK
        vfs.fs.write_inode(inode)
    volume.unmount()
    return volume


def metadata_blocks(data: bytes) -> list[int]:
    """Blocks with a signature, and directory blocks."""
    signatures = (DINODE_SIGNATURE, EXTENT_BLOCK_SIGNATURE, GROUP_SIGNATURE, b"OCFSV2\0\0")
    found = []
    for block in range(len(data) // BLOCK):
        head = data[block * BLOCK : block * BLOCK + 32]
        if head[:8] in signatures or head[10:13] == b"\x01\x02." or b"0000" in head[12:]:
            found.append(block)
    return found


def use(vfs: Vfs) -> None:
    """Everything once; each step may be refused, but only as a file system refuses."""

    def remove_all() -> None:
        for name in vfs.listdir("/d"):
            vfs.unlink(f"/d/{name}")

    def walk() -> None:
        for top, _directories, others in vfs.walk():
            for name in others:
                vfs.lstat(f"{top}/{name}")

    steps: list[Callable[[], object]] = [
        walk,
        lambda: read(vfs, "/f"),
        lambda: read(vfs, "/one"),
        lambda: vfs.readlink("/long"),
        vfs.statfs,
        lambda: vfs.mkdir("/new"),
        lambda: write(vfs, "/new/f", b"n" * 50 * BLOCK),
        lambda: vfs.rename("/d/e", "/new/e"),
        lambda: vfs.rename("/f", "/new/f"),
        lambda: vfs.truncate("/one", 100 * BLOCK),
        lambda: vfs.truncate("/two", 270 * BLOCK),
        lambda: vfs.unlink("/one"),
        lambda: vfs.rmdir("/new/e"),
        remove_all,
        vfs.sync,
    ]
    for step in steps:
        with contextlib.suppress(OSError):
            step()


@pytest.mark.parametrize("part", range(3))
def test_random_damage(populated: Volume, part: int) -> None:
    """Words of metadata are replaced; all operations end, with success or `OSError`."""
    good = populated.path.with_name("good")
    shutil.copyfile(populated.path, good)
    whole = good.read_bytes()
    blocks = metadata_blocks(whole)
    assert len(blocks) > 60
    special = [block for block in blocks if block < 40]
    refused = 0
    told: list[str] = []
    for case in range(CASES):
        seed = part * CASES + case
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            block = rng.choice(special if rng.random() < 0.5 else blocks)
            size, kind = rng.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
            where = rng.choice((0x100, 0x100, 0x200, BLOCK))
            offset = block * BLOCK + rng.randrange(where // size) * size
            value = rng.choice((*VALUES, rng.getrandbits(64), rng.choice(blocks)))
            struct.pack_into(f"<{kind}", data, offset, value & ((1 << size * 8) - 1))
        populated.path.write_bytes(data)
        with bounded():
            try:
                vfs = populated.mount()
            except ImageError as reason:
                refused += 1
                told.append(str(reason))
                continue
            try:
                use(vfs)
            except Exception as reason:
                raise AssertionError(f"seed {seed}: {reason!r}") from reason
            finally:
                populated.mounts.clear()
                with contextlib.suppress(OSError):
                    vfs.unmount()
    assert refused < CASES
    assert not any("\n" in line for line in told)


def patch(volume: Volume, block: int, change: Callable[[bytearray], None]) -> None:
    """Change a block of the image."""
    with volume.path.open("r+b") as file:
        file.seek(block * BLOCK)
        data = bytearray(file.read(BLOCK))
        change(data)
        file.seek(block * BLOCK)
        file.write(data)


def numbers(volume: Volume, *paths: str) -> list[int]:
    """The inodes of paths."""
    vfs = volume.mount(read_only=True)
    found = [vfs.lstat(path).st_ino for path in paths]
    volume.unmount()
    return found


def test_a_tree_that_points_at_itself_ends(populated: Volume) -> None:
    """An inner list names its own inode's block, or a leaf says that it is an inner node."""
    (one,) = numbers(populated, "/one")

    def loop(data: bytearray) -> None:
        struct.pack_into("<Q", data, 0xC0 + 16 + 8, one)

    patch(populated, one, loop)
    vfs = populated.mount()
    for step in (lambda: read(vfs, "/one"), lambda: vfs.truncate("/one", 0)):
        with pytest.raises(OSError, match=os.strerror(errno.EUCLEAN)):
            step()
    assert read(vfs, "/f") == b"f" * 40 * BLOCK


def test_groups_in_a_loop_end(populated: Volume) -> None:
    """A full group that is its own successor."""

    def loop(data: bytearray) -> None:
        struct.pack_into("<H", data, 0xC, 0)  # nothing free, as the group says
        struct.pack_into("<Q", data, 0x18, 3)

    patch(populated, 3, loop)
    vfs = populated.mount()
    with bounded(), pytest.raises(OSError, match=os.strerror(errno.EUCLEAN)):
        vfs.mkdir("/new")
    assert vfs.listdir("/d/e") == []


def test_clusters_of_two_files_are_found(populated: Volume) -> None:
    """Freeing them the second time is EUCLEAN, and the counts stay right."""
    (f,) = numbers(populated, "/f")
    vfs = populated.mount(read_only=True)
    block = vfs.fs.map_blocks(vfs.fs.iget(f), 0, 1)[0]
    populated.unmount()
    (small,) = numbers(populated, f"/d/{39:050}")

    def share(data: bytearray) -> None:
        struct.pack_into("<Q", data, 0xC0 + 16 + 8, block)

    patch(populated, small, share)
    vfs = populated.mount()
    vfs.unlink(f"/d/{39:050}")
    with pytest.raises(OSError, match=os.strerror(errno.EUCLEAN)):
        vfs.unlink("/f")


def test_wrong_inodes(populated: Volume) -> None:
    """Each way in which a dinode can contradict itself is EUCLEAN, and only for that inode."""
    (inode,) = numbers(populated, "/f")

    def change(**fields: int) -> Callable[[bytearray], None]:
        def apply(data: bytearray) -> None:
            raw = Dinode.read(data)
            for name, value in fields.items():
                setattr(raw, name, value)
            raw.write_into(data)

        return apply

    def list_of(**fields: int) -> Callable[[bytearray], None]:
        def apply(data: bytearray) -> None:
            head = ExtentListHeader.read(data)
            for name, value in fields.items():
                setattr(head, name, value)
            head.write_into(data)

        return apply

    whole = populated.path.read_bytes()
    for wrong in (
        change(block=7),
        change(fs_generation=1),
        change(flags=0),
        change(mode=0),
        change(size=1 << 40),
        change(clusters=1 << 30),
        change(dyn_features=1),
        change(xattr_block=9),
        change(mtime_nsec=0xFFFFFFFF),
        list_of(used=300),
        list_of(count=0),
        list_of(depth=200),
        list_of(used=0),
    ):
        populated.path.write_bytes(whole)
        patch(populated, inode, wrong)
        vfs = populated.mount()
        with pytest.raises(OSError, match=os.strerror(errno.EUCLEAN)):
            read(vfs, "/f")
        assert vfs.listdir("/d/e") == []
        populated.unmount()


@pytest.mark.parametrize(
    ("features", "named"),
    [
        ("nosparse,nounwritten,inline-data", "inline-data"),
        ("sparse,nounwritten", "sparse"),
        ("sparse,unwritten", "unwritten"),
        ("nosparse,nounwritten,metaecc", "metaecc"),
        ("nosparse,nounwritten,indexed-dirs", "indexed-dirs"),
        ("nosparse,nounwritten,xattr", "xattr"),
    ],
)
def test_other_profiles_are_refused_by_name(tmp_path: Path, features: str, named: str) -> None:
    """The refusal names the feature, and the image."""
    wanted = features.split(",")
    others = [
        "inline-data", "indexed-dirs", "refcount", "discontig-bg", "xattr", "append-dio",
        "backup-super",
    ]  # fmt: skip
    features = ",".join([*wanted, *(f"no{name}" for name in others if name not in wanted)])
    volume = Volume(make_volume(tmp_path / "other", features=features))
    with pytest.raises(ImageError, match=named) as refusal:
        volume.mount()
    assert str(volume.path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
