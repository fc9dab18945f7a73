"""Each block device does what its docstring says."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs.block.counting import CountingDevice
from fs.block.delaying import DelayingDevice
from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.block.faulty import FaultyDevice
from fs.block.file import FileDevice
from fs.buffers import Buffers
from fs.runs import Run, runs


@pytest.fixture
def file(tmp_path: Path) -> Iterator[FileDevice]:
    """A device of 16 blocks."""
    path = tmp_path / "raw"
    path.write_bytes(bytes(16 * BLOCK_BYTES + 100))
    device = FileDevice(path)
    yield device
    device.close()


def block(device: BlockDevice, number: int) -> bytes:
    """The content of a block."""
    data = bytearray(BLOCK_BYTES)
    device.read(number, 1, memoryview(data))
    return bytes(data)


def page(fill: str) -> bytes:
    """A block full of one letter."""
    return fill.encode() * BLOCK_BYTES


def test_file_device_keeps_blocks(file: FileDevice) -> None:
    """What is written is read, in extents and from any kind of buffer."""
    assert file.blocks == 16
    file.write(3, 2, page("a") + page("b"))
    file.write(15, 1, memoryview(bytearray(page("c"))))
    into = bytearray(3 * BLOCK_BYTES)
    file.read(3, 2, memoryview(into))
    assert bytes(into) == page("a") + page("b") + bytes(BLOCK_BYTES)
    assert block(file, 15) == page("c")
    file.flush()


@pytest.mark.parametrize(("number", "count"), [(16, 1), (15, 2), (-1, 1), (0, 0), (1 << 40, 1)])
def test_extents_outside_the_device_are_refused(file: FileDevice, number: int, count: int) -> None:
    """EINVAL, and nothing is moved."""
    with pytest.raises(OSError, match="blocks") as caught:
        file.read(number, count, memoryview(bytearray(2 * BLOCK_BYTES)))
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="blocks"):
        file.write(number, count, bytes(2 * BLOCK_BYTES))


def test_a_buffer_that_is_too_small_is_refused(file: FileDevice) -> None:
    """Whole blocks only."""
    with pytest.raises(OSError, match="buffer"):
        file.read(0, 2, memoryview(bytearray(BLOCK_BYTES)))
    with pytest.raises(OSError, match="buffer"):
        file.write(0, 1, b"short")


def test_a_file_that_shrank_is_eio(file: FileDevice) -> None:
    """A read behind the new end doesn't return short or stale bytes."""
    os.truncate(file.path, 2 * BLOCK_BYTES)
    with pytest.raises(OSError, match="ends inside") as caught:
        block(file, 5)
    assert caught.value.errno == errno.EIO


def test_counting_counts_what_succeeded(file: FileDevice) -> None:
    """Calls, pages and flushes; a refused read is not counted."""
    device = CountingDevice(file)
    device.write(0, 3, bytes(3 * BLOCK_BYTES))
    device.read(0, 2, memoryview(bytearray(2 * BLOCK_BYTES)))
    device.flush()
    with pytest.raises(OSError, match="blocks"):
        device.read(16, 1, memoryview(bytearray(BLOCK_BYTES)))
    assert (device.reads, device.read_pages) == (1, 2)
    assert (device.writes, device.write_pages, device.flushes) == (1, 3, 1)


def test_delaying_waits_by_its_model(file: FileDevice) -> None:
    """A seek for each call and a transfer for each block, in seconds."""
    waited: list[float] = []
    device = DelayingDevice(file, seek_ns=1_000_000, transfer_ns=10_000, sleep=waited.append)
    device.write(0, 2, bytes(2 * BLOCK_BYTES))
    block(device, 0)
    device.flush()
    assert waited == [0.00102, 0.00101, 0.001]


def test_faulty_bad_blocks(file: FileDevice) -> None:
    """EIO for every operation that touches one."""
    device = FaultyDevice(file, random.Random(0), bad_reads=[3], bad_writes=[5])
    with pytest.raises(OSError, match="read error"):
        device.read(2, 2, memoryview(bytearray(2 * BLOCK_BYTES)))
    with pytest.raises(OSError, match="write error"):
        device.write(4, 2, bytes(2 * BLOCK_BYTES))
    device.write(3, 1, page("x"))
    assert block(file, 3) == page("x")


def test_faulty_torn_and_lost_writes(file: FileDevice) -> None:
    """A torn block is new in front and old behind; a lost one is old."""
    FaultyDevice(file, random.Random(1), torn_chance=1.0).write(0, 1, page("n"))
    kept = block(file, 0).index(0)
    assert 0 < kept < BLOCK_BYTES
    assert kept % 512 == 0
    FaultyDevice(file, random.Random(1), lost_chance=1.0).write(1, 1, page("n"))
    assert block(file, 1) == bytes(BLOCK_BYTES)


def test_faulty_power_cut(file: FileDevice) -> None:
    """The first N block writes arrive, later ones and reads are EIO."""
    device = FaultyDevice(file, random.Random(0), cut_after_writes=2)
    with pytest.raises(OSError, match="power"):
        device.write(0, 4, b"".join(map(page, "abcd")))
    with pytest.raises(OSError, match="power"):
        block(device, 0)
    assert [block(file, n)[:1] for n in range(4)] == [b"a", b"b", b"\0", b"\0"]


def test_faulty_volatile_cache(file: FileDevice) -> None:
    """What was flushed survives, of the rest some; before the cut everything is readable."""
    device = FaultyDevice(file, random.Random(3), cut_after_writes=12, volatile_cache=True)
    device.write(0, 4, b"".join(map(page, "abcd")))
    device.flush()
    device.write(4, 8, b"".join(map(page, "efghijkl")))
    assert block(device, 4) == page("e")
    with pytest.raises(OSError, match="power"):
        device.write(0, 1, page("z"))
    assert [block(file, n) for n in range(4)] == list(map(page, "abcd"))
    arrived = [n for n in range(4, 12) if block(file, n) != bytes(BLOCK_BYTES)]
    assert 0 < len(arrived) < 8


def test_buffers_stay_within_their_capacity_and_lose_nothing(file: FileDevice) -> None:
    """Sixteen blocks changed through eight buffers are all on the device after a flush."""
    buffers = Buffers(file, 8)
    for number in range(16):
        buffer = buffers.get(number)
        buffer.data[0] = number + 1
        buffers.dirty(buffer)
        assert len(buffers) <= 8
    buffers.flush()
    assert [block(file, number)[0] for number in range(16)] == list(range(1, 17))


def test_an_evicted_buffer_that_is_held_stays_the_only_one(file: FileDevice) -> None:
    """A change made after eviction is not lost to a second copy."""
    buffers = Buffers(file, 8)
    held = buffers.get(0)
    for number in range(1, 12):
        buffers.get(number)
    assert buffers.get(0) is held
    held.data[5] = 7
    buffers.dirty(held)
    buffers.flush()
    assert block(file, 0)[5] == 7


def test_forgotten_buffers_are_not_written(file: FileDevice) -> None:
    """The old metadata of a freed block never overwrites its new content."""
    buffers = Buffers(file, 8)
    buffers.zeroed(3).data[:] = page("m")
    buffers.forget(0, 10)
    file.write(3, 1, page("d"))
    buffers.flush()
    assert block(file, 3) == page("d")
    assert bytes(buffers.get(3).data) == page("d")


def test_neighbouring_buffers_are_written_at_once(file: FileDevice) -> None:
    """One write for a run, the superblock's block last."""
    device = CountingDevice(file)
    buffers = Buffers(device, 8)
    for number in (5, 0, 4, 6, 9):
        buffers.zeroed(number)
    buffers.flush()
    assert (device.writes, device.write_pages) == (3, 5)


def test_runs_cut_a_block_map() -> None:
    """Neighbours join, holes join, nothing else does."""
    assert list(runs([])) == []
    assert list(runs([7, 8, 9, 0, 0, 3, 5, 4])) == [
        Run(0, 7, 3),
        Run(3, 0, 2),
        Run(5, 3, 1),
        Run(6, 5, 1),
        Run(7, 4, 1),
    ]
    assert list(runs([1, 0, 1])) == [Run(0, 1, 1), Run(1, 0, 1), Run(2, 1, 1)]
