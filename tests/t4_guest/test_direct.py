"""Disks that are used around the host's page cache: the bytes are right, and the cache has none."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs.block import direct, hostcache
from fs.block.device import BLOCK_BYTES
from fs.block.direct import BOUNCE_BLOCKS, DirectFileDevice, Waits, is_aligned
from fs.errors import ImageError
from guests.swapheader import make_swap, owner_uuid
from tests.support.disks import in_host_cache, is_on_disk, mount_of
from tests.t4_guest.worlds import PAGE, assert_clean, make_image, running_kernel

BLOCKS = 64
MEMORY = Path("/dev/shm")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file that the host's page cache has all of; skips where the folder is on no disk."""
    path = tmp_path / "raw"
    path.write_bytes(random.Random(1).randbytes(BLOCKS * BLOCK_BYTES + 100))
    if not is_on_disk(path):
        pytest.skip(f"{tmp_path} is not on a disk")
    assert in_host_cache(path) == BLOCKS + 1
    return path


@pytest.fixture
def device(disk: Path) -> Iterator[DirectFileDevice]:
    """The same, open."""
    device = DirectFileDevice(disk)
    yield device
    device.close()


def buffer(blocks: int, *, offset: int) -> memoryview:
    """A buffer that begins so many bytes after a page."""
    view = memoryview(mmap.mmap(-1, (blocks + 1) * BLOCK_BYTES))
    return view[offset : offset + blocks * BLOCK_BYTES]


@pytest.mark.parametrize("offset", [0, 1, 512])
@pytest.mark.parametrize("count", [1, 3, BOUNCE_BLOCKS, BOUNCE_BLOCKS + 1])
def test_any_buffer_will_do(device: DirectFileDevice, disk: Path, count: int, offset: int) -> None:
    """Aligned or not, longer than the bounce buffer or not; nothing of it stays with the host."""
    content = bytearray(disk.read_bytes())
    os.posix_fadvise(device._fd, 0, 0, os.POSIX_FADV_DONTNEED)
    into = buffer(count, offset=offset)
    assert is_aligned(into) == (offset == 0)
    device.read(7, count, into)
    assert into == content[7 * BLOCK_BYTES : (7 + count) * BLOCK_BYTES]

    data = random.Random(count).randbytes(count * BLOCK_BYTES)
    into[:] = data
    device.write(20, count, into)
    device.write(2, 1, data)
    device.flush()
    assert in_host_cache(disk) == hostcache.cached_pages(device._fd) == 0
    content[20 * BLOCK_BYTES : (20 + count) * BLOCK_BYTES] = data
    content[2 * BLOCK_BYTES : 3 * BLOCK_BYTES] = data[:BLOCK_BYTES]
    assert disk.read_bytes() == content


def test_what_the_maker_left_in_the_cache_is_dropped(disk: Path) -> None:
    """And has reached the disk: the first reader waits for nobody's writes."""
    made = disk.read_bytes()
    disk.write_bytes(made[::-1])
    device = DirectFileDevice(disk)
    assert in_host_cache(disk) == 0
    into = buffer(BLOCKS, offset=0)
    device.read(0, BLOCKS, into)
    assert into == made[::-1][: BLOCKS * BLOCK_BYTES]
    device.close()


@pytest.mark.parametrize("offset", [0, 8])
@pytest.mark.parametrize(("first", "count"), [(8, 3), (10, 1), (30, 2)])
def test_a_file_that_shrank_is_eio(
    device: DirectFileDevice, first: int, count: int, offset: int
) -> None:
    """Also one that ends within a block, where O_DIRECT can't go on."""
    os.truncate(device.path, 10 * BLOCK_BYTES + 50)
    with pytest.raises(OSError, match="ends inside blocks") as caught:
        device.read(first, count, buffer(count, offset=offset))
    assert caught.value.errno == errno.EIO


def test_a_device_for_reading_is_not_written(disk: Path) -> None:
    """EROFS, and the same bytes."""
    device = DirectFileDevice(disk, read_only=True)
    into = buffer(1, offset=0)
    device.read(0, 1, into)
    assert into == disk.read_bytes()[:BLOCK_BYTES]
    with pytest.raises(OSError, match="Read-only") as caught:
        device.write(0, 1, bytes(BLOCK_BYTES))
    assert caught.value.errno == errno.EROFS
    device.close()


def test_extents_outside_are_refused(device: DirectFileDevice) -> None:
    """As by every device."""
    for move in (device.read, device.write):
        with pytest.raises(OSError, match="blocks") as caught:
            move(BLOCKS - 1, 2, buffer(2, offset=0))
        assert caught.value.errno == errno.EINVAL


def test_writes_are_durable_as_before(
    device: DirectFileDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush is fdatasync, since O_DIRECT goes around one cache of several."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    device.write(0, 1, bytes(BLOCK_BYTES))
    assert synced == []
    device.flush()
    assert synced == [device._fd]


def test_the_median_wait_is_known(disk: Path) -> None:
    """Of reads and writes; one that took very long, whatever held it up, does not change it."""
    lengths = [1000, 1000, 1000, 5_000_000, 1000]
    clock = itertools.accumulate(itertools.chain.from_iterable((7, length) for length in lengths))
    waits = Waits(lambda: next(clock))
    assert waits.median_ns == 0
    device = DirectFileDevice(disk, waits=waits)
    device.read(0, 2, buffer(2, offset=0))
    device.write(0, BOUNCE_BLOCKS + 1, bytes((BOUNCE_BLOCKS + 1) * BLOCK_BYTES))
    device.read(0, 1, buffer(1, offset=3))
    assert next(clock, None) is None
    assert waits.median_ns == pytest.approx(1000, rel=0.05)
    device.flush()
    device.close()


@pytest.mark.parametrize(("accounts", "expected"), [(True, 50), (False, 70)])
def test_time_of_processors_is_no_waiting(
    monkeypatch: pytest.MonkeyPatch, *, accounts: bool, expected: int
) -> None:
    """Neither what the thread did itself in a request, nor its waiting for its turn to do it."""
    with monkeypatch.context() as patch:
        if not accounts:
            patch.setattr(os, "open", lambda *_arguments: (_ for _ in ()).throw(OSError()))
        waits = Waits()
    ran, waited = iter([0, 30]), iter([b"7 5 1\n", b"8 25 2\n"])
    wall = iter([1000, 1100])
    with monkeypatch.context() as patch:
        patch.setattr("time.perf_counter_ns", lambda: next(wall))
        patch.setattr("time.thread_time_ns", lambda: next(ran))
        patch.setattr(os, "pread", lambda *_arguments: next(waited))
        with waits:
            pass
    assert waits.median_ns == pytest.approx(expected, rel=0.05)
    waits.close()


@pytest.mark.parametrize("kernel_counts", [True, False])
def test_a_file_system_in_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, *, kernel_counts: bool
) -> None:
    """It takes O_DIRECT and caches nonetheless; the line says what to do, the lock goes back."""
    if not kernel_counts:
        monkeypatch.setattr(direct, "cached_pages", lambda _fd, _length: None)
    if not os.access(MEMORY, os.W_OK):
        pytest.skip("/dev/shm can't be written to")
    path = MEMORY / f"tmem-test-{os.getpid()}.img"
    path.write_bytes(bytes(2 * BLOCK_BYTES))
    try:
        for _ in range(2):
            with pytest.raises(ImageError, match=r"tmpfs on .*\(O_DIRECT\); .* in another folder"):
                DirectFileDevice(path)
    finally:
        path.unlink()


def test_a_file_system_that_caches_anyway_is_refused(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its name; an older kernel that has no figure is believed."""
    monkeypatch.setattr(direct, "cached_pages", lambda _fd, _length: 1)
    with pytest.raises(ImageError, match="can't be used around the host's page cache"):
        DirectFileDevice(disk)
    monkeypatch.setattr(direct, "cached_pages", lambda _fd, _length: None)
    DirectFileDevice(disk).close()


def test_a_guest_leaves_nothing_in_the_hosts_cache(tmp_path: Path, disk: Path) -> None:
    """Files, metadata and swap: all is read back right, and the host has no page of either file."""
    assert disk.exists()
    image = make_image(tmp_path / "image")
    swap = tmp_path / "swap"
    swap.write_bytes(bytes(8 << 20))
    make_swap(swap, uuid=owner_uuid("guest"))
    content = random.Random(5).randbytes(300 * PAGE + 11)
    with running_kernel(image, swap=swap, direct=True) as kernel:
        kernel.vfs.mkdir("/folder")
        file = kernel.vfs.open("/folder/file", os.O_CREAT | os.O_RDWR)
        assert kernel.vfs.write(file, content) == len(content)
        kernel.vfs.sync()
        program = kernel.userland.processes.spawn("program")
        address = program.map(256 * PAGE)
        program.write(address, content[: 256 * PAGE])
        assert kernel.vfs.pread(file, len(content), 0) == content
        kernel.vfs.close(file)
        assert program.read(address, 256 * PAGE) == content[: 256 * PAGE]
        counters = kernel.counters()
        assert counters["swap"]["in_pages"] > 100
        assert counters["disk_reads_pages"] > 200
        assert counters["disk_access_seconds"] > 0
        assert in_host_cache(image) == in_host_cache(swap) == 0
    assert in_host_cache(image) == in_host_cache(swap) == 0
    assert_clean(image)


def test_a_guest_that_is_not_told_uses_the_hosts_cache(tmp_path: Path) -> None:
    """The measure above can tell the two apart."""
    image = make_image(tmp_path / "image")
    with running_kernel(image) as kernel:
        assert in_host_cache(image) > 0
        assert kernel.counters()["disk_access_seconds"] == 0


def test_where_a_file_is(tmp_path: Path) -> None:
    """As df has it."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    with path.open("rb") as file:
        assert list(hostcache.backing(file.fileno())) == mount_of(path)
