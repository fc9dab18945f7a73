"""A shared pool in the hands of an attacker, and what has to be true of checksums on a disk.

The pool answers a get with what it likes: an older content of the page, another page's, noise, or
the right one. It forgets nothing, whatever is flushed. Nobody may notice but in the counters.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Final

from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.directpages import DirectPages
from fs.hooks import Extent, FileKey
from fs.ocfs2.checksums import Capacity
from fs.ocfs2.filesystem import Ocfs2
from fs.vfs import Vfs
from tests.support.ocfs2 import Clock

POISONED: Final = "poisoned-"
"""Begins the name of a run with such a pool."""
CAPACITY: Final = Capacity(inside_pages=1, block_pages=2, chunks=3)
"""So small that files of two pages have their checksums outside, and those of three two blocks, and
that memory has not all of a file of seven."""
_NOISE: Final = b"\xa5" * BLOCK_BYTES


class HostilePool:
    """`SharedPageHooks`, all of whose answers are drawn from a seed; `honest`: no tricks."""

    def __init__(self, seed: int, *, honest: bool = False) -> None:
        self._chance = random.Random(seed)
        self._honest = honest
        self._history: dict[tuple[FileKey, int], list[bytes]] = {}
        self._all: list[bytes] = [_NOISE]
        self.wrong = 0
        """Pages given that were not the newest."""
        self.flushed = 0

    def get_pages(self, key: FileKey, index: int, count: int, into: memoryview) -> int:
        found = 0
        for number in range(count):
            known = self._history.get((key, index + number))
            if known is None and (self._honest or self._chance.random() < 0.5):
                continue
            page = known[-1] if known else self._chance.choice(self._all)
            if known and not self._honest:
                page = self._chance.choice(
                    (known[-1], *known, *known, self._chance.choice(self._all))
                )
            self.wrong += not known or page != known[-1]
            into[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES] = page
            found |= 1 << number
        return found

    def put_pages(
        self, key: FileKey, index: int, count: int, pages: memoryview, *, active: bool = False
    ) -> None:
        self.put_extents([Extent(key, index, count, active)], pages)

    def put_extents(self, extents: Sequence[Extent], pages: memoryview) -> None:
        at = 0
        for key, start, length, _ in extents:
            for index in range(start, start + length):
                page = bytes(pages[at : at + BLOCK_BYTES])
                self._history.setdefault((key, index), []).append(page)
                self._all.append(page)
                at += BLOCK_BYTES

    def flush_page(self, key: FileKey, index: int) -> None:
        self.flushed += 1
        if self._honest:
            self._history.pop((key, index), None)

    def flush_inode(self, key: FileKey) -> None:
        if self._honest:
            for name in [name for name in self._history if name[0] == key]:
                del self._history[name]

    def flush_fs(self) -> None:
        """Others still use it."""

    def settle(self, key: FileKey) -> bool:
        return True

    def hand_over(self, key: FileKey) -> None:
        """Nothing is owed."""

    def distrust(self, key: FileKey) -> None:
        self.flush_inode(key)


def mount_with_checksums(device: BlockDevice, node: int = 0) -> Vfs:
    """As the only node."""
    fs = Ocfs2(
        device,
        clock_ns=Clock(),
        node=node,
        keep_checksums=True,
        random_bytes=random.Random(0).randbytes,
        checksums_capacity=CAPACITY,
    )
    return Vfs(fs, DirectPages(fs, fs.checksums))


def checksums_hold(device: BlockDevice) -> Counter[str]:
    """Every checksum on the disk is that of what the disk holds; how many there are, and how many
    of them outside of the inodes' blocks.

    `device` is changed: what a crash left is replayed.
    """
    vfs = mount_with_checksums(device)
    fs = vfs.fs
    assert isinstance(fs, Ocfs2)
    assert fs.checksums is not None
    counts: Counter[str] = Counter()
    for top, _, names in vfs.walk():
        for name in names:
            path = f"{top.rstrip('/')}/{name}"
            if vfs.lstat(path).st_mode & 0o170000 != 0o100000:
                continue
            ino = vfs.stat(path).st_ino
            inode = fs.iget(ino)
            with fs.reading(inode):
                for index in range(-(-inode.size // BLOCK_BYTES) + 1):
                    if fs.checksums.known(inode, index, 1):
                        data = vfs.pages.read(inode, index * BLOCK_BYTES, BLOCK_BYTES)
                        page = memoryview(data.ljust(BLOCK_BYTES, b"\0"))
                        assert fs.checksums.matches(inode, index, page), f"{path} page {index}"
                        counts["checksums"] += 1
                        counts["outside"] += bool(inode.checksums and inode.checksums.epoch)
    return counts
