"""The power goes after a block write: the next mount replays, what was synced is there."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from fs.block.device import BlockDevice
from fs.block.faulty import FaultyDevice
from fs.errors import ImageError
from fs.vfs import Vfs
from tests.support.ocfs2 import ALL, BLOCK, Volume, faults, read, vfs_tree, write

OLD = {f"/old/{number}": random.Random(number).randbytes(number * 3000) for number in range(8)}
STEP = 1 if ALL else 7
"""Every so many writes of the workload are a place of a cut."""


def work(vfs: Vfs, synced: list[dict[str, bytes]]) -> None:
    """Changes of all kinds; `synced` gets what must be there after each sync."""
    files: dict[str, bytes] = {}
    vfs.mkdir("/new")
    for number in range(10):
        path = f"/new/{number}"
        files[path] = bytes([number]) * number * 4000
        write(vfs, path, files[path])
        if number % 4 == 3:
            vfs.sync()
            synced.append(dict(files))
    vfs.rename("/new/9", "/new/8")
    files["/new/8"] = files.pop("/new/9")
    # From here on what was synced may be gone; only files that stay are promised.
    for path in ("/new/5", "/new/7"):
        del files[path]
        synced[:] = [{name: data for name, data in one.items() if name != path} for one in synced]
        vfs.unlink(path)
    vfs.sync()
    synced.append(dict(files))
    handle = vfs.open("/new/orphan", os.O_RDWR | os.O_CREAT)
    vfs.write(handle, b"o" * 9 * BLOCK)
    vfs.unlink("/new/orphan")
    vfs.fsync(handle)
    vfs.close(handle)
    vfs.symlink("t" * 4000, "/new/link")
    vfs.unmount()


def run(volume: Volume, good: Path, after: int, *, volatile: bool, seed: int) -> tuple[
    FaultyDevice, dict[str, bytes]
]:  # fmt: skip
    """Work on a copy of `good` until the power goes; what was synced then."""
    shutil.copyfile(good, volume.path)
    devices: list[FaultyDevice] = []

    def stack(device: BlockDevice) -> BlockDevice:
        rng = random.Random(seed)
        devices.append(FaultyDevice(device, rng, cut_after_writes=after, volatile_cache=volatile))
        return devices[0]

    synced: list[dict[str, bytes]] = [{}]
    try:
        work(volume.mount(stack=stack), synced)
    except (OSError, ImageError):
        assert devices[0].cut
    finally:
        devices[0].close()
        volume.mounts.clear()
    return devices[0], synced[-1]


@pytest.mark.parametrize("volatile", [False, True], ids=["write-through", "volatile-cache"])
def test_power_cut(volume: Volume, volatile: bool) -> None:
    """After each cut the volume mounts, is whole, and holds what was synced."""
    vfs = volume.mount()
    vfs.mkdir("/old")
    for path, data in OLD.items():
        write(vfs, path, data)
    free = vfs.statfs().blocks_free
    volume.unmount()
    good = volume.path.with_name("good")
    shutil.copyfile(volume.path, good)
    total = run(volume, good, 10**9, volatile=volatile, seed=0)[0].block_writes
    assert total > 100
    judged = 0
    for after in range(volatile, total, STEP):
        device, synced = run(volume, good, after, volatile=volatile, seed=after)
        where = f"cut after {after} of {total} writes, volatile={volatile}"
        assert device.cut, where
        looked = vfs_tree(volume.mount(read_only=True))
        volume.unmount()
        vfs = volume.mount()
        for path, data in (OLD | synced).items():
            assert read(vfs, path) == data, f"{path}: {where}"
            assert looked[path] == ("file", data), f"{path}: {where}"
        if "new" in vfs.listdir("/"):
            for name in vfs.listdir("/new"):
                vfs.unlink(f"/new/{name}")
            vfs.rmdir("/new")
        assert vfs.statfs().blocks_free == free, where
        volume.unmount()
        if after // STEP % 4 == 0:
            # fsck.ocfs2 takes most of the time, so it sees one state in four.
            assert faults(volume.path) == [], where
            judged += 1
    assert judged > 2


def test_a_cut_during_recovery_is_recovered(volume: Volume) -> None:
    """The power goes again while the next mount replays and frees orphans."""
    write(volume.mount(), "/old", b"old" * 5000)
    volume.unmount()
    good = volume.path.with_name("good")
    shutil.copyfile(volume.path, good)
    total = run(volume, good, 10**9, volatile=False, seed=0)[0].block_writes
    run(volume, good, total - 60, volatile=False, seed=0)
    crashed = volume.path.with_name("crashed")
    shutil.copyfile(volume.path, crashed)
    reference = vfs_tree(volume.mount())
    volume.unmount()
    after = 0
    while True:
        shutil.copyfile(crashed, volume.path)
        devices: list[FaultyDevice] = []

        def stack(
            device: BlockDevice, after: int = after, made: list[FaultyDevice] = devices
        ) -> BlockDevice:
            made.append(FaultyDevice(device, random.Random(0), cut_after_writes=after))
            return made[0]

        try:
            volume.mount(stack=stack)
            volume.unmount()
        except (OSError, ImageError):
            assert devices[0].cut
            devices[0].close()
            volume.mounts.clear()
        done = not devices[0].cut
        assert vfs_tree(volume.mount()) == reference, f"cut after {after} writes of recovery"
        volume.unmount()
        if done:
            break
        after += 2
    assert after > 10


def test_a_journal_that_cannot_be_written_stops_all_changes(volume: Volume) -> None:
    """EIO once, EROFS from then on; what was read stays readable, and the disk stays whole."""
    devices: list[FaultyDevice] = []

    def stack(device: BlockDevice) -> BlockDevice:
        devices.append(FaultyDevice(device, random.Random(0)))
        return devices[0]

    vfs = volume.mount(stack=stack)
    write(vfs, "/f", b"x")
    vfs.sync()
    journal = vfs.fs._journal.area.blocks  # type: ignore[attr-defined]
    devices[0].bad_writes |= set(journal)
    vfs.mkdir("/lost")
    with pytest.raises(OSError, match="Input/output"):
        vfs.sync()
    with pytest.raises(OSError, match="Read-only"):
        vfs.mkdir("/d")
    assert read(vfs, "/f") == b"x"
    devices[0].bad_writes.clear()
    volume.unmount()
    vfs = volume.mount()
    assert not vfs.fs.was_clean  # type: ignore[attr-defined]
    assert read(vfs, "/f") == b"x"
