"""Our mkfs makes what mkfs.ocfs2 makes, block by block; fsck.ocfs2 is the judge."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fs.block.file import FileDevice
from fs.errors import ImageError
from fs.ocfs2.format import Dinode, SuperBlock
from fs.ocfs2.mkfs import Parameters, blocks_needed, make_volume
from tests.support.ocfs2 import BLOCK, FEATURES, Volume, debugfs, faults, problems, read, write
from tests.support.tools import need_tool

MEBIBYTE = 1 << 20
PARAMETERS = Parameters(slots=2, uuid=bytes(range(16)), generation=0x1234, now_s=1_700_000_000)


def make(path: Path, size_bytes: int, parameters: Parameters, *, fresh: bool = True) -> Path:
    """Make a volume in a file of its own."""
    if fresh:
        path.write_bytes(b"")
        os.truncate(path, size_bytes)
    device = FileDevice(path)
    try:
        make_volume(device, parameters, fresh=fresh)
    finally:
        device.close()
    return path


def theirs(path: Path, size_bytes: int, parameters: Parameters) -> Path:
    """The same by mkfs.ocfs2."""
    path.write_bytes(b"")
    os.truncate(path, size_bytes)
    command = [need_tool("mkfs.ocfs2"), "-q", "-M", "cluster", "-N", str(parameters.slots)]
    command += ["-b", "4K", "-C", "4K", "-J", f"size={parameters.journal_bytes // MEBIBYTE}M"]
    command += ["-L", parameters.label.decode(), f"--fs-features={FEATURES}"]
    if parameters.cluster:
        command += ["--cluster-stack=o2cb", f"--cluster-name={parameters.cluster.decode()}"]
    subprocess.run([*command, str(path)], check=True, capture_output=True)
    return path


def like(path: Path, parameters: Parameters) -> Parameters:
    """With the uuid, the generation and the time that mkfs.ocfs2 chose."""
    with path.open("rb") as file:
        block = file.read(3 * BLOCK)[2 * BLOCK :]
    dinode, superblock = Dinode.read(block), SuperBlock.read(block)
    return replace(
        parameters,
        uuid=bytes(superblock.uuid),
        generation=dinode.fs_generation,
        now_s=dinode.ctime_s,
    )


def differing_blocks(one: Path, other: Path) -> list[int]:
    """Numbers of the blocks that differ."""
    with one.open("rb") as left, other.open("rb") as right:
        blocks = one.stat().st_size // BLOCK
        return [block for block in range(blocks) if left.read(BLOCK) != right.read(BLOCK)]


def superblock_fields(path: Path) -> dict[str, object]:
    """All fields of block 2.

    Behind the end of the cluster's name mkfs.ocfs2 leaves what was in its memory.
    """
    with path.open("rb") as file:
        block = file.read(3 * BLOCK)[2 * BLOCK :]
    found = asdict(SuperBlock.read(block)) | asdict(Dinode.read(block))
    found["cluster"] = found["cluster"].partition(b"\0")[0]
    return found


@pytest.mark.parametrize(
    ("mebibytes", "parameters"),
    [
        (24, replace(PARAMETERS, label=b"a label")),
        (64, replace(PARAMETERS, slots=1, journal_bytes=8 * MEBIBYTE)),
        (100, replace(PARAMETERS, slots=8, cluster=b"tmem")),
    ],
)
def test_same_blocks_as_mkfs_ocfs2(tmp_path: Path, mebibytes: int, parameters: Parameters) -> None:
    """Every block is the same but those that may differ.

    Blocks 0 and 1 hold a text against OCFS version 1 there. Behind the entries of lost+found
    mkfs.ocfs2 leaves the inode that was in its buffer.
    """
    size_bytes = mebibytes * MEBIBYTE
    # All times that mkfs.ocfs2 writes are the same only if the clock's second did not change.
    while True:
        second = int(time.time())
        real = theirs(tmp_path / f"real{second}", size_bytes, parameters)
        if int(time.time()) == second:
            break
    ours = make(tmp_path / "ours", size_bytes, like(real, parameters))

    extents = debugfs(ours, "stat /lost+found")
    match = re.search(r"\n\s+0\s+0\s+1\s+(\d+)\s+0x0", extents)
    assert match is not None, extents
    assert superblock_fields(real) == superblock_fields(ours)
    assert set(differing_blocks(real, ours)) - {2} == {0, 1, int(match.group(1))}
    assert debugfs(real, "ls -l /lost+found") == debugfs(ours, "ls -l /lost+found")
    assert faults(ours) == []


@pytest.mark.parametrize(
    ("mebibytes", "slots", "journal_mebibytes"), [(400, 4, 8), (300, 32, 4), (140, 1, 4)]
)
def test_volumes_of_several_groups(
    tmp_path: Path, mebibytes: int, slots: int, journal_mebibytes: int
) -> None:
    """debugfs.ocfs2 shows the same superblock; fsck.ocfs2 and our checker find nothing."""
    parameters = replace(PARAMETERS, slots=slots, journal_bytes=journal_mebibytes * MEBIBYTE)
    size_bytes = mebibytes * MEBIBYTE
    real = theirs(tmp_path / "real", size_bytes, parameters)
    ours = make(tmp_path / "ours", size_bytes, like(real, parameters))

    assert debugfs(real, "stats") == debugfs(ours, "stats")
    names = [re.findall(r"\S+$", debugfs(path, "ls //"), re.MULTILINE) for path in (real, ours)]
    assert names[0] == names[1]
    assert len(names[1]) >= 7 + 6 * slots
    assert faults(ours) == []
    assert problems(ours) == []


@pytest.mark.parametrize("clusters", [32256 + 1, 32256 + 2, 2 * 32256])
def test_last_group_may_be_small(tmp_path: Path, clusters: int) -> None:
    """Even one cluster that holds only its own group descriptor."""
    ours = make(tmp_path / "ours", clusters * BLOCK, PARAMETERS)

    assert faults(ours) == []
    assert problems(ours) == []


def test_more_groups_than_chains(tmp_path: Path) -> None:
    """From 31 GiB on a chain has several groups."""
    ours = make(tmp_path / "ours", 32 << 30, PARAMETERS)

    assert problems(ours) == []
    assert faults(ours) == []


def test_over_an_old_volume(tmp_path: Path) -> None:
    """What was there before is gone, and what nobody cleared harms nobody."""
    path = make(tmp_path / "ours", 24 * MEBIBYTE, PARAMETERS)
    with path.open("r+b") as file:
        for block in range(24 * MEBIBYTE // BLOCK):
            file.seek(block * BLOCK)
            file.write(os.urandom(64))

    make(path, 0, replace(PARAMETERS, generation=7), fresh=False)

    assert faults(path) == []
    assert problems(path) == []


def test_our_file_system_uses_it(tmp_path: Path) -> None:
    """Files can be written to it, up to the last slot."""
    volume = Volume(make(tmp_path / "ours", 32 * MEBIBYTE, replace(PARAMETERS, cluster=b"tmem")))
    vfs = volume.mount()
    vfs.mkdir("/folder")
    write(vfs, "/folder/file", b"text" * 5000)
    assert read(vfs, "/folder/file") == b"text" * 5000
    volume.judge(tmp_path / "dump")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"slots": 0}, "can't have 0 slots"),
        ({"slots": 33}, "take 1 to 32"),
        ({"uuid": b"short"}, "a uuid of 16 bytes"),
        ({"label": b"x" * 65}, "at most 64 bytes"),
        ({"cluster": b"no-dash"}, "letters and digits"),
        ({"cluster": b"x" * 17}, "at most 16"),
        ({"journal_bytes": MEBIBYTE}, "take 4 to 256 MiB"),
        ({"journal_bytes": 5 * MEBIBYTE + 1}, "whole blocks"),
        ({"slots": 8}, "is too small: 8 slots with journals of 4 MiB need"),
    ],
)
def test_what_can_t_be_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    """In one line, and the file stays as it was."""
    path = tmp_path / "ours"
    with pytest.raises(ImageError, match=says):
        make(path, 24 * MEBIBYTE, replace(PARAMETERS, **change))  # type: ignore[arg-type]
    assert not any(path.read_bytes()[: 3 * BLOCK])


def test_smallest_volume_is_one(tmp_path: Path) -> None:
    """What the check of the size promises holds, for few and many slots."""
    for slots in (1, 7, 32):
        parameters = replace(PARAMETERS, slots=slots)
        size_bytes = blocks_needed(parameters) * BLOCK
        path = make(tmp_path / f"{slots}", size_bytes, parameters)
        assert faults(path) == []
        with pytest.raises(ImageError, match="is too small"):
            make(tmp_path / f"{slots}", size_bytes - BLOCK, parameters)
