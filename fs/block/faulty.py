"""A device that breaks in chosen ways, for tests; all randomness comes from one seeded generator.

Fault model, each fault off unless asked for:
  - read error, write error: EIO for any operation that touches a chosen block; nothing is moved;
  - no room: the same with ENOSPC for writes, as a file with holes on a full disk has it;
  - torn write: a block write stores only its first k sectors of 512 bytes (0 < k < 8) and reports
    success;
  - lost write: a block write reports success and stores nothing;
  - power cut after N block writes: block write N+1 and everything later, reads and flushes too,
    fail with EIO. Blocks of one call are stored in ascending order, so a cut inside a call leaves
    a prefix of it;
  - volatile cache (with a power cut): what was written since the last flush is held back; when
    the power goes, a random half of those blocks reaches the disk, so writes are lost and
    reordered as a disk with a write cache does.

Not modelled: bits that rot, writes to the wrong place, a flush that lies.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Collection

from fs.block.device import BLOCK_BYTES, BlockDevice, Bytes, check_extent
from fs.errors import error

SECTOR_BYTES = 512


class FaultyDevice:
    """Stacks on `device`.

    `bad_reads`, `bad_writes` and `no_room` may be changed at any time; `cut` tells of the power.
    """

    def __init__(
        self,
        device: BlockDevice,
        rng: random.Random,
        *,
        bad_reads: Collection[int] = (),
        bad_writes: Collection[int] = (),
        torn_chance: float = 0.0,
        lost_chance: float = 0.0,
        cut_after_writes: int | None = None,
        volatile_cache: bool = False,
    ) -> None:
        self._device = device
        self._rng = rng
        self.bad_reads = set(bad_reads)
        self.bad_writes = set(bad_writes)
        self.no_room: set[int] = set()
        self._torn_chance = torn_chance
        self._lost_chance = lost_chance
        self._cut_after_writes = cut_after_writes
        self._cache: dict[int, bytes] | None = {} if volatile_cache else None
        self.block_bytes = device.block_bytes
        self.blocks = device.blocks
        self.read_only = device.read_only
        self.block_writes = 0
        self.cut = False

    def _check_power(self) -> None:
        if self.cut:
            raise error(errno.EIO, "the power is cut")

    def read(self, block: int, count: int, into: memoryview) -> None:
        """Read, held back writes included; EIO on a bad block."""
        self._check_power()
        if not self.bad_reads.isdisjoint(range(block, block + count)):
            raise error(errno.EIO, f"read error in blocks {block}..{block + count - 1}")
        self._device.read(block, count, into)
        for i in range(count if self._cache else 0):
            held = self._cache.get(block + i) if self._cache else None
            if held is not None:
                into[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] = held

    def write(self, block: int, count: int, data: Bytes) -> None:
        """Write with the faults above."""
        self._check_power()
        view = memoryview(data)
        check_extent(self, block, count, view.nbytes)
        if not self.bad_writes.isdisjoint(range(block, block + count)):
            raise error(errno.EIO, f"write error in blocks {block}..{block + count - 1}")
        if not self.no_room.isdisjoint(range(block, block + count)):
            raise error(errno.ENOSPC, f"no room for blocks {block}..{block + count - 1}")
        for i in range(count):
            if self._cut_after_writes is not None and self.block_writes >= self._cut_after_writes:
                self._cut_power()
            self.block_writes += 1
            self._write_block(block + i, bytes(view[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]))

    def _write_block(self, block: int, data: bytes) -> None:
        if self._rng.random() < self._lost_chance:
            return
        if self._rng.random() < self._torn_chance:
            kept = self._rng.randrange(1, BLOCK_BYTES // SECTOR_BYTES) * SECTOR_BYTES
            old = bytearray(BLOCK_BYTES)
            self.read(block, 1, memoryview(old))
            data = data[:kept] + old[kept:]
        if self._cache is None:
            self._device.write(block, 1, data)
        else:
            self._cache[block] = data

    def _cut_power(self) -> None:
        self.cut = True
        for block, data in list((self._cache or {}).items()):
            if self._rng.random() < 0.5:
                self._device.write(block, 1, data)
        self._check_power()

    def flush(self) -> None:
        """Store what was held back, then flush."""
        self._check_power()
        if self._cache is not None:
            for block, data in self._cache.items():
                self._device.write(block, 1, data)
            self._cache.clear()
        self._device.flush()

    def close(self) -> None:
        """Close the device below; what is held back is lost."""
        self._device.close()
