"""Swap areas: the header that mkswap writes, and who gets which slot."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import uuid as uuids
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from fs.block.counting import CountingDevice
from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.block.faulty import FaultyDevice
from fs.block.memory import MemoryDevice
from fs.errors import ImageError
from guests.swapdisk import CLUSTER_SLOTS, SwapDisk, open_swap
from guests.swapheader import make_swap, names_owner, owner_uuid, read_header
from tests.support.tools import need_tool

UUID = uuids.UUID("00112233-4455-6677-8899-aabbccddeeff")


def area(blocks: int, *, bad_pages: tuple[int, ...] = ()) -> MemoryDevice:
    """A device with a swap area on all of it; `bad_pages` are named in the header."""
    device = MemoryDevice.empty(blocks)
    make_swap(device, uuid=UUID.bytes, label="swap")
    patch(device, 1032, struct.pack("<I", len(bad_pages)))
    patch(device, 1536, struct.pack(f"<{len(bad_pages)}I", *bad_pages))
    return device


def patch(device: MemoryDevice, at: int, data: bytes) -> None:
    """Change bytes of the first page."""
    page = bytearray(device.contents[0])
    page[at : at + len(data)] = data
    device.contents[0] = bytes(page)


def page_of(number: int) -> bytes:
    """A page that is like no other."""
    return number.to_bytes(8, "little") * (BLOCK_BYTES // 8)


# ---- the header, judged by those who have known it for long


def run(*words: str | Path) -> str:
    """Output of a program that must succeed."""
    return subprocess.run(
        [need_tool(str(words[0])), *words[1:]], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("label", ["", "s", "fifteen bytes ."])
@pytest.mark.parametrize("size", [10 * BLOCK_BYTES, (4 << 20) + 777])
def test_same_bytes_as_mkswap(tmp_path: Path, label: str, size: int) -> None:
    """For the same file, uuid and label; each is accepted by the other's readers."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        path.touch(0o600)
        os.truncate(path, size)

    make_swap(ours, uuid=UUID.bytes, label=label)
    run("mkswap", "-q", "-U", str(UUID), *(("-L", label) if label else ()), theirs)

    assert ours.read_bytes() == theirs.read_bytes()
    disk = open_swap(theirs, uuid=UUID.bytes)
    assert (disk.uuid, disk.label, disk.slots) == (UUID.bytes, label, size // BLOCK_BYTES - 1)
    disk.close()


def test_recognised_by_file_blkid_and_swaplabel(tmp_path: Path) -> None:
    """With version, size, label and uuid."""
    path = tmp_path / "swap"
    path.touch(0o600)
    os.truncate(path, 1 << 20)
    make_swap(path, uuid=UUID.bytes, label="of-web1")

    said = run("file", path)
    assert "Linux swap file, 4k page size, little endian, version 1, size 255 pages" in said
    assert f"0 bad pages, LABEL=of-web1, UUID={UUID}" in said
    answer = dict(line.split("=", 1) for line in run("blkid", "-p", "-o", "export", path).split())
    assert (answer["TYPE"], answer["VERSION"]) == ("swap", "1")
    assert (answer["LABEL"], answer["UUID"]) == ("of-web1", str(UUID))
    assert run("swaplabel", path).split() == ["LABEL:", "of-web1", "UUID:", str(UUID)]


# ---- slots


@pytest.mark.parametrize("seed", range(3))
def test_slots_against_a_set(seed: int) -> None:
    """Random allocations, frees and retirements, and slots that are set aside for a while; the
    figures are what counting gives."""
    rng = random.Random(seed)
    bad = tuple(rng.sample(range(1, 700), 20))
    disk = SwapDisk.open(area(rng.choice([700, 768, 1000]), bad_pages=bad))
    free = set(range(1, disk.slots + len(bad) + 1)) - set(bad)
    used: set[int] = set()
    aside: set[int] = set()
    for _ in range(1500):
        action = rng.random()
        if action < 0.02:
            disk.bring_back()
            free |= aside
            aside.clear()
        elif action < 0.05:
            got = disk.take_aside(rng.choice([0, 1, 8]))
            assert aside.issuperset(got), seed
            aside.difference_update(got)
            used.update(got)
        elif action < 0.1:
            for slot in rng.sample(sorted(used), min(len(used), 8)):
                disk.set_aside(slot)
                used.remove(slot)
                aside.add(slot)
        elif action < 0.4:
            count = rng.choice([0, 1, 2, 32, 300])
            got = disk.allocate(count)
            assert len(got) == len(set(got)) == min(count, len(free)), seed
            assert free.issuperset(got), seed
            free.difference_update(got)
            used.update(got)
        elif action < 0.99:
            for slot in rng.sample(sorted(used), min(len(used), rng.choice([1, 8, 60]))):
                disk.free(slot)
                used.remove(slot)
                free.add(slot)
        elif free | used | aside:
            slot = rng.choice(sorted(free | used | aside))
            disk.retire(slot)
            for slots in (free, used, aside):
                slots.discard(slot)
        assert disk.slots == len(free | used | aside), seed
        assert (disk.free_slots, disk.used_slots) == (len(free), len(used)), seed
        assert disk.aside_slots == len(aside), seed
    assert {slot for slot in range(-1, 1001) if disk.is_used(slot)} == used, seed
    assert sorted(disk.allocate(1001)) == sorted(free), seed
    assert disk.allocate(1) == [], seed


def run_length(batches: list[list[int]]) -> float:
    """How many neighbours stand together within a batch, in the mean."""
    slots = sum(map(len, batches))
    breaks = sum(after != slot + 1 for batch in batches for slot, after in pairwise(batch))
    return slots / (breaks + len(batches))


def half_full(rng: random.Random, unit: int) -> tuple[SwapDisk, list[list[int]]]:
    """An area of 16 MiB filled in batches, then half of it freed in runs of `unit`."""
    disk = SwapDisk.open(area(4096))
    slots: list[int] = []
    while batch := disk.allocate(32):
        slots += batch
    units = [slots[at : at + unit] for at in range(0, len(slots), unit)]
    rng.shuffle(units)
    for freed in units[: len(units) // 2]:
        for slot in freed:
            disk.free(slot)
    return disk, units[len(units) // 2 :]


@pytest.mark.parametrize(("unit", "least"), [(1, 2.3), (8, 16), (32, 30), (256, 30)])
def test_batches_of_streams_stay_together(unit: int, least: float) -> None:
    """Streams write batches of 32 and drop old ones on an area that stays half full.

    First-fit gives runs of 1.2 pages where single pages are dropped, and of 9 where eights are.
    """
    rng = random.Random(unit)
    disk, live = half_full(rng, unit)
    batches = []
    for _ in range(200):
        batches.append(disk.allocate(32))
        live += [batches[-1][at : at + unit] for at in range(0, 32, unit)]
        dropped = 0
        while dropped < 32:
            slots = live.pop(rng.randrange(len(live)))
            dropped += len(slots)
            for slot in slots:
                disk.free(slot)
    assert run_length(batches) >= least
    assert disk.free_slots >= 2000


def test_a_free_cluster_comes_before_gaps() -> None:
    """And no batch is cut while one is free, but for the ends of clusters."""
    disk = SwapDisk.open(area(4 * CLUSTER_SLOTS))
    for _ in range(4):
        disk.allocate(CLUSTER_SLOTS)
    for slot in [*range(1, CLUSTER_SLOTS, 2), *range(2 * CLUSTER_SLOTS, 3 * CLUSTER_SLOTS)]:
        disk.free(slot)

    assert disk.allocate(CLUSTER_SLOTS) == list(range(2 * CLUSTER_SLOTS, 3 * CLUSTER_SLOTS))
    assert disk.allocate(3) == [1, 3, 5]
    disk.free(1)
    assert disk.allocate(2) == [7, 9], "within a cluster it goes forward"


def test_a_gap_for_the_whole_batch_comes_before_small_ones() -> None:
    """The small ones are used when nothing else is left."""
    disk = SwapDisk.open(area(100))
    disk.allocate(99)
    for slot in (10, 11, 20, 21, 22, 23, 30):
        disk.free(slot)

    assert disk.allocate(4) == [20, 21, 22, 23]
    assert disk.allocate(2) == [30, 10]
    assert disk.allocate(2) == [11]


def test_wrong_slots_are_bugs_of_the_caller() -> None:
    """A slot that is free, bad, retired or nowhere can't be freed."""
    disk = SwapDisk.open(area(10, bad_pages=(3,)))
    first, second = disk.allocate(2)
    disk.retire(first)
    disk.free(second)
    for slot in (0, 3, first, second, 9, 10, -1):
        assert not disk.is_used(slot)
        with pytest.raises(ValueError, match=f"slot {slot} is not in use"):
            disk.free(slot)
    for slot in (0, 10, -1):
        with pytest.raises(ValueError, match="none of 1 to 9"):
            disk.retire(slot)


def test_retired_once() -> None:
    """Whether the slot was used or free; a bad page of the header is out of use already."""
    disk = SwapDisk.open(area(10, bad_pages=(3,)))
    assert (disk.slots, disk.free_slots) == (8, 8)
    used = disk.allocate(1)[0]
    for slot in (used, used, 9, 9, 3):
        disk.retire(slot)
    assert (disk.slots, disk.free_slots, disk.used_slots) == (6, 6, 0)
    assert disk.counters.retired_slots == 2
    assert sorted(disk.allocate(10)) == sorted({1, 2, 4, 5, 6, 7, 8, 9} - {used, 9})


@pytest.mark.parametrize(
    ("slot", "pages", "window"),
    [
        (1, 8, range(1, 8)),
        (7, 8, range(1, 8)),
        (8, 8, range(8, 16)),
        (15, 8, range(8, 16)),
        (16, 8, range(16, 20)),
        (19, 8, range(16, 20)),
        (19, 1, range(19, 20)),
        (19, 64, range(1, 20)),
    ],
)
def test_window(slot: int, pages: int, window: range) -> None:
    """Aligned to its size, without the header and what is behind the last page."""
    assert SwapDisk.open(area(20)).window(slot, pages) == window


def test_window_of_a_size_that_can_not_be_aligned() -> None:
    """Only powers of two can."""
    disk = SwapDisk.open(area(20))
    for pages in (0, -1, 6):
        with pytest.raises(ValueError, match="can't be aligned"):
            disk.window(1, pages)


def test_larger_device_than_its_header_says() -> None:
    """What lies behind the last page is left alone."""
    device = area(40)
    patch(device, 1028, struct.pack("<I", 29))
    disk = SwapDisk.open(device)
    assert sorted(disk.allocate(40)) == list(range(1, 30))
    assert disk.window(29, 8) == range(24, 30)
    with pytest.raises(OSError, match=r"slots 29\.\.30 are none of 1 to 29"):
        disk.read(29, 2, memoryview(bytearray(2 * BLOCK_BYTES)))


# ---- pages


def test_neighbours_in_one_call() -> None:
    """Every page comes back, with as many calls as there are runs."""
    device = CountingDevice(area(64))
    disk = SwapDisk.open(device)
    reads = device.reads
    slots = [5, 6, 7, 20, 9, 8, 10, 11]
    pages = b"".join(page_of(slot) for slot in slots)

    assert disk.write(slots, memoryview(pages)) == {}
    assert (device.writes, device.write_pages) == (5, 8)
    assert (disk.counters.writes, disk.counters.write_pages) == (5, 8)

    into = bytearray(7 * BLOCK_BYTES)
    disk.read(5, 7, memoryview(into))
    assert into == b"".join(map(page_of, range(5, 12)))
    assert (device.reads - reads, disk.counters.reads, disk.counters.read_pages) == (1, 1, 7)
    assert disk.write([], memoryview(b"")) == {}


def test_header_and_outside_are_never_written() -> None:
    """Nor is anything else, if the pages don't fit the slots."""
    device = area(10)
    before = list(device.contents)
    disk = SwapDisk.open(device)
    for slots, pages in (([0], 1), ([10], 1), ([9, 10], 2), ([-1], 1), ([3, 4], 1), ([3], 2)):
        with pytest.raises(OSError, match="Invalid argument"):
            disk.write(slots, memoryview(b"x" * BLOCK_BYTES * pages))
    assert device.contents == before


@pytest.mark.parametrize("seed", range(5))
def test_exactly_the_bad_slots_are_told(seed: int) -> None:
    """And everything else of a batch is written."""
    rng = random.Random(seed)
    bad = set(rng.sample(range(1, 200), 30))
    device = FaultyDevice(area(200), rng, bad_writes=bad)
    disk = SwapDisk.open(device)
    written = 0
    retired: list[int] = []
    for count in (1, 32, 7, 32, 32):
        slots = disk.allocate(count)
        failed = disk.write(slots, memoryview(b"".join(map(page_of, slots))))
        assert set(failed) == bad.intersection(slots) and len(set(failed)) == len(failed), seed
        written += count - len(failed)
        for slot in failed:
            assert disk.is_used(slot), seed
            disk.retire(slot)
        retired += failed
        into = bytearray(BLOCK_BYTES)
        for slot in set(slots) - bad:
            disk.read(slot, 1, memoryview(into))
            assert into == page_of(slot), seed
    assert disk.counters.write_pages == written
    assert disk.counters.write_errors == disk.counters.retired_slots == 104 - written > 0
    assert set(disk.allocate(200)).isdisjoint(retired), seed


def test_read_error_is_told() -> None:
    """It is EIO, and is counted; nothing is read ahead by this module that could hide it."""
    device = FaultyDevice(area(20), random.Random(1), bad_reads={7})
    disk = SwapDisk.open(device)
    into = memoryview(bytearray(8 * BLOCK_BYTES))
    with pytest.raises(OSError, match="Input/output error"):
        disk.read(4, 8, into)
    disk.read(8, 8, into)
    assert (disk.counters.reads, disk.counters.read_pages, disk.counters.read_errors) == (1, 8, 1)


# ---- what is refused


def bytes_at(at: int, data: bytes) -> Callable[[MemoryDevice], None]:
    """The header with these bytes in it."""
    return lambda device: patch(device, at, data)


def bad_pages(*pages: int, count: int | None = None) -> Callable[[MemoryDevice], None]:
    """The header with these bad pages; `count` is what it says of their number."""

    def change(device: MemoryDevice) -> None:
        patch(device, 1032, struct.pack("<I", len(pages) if count is None else count))
        patch(device, 1536, struct.pack(f"<{len(pages)}I", *pages))

    return change


def of_large_pages(device: MemoryDevice) -> None:
    """The signature of a machine whose pages have 64 KiB."""
    device.contents[15] = bytes(BLOCK_BYTES - 10) + b"SWAPSPACE2"
    device.contents[0] = bytes(BLOCK_BYTES)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (bytes_at(4086, bytes(10)), "holds no swap area; make one with tmem mkswap or correct"),
        (bytes_at(4086, b"swapspace2"), "holds no swap area"),
        (bytes_at(4086, b"SWAP-SPACE"), "is a swap area of the old kind, SWAP-SPACE"),
        (bytes_at(1024, struct.pack(">I", 1)), "of a machine with the other byte order"),
        (bytes_at(4086, b"S1SUSPEND\0"), "holds the memory of a machine that hibernates"),
        (bytes_at(4086, b"S2SUSPEND\0"), "holds the memory of a machine that hibernates"),
        (bytes_at(4086, b"ULSUSPEND\0"), "holds the memory of a machine that hibernates"),
        (bytes_at(4086, b"LINHIB0001"), "holds the memory of a machine that hibernates"),
        (bytes_at(1024, struct.pack("<I", 2)), "of version 2, and only version 1 is known"),
        (bytes_at(1024, bytes(4)), "of version 0, and only version 1 is known"),
        (bytes_at(1028, bytes(4)), "has a swap header that counts no page behind it"),
        (bytes_at(1028, struct.pack("<I", 20)), "21 pages (84 KiB), and there are 20 pages (80 Ki"),
        (bytes_at(1028, b"\xff" * 4), "4294967296 pages (17179869184 KiB), and there are 20 pages"),
        (bad_pages(count=638), "has a swap header with 638 bad pages, and there is room for 637"),
        (bad_pages(0), "calls page 0 bad, and its pages are 1 to 19"),
        (bad_pages(3, 20), "calls page 20 bad, and its pages are 1 to 19"),
        (bad_pages(3, 4, 3), "names a bad page twice"),
        (bad_pages(*range(1, 20)), "has no usable page: its swap header calls all of them bad"),
        (of_large_pages, "is a swap area of pages of 64 KiB, and a guest's have 4"),
    ],
)
def test_refused_in_one_line(change: Callable[[MemoryDevice], None], says: str) -> None:
    """With what is wrong and what to do; each for itself."""
    device = area(20)
    change(device)
    with pytest.raises(ImageError) as caught:
        SwapDisk.open(device)
    text = str(caught.value)
    assert says in text and "make" in text and "\n" not in text


def test_most_bad_pages() -> None:
    """As many as the header can name."""
    disk = SwapDisk.open(area(1000, bad_pages=tuple(range(1, 638))))
    assert sorted(disk.allocate(1000)) == list(range(638, 1000))


def test_area_of_another_guest_is_refused() -> None:
    """By its uuid; both are named."""
    device = MemoryDevice.empty(20)
    make_swap(device, uuid=owner_uuid("web1"), label="web1")
    assert SwapDisk.open(device, uuid=owner_uuid("web1")).label == "web1"
    with pytest.raises(ImageError, match=r"^belongs to another guest: the swap area 'web1' has"):
        SwapDisk.open(device, uuid=owner_uuid("web2"))
    assert names_owner(owner_uuid("web1"))
    assert not names_owner(UUID.bytes) and not names_owner(uuids.uuid4().bytes)


def test_unreadable_and_unwritable() -> None:
    """A header that can't be read, an area that could only be read."""
    device = area(20)
    with pytest.raises(ImageError, match=r"^block 0, .* can't be read \(Input/output error\)"):
        SwapDisk.open(FaultyDevice(device, random.Random(1), bad_reads={0}))
    device.read_only = True
    with pytest.raises(ImageError, match=r"^can't be written to"):
        SwapDisk.open(device)
    assert read_header(device).last_page == 19


def test_file_in_use_missing_or_cut_short(tmp_path: Path) -> None:
    """The line names the file; a refused one is not locked any more."""
    path = tmp_path / "swap"
    path.write_bytes(bytes(20 * BLOCK_BYTES))
    with pytest.raises(ImageError, match=f"^image {path}: holds no swap area"):
        open_swap(path)
    make_swap(path, uuid=UUID.bytes)
    disk = open_swap(path)
    for refused in (lambda: open_swap(path), lambda: make_swap(path, uuid=UUID.bytes)):
        with pytest.raises(ImageError, match=f"^image {path}: is in use by another guest"):
            refused()
    disk.close()
    os.truncate(path, 19 * BLOCK_BYTES)
    with pytest.raises(ImageError, match=r"counts 20 pages \(80 KiB\), and there are 19"):
        open_swap(path)
    with pytest.raises(ImageError, match="no such file; make it with tmem mkswap"):
        open_swap(tmp_path / "missing")


def test_file_below_other_devices(tmp_path: Path) -> None:
    """What is stacked on it sees every call."""
    path = tmp_path / "swap"
    path.write_bytes(bytes(20 * BLOCK_BYTES))
    make_swap(path, uuid=UUID.bytes)
    stacked: list[CountingDevice] = []

    def stack(device: BlockDevice) -> BlockDevice:
        stacked.append(CountingDevice(device))
        return stacked[0]

    disk = open_swap(path, uuid=UUID.bytes, stack=stack)
    disk.write([3], memoryview(page_of(3)))
    disk.close()
    assert stacked[0].writes == 1
    assert path.read_bytes()[3 * BLOCK_BYTES : 4 * BLOCK_BYTES] == page_of(3)


@pytest.mark.parametrize(
    ("blocks", "label", "says"),
    [
        (9, "", "has 10 to 4294967296 pages of 4 KiB, not 9"),
        (20, "sixteen bytes ..", "has 16 bytes; take at most 15"),
        (20, "ääääääää", "has 16 bytes; take at most 15"),
        (20, "a\0b", "none of them 0"),
    ],
)
def test_not_to_be_made(blocks: int, label: str, says: str) -> None:
    """And then nothing is written."""
    device = MemoryDevice.empty(blocks)
    with pytest.raises(ImageError) as caught:
        make_swap(device, uuid=UUID.bytes, label=label)
    assert says in str(caught.value)
    assert not any(device.contents[0])
