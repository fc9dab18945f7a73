"""The journal of a slot: a system file with a jbd2 log in it.

Its inode says whether the log needs recovery (`JOURNAL_DIRTY`) and how often that was done. Both
words are written in place, as Linux does: they must be readable before the log is replayed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NamedTuple

from fs.block.device import BLOCK_BYTES, BlockDevice, Bytes
from fs.errors import corrupt, error
from fs.jbd2.area import Area
from fs.jbd2.format import Superblock
from fs.jbd2.journal import Journal
from fs.jbd2.recovery import Recovered, recover, unreplayed
from fs.ocfs2.dinode import Ocfs2Inode
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.format import DINODE_SIGNATURE, JOURNAL_DIRTY, Dinode


class JournalState(NamedTuple):
    """A slot's journal as the disk has it, for a person."""

    dirty: bool
    """Somebody uses it, or has left it to be replayed."""
    sequence: int
    """Of the oldest transaction that may have to be replayed; all before it are home."""
    recoveries: int
    """How often it was replayed after a death."""


class SlotJournal:
    """The journal file `inode`, whose data lies in `blocks`."""

    def __init__(self, device: BlockDevice, inode: Ocfs2Inode, blocks: list[int]) -> None:
        if not inode.flags & InodeFlag.JOURNAL or not all(blocks):
            raise corrupt(f"inode {inode.ino} is no journal")
        self._device = device
        self._block = inode.ino
        self.area = Area(device, blocks)

    def _read(self) -> tuple[bytearray, Dinode]:
        data = bytearray(BLOCK_BYTES)
        self._device.read(self._block, 1, memoryview(data))
        raw = Dinode.read(data)
        if raw.signature != DINODE_SIGNATURE or not raw.flags & InodeFlag.JOURNAL:
            raise corrupt(f"inode {self._block} is no journal")
        return data, raw

    def _write(self, data: bytearray, raw: Dinode) -> None:
        raw.write_into(data)
        self._device.write(self._block, 1, data)
        self._device.flush()

    @property
    def dirty(self) -> bool:
        """True when the slot was not given back properly."""
        return bool(self._read()[1].id1_low & JOURNAL_DIRTY)

    def state(self) -> JournalState:
        """What there is to say about it."""
        raw = self._read()[1]
        superblock = Superblock(self.area.read(0), len(self.area))
        return JournalState(bool(raw.id1_low & JOURNAL_DIRTY), superblock.sequence, raw.id1_high)

    def replay(self) -> Recovered:
        """Write home what the log holds."""
        return recover(self.area)

    def unreplayed(self) -> dict[int, bytearray]:
        """What `replay` would write, for a device that can't be written."""
        return unreplayed(self.area)

    def mark_dirty(self) -> None:
        """The log is going to be used."""
        data, raw = self._read()
        raw.id1_low |= JOURNAL_DIRTY
        self._write(data, raw)

    def mark_clean(self, *, recovered: bool = False) -> None:
        """The log holds nothing any more; `recovered`: after the death of its node."""
        data, raw = self._read()
        raw.id1_low &= ~JOURNAL_DIRTY
        if recovered:
            raw.id1_high = (raw.id1_high + 1) & 0xFFFFFFFF
        self._write(data, raw)

    def open(self, now_ns: Callable[[], int]) -> Journal:
        """The log, replayed before, for writing."""
        return Journal(self.area, now_ns=now_ns, ocfs2_tools=True)


class ReplayedDevice:
    """A device that can't be written, as it would be after its journals were replayed."""

    read_only = True

    def __init__(self, device: BlockDevice, images: dict[int, bytearray]) -> None:
        self._device = device
        self._images = images
        self.block_bytes = device.block_bytes
        self.blocks = device.blocks

    def read(self, block: int, count: int, into: memoryview) -> None:
        """Read, images first."""
        self._device.read(block, count, into)
        for number in range(count):
            image = self._images.get(block + number)
            if image is not None:
                into[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES] = image

    def write(self, block: int, count: int, data: Bytes) -> None:
        """EROFS."""
        raise error(errno.EROFS, f"{count} blocks from {block}, {len(data)} bytes")

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Close the device below."""
        self._device.close()
