"""A guest of an experiment: the real page cache and cleancache client over a made-up disk.

The guest side is `guests.pagecache` with its reclaim and readahead, `guests.cleancache` and the
hypercalls over the local transport; only the file system below is not real: one endless file whose
block n holds page n, made when it is read.  So a disk costs no space and every page can be checked.
Blocks are counted by `fs.block.counting` as in a real guest.
"""

from __future__ import annotations

import random
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Final, cast

from fs.block.counting import CountingDevice
from fs.block.device import BLOCK_BYTES, Bytes
from fs.filesystem import FileSystem
from fs.inode import Inode
from guests.attachment import Attachment
from guests.cleancache import Cleancache
from guests.memory import TRANSFER_PAGES, Budget, Memory
from guests.pagecache import PageCache
from ipc.channel import Channel

Reads = Iterator[tuple[int, int]]
"""What a workload asks for: first page and number of pages, without end."""

_INO: Final = 2
_FILE_PAGES: Final = 1 << 30
_stamp = struct.Struct("<QQ").pack


class MadeUpDisk:
    """Block n+1 is page n: its number, noise, its number again.  Reads only."""

    block_bytes = BLOCK_BYTES
    blocks = _FILE_PAGES + 1
    read_only = True

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._noise = random.Random(seed).randbytes(BLOCK_BYTES - 32)

    def page(self, number: int) -> bytes:
        """What a page holds."""
        stamp = _stamp(number, self._seed)
        return b"".join((stamp, self._noise, stamp))

    def read(self, block: int, count: int, into: memoryview) -> None:
        for at in range(count):
            into[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES] = self.page(block - 1 + at)

    def write(self, block: int, count: int, data: Bytes) -> None:
        raise PermissionError(f"{count} blocks of {len(data)} bytes at {block} are not written")

    def flush(self) -> None:
        """Nothing is ever written."""

    def close(self) -> None:
        """Nothing is held."""


class _OneFile:
    """As much of a `FileSystem` as a page cache asks for."""

    def __init__(self, device: CountingDevice) -> None:
        self.device = device

    def map_blocks(self, inode: Inode, index: int, count: int) -> list[int]:
        assert inode.ino == _INO
        return list(range(index + 1, index + 1 + count))


class ExperimentGuest:
    """Reads its file as a workload says, and checks every page."""

    def __init__(
        self,
        name: str,
        frames: int,
        seed: int,
        workload: Reads,
        pages_a_turn: int,
        connect: Callable[[], Channel],
    ) -> None:
        self.name = name
        self.pages_a_turn = pages_a_turn
        self.verified_pages = 0
        self.mismatches = 0
        self._workload = workload
        self._disk = MadeUpDisk(seed)
        self._device = CountingDevice(self._disk)
        memory = Memory(Budget(frames + TRANSFER_PAGES, frames, TRANSFER_PAGES, 0, 0))
        # The clock is only asked whether it is time to attach again.
        self._cleancache = Cleancache(Attachment(connect, lambda: 0.0))
        self._cleancache.attach(refusal_is_fatal=True)
        file_system = cast("FileSystem", _OneFile(self._device))
        self._cache = PageCache(file_system, memory, self._cleancache)
        mode = stat.S_IFREG | 0o444
        size = _FILE_PAGES * BLOCK_BYTES
        self._inode = Inode(_INO, 1, mode, 1, 0, 0, size, size // 512, 0, 0, 0)

    @property
    def disk_reads(self) -> int:
        """Pages that were neither in the guest nor in tmem."""
        return self._device.read_pages

    @property
    def tmem_hits(self) -> int:
        """Pages that tmem had."""
        return self._cleancache.succ_gets

    def turn(self) -> None:
        """Read about as many pages as a turn allows."""
        left = self.pages_a_turn
        while left > 0:
            first, count = next(self._workload)
            left -= max(count, 1)
            if not count:
                continue
            data = self._cache.read(self._inode, first * BLOCK_BYTES, count * BLOCK_BYTES)
            for at in range(count):
                page = data[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES]
                self.mismatches += page != self._disk.page(first + at)
            self.verified_pages += count
