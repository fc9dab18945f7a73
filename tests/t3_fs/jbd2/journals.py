"""Journals in memory, in every form, and the history of what was promised about them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.block.memory import MemoryDevice
from fs.block.writelog import LoggingDevice
from fs.jbd2.area import Area
from fs.jbd2.format import (
    COMPAT_CHECKSUM,
    INCOMPAT_64BIT,
    INCOMPAT_CSUM_V2,
    INCOMPAT_CSUM_V3,
    MAGIC_BYTES,
)
from fs.jbd2.journal import Journal, format_journal
from fs.jbd2.recovery import recover

UUID = bytes(range(16))
FORMS = {
    "plain": (0, 0),
    "64bit": (0, INCOMPAT_64BIT),
    "checksum-v1": (COMPAT_CHECKSUM, 0),
    "checksum-v2": (0, INCOMPAT_CSUM_V2),
    "checksum-v2-64bit": (0, INCOMPAT_CSUM_V2 | INCOMPAT_64BIT),
    "checksum-v3": (0, INCOMPAT_CSUM_V3),
    "checksum-v3-64bit": (0, INCOMPAT_CSUM_V3 | INCOMPAT_64BIT),
}
HOME_BLOCKS = 24
"""Blocks 0..23 of these devices are the file system's, the journal comes after them."""


def clock() -> int:
    """A moment in 2026."""
    return 1_767_225_600_123_456_789


def area_of(device: BlockDevice, journal_blocks: int) -> Area:
    """The journal's blocks: two runs, the later one first, as a file may have them."""
    first = HOME_BLOCKS
    half = first + journal_blocks // 2
    return Area(device, [*range(half, first + journal_blocks), *range(first, half)])


def new_device(form: str, journal_blocks: int = 24, *, started: bool = False) -> MemoryDevice:
    """A device with an empty journal."""
    device = MemoryDevice.empty(HOME_BLOCKS + journal_blocks)
    compat, incompat = FORMS[form]
    area = area_of(device, journal_blocks)
    format_journal(area, UUID, compat=compat, incompat=incompat, started=started)
    return device


def image(rng: random.Random) -> bytes:
    """A block; one of four looks like the journal's own."""
    head = MAGIC_BYTES if rng.random() < 0.25 else rng.randbytes(4)
    return head + rng.randbytes(8) * ((BLOCK_BYTES - 4) // 8) + rng.randbytes(4)


@dataclass
class History:
    """Contents of the home blocks after each step; None where anything is allowed."""

    steps: list[dict[int, bytes | None]]

    def allows(self, step: int, device: MemoryDevice) -> bool:
        """True when the device holds what it held after this step."""
        return all(
            expected is None or device.contents[block] == expected
            for block, expected in self.steps[step].items()
        )


def recovered_home(device: BlockDevice, journal_blocks: int) -> list[bytes]:
    """What recovery would make of the home blocks."""
    copy = MemoryDevice.empty(device.blocks)
    for block in range(device.blocks):
        into = bytearray(BLOCK_BYTES)
        device.read(block, 1, memoryview(into))
        copy.contents[block] = bytes(into)
    recover(area_of(copy, journal_blocks))
    return copy.contents[:HOME_BLOCKS]


def work(
    device: LoggingDevice,
    journal_blocks: int,
    rng: random.Random,
    *,
    commits: int,
    images_max: int = 4,
) -> History:
    """Commit, forget, reuse freed blocks for data, checkpoint; marks the number of each step.

    The journal may hold what an earlier crash left.
    """
    history = History([dict(enumerate(recovered_home(device, journal_blocks)))])
    journal = Journal(area_of(device, journal_blocks), now_ns=clock)
    now: dict[int, bytes | None] = dict(history.steps[0])

    def promise() -> None:
        history.steps.append(dict(now))
        device.mark(len(history.steps) - 1)

    for _ in range(commits):
        blocks = rng.sample(range(HOME_BLOCKS), rng.randrange(1, images_max + 1))
        freed = set(rng.sample(range(HOME_BLOCKS), rng.randrange(3)))
        writes = {block: image(rng) for block in blocks}
        if rng.random() < 0.5:
            for block in freed:
                journal.forget(block)
            journal.commit(writes)
        else:
            journal.commit(writes, freed)
        freed -= set(blocks)
        now |= writes
        now |= dict.fromkeys(freed)
        promise()
        if freed and rng.random() < 0.7:
            # A freed block becomes file data, which is written around the journal.
            block, data = min(freed), image(rng)
            device.write(block, 1, data)
            device.flush()
            now[block] = data
            promise()
        if rng.random() < 0.15:
            journal.checkpoint()
    if rng.random() < 0.5:
        journal.close()
    return history
