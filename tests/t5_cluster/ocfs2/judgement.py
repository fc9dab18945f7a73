"""What must be true after a crash: the volume mounts, is whole, holds what it may, and works."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from fs.block.device import BlockDevice
from fs.block.memory import MemoryDevice
from fs.directpages import DirectPages
from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.fsck.checker import check
from fs.vfs import Vfs
from tests.support.ocfs2 import BLOCK, Clock, faults, read, write
from tests.t5_cluster.ocfs2.world import SLOTS

PROBE = b"probe" * BLOCK


@dataclass(frozen=True)
class Width:
    """How much of a campaign is looked at."""

    subset_writes_max: int = 10
    samples: int = 200
    torn_each: int = 2
    every: int = 1
    """Of so many states one."""
    again_every: int = 100
    """Of so many looked at, one has its recovery cut at every write."""
    fsck_every: int = 100
    """Of so many looked at, fsck.ocfs2, which takes longer than all else, judges one."""


@dataclass
class Seen:
    """A tree as it was read: shape as `Model.shape`, and the files' contents."""

    shape: set[tuple[str, object]]
    contents: dict[str, bytes]


def mount(device: BlockDevice, node: int, *, read_only: bool = False) -> Vfs:
    """Mount as the only node; all dirty journals are replayed."""
    fs = Ocfs2(device, clock_ns=Clock(), node=node, read_only=read_only)
    return Vfs(fs, DirectPages(fs))


def look(vfs: Vfs) -> Seen:
    """The whole tree."""
    fs = vfs.fs
    seen = Seen(set(), {})
    pending = [("/", fs.root)]
    while pending:
        path, inode = pending.pop()
        detail: object = None
        if inode.is_file:
            with fs.reading(inode):
                seen.contents[path] = vfs.pages.read(inode, 0, inode.size)
            detail = inode.size
        elif inode.is_symlink:
            detail = fs.readlink(inode).decode()
        else:
            for entry in fs.readdir(inode):
                name = entry.name.decode()
                pending.append((f"{path.rstrip('/')}/{name}", fs.iget(entry.ino)))
        if path != "/lost+found":
            seen.shape.add((path, detail))
    return seen


def recovered(device: BlockDevice, node: int) -> tuple[Vfs, Seen]:
    """Mount, which recovers; no orphan is left, as nobody has a file open."""
    vfs = mount(device, node)
    seen = look(vfs)
    fs = vfs.fs
    assert isinstance(fs, Ocfs2)
    for slot in range(SLOTS):
        orphans = fs._volume.orphans.numbers(slot)
        assert not orphans, f"orphans {orphans} of slot {slot} are not freed"
    return vfs, seen


def works(vfs: Vfs) -> None:
    """It can be written, synced, and unmounted."""
    write(vfs, "/probe", PROBE)
    vfs.sync()
    assert read(vfs, "/probe") == PROBE
    vfs.unlink("/probe")
    vfs.unmount()


def is_whole(device: MemoryDevice) -> None:
    """Nobody has it mounted: our checker finds nothing, all journals and slots are free."""
    found = check(device)
    assert not found, f"our checker: {found[0]} and {len(found) - 1} more"
    fs = mount(device.copy(), 0, read_only=True).fs
    assert isinstance(fs, Ocfs2)
    assert fs.was_clean, "a journal is dirty"
    assert fs.slot_nodes() == [None] * SLOTS, f"slots: {fs.slot_nodes()}"


def fsck_agrees(device: MemoryDevice) -> None:
    """So does fsck.ocfs2."""
    with tempfile.TemporaryDirectory(prefix="crash-cluster-") as folder:
        path = Path(folder, "image")
        with path.open("wb") as file:
            file.truncate(device.blocks * BLOCK)
            zeros = bytes(BLOCK)
            for number, block in enumerate(device.contents):
                if block != zeros:
                    file.seek(number * BLOCK)
                    file.write(block)
        found = faults(path)
        assert not found, f"fsck.ocfs2: {found[0]} and {len(found) - 1} more lines"
