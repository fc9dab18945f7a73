"""The power goes after every single block write: e2fsck repairs, what was synced is there."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from fs.block.device import BlockDevice
from fs.block.faulty import FaultyDevice
from fs.vfs import Vfs
from tests.t3_fs.images import BLOCK, Image, MakeImage, read, write

OLD = {f"/old/{number}": random.Random(number).randbytes(number * 3000) for number in range(8)}


def work(vfs: Vfs) -> None:
    """Changes of all kinds after a sync; nothing of it touches what was synced."""
    vfs.mkdir("/new")
    for number in range(12):
        write(vfs, f"/new/{number}", bytes([number]) * number * 4000)
        if number % 4 == 3:
            vfs.sync()
    vfs.rename("/new/1", "/new/2")
    vfs.unlink("/new/5")
    vfs.truncate("/new/11", 5000)
    vfs.symlink("t" * 100, "/new/link")
    vfs.rename("/new", "/moved")
    vfs.unmount()


def start(make_image: MakeImage) -> Image:
    """An image with the old files, cleanly unmounted."""
    image = make_image(blocks=512)
    image.judged = False
    vfs = image.mount()
    vfs.mkdir("/old")
    for path, data in OLD.items():
        write(vfs, path, data)
    image.unmount()
    return image


def cut(image: Image, good: Path, after: int, *, volatile: bool, seed: int) -> FaultyDevice:
    """Do the work on a copy of `good` until the power goes after so many block writes."""
    shutil.copyfile(good, image.path)
    devices: list[FaultyDevice] = []

    def stack(device: BlockDevice) -> BlockDevice:
        rng = random.Random(seed)
        devices.append(FaultyDevice(device, rng, cut_after_writes=after, volatile_cache=volatile))
        return devices[0]

    try:
        work(image.mount(stack=stack, buffer_blocks=8))
    except OSError:
        assert devices[0].cut
    finally:
        devices[0].close()
        image.mounts.clear()
    return devices[0]


@pytest.mark.parametrize("volatile", [False, True], ids=["write-through", "volatile-cache"])
def test_power_cut_after_every_write(make_image: MakeImage, volatile: bool) -> None:
    """After each cut the image still mounts as it is, and e2fsck makes it whole."""
    image = start(make_image)
    good = image.path.with_name("good")
    shutil.copyfile(image.path, good)
    total = cut(image, good, 10**9, volatile=volatile, seed=0).block_writes
    assert total > 60
    for after in range(0, total, 1 if not volatile else 2):
        assert cut(image, good, after, volatile=volatile, seed=after).cut
        vfs = image.mount(read_only=True)
        for path, data in OLD.items():
            assert read(vfs, path) == data, f"cut after {after} writes"
        image.unmount()
        assert image.e2fsck("-fy").returncode in {0, 1}, f"cut after {after} writes"
        verdict = image.e2fsck()
        assert verdict.returncode == 0, f"cut after {after} writes: {verdict.stdout}"
        vfs = image.mount()
        for path, data in OLD.items():
            assert read(vfs, path) == data, f"cut after {after} writes"
        write(vfs, "/after", b"works")
        image.unmount()


def test_synced_data_survives_any_later_cut(make_image: MakeImage) -> None:
    """A file that was written and fsynced is whole after a cut, without any repair."""
    image = start(make_image)
    devices: list[FaultyDevice] = []

    def stack(device: BlockDevice) -> BlockDevice:
        devices.append(FaultyDevice(device, random.Random(9), volatile_cache=True))
        return devices[0]

    vfs = image.mount(stack=stack)
    data = random.Random(9).randbytes(20 * BLOCK)
    handle = vfs.open("/file", os.O_CREAT | os.O_WRONLY)
    vfs.write(handle, data)
    vfs.fsync(handle)
    write(vfs, "/unsynced", b"lost" * 1000)
    devices[0].close()
    image.mounts.clear()
    vfs = image.mount(read_only=True)
    assert read(vfs, "/file") == data
    assert "unsynced" not in vfs.listdir("/")


@pytest.mark.parametrize("seed", range(3))
def test_torn_and_lost_writes_never_crash(make_image: MakeImage, seed: int) -> None:
    """A disk that lies gives errors or wrong trees, but only `OSError`, and e2fsck can repair."""
    image = start(make_image)

    def stack(device: BlockDevice) -> BlockDevice:
        rng = random.Random(seed)
        return FaultyDevice(device, rng, torn_chance=0.1, lost_chance=0.1)

    vfs = image.mount(stack=stack, buffer_blocks=8)
    try:
        work(vfs)
    except OSError as reason:
        assert reason.errno is not None  # noqa: PT017
        vfs.fs.device.close()
    image.mounts.clear()
    assert image.e2fsck("-fy").returncode in {0, 1}
    assert image.e2fsck().returncode == 0
    image.mount()
