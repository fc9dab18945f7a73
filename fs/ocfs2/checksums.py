"""Checksums of the pages of a volume's files, against wrong pages in a pool that nodes share.

A member of a shared pool may put any bytes under any name. Whoever gets a page compares it with a
checksum that comes from the disk, under the file's meta lock, which no call to tmem can change.
**Who may write the disk itself can forge everything here, as it can the data.** 64 bits of BLAKE2b,
keyed with 16 random bytes of the inode, and bound to inode, generation and page: to find a page
that passes takes 2^64 tries for who can read the key on the disk, and can't be tried elsewhere for
who can't. A crc or xxhash can be made to fit in no time. (2^32 tries find two contents with one
checksum: who may write a file could have nodes see different contents of it, both of them his.)

Where they are. Of a small file in the inode's own block, behind the extent records
(`checksumarea`), where a file with e extents has room for 478 - 2e pages. Of a larger one outside:
in the blocks of an extended attribute of the inode (`attributes`, `checksumblocks`), and then none
in its own block, but for the trailer there, which says of all of them whether they count. Compared:

    in the inode        no block, no read and no lock more than without; in the same journal commit
                        as the inode; gone with it. Up to 1.8 MiB
    attribute, outside  any size; 0.2 % of the file, and a block that names them. Under the inode's
                        meta lock, so no lock that it hasn't got is waited for in a write-back; in
                        the same commits; Linux and fsck.ocfs2 check it, show it, and free it with
                        the file. A feature bit (xattr), which mkfs sets for who wants it
    attribute, inline   at most half a block, and it takes the place of extent records
    beyond the end      clusters of the file itself behind its size: no feature, and Linux frees
                        them. But without holes they have to make way for each page that comes,
                        and who extends the file without knowing of them puts data over them
    side file a file    an inode and a name more; a directory's lock, and an inode allocator's, for
                        the first; a second meta lock, or a rule that it needs none. What Linux
                        removes leaves it behind, and a new file with the number finds it
    side file by block  0.2 % of the disk. A block of it covers 2 MiB of neighbours of other files,
                        so it needs locks of its own: taken in the middle of a write-back, where
                        nothing may be waited for, and passed to and fro by nodes that write side by
                        side; and its own answer to every crash

An attribute gets its blocks with the file's own (`make_room`), an eighth more than are needed, so
that the next ones of the file are not always cut off by them; a file that was there before gets
them with its first change, or `save`. Reading costs a block for 2 MiB, which stays cached under the
meta lock; a commit logs those blocks in which something is new.

What has no checksum on the disk (what Linux wrote; files of more than 1.8 MiB of a volume without
the feature) this node keeps in memory once it has read it from the disk, as long as nobody else
changes the file. Under PR nothing can be stored; whoever next writes the file stores what it knows,
or is told to (`save`). Until then such pages are verified where they were read before, and come
from the disk at each other node: nothing wrong, nothing shared.

Memory keeps a part of a large file, by chunks of as many pages as a block has (`Capacity`). A chunk
with nothing that the disk doesn't know can go. One with more, or less, is put into its block first,
in the running transaction: what it says was on the disk before it was told. No commit is made for
that, for it happens in the middle of a write-back; if the transaction is full all checksums of the
file are given up.

What a crash leaves
  K1  A checksum on the disk is that of what the disk holds, at each moment, in whatever order what
      was not flushed got there. It is stored by the commit that follows the data, and it is voided
      by a commit of its own before data that it covers is written over (`changing`): with one bit
      in the inode's block all of the file. They count again when all that changed is stored
      (`close`). Only changes in place cost that commit, once per file and commit; new pages and a
      longer tail have nothing to void: bytes behind the end are zeros to a reader.
  K2  What is missing costs a read of the disk. The disk's own data is never refused. A crash while
      they are void costs all checksums of that file: whoever comes next starts with another key,
      and another epoch, in which no old block counts.
  K3  A file that was changed by Linux, or by a mount without checksums, has none, wherever they
      are: their times are not the inode's (`checksumarea`). A crash of such a mount between its
      data and its inode is the one gap: it leaves new data under old times. All nodes of a volume
      should have the switch in the same position.

Invariant: entries of pages on the disk never reach beyond the size that the inode's block says.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Final, NamedTuple

from fs.block.device import BLOCK_BYTES
from fs.inode import Inode
from fs.ocfs2 import checksumarea as area
from fs.ocfs2 import checksumblocks as blocks
from fs.ocfs2.attributes import Attributes
from fs.ocfs2.dinode import Dinodes, FileChecksums, Ocfs2Inode, own
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.format import Dinode
from fs.ocfs2.transaction import Transactions

AHEAD: Final = 8
"""A value grows by an eighth more than is needed: its blocks lie in the way of the file's."""
OTHERS_BLOCKS: Final = 64
"""Of a transaction, that are left for what can't wait."""
_person: Final = struct.Struct("<QII").pack


class Capacity(NamedTuple):
    """Of how many pages checksums have room; all nodes of a volume have the same."""

    inside_pages: int = blocks.PAGES
    """In the inode's block, at most; the room behind the extent records is another limit."""
    block_pages: int = blocks.PAGES
    """In a block of the attribute; not less."""
    chunks: int = 32
    """Of a file in memory at once, each as much as a block has room for: 128 KiB for 64 MiB. At
    least 2. A change of more than a quarter of that is not looked at page by page: all checksums
    of the file are void then."""


class Checksums:
    """Those of one mount. `random_bytes` gives salts, `attributes` are the volume's if it has any.

    `reserve` does what `make_room` does as an operation of its own.
    """

    def __init__(
        self,
        transactions: Transactions,
        dinodes: Dinodes,
        attributes: Attributes | None,
        random_bytes: Callable[[int], bytes],
        reserve: Callable[[Ocfs2Inode], None],
        capacity: Capacity,
    ) -> None:
        self._transactions = transactions
        self._dinodes = dinodes
        self._attributes = attributes
        self._random_bytes = random_bytes
        self._reserve = reserve
        self._inside_pages = min(capacity.inside_pages, capacity.block_pages)
        self._block_pages = capacity.block_pages
        self._chunks_max = capacity.chunks
        self._wide_pages = max(1, capacity.chunks // 4) * capacity.block_pages
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
        if self._blocks_missing(file):
            self._reserve(file)
        pages = range(start // BLOCK_BYTES, -(-min(end, file.size) // BLOCK_BYTES))
        trailer = area.closed(self._dinodes.buffer(file).data)
        if len(pages) > self._wide_pages:
            file.checksums = self._none()
            on_disk = trailer is not None
        else:
            on_disk = trailer is not None and self._on_disk(file, trailer, pages)
            for index in pages:
                self._set(file, index, 0, surely=True)
        if not on_disk and file.ino not in self._weakened:
            return
        self._void(file)
        self._held_open = file.ino
        try:
            self._transactions.commit()
        finally:
            self._held_open = None
        self.voids += 1

    def _on_disk(self, file: Ocfs2Inode, trailer: area.Trailer, pages: range) -> bool:
        """Whether the file's blocks have checksums of some of these pages, valid ones."""
        if not trailer.epoch:
            values = area.read(self._dinodes.buffer(file).data, trailer)
            return any(values[pages.start : pages.stop])
        for number in range(pages.start // self._block_pages, -(-pages.stop // self._block_pages)):
            first = number * self._block_pages
            values = self._in_block(file, trailer.epoch, number)
            if any(values[max(0, pages.start - first) : pages.stop - first]):
                return True
        return False

    def _void(self, file: Ocfs2Inode, *, may_commit: bool = True) -> None:
        with self._transactions.operation(may_commit=may_commit):
            buffer = self._dinodes.buffer(file)
            self._transactions.modify(buffer)
            area.void(buffer.data)
        self._unsaved[file.ino] = file

    def written(self, inode: Inode, index: int, pages: memoryview) -> None:
        """The disk holds these pages."""
        file = own(inode)
        self._unsaved[file.ino] = file
        for number in range(len(pages) // BLOCK_BYTES):
            page = pages[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            self._set(file, index + number, self._checksum(file, index + number, page))

    def was_read(self, inode: Inode, index: int, page: memoryview) -> None:
        """The disk holds this page. It is right, whatever was known before."""
        file = own(inode)
        before = self._value(file, index)
        value = self._checksum(file, index, page)
        self.contradicted += before not in (0, value)
        self._set(file, index, value)

    def save(self, inode: Inode) -> None:
        """The next commit stores what is known of this file."""
        file = own(inode)
        if self._blocks_missing(file):
            self._reserve(file)
        self._unsaved[file.ino] = file

    def known(self, inode: Inode, index: int, count: int) -> int:
        """Which pages can be verified."""
        file = own(inode)
        bits = 0
        for number in range(count):
            if self._value(file, index + number):
                bits |= 1 << number
        return bits

    def matches(self, inode: Inode, index: int, page: memoryview) -> bool:
        """Whether this page is what the disk holds, as far as 64 bits tell."""
        file = own(inode)
        value = self._value(file, index)
        return value == self._checksum(file, index, page) if value else False

    # What memory has

    def _of(self, file: Ocfs2Inode) -> FileChecksums:
        """What is known of a file whose lock is held; `Dinodes.load` makes us look anew."""
        known = file.checksums
        if known is None:
            trailer = area.closed(self._dinodes.buffer(file).data)
            known = self._none() if trailer is None else FileChecksums(trailer.salt, trailer.epoch)
            file.checksums = known
        return known

    def _none(self) -> FileChecksums:
        return FileChecksums(self._random_bytes(area.SALT_BYTES), 0)

    def _value(self, file: Ocfs2Inode, index: int) -> int:
        number, at = divmod(index, self._block_pages)
        return self._chunk(file, number)[at]

    def _set(self, file: Ocfs2Inode, index: int, value: int, *, surely: bool = False) -> None:
        """`surely`: the disk has to be told, whatever memory had."""
        number, at = divmod(index, self._block_pages)
        chunk = self._chunk(file, number)
        if chunk[at] != value or surely:
            chunk[at] = value
            self._of(file).dirty.add(number)

    def _checksum(self, file: Ocfs2Inode, index: int, page: memoryview) -> int:
        """Never 0."""
        # A chunk that has to come may change the salt.
        self._chunk(file, index // self._block_pages)
        key = self._of(file).salt
        person = _person(file.ino, file.generation, index)
        digest = blake2b(page, digest_size=area.CHECKSUM_BYTES, key=key, person=person).digest()
        return int.from_bytes(digest, "little") or 1

    def _chunk(self, file: Ocfs2Inode, number: int) -> array[int]:
        known = self._of(file)
        chunk = known.chunks.pop(number, None)
        if chunk is None:
            if len(known.chunks) >= self._chunks_max:
                self._drop_chunk(file)
                known = self._of(file)
            chunk = self._load(file, known, number)
        known.chunks[number] = chunk
        return chunk

    def _load(self, file: Ocfs2Inode, known: FileChecksums, number: int) -> array[int]:
        if known.epoch:
            return self._in_block(file, known.epoch, number)
        chunk = array("Q", bytes(self._block_pages * area.CHECKSUM_BYTES))
        block = self._dinodes.buffer(file).data
        trailer = area.closed(block)
        if not number and trailer is not None and trailer.salt == known.salt:
            values = area.read(block, trailer)
            chunk[: len(values)] = values
        return chunk

    def _in_block(self, file: Ocfs2Inode, epoch: int, number: int) -> array[int]:
        buffer = self._attributes.block(file, number) if self._attributes is not None else None
        block = bytearray(BLOCK_BYTES) if buffer is None else buffer.data
        return blocks.read(block, epoch, number, self._block_pages)

    def _drop_chunk(self, file: Ocfs2Inode) -> None:
        """Memory has enough of this file. Not a commit: its pages may be on their way."""
        known = self._of(file)
        if file.ino in self._unsaved and known.dirty.issuperset(known.chunks):
            if self._blocks_to_store(file) + OTHERS_BLOCKS > self._transactions.room_blocks:
                self._give_up(file)
                return
            with self._transactions.operation(may_commit=False):
                stored = self._store_outside(file, self._pages_on_disk(file)[0])
            known.dirty -= stored
        unchanged = (number for number in known.chunks if number not in known.dirty)
        # If all have more than could be stored, then of pages that the disk says nothing of.
        number = next(unchanged, next(iter(known.chunks)))
        del known.chunks[number]
        known.dirty.discard(number)

    def _give_up(self, file: Ocfs2Inode) -> None:
        """Know nothing of a file any more, and have the disk say so."""
        self._void(file, may_commit=False)
        self._weakened.add(file.ino)
        file.checksums = self._none()

    # What the volume tells

    def make_room(self, file: Ocfs2Inode) -> None:
        """Inside an operation: blocks for what has no room in the file's own. ENOSPC."""
        if self._attributes is not None and self._blocks_missing(file):
            wanted = self._blocks_wanted(file)
            self._attributes.extend(file, wanted + wanted // AHEAD)

    def _blocks_wanted(self, file: Ocfs2Inode) -> int:
        return -(-file.clusters // self._block_pages)

    def _blocks_missing(self, file: Ocfs2Inode) -> bool:
        if self._attributes is None:
            return False
        value = self._attributes.value(file)
        if value is None:
            room = area.room(self._dinodes.buffer(file).data)
            return file.clusters > min(self._inside_pages, room)
        return value.clusters < self._blocks_wanted(file)

    def cut(self, file: Ocfs2Inode, clusters: int) -> bool:
        """Inside the operation that frees clusters from `clusters` on: their pages are no more.

        False when it has to be done again, and before any is freed: there are too many blocks.
        """
        number, rest = divmod(clusters, self._block_pages)
        attributes = self._attributes
        if attributes is not None and file.clusters > clusters:
            if not attributes.cut(file, number + bool(rest)):
                return False
            edge = attributes.block(file, number) if rest else None
            if edge is not None:
                self._transactions.modify(edge)
                blocks.shorten(edge.data, rest)
        known = file.checksums
        for number, chunk in list(known.chunks.items()) if known is not None else ():
            for at in range(max(0, clusters - number * self._block_pages), len(chunk)):
                chunk[at] = 0
        buffer = self._dinodes.buffer(file)
        self._transactions.modify(buffer)
        area.shorten(buffer.data, clusters)
        return True

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

    def close(self) -> bool:
        """The data of all files is on the disk, and the next commit stores what is known; whether
        it has no room for some."""
        self._weakened.clear()
        left = False
        for file in list(self._unsaved.values()):
            if file.ino == self._held_open:
                continue
            if self._blocks_to_store(file) > self._transactions.room_blocks:
                left = True
                continue
            with self._transactions.operation():
                done = self._store(file)
            if done:
                del self._unsaved[file.ino]
        return left

    def forget(self, ino: int) -> None:
        """The lock goes. What is not stored, for whatever reason, is not known to anybody then."""
        file = self._unsaved.pop(ino, None)
        if file is not None:
            file.checksums = None

    def _pages_on_disk(self, file: Ocfs2Inode) -> tuple[int, bool]:
        """Of how many pages the disk may say something, and whether it is all that there are."""
        size = Dinode.read(self._dinodes.buffer(file).data).size
        if size == file.size:
            return -(-size // BLOCK_BYTES), True
        # In the middle of a write the size in the block is the old one still.
        return min(size, file.size) // BLOCK_BYTES, False

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
            if known.epoch:
                file.checksums = None
            return True
        pages, whole = self._pages_on_disk(file)
        if self._attributes is not None and self._attributes.value(file) is not None:
            known.dirty -= self._store_outside(file, pages)
            values = array("Q")
        else:
            known.epoch = 0
            chunk = known.chunks.get(0) or self._load(file, known, 0)
            values = chunk[: min(pages, room, self._inside_pages)]
        self._transactions.modify(buffer)
        area.write(buffer.data, area.Trailer(salt=known.salt, epoch=known.epoch), values)
        return whole

    @staticmethod
    def _blocks_to_store(file: Ocfs2Inode) -> int:
        known = file.checksums
        if known is None or not file.attribute_block:
            return 1
        return 1 + len(known.dirty if known.epoch else known.chunks)

    def _store_outside(self, file: Ocfs2Inode, pages: int) -> set[int]:
        """Put into the attribute what is known of the first pages; the chunks that have no more."""
        known = self._of(file)
        attributes = self._attributes
        if attributes is None or attributes.value(file) is None:
            return known.dirty - {0}
        if not known.epoch:
            known.epoch = int.from_bytes(self._random_bytes(8), "little") or 1
            known.dirty.update(known.chunks)
        whole = set()
        for number in sorted(known.dirty):
            chunk = known.chunks[number]
            inside = max(0, pages - number * self._block_pages)
            buffer = attributes.block(file, number)
            if buffer is not None:
                self._transactions.modify(buffer)
                blocks.write(buffer.data, known.epoch, number, chunk[:inside])
            if not any(chunk[inside:]):
                whole.add(number)
        return whole
