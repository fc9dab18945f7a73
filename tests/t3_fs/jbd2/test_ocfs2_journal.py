"""A slot journal of OCFS2: the form that mkfs.ocfs2 gives it, and fsck.ocfs2 as judge."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from fs.block.device import BLOCK_BYTES
from fs.block.memory import MemoryDevice
from fs.jbd2.area import Area
from fs.jbd2.journal import Journal, format_journal
from fs.jbd2.recovery import recover
from tests.support.tools import need_tool
from tests.t3_fs.jbd2.journals import clock

ABSENT = "inline-data indexed-dirs refcount discontig-bg xattr append-dio backup-super"
MKFS = (
    *("-q", "-M", "cluster", "-N", "2", "-b", "4K", "-C", "4K", "-J", "size=4M"),
    "--fs-features=" + ",".join(f"no{name}" for name in [*ABSENT.split(), "sparse", "unwritten"]),
)
JOURNAL_FLAGS_OFFSET = 0xB8
DIRTY = 1


def run(*command: str) -> str:
    """Both outputs of a program of ocfs2-tools, which need not like it that there is no cluster."""
    done = subprocess.run(command, input="y\n" * 99, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def stat(path: Path, name: str) -> tuple[int, list[int]]:
    """The inode's block and the data blocks of a system file with one extent."""
    text = run(need_tool("debugfs.ocfs2"), "-R", f"stat //{name}", str(path))
    inode = re.search(r"Inode: (\d+)", text)
    extent = re.search(r"^\s*0\s+0\s+(\d+)\s+(\d+)\s+0x0", text, re.MULTILINE)
    assert inode and extent, text
    first = int(extent[2])
    return int(inode[1]), list(range(first, first + int(extent[1])))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file system for two nodes."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(24 << 20)
    run(need_tool("mkfs.ocfs2"), *MKFS, str(path))
    return path


def device_of(path: Path) -> MemoryDevice:
    """Its blocks."""
    data = path.read_bytes()
    return MemoryDevice([data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)])


def test_superblock_of_mkfs(image: Path) -> None:
    """Ours is the same, byte for byte, and so is the log of zeros."""
    device = device_of(image)
    _, blocks = stat(image, "journal:0001")
    theirs = [device.contents[block] for block in blocks]
    format_journal(Area(device, blocks), theirs[0][48:64], started=True)
    assert [device.contents[block] for block in blocks] == theirs
    assert recover(Area(device, blocks)).next_sequence == 2


def test_fsck_replays_our_slot_journal(image: Path) -> None:
    """The journal of a slot that is marked dirty is replayed as we replay it."""
    inode, blocks = stat(image, "journal:0001")
    _, heartbeat = stat(image, "heartbeat")
    device = device_of(image)
    area = Area(device, blocks)
    journal = Journal(area, now_ns=clock, ocfs2_tools=True)
    # The far end of the heartbeat area is no node's here, and nobody checks what is in it.
    targets = heartbeat[-20:]
    for number in range(12):
        writes = {block: bytes([number + 1]) * BLOCK_BYTES for block in targets[number:]}
        journal.commit(writes, [targets[number - 1]] if number else [])
    dinode = bytearray(device.contents[inode])
    struct.pack_into("<I", dinode, JOURNAL_FLAGS_OFFSET, DIRTY)
    device.contents[inode] = bytes(dinode)
    image.write_bytes(b"".join(device.contents))
    said = run(need_tool("fsck.ocfs2"), "-fyF", str(image))
    assert "Slot 1's journal replayed successfully" in said, said
    assert "MISSING_FEATURE" not in said, said
    found = recover(area)
    assert (found.transactions, found.replayed_blocks, found.revoked_blocks) == (12, 9, 66)
    theirs = device_of(image)
    assert [theirs.contents[block] for block in heartbeat] == [
        device.contents[block] for block in heartbeat
    ]
    assert theirs.contents[targets[-1]] == b"\x0c" * BLOCK_BYTES
