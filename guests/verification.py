"""Pages from tmem are compared with the file system's checksums before anybody sees them.

A page that is not what the disk holds is a miss, is counted, told in the guest's log, and refused:
the hypervisor is told, whose audit log then says who put it, and the pool forgets it, so that the
others do not get it either. A page of which no checksum is known is a
miss as well and not even asked for: nothing is believed. The disk is asked instead, and what comes
from there is known from then on (`fs.ocfs2.checksums`).

`checking` may be switched while the guest runs (`tmem exec GUEST -- verify off`); pages that came
in meanwhile are in the page cache and stay there. Checksums are kept in either position, by all
nodes of a volume that is configured with `verify`; else there is no `Verification` at all.

Costs 4.5 us of CPU a page that comes from tmem, 4.3 a page written back, nothing but one test of an
attribute without `verify`.

Not for ext2: a guest's own file system has a private pool, which nobody else can put into. What
rots there is the hypervisor's business.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Callable
from typing import Final, Protocol

from fs.block.device import BLOCK_BYTES
from fs.checksums import PageChecksums
from fs.hooks import FileKey
from fs.inode import Inode
from fs.vfs import Vfs

log = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 64 * 1024
_SAVE_CHUNKS: Final = 256
"""16 MiB of a file are learnt at a time: of more than 64 nobody keeps the checksums in memory."""
TELL_SECONDS: Final = 1.0
"""At least between two lines of the log: a poisoner can't fill a disk with them."""


class GetPages(Protocol):
    """`PageHooks.get_pages`."""

    def __call__(self, key: FileKey, index: int, count: int, into: memoryview) -> int:
        """Bit i: page `index+i` is in `into`."""
        ...


class Verification:
    """Of one mount. `refuse_page` is told of each page that is wrong."""

    def __init__(
        self,
        checksums: PageChecksums,
        refuse_page: Callable[[FileKey, int], None],
        now_seconds: Callable[[], float],
    ) -> None:
        self.checksums = checksums
        self.checking = True
        self.verified = 0
        self.mismatches = 0
        self.unknown = 0
        self._refuse_page = refuse_page
        self._now_seconds = now_seconds
        self._told_at_seconds: float | None = None
        self._untold = 0

    def counters(self) -> dict[str, int | bool]:
        """In pages, since boot."""
        return {
            "checking": self.checking,
            "verified": self.verified,
            "mismatches": self.mismatches,
            "unknown": self.unknown,
        }

    def get_pages(
        self, get: GetPages, inode: Inode, index: int, count: int, into: memoryview
    ) -> int:
        """As `get`, but a page that can't be shown to be right is a miss."""
        if not self.checking:
            return get(inode.key, index, count, into)
        known = self.checksums.known(inode, index, count)
        self.unknown += count - known.bit_count()
        found = get(inode.key, index, count, into) & known if known else 0
        for number in range(found.bit_length()):
            if found >> number & 1:
                page = into[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
                inside = inode.size - (index + number) * BLOCK_BYTES
                if inside < BLOCK_BYTES:
                    page[inside:] = bytes(BLOCK_BYTES - inside)
                if self.checksums.matches(inode, index + number, page):
                    self.verified += 1
                else:
                    found ^= 1 << number
                    self._mismatch(inode.key, index + number)
        return found

    def learn(self, vfs: Vfs) -> int:
        """Read all files, and have the disk know what is known of them then, for all nodes; the
        number of files.  For a volume that Linux has written."""
        files = 0
        for top, _, names in vfs.walk():
            for name in names:
                path = f"{top.rstrip('/')}/{name}"
                try:
                    if stat.S_ISREG(vfs.lstat(path).st_mode):
                        self._learn_file(vfs, path)
                        files += 1
                except OSError as reason:
                    # Another node may have removed it.
                    if reason.errno not in (errno.ENOENT, errno.ESTALE):
                        raise
        vfs.sync()
        return files

    def _learn_file(self, vfs: Vfs, path: str) -> None:
        handle = vfs.open(path)
        try:
            inode = vfs.inode_of(handle)
            more = True
            while more:
                more = all(vfs.read(handle, _CHUNK_BYTES) for _ in range(_SAVE_CHUNKS))
                with vfs.fs.writing(inode):
                    self.checksums.save(inode)
                if more:
                    vfs.fs.sync()
        finally:
            vfs.close(handle)

    def _mismatch(self, key: FileKey, index: int) -> None:
        self.mismatches += 1
        now_seconds = self._now_seconds()
        told = self._told_at_seconds
        if told is None or now_seconds - told >= TELL_SECONDS:
            log.warning(
                "verification event=mismatch ino=%d generation=%d page=%d untold=%d",
                key.ino,
                key.generation,
                index,
                self._untold,
            )
            self._told_at_seconds = now_seconds
            self._untold = 0
        else:
            self._untold += 1
        self._refuse_page(key, index)
