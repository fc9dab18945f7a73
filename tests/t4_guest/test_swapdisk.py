"""Swap areas: the header that mkswap writes, and who gets which slot."""

from __future__ import annotations

import errno
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
from fs.block.device import BLOCK_BYTES
from fs.block.faulty import FaultyDevice
from fs.block.file import FileDevice
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
    """Random allocations, frees and retirements; the figures are what counting gives."""
    rng = random.Random(seed)
    bad = tuple(rng.sample(range(1, 700), 20))
    disk = SwapDisk.open(area(rng.choice([700, 768, 1000]), bad_pages=bad))
    free = set(range(1, disk.slots + len(bad) + 1)) - set(bad)
    used: set[int] = set()
    for _ in range(1500):
        action = rng.random()
        if action < 0.4:
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
        elif free | used:
            slot = rng.choice(sorted(free | used))
            disk.retire(slot)
            free.discard(slot)
            used.discard(slot)
        assert (disk.free_slots, disk.slots) == (len(free), len(free) + len(used)), seed
        assert disk.used_slots == len(used), seed
    assert {slot for slot in range(-1, 1001) if disk.is_used(slot)} == used, seed
    assert sorted(disk.allocate(1001)) == sorted(free), seed
    assert disk.allocate(1) == [], seed
