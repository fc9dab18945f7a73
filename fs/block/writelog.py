"""A device that keeps a log of its writes, and the states that a power cut could leave.

The model of a disk with a volatile cache: an epoch is what lies between two flushes. When the
power goes, everything of finished epochs is on the disk; of the current one any subset of the
block writes is, in any order, and one that was under way may be torn: some of its 512-byte
sectors are new, the others old.

States of one epoch of n writes:
  - every prefix, in order of the writes;
  - every subset for n <= `subset_writes_max`, else `samples` random ones;
  - each write torn, after everything before it, with `torn_each` random sets of sectors.

A state has an id that gives it again from the same log: `EPOCH:KEPT[:TORN:SECTORS]`, numbers of
the epoch and the torn write, masks of kept writes and of new sectors in hex.

Not modelled: sectors that are neither old nor new, writes to the wrong place, a flush that lies.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from fs.block.device import BLOCK_BYTES, BlockDevice, Bytes
from fs.block.memory import MemoryDevice

SECTOR_BYTES = 512
SECTORS = BLOCK_BYTES // SECTOR_BYTES


@dataclass
class Epoch:
    """Block writes between two flushes, and what the user had been promised when it began."""

    writes: list[tuple[int, bytes]] = field(default_factory=list)
    marks: list[object] = field(default_factory=list)
    """Of `LoggingDevice.mark` before the first write of this epoch."""


class LoggingDevice:
    """Stacks on `device` and remembers all writes."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self.block_bytes = device.block_bytes
        self.blocks = device.blocks
        self.read_only = device.read_only
        self.epochs = [Epoch()]
        self._marks: list[object] = []

    def mark(self, promise: object) -> None:
        """The user of the device was promised something that must survive from here on.

        It counts from the next epoch on when the current one has begun.
        """
        self._marks.append(promise)
        if not self.epochs[-1].writes:
            self.epochs[-1].marks = list(self._marks)

    def read(self, block: int, count: int, into: memoryview) -> None:
        """Read."""
        self._device.read(block, count, into)

    def write(self, block: int, count: int, data: Bytes) -> None:
        """Write, and log each block."""
        self._device.write(block, count, data)
        view = memoryview(data)
        for number in range(count):
            part = bytes(view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
            self.epochs[-1].writes.append((block + number, part))

    def flush(self) -> None:
        """Flush; the next write begins an epoch."""
        self._device.flush()
        if self.epochs[-1].writes:
            self.epochs.append(Epoch(marks=list(self._marks)))

    def close(self) -> None:
        """Close the device below."""
        self._device.close()


@dataclass(frozen=True)
class PowerCut:
    """One state that a power cut can leave."""

    epoch: int
    kept: int
    """Mask of the epoch's writes that reached the disk."""
    torn: int | None = None
    """Number of the write that reached it in part."""
    sectors: int = 0
    """Mask of the sectors of that write that did."""

    def __str__(self) -> str:
        """The id."""
        text = f"{self.epoch}:{self.kept:x}"
        return text if self.torn is None else f"{text}:{self.torn}:{self.sectors:x}"

    @classmethod
    def from_id(cls, text: str) -> PowerCut:
        """The state with this id."""
        epoch, kept, *torn = text.split(":")
        if not torn:
            return cls(int(epoch), int(kept, 16))
        return cls(int(epoch), int(kept, 16), int(torn[0]), int(torn[1], 16))


def power_cuts(
    epochs: list[Epoch],
    rng: random.Random,
    *,
    subset_writes_max: int = 10,
    samples: int = 200,
    torn_each: int = 2,
) -> Iterator[PowerCut]:
    """All states of a log in the sense above, epoch by epoch and none twice."""
    for number, epoch in enumerate(epochs):
        count = len(epoch.writes)
        seen = {(1 << length) - 1 for length in range(count + 1)}
        if count <= subset_writes_max:
            seen.update(range(1 << count))
        else:
            seen.update(rng.getrandbits(count) for _ in range(samples))
        for kept in sorted(seen):
            yield PowerCut(number, kept)
        for torn in range(count):
            for _ in range(torn_each):
                yield PowerCut(number, (1 << torn) - 1, torn, rng.randrange(1, (1 << SECTORS) - 1))


class PowerCuts:
    """Builds the states of a log on top of the contents from before it."""

    def __init__(self, before: MemoryDevice, epochs: list[Epoch]) -> None:
        self._epochs = epochs
        self._device = before.copy()
        self._done = 0

    def state(self, cut: PowerCut) -> MemoryDevice:
        """What the disk holds; cheap when epochs are asked for in ascending order."""
        if cut.epoch < self._done:
            raise ValueError("power cuts go forward through the log")
        while self._done < cut.epoch:
            for block, data in self._epochs[self._done].writes:
                self._device.contents[block] = data
            self._done += 1
        device = self._device.copy()
        for number, (block, data) in enumerate(self._epochs[cut.epoch].writes):
            if cut.kept >> number & 1:
                device.contents[block] = data
            elif number == cut.torn:
                device.contents[block] = _torn(device.contents[block], data, cut.sectors)
        return device


def _torn(old: bytes, new: bytes, sectors: int) -> bytes:
    return b"".join(
        (new if sectors >> number & 1 else old)[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES]
        for number in range(SECTORS)
    )
