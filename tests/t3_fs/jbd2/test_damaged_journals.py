"""A damaged journal is refused or recovered in part; nothing outside of the home blocks changes."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable

import pytest

from fs.block.counting import CountingDevice
from fs.block.device import BLOCK_BYTES
from fs.block.memory import MemoryDevice
from fs.errors import ImageError
from fs.jbd2.area import Area
from fs.jbd2.format import COMMIT, DESCRIPTOR, MAGIC, REVOKE, header
from fs.jbd2.journal import Journal
from fs.jbd2.recovery import Recovered, recover
from tests.t3_fs.jbd2.journals import FORMS, HOME_BLOCKS, area_of, clock, new_device

BLOCKS = 24
CRC32C = [form for form in FORMS if "v2" in form or "v3" in form]


def crashed(form: str, rng: random.Random) -> tuple[MemoryDevice, list[list[bytes]]]:
    """A device whose log holds four transactions, and its home blocks after 0..4 of them."""
    device = new_device(form, BLOCKS)
    journal = Journal(area_of(device, BLOCKS), now_ns=clock)
    states = [device.contents[:HOME_BLOCKS]]
    for number in range(4):
        writes = {block: rng.randbytes(BLOCK_BYTES) for block in rng.sample(range(20), 2)}
        journal.commit(writes, [20 + number] if number else [])
        states.append(list(states[-1]))
        for block, image in writes.items():
            states[-1][block] = image
    return device, states


def attempt(device: MemoryDevice) -> Recovered | None:
    """Recover within bounds; None when it is refused, and then nothing has changed."""
    counting = CountingDevice(device)
    before = list(device.contents)
    area = area_of(counting, BLOCKS)
    found = None
    try:
        found = recover(area)
    except ImageError:
        pass
    except OSError as reason:
        if reason.errno != errno.EUCLEAN:
            raise
    if found is None:
        assert device.contents == before
        return None
    # Each pass visits a block once, the last one reads what it writes.
    assert counting.read_pages <= 4 * BLOCKS
    changed = {n for n, content in enumerate(device.contents) if content is not before[n]}
    assert changed <= {*range(HOME_BLOCKS), area.blocks[0]}
    assert recover(area).transactions == 0
    return found


@pytest.mark.parametrize("form", FORMS)
def test_flipped_bits(form: str) -> None:
    """No crash, no hang, no stray write; with a crc32c nothing wrong is replayed either."""
    for seed in range(150):
        rng = random.Random(f"{form}{seed}")
        device, states = crashed(form, rng)
        area = area_of(device, BLOCKS)
        index = rng.randrange(BLOCKS)
        content = area.read(index)
        # Headers and the first tags are hit as often as all the rest.
        place = rng.randrange(80 if rng.random() < 0.5 else BLOCK_BYTES)
        content[place] ^= 1 << rng.randrange(8)
        area.write(index, content)
        found = attempt(device)
        if form in CRC32C and found:
            assert found.transactions >= 3, f"seed {seed}"
            home = device.contents[:HOME_BLOCKS]
            assert home in (states[3], states[4]), f"seed {seed}"


@pytest.mark.parametrize("form", FORMS)
def test_garbage(form: str) -> None:
    """Blocks of noise, of headers with any kind and number, and swapped ones."""
    for seed in range(100):
        rng = random.Random(f"{form}{seed}")
        device, _ = crashed(form, rng)
        area = area_of(device, BLOCKS)
        for _ in range(rng.randrange(1, 5)):
            index = rng.randrange(rng.random() < 0.8, BLOCKS)
            start = struct.pack(">III", MAGIC, rng.randrange(7), rng.randrange(8))
            noise = rng.choice([bytes(BLOCK_BYTES), rng.randbytes(BLOCK_BYTES)])
            swapped = bytes(area.read(rng.randrange(BLOCKS)))
            area.write(index, rng.choice([noise, start + noise[12:], swapped]))
        attempt(device)


def damage_superblock(offset: int, value: int) -> Callable[[Area], None]:
    """Sets one word of the superblock."""

    def apply(area: Area) -> None:
        raw = area.read(0)
        struct.pack_into(">I", raw, offset, value)
        area.write(0, raw)

    return apply


@pytest.mark.parametrize(
    ("offset", "value", "what"),
    [
        (0, 0x12345678, "no superblock"),
        (4, 1, "no superblock"),
        (12, 1024, "blocks of 1024 bytes"),
        (16, BLOCKS + 1, "25 blocks in a file of 24"),
        (16, 1, "a log from 1 to 1"),
        (20, 0, "a log from 0"),
        (20, 99, "a log from 99"),
        (28, BLOCKS, "starts at 24"),
        (28, 0xFFFFFFFF, "starts at 4294967295"),
        (36, 3, "compat:0x2"),
        (40, 0x20, "fast_commit"),
        (40, 0x80000040, "incompat:0x40, incompat:0x80000000"),
        (40, 0x18, "two versions"),
        (40, 0x10, "kind 0"),
        (44, 1, "ro:0x1"),
    ],
)
def test_superblock(offset: int, value: int, what: str) -> None:
    """Each impossible field is named."""
    device, _ = crashed("plain", random.Random(1))
    area = area_of(device, BLOCKS)
    damage_superblock(offset, value)(area)
    before = list(device.contents)
    with pytest.raises((OSError, ImageError), match=what):
        recover(area)
    assert device.contents == before


def write_log(area: Area, *blocks: bytes) -> None:
    """Put these blocks at the start of the log."""
    area.write(1, b"".join(block.ljust(BLOCK_BYTES, b"\0") for block in blocks))


@pytest.mark.parametrize("target", [HOME_BLOCKS, HOME_BLOCKS + BLOCKS, 0xFFFFFFFF])
def test_tag_outside_of_the_home_blocks(target: int) -> None:
    """An image of the journal itself, or of a block that doesn't exist, is EUCLEAN."""
    device = new_device("plain", BLOCKS, started=True)
    area = area_of(device, BLOCKS)
    good = struct.pack(">IHH", 3, 0, 0) + bytes(16)
    bad = struct.pack(">IHH", target, 0, 2 | 8)
    images = bytes(BLOCK_BYTES), bytes(BLOCK_BYTES)
    write_log(area, header(DESCRIPTOR, 1) + good + bad, *images, header(COMMIT, 1))
    with pytest.raises(OSError, match=f"impossible block {target}") as caught:
        recover(area)
    assert caught.value.errno == errno.EUCLEAN
    # Without the commit block it is only an unfinished transaction.
    write_log(area, header(DESCRIPTOR, 1) + good + bad, *images, bytes(4))
    assert recover(area).transactions == 0


def test_circle() -> None:
    """A log full of blocks of one transaction has no end that Linux's old walk would find."""
    device = new_device("plain", BLOCKS, started=True)
    area = area_of(device, BLOCKS)
    write_log(area, *[header(REVOKE, 1) + struct.pack(">I", 16)] * (BLOCKS - 1))
    assert attempt(device) == Recovered(0, 0, 0, 2)


@pytest.mark.parametrize("used", [0, 15, 17, 4097, 0xFFFFFFFF])
def test_length_of_revoke_block(used: int) -> None:
    """An impossible length is EUCLEAN, one too short for a record is none."""
    device = new_device("plain", BLOCKS, started=True)
    area = area_of(device, BLOCKS)
    write_log(area, header(REVOKE, 1) + struct.pack(">I", used), header(COMMIT, 1))
    if used > BLOCK_BYTES:
        with pytest.raises(OSError, match=f"claims {used} bytes"):
            recover(area)
    else:
        assert recover(area).transactions == 1


@pytest.mark.parametrize("blocks", [[], [3, 4, 3], [3, 200], [-1, 2]])
def test_area(blocks: list[int]) -> None:
    """A journal's blocks are on the device, each once."""
    with pytest.raises(OSError, match="journal") as caught:
        Area(MemoryDevice.empty(100), blocks)
    assert caught.value.errno == errno.EUCLEAN
