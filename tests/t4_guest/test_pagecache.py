"""The page cache: what is read, what is written when, and how much memory it takes."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from fs.block.device import BlockDevice
from fs.block.faulty import FaultyDevice
from guests.kernel import Kernel
from guests.memory import FRAMES_MIN, WINDOW_PAGES, divide
from guests.pagecache import FLUSH_PAGES_MAX
from guests.readahead import Readahead
from guests.reclaim import BATCH_PAGES, PageLists
from ipc.errors import OperatorError
from tests.t4_guest.worlds import (
    PAGE,
    LocalHypervisor,
    check_pages,
    push_out,
    read_file,
    running_kernel,
    write_file,
)


def test_budget_is_the_sum_of_its_parts() -> None:
    """With tmem the window is paid for; without it those pages are the page cache's."""
    attached = divide(4 << 20, attach=True)
    alone = divide(4 << 20, attach=False)

    assert attached.total == alone.total == 1024
    for budget in (attached, alone):
        assert sum(budget) == 2 * budget.total
    assert alone.frames == attached.frames + WINDOW_PAGES


def test_too_little_memory_is_told_with_what_is_needed() -> None:
    """The figure in the message is the least that works."""
    with pytest.raises(OperatorError, match="too little") as told:
        divide(100 * PAGE, attach=True, buffer_blocks=8)
    least = int(str(told.value).rpartition(" ")[2])

    assert divide(least, attach=True, buffer_blocks=8).frames == FRAMES_MIN
    with pytest.raises(OperatorError):
        divide(least - PAGE, attach=True, buffer_blocks=8)


def test_readahead_doubles_while_reading_is_sequential() -> None:
    """4, 8, 16, 32 pages, no more, and never beyond the end of the file."""
    readahead = Readahead()
    index, plans = 0, []
    while index < 150:
        plans.append(readahead.plan(index, 1, 150))
        index += plans[-1]

    assert plans == [4, 8, 16, 32, 32, 32, 26]


def test_readahead_reads_what_was_asked_when_reading_jumps() -> None:
    """A random reader pays for no page that it did not ask for."""
    readahead = Readahead()

    assert readahead.plan(50, 1, 1000) == 1
    assert readahead.plan(10, 3, 1000) == 3
    assert readahead.plan(13, 1, 1000) == 4, "sequential from here"


def test_page_touched_once_leaves_before_page_touched_twice() -> None:
    """One touch is what a sequential reader does to every page."""
    lists = PageLists(200)
    for frame in range(100):
        lists.add(frame)
        lists.touch(frame)
    for frame in range(10):
        lists.touch(frame)

    first = lists.victims()

    assert first == list(range(10, 10 + BATCH_PAGES))
    assert lists.active_pages == 10


def test_every_page_leaves_in_the_end() -> None:
    """However much they are used, victims are always found while anything is listed."""
    lists = PageLists(300)
    rng = random.Random(1)
    for frame in range(300):
        lists.add(frame)
    gone = []
    while len(lists):
        for _ in range(500):
            listed = list(lists._active) + list(lists._inactive)
            lists.touch(rng.choice(listed))
        victims = lists.victims()
        assert 0 < len(victims) <= BATCH_PAGES
        for frame in victims:
            lists.remove(frame)
        gone += victims

    assert sorted(gone) == list(range(300))


def test_file_larger_than_memory_is_read_right(image: Path) -> None:
    """It passes through; the budget holds after every read."""
    data = random.Random(2).randbytes(300 * PAGE + 123)
    with running_kernel(image) as kernel:
        write_file(kernel, "/big", data)
        for offset in range(0, len(data), 64 * 1024):
            assert read_file(kernel, "/big", offset, 64 * 1024) == data[offset : offset + 65536]
            check_pages(kernel.pages)
        assert kernel.pages.counters.evictions > 300


def test_sequential_read_makes_few_device_calls(image: Path) -> None:
    """Readahead and runs: 128 contiguous pages in at most 8 reads of data."""
    data = random.Random(3).randbytes(128 * PAGE)
    with running_kernel(image) as kernel:
        write_file(kernel, "/data", data)
    with running_kernel(image) as kernel:
        read_file(kernel, "/data", 0, 1)
        calls, pages = kernel.device.reads, kernel.device.read_pages
        handle = kernel.vfs.open("/data")
        for index in range(128):
            assert kernel.vfs.pread(handle, PAGE, index * PAGE) == data[index * PAGE :][:PAGE]
        kernel.vfs.close(handle)

        # An indirect block among them.
        assert kernel.device.read_pages - pages <= 128
        assert kernel.device.reads - calls <= 9


def test_cached_page_is_not_read_again(image: Path) -> None:
    """A second read moves nothing."""
    with running_kernel(image) as kernel:
        write_file(kernel, "/a", b"x" * 3 * PAGE)
        read_file(kernel, "/a")
        before = kernel.device.read_pages

        assert read_file(kernel, "/a") == b"x" * 3 * PAGE
        assert kernel.device.read_pages == before


def test_contiguous_dirty_pages_are_written_in_one_call(image: Path) -> None:
    """Write-back is in runs."""
    with running_kernel(image) as kernel:
        write_file(kernel, "/a", b"x" * 16 * PAGE)
        calls, pages = kernel.device.writes, kernel.device.write_pages
        kernel.pages.sync_all()

        assert kernel.device.write_pages - pages == 16
        assert kernel.device.writes - calls <= 2
        assert kernel.pages.dirty_pages == 0


def test_hole_reads_as_zeros_and_is_never_offered(image: Path, hypervisor: LocalHypervisor) -> None:
    """Only what is mapped to the disk goes to tmem."""
    with running_kernel(image, hypervisor) as kernel:
        write_file(kernel, "/push-out", bytes(300 * PAGE))
        write_file(kernel, "/sparse", b"a")
        kernel.vfs.truncate("/sparse", 30 * PAGE)
        kernel.vfs.sync()
        inode = kernel.vfs.fs.lookup(kernel.vfs.fs.root, b"sparse")
        assert read_file(kernel, "/sparse") == b"a" + bytes(30 * PAGE - 1)
        push_out(kernel)
        assert kernel.cleancache is not None

        into = memoryview(bytearray(30 * PAGE))
        assert kernel.cleancache.get_pages(inode.key, 0, 30, into) == 1


def test_overwrite_evict_read_gives_the_new_content(
    image: Path, hypervisor: LocalHypervisor
) -> None:
    """The copy in tmem goes before the page becomes dirty."""
    with running_kernel(image, hypervisor) as kernel:
        write_file(kernel, "/a", b"old." * (8 * PAGE // 4))
        push_out(kernel)
        handle = kernel.vfs.open("/a", os.O_WRONLY)
        kernel.vfs.pwrite(handle, b"new!", 3 * PAGE)
        kernel.vfs.close(handle)
        push_out(kernel)

        assert read_file(kernel, "/a", 3 * PAGE, 8) == b"new!old."


@pytest.mark.parametrize("dropped", [3, FLUSH_PAGES_MAX + 5])
def test_truncate_and_extend_reads_zeros(
    image: Path, hypervisor: LocalHypervisor, dropped: int
) -> None:
    """Neither tmem nor the disk gives back what was cut off, by page or by object."""
    kept = (20 - dropped - 1) * PAGE + 100
    with running_kernel(image, hypervisor) as kernel:
        write_file(kernel, "/a", b"x" * 20 * PAGE)
        push_out(kernel)
        kernel.vfs.truncate("/a", kept)
        kernel.vfs.truncate("/a", 20 * PAGE)
        push_out(kernel)

        assert read_file(kernel, "/a") == b"x" * kept + bytes(20 * PAGE - kept)


def test_bytes_past_the_end_on_disk_are_not_shown(image: Path) -> None:
    """An image may hold anything after a file's last byte; extending must not reveal it later."""
    with running_kernel(image) as kernel:
        write_file(kernel, "/a", b"x" * 100)
        inode = kernel.vfs.fs.lookup(kernel.vfs.fs.root, b"a")
        kernel.vfs.sync()
        block = kernel.vfs.fs.map_blocks(inode, 0, 1)[0]
    raw = bytearray(image.read_bytes())
    raw[block * PAGE + 100 : (block + 1) * PAGE] = b"g" * (PAGE - 100)
    image.write_bytes(raw)

    with running_kernel(image) as kernel:
        read_file(kernel, "/a")
        handle = kernel.vfs.open("/a", os.O_WRONLY)
        kernel.vfs.pwrite(handle, b"y", 200)
        kernel.vfs.close(handle)

        assert read_file(kernel, "/a") == b"x" * 100 + bytes(100) + b"y"


def _write_until_full(kernel: Kernel, handle: int, size: int) -> None:
    while True:
        kernel.vfs.write(handle, bytes(size))


def test_no_space_leaves_a_file_as_it_was(image: Path) -> None:
    """ENOSPC is told by write, never lost at write-back."""
    with running_kernel(image) as kernel:
        write_file(kernel, "/a", b"a" * 100)
        fill = kernel.vfs.open("/fill", os.O_WRONLY | os.O_CREAT)
        for size in (64 * PAGE, PAGE):
            with pytest.raises(OSError, match="space") as told:
                _write_until_full(kernel, fill, size)
            assert told.value.errno == errno.ENOSPC
        handle = kernel.vfs.open("/a", os.O_WRONLY)
        with pytest.raises(OSError, match="space"):
            kernel.vfs.pwrite(handle, b"b" * 10, 20 * PAGE)
        kernel.vfs.close(handle)
        kernel.vfs.close(fill)

        assert read_file(kernel, "/a") == b"a" * 100
        kernel.vfs.unlink("/fill")
        write_file(kernel, "/b", b"b" * 50 * PAGE)
        kernel.vfs.sync()


def test_read_error_in_readahead_is_told_only_to_who_reads_that_page(image: Path) -> None:
    """The pages before it are read; the page itself is EIO each time."""
    faults: list[FaultyDevice] = []

    def stack(device: BlockDevice) -> BlockDevice:
        faults.append(FaultyDevice(device, random.Random(4)))
        return faults[0]

    with running_kernel(image) as kernel:
        write_file(kernel, "/a", b"x" * 8 * PAGE)
    with running_kernel(image, stack=stack) as kernel:
        inode = kernel.vfs.fs.lookup(kernel.vfs.fs.root, b"a")
        faults[0].bad_reads = {kernel.vfs.fs.map_blocks(inode, 2, 1)[0]}

        assert read_file(kernel, "/a", 0, 2 * PAGE) == b"x" * 2 * PAGE
        for _ in range(2):
            with pytest.raises(OSError, match="read error") as told:
                read_file(kernel, "/a", 2 * PAGE, 1)
            assert told.value.errno == errno.EIO
        assert read_file(kernel, "/a", 3 * PAGE) == b"x" * 5 * PAGE
        check_pages(kernel.pages)


def test_write_error_keeps_the_page_dirty(image: Path) -> None:
    """Nothing is lost: when the disk works again, sync writes it."""
    faults: list[FaultyDevice] = []

    def stack(device: BlockDevice) -> BlockDevice:
        faults.append(FaultyDevice(device, random.Random(4)))
        return faults[0]

    with running_kernel(image, stack=stack) as kernel:
        write_file(kernel, "/a", b"x" * 3 * PAGE)
        inode = kernel.vfs.fs.lookup(kernel.vfs.fs.root, b"a")
        faults[0].bad_writes = {kernel.vfs.fs.map_blocks(inode, 1, 1)[0]}
        with pytest.raises(OSError, match="write error"):
            kernel.vfs.sync()
        assert kernel.pages.dirty_pages > 0
        check_pages(kernel.pages)
        faults[0].bad_writes = set()
        kernel.vfs.sync()

        assert kernel.pages.dirty_pages == 0
    with running_kernel(image) as kernel:
        assert read_file(kernel, "/a") == b"x" * 3 * PAGE
