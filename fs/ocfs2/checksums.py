"""Checksums of the pages of a volume's files, against wrong pages in a pool that nodes share.

A member of a shared pool may put any bytes under any name. Whoever gets a page compares it with a
checksum that comes from the disk, under the file's meta lock, which no call to tmem can change.
**Who may write the disk itself can forge everything here, as it can the data.** 64 bits of BLAKE2b,
keyed with 16 random bytes of the inode, and bound to inode, generation and page: to find a page
that passes takes 2^64 tries for who can read the key on the disk, and can't be tried elsewhere for
who can't. A crc or xxhash can be made to fit in no time. (2^32 tries find two contents with one
checksum: who may write a file could have nodes see different contents of it, both of them his.)

Where they are (`checksumarea`): in the inode's own block, behind the extent records, where a file
with e extents has room for 478 - 2e pages. Compared:

    here                no block, no read and no lock more than without; in the same journal commit
                        as the inode; gone with it. Files up to 1.8 MiB are covered by the disk
    inline attribute    the same in the format's own name, but at most half a block (1 MiB of a file
                        at 8 bytes), and a feature bit that our minimal profile does not have
    side file by block  0.2 % of the disk, any file. A block of it covers 2 MiB of neighbours of
                        other files, so it needs locks of its own: taken in the middle of a
                        write-back, where nothing may be waited for, and passed to and fro by nodes
                        that write files side by side; and its own answer to every crash
    side file a file    any size, but an inode and a cluster more a file (double for small ones) and
                        a second meta lock with each first use

What has no checksum on the disk (the rest of a large file; what Linux wrote) this node keeps in
memory once it has read it from the disk, as long as nobody else changes the file. Under PR nothing
can be stored; whoever next writes the file stores what it knows, or is told to (`save`). Until then
such pages are verified where they were read before, and come from the disk at each other node:
nothing wrong, nothing shared.

What a crash leaves
  K1  A checksum on the disk is that of what the disk holds, at each moment, in whatever order what
      was not flushed got there. It is stored by the commit that follows the data (`close`), and it
      is voided by a commit of its own before data that it covers is written over (`changing`).
      Only changes in place cost that commit, once per file and commit; new pages and a longer tail
      have nothing to void: bytes behind the end are zeros to a reader.
  K2  What is missing costs a read of the disk. The disk's own data is never refused.
  K3  A file that was changed by Linux, or by a mount without checksums, has none: their times are
      not the inode's (`checksumarea`). A crash of such a mount between its data and its inode is
      the one gap: it leaves new data under old times. All nodes of a volume should have the switch
      in the same position.

Invariant: entries of pages on the disk never reach beyond the size that the inode's block says.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Final

from fs.block.device import BLOCK_BYTES
from fs.inode import Inode
from fs.ocfs2 import checksumarea as area
from fs.ocfs2.dinode import Dinodes, FileChecksums, Ocfs2Inode, own
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.format import Dinode
from fs.ocfs2.transaction import Transactions

PAGES_MAX: Final = 1 << 14
"""Of a file, that are kept in memory: 128 KiB of checksums for the first 64 MiB."""
_person: Final = struct.Struct("<QII").pack


class Checksums:
    """Those of one mount. `random_bytes` gives salts."""

    def __init__(
        self,
        transactions: Transactions,
        dinodes: Dinodes,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._transactions = transactions
        self._dinodes = dinodes
        self._random_bytes = random_bytes
        self._unsaved: dict[int, Ocfs2Inode] = {}
        """Files of which memory knows more than the disk; their locks are held in EX."""
        self._held_open: int | None = None
        """The inode whose checksums are being voided: not to be stored in that very commit."""
        self._weakened: set[int] = set()
        """Files that lost checksums in the running transaction, which the log still has."""
        self.voids = 0
        """Commits that were needed before data could be changed in place."""
        self.contradicted = 0
        """Pages that the disk has otherwise than their checksum says: it was damaged, or somebody
        changed it behind the file system."""
        dinodes.keep_checksums = True

    # What a page cache tells and asks

    def changing(self, inode: Inode, start: int, end: int) -> None:
        """Void what the disk says of the pages that these bytes are in, before they change."""
        file = own(inode)
        if start >= file.size or end <= start:
            return
        first, last = start // BLOCK_BYTES, (min(end, file.size) - 1) // BLOCK_BYTES
        values = self._of(file).values
        for index in range(first, min(last + 1, len(values))):
            values[index] = 0
        block = self._dinodes.buffer(file).data
        trailer = area.closed(block)
        on_disk = trailer is not None and any(area.read(block, trailer)[first : last + 1])
        if not on_disk and file.ino not in self._weakened:
            return
        with self._transactions.operation():
            buffer = self._dinodes.buffer(file)
            self._transactions.modify(buffer)
            area.void(buffer.data)
        self._held_open = file.ino
        try:
            self._transactions.commit()
        finally:
            self._held_open = None
        self.voids += 1
        self._unsaved[file.ino] = file

    def written(self, inode: Inode, index: int, pages: memoryview) -> None:
        """The disk holds these pages."""
        file = own(inode)
        known = self._of(file)
        for number in range(min(len(pages) // BLOCK_BYTES, PAGES_MAX - index)):
            page = pages[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            known.set(index + number, _checksum(known.salt, file, index + number, page))
        self._unsaved[file.ino] = file

    def was_read(self, inode: Inode, index: int, page: memoryview) -> None:
        """The disk holds this page. It is right, whatever was known before."""
        if index < PAGES_MAX:
            file = own(inode)
            known = self._of(file)
            value = _checksum(known.salt, file, index, page)
            before = known.values[index] if index < len(known.values) else 0
            self.contradicted += before not in (0, value)
            known.set(index, value)

    def save(self, inode: Inode) -> None:
        """The next commit stores what is known of this file."""
        self._unsaved[inode.ino] = own(inode)

    def known(self, inode: Inode, index: int, count: int) -> int:
        """Which pages can be verified."""
        values = self._of(own(inode)).values
        bits = 0
        for number, value in enumerate(values[index : index + count]):
            if value:
                bits |= 1 << number
        return bits

    def matches(self, inode: Inode, index: int, page: memoryview) -> bool:
        """Whether this page is what the disk holds, as far as 64 bits tell."""
        file = own(inode)
        known = self._of(file)
        value = known.values[index] if index < len(known.values) else 0
        return value == _checksum(known.salt, file, index, page) if value else False

    def _of(self, file: Ocfs2Inode) -> FileChecksums:
        """What is known of a file whose lock is held; `Dinodes.load` makes us look anew."""
        known = file.checksums
        if known is None:
            block = self._dinodes.buffer(file).data
            trailer = area.closed(block)
            if trailer is None:
                known = FileChecksums(self._random_bytes(area.SALT_BYTES), array("Q"))
            else:
                known = FileChecksums(trailer.salt, area.read(block, trailer))
            file.checksums = known
        return known

    # What the volume tells

    def cut(self, file: Ocfs2Inode, clusters: int) -> None:
        """Inside the operation that frees clusters from `clusters` on: their pages are no more."""
        known = file.checksums
        if known is not None:
            del known.values[clusters:]
        buffer = self._dinodes.buffer(file)
        self._transactions.modify(buffer)
        area.shorten(buffer.data, clusters)

    @contextmanager
    def growing(self, file: Ocfs2Inode) -> Iterator[None]:
        """Inside the operation that gives a file extents: some may come to lie over checksums."""
        buffer = self._dinodes.buffer(file)
        before = area.closed(buffer.data)
        yield
        if before is not None and area.closed(buffer.data) is None:
            self._weakened.add(file.ino)
            self._unsaved[file.ino] = file

    def unsaved(self, ino: int) -> bool:
        """Before the lock of this inode goes to another node there has to be a commit."""
        return ino in self._unsaved

    def close(self) -> None:
        """The data of all files is on the disk, and the next commit stores what is known."""
        self._weakened.clear()
        for file in list(self._unsaved.values()):
            if file.ino != self._held_open:
                with self._transactions.operation():
                    done = self._store(file)
                if done:
                    del self._unsaved[file.ino]

    def _store(self, file: Ocfs2Inode) -> bool:
        """Whether nothing is left that a later commit could store."""
        known = file.checksums
        if known is None:
            return True
        buffer = self._dinodes.buffer(file)
        raw = Dinode.read(buffer.data)
        if not raw.flags & InodeFlag.VALID or raw.generation != file.generation:  # it is gone
            return True
        room = area.room(buffer.data)
        if room < 0:
            return True
        # In the middle of a write the size in the block is the old one still.
        whole = raw.size == file.size
        pages = -(-raw.size // BLOCK_BYTES) if whole else min(raw.size, file.size) // BLOCK_BYTES
        values = known.values[: min(pages, room)]
        self._transactions.modify(buffer)
        area.write(buffer.data, area.Trailer(salt=known.salt), values)
        return whole


def _checksum(salt: bytes, file: Ocfs2Inode, index: int, page: memoryview) -> int:
    """Never 0."""
    person = _person(file.ino, file.generation, index)
    digest = blake2b(page, digest_size=area.CHECKSUM_BYTES, key=salt, person=person).digest()
    return int.from_bytes(digest, "little") or 1
