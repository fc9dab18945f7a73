"""After a crash: what the log holds goes home, in three passes.

    scan    walks the log from its start, transaction by transaction, until one has no commit
            block; checks everything that can be checked. Nothing was written until here.
    revoke  notes which blocks were freed, and by which transaction.
    replay  writes the newest image of each block over the block, unless a later transaction, or
            the same one, revoked it.

Then the device is flushed, the log is marked empty, and the device is flushed again. The next
sequence number leaves one out, so that what is left of an unfinished transaction can't be taken
for a part of a new one. A power cut anywhere in between leaves a log that gives the same again.

Invariants:
  I1  no block is written outside of the device, nor inside the journal itself;
  I2  a log that is damaged (and not merely unfinished) is refused with EUCLEAN before anything is
      written;
  I3  each block of the log is visited once a pass at most, so a log that leads in a circle ends.

Unfinished or damaged? The commit block is written only when all other blocks of its transaction
are durable, and the next transaction only when the commit block is. So a wrong checksum means an
unfinished transaction when it is in the last commit block, or when no commit block follows; and
damage otherwise. With checksums that start from the uuid the same is asked wherever the log ends;
without them a damaged block in the middle of the log is taken for its end, as Linux does.

Linux differs: it replays what comes before a commit block with a wrong
checksum and then refuses to mount, and it writes the sound blocks of a damaged transaction; torn
sectors of an unfinished commit block are damage to it. It also replays images over the journal.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field

from fs.block.device import BLOCK_BYTES
from fs.errors import corrupt, error
from fs.jbd2.area import RUN_BLOCKS_MAX, Area, write_home
from fs.jbd2.format import (
    COMMIT,
    DESCRIPTOR,
    HEADER,
    INCOMPAT_ASYNC_COMMIT,
    MAGIC,
    REVOKE,
    Superblock,
    following,
)
from fs.jbd2.layout import Crc32, Layout, Tag, unescape


@dataclass(frozen=True)
class Recovered:
    """What recovery found and did."""

    transactions: int
    """Complete transactions in the log."""
    replayed_blocks: int
    """Blocks that got their newest image."""
    revoked_blocks: int
    """Images that were left out because their block was freed later."""
    next_sequence: int
    """Sequence number of the next transaction."""
    error_code: int = 0
    """An error (positive errno) that the file system had before; its owner clears it."""


@dataclass
class _Transaction:
    """One transaction in the log, complete or not yet."""

    tid: int
    tags: list[tuple[int, Tag]] = field(default_factory=list)
    """Journal block of the image, and its tag."""
    revokes: list[int] = field(default_factory=list)
    """Journal blocks with revoke records."""
    crc32: Crc32 = field(default_factory=Crc32)
    flaw: str = ""
    """Why it can't be replayed, if it turns out to be complete."""


class _Log:
    """The log of a journal, as it was found."""

    def __init__(self, area: Area) -> None:
        self._area = area
        self.superblock = Superblock(area.read(0), len(area))
        self._layout = Layout(
            self.superblock.compat, self.superblock.incompat, self.superblock.uuid
        )
        self.transactions: list[_Transaction] = []
        self.newest: dict[int, tuple[int, Tag]] = {}
        """Block to the journal block and tag of the image to replay."""
        self.revoked_images = 0
        self.end = self.superblock.sequence
        if self.superblock.start:
            self._scan()
            self._revoke()

    @property
    def next_sequence(self) -> int:
        """One left out: see above."""
        return following(self.end)

    def _header(self, index: int, tid: int) -> tuple[int, bytearray]:
        """Kind and contents of a block of transaction `tid`; kind 0 when it is none."""
        block = self._area.read(index)
        magic, kind, sequence = HEADER.unpack_from(block)
        return (kind if magic == MAGIC and sequence == tid else 0), block

    def _scan(self) -> None:
        superblock = self.superblock
        left = superblock.log_blocks
        index = superblock.start
        current = _Transaction(superblock.sequence)
        while left > 0:
            kind, block = self._header(index, current.tid)
            index = superblock.advance(index, 1)
            left -= 1
            if kind in (DESCRIPTOR, REVOKE) and not self._layout.is_sealed(block):
                break
            if kind == DESCRIPTOR:
                tags = self._layout.tags(block)
                if len(tags) >= left:
                    break
                current.crc32.add(block)
                self._take(current, index, tags)
                index = superblock.advance(index, len(tags))
                left -= len(tags)
            elif kind == REVOKE:
                current.revokes.append(superblock.advance(index, -1))
            elif kind == COMMIT:
                if not self._is_complete(current, block, index, left):
                    self.end = current.tid
                    return
                self.transactions.append(current)
                current = _Transaction(following(current.tid))
            else:
                break
        self.end = current.tid
        self._refuse_if_committed(current.tid, index, left)

    def _take(self, transaction: _Transaction, index: int, tags: list[Tag]) -> None:
        """Check the images that `tags` describe; they start at journal block `index`."""
        layout = self._layout
        reads = layout.has_crc32c or layout.has_crc32
        images = self._images(index, len(tags)) if reads else iter(())
        for number, tag in enumerate(tags):
            transaction.tags.append((self.superblock.advance(index, number), tag))
            if not self._area.is_home(tag.block):
                transaction.flaw = f"has an image of the impossible block {tag.block}"
            stored = next(images, b"")
            if layout.has_crc32:
                transaction.crc32.add(stored)
            elif reads and tag.checksum != layout.image_checksum(transaction.tid, stored):
                transaction.flaw = f"has an image of block {tag.block} with a wrong checksum"

    def _images(self, index: int, count: int) -> Iterator[memoryview]:
        """The contents of so many blocks of the ring."""
        while count > 0:
            step = min(count, RUN_BLOCKS_MAX, self.superblock.blocks - index)
            view = memoryview(self._area.read(index, step))
            for start in range(0, step * BLOCK_BYTES, BLOCK_BYTES):
                yield view[start : start + BLOCK_BYTES]
            index = self.superblock.advance(index, step)
            count -= step

    def _is_complete(
        self, transaction: _Transaction, commit: bytearray, index: int, left: int
    ) -> bool:
        """True when `transaction` is to be replayed; `index` is what follows its commit block."""
        flaw = transaction.flaw
        if not self._layout.is_commit_sound(commit, transaction.crc32):
            flaw = "has a commit block with a wrong checksum"
            unfinished = True
        else:
            # Such a commit block doesn't wait for the images.
            unfinished = bool(self.superblock.incompat & INCOMPAT_ASYNC_COMMIT)
        if not flaw:
            return True
        if unfinished and not self._begins(following(transaction.tid), index, left):
            return False
        raise _damage(transaction.tid, flaw)

    def _begins(self, tid: int, index: int, left: int) -> bool:
        """True when transaction `tid` starts at this block."""
        kind, block = self._header(index, tid) if left > 0 else (0, bytearray())
        return kind in (DESCRIPTOR, REVOKE) and self._layout.is_sealed(block)

    def _refuse_if_committed(self, tid: int, index: int, left: int) -> None:
        """EUCLEAN when the rest of the log holds a commit block of `tid` or of a later one.

        Only checksums that start from the uuid tell it from what an older file system left.
        """
        if not self._layout.has_crc32c:
            return
        for block in self._images(index, left):
            magic, kind, sequence = HEADER.unpack_from(block)
            later = following(sequence, -tid) < self.superblock.blocks
            if magic == MAGIC and kind == COMMIT and later:
                if self._layout.is_commit_sound(block, Crc32()):
                    raise _damage(tid, "is damaged, but a later commit block is whole")

    def _revoke(self) -> None:
        # Only what has an image: a log can hold many more records than images.
        logged = {tag.block for transaction in self.transactions for _, tag in transaction.tags}
        last: dict[int, int] = {}
        for order, transaction in enumerate(self.transactions):
            for at in transaction.revokes:
                for block in self._layout.revoked(self._area.read(at)):
                    if block in logged:
                        last[block] = order
        for order, transaction in enumerate(self.transactions):
            for at, tag in transaction.tags:
                if order > last.get(tag.block, -1):
                    self.newest[tag.block] = (at, tag)
                else:
                    self.revoked_images += 1

    def images(self, blocks: list[int]) -> dict[int, bytearray]:
        """The images to replay of these blocks."""
        found = {}
        for block in blocks:
            at, tag = self.newest[block]
            found[block] = unescape(self._area.read(at), tag)
        return found


def _damage(tid: int, what: str) -> OSError:
    return corrupt(f"transaction {tid} of the journal {what}")


def recover(area: Area, *, read_only: bool = False) -> Recovered:
    """Replay the journal in `area` and mark it empty; doing it twice does no more than once.

    `read_only` changes nothing and tells what there is to do. EUCLEAN for a damaged log, EROFS
    when there is something to do and the device can't be written, `ImageError` for features that
    are not supported.
    """
    log = _Log(area)
    superblock = log.superblock
    found = Recovered(
        transactions=len(log.transactions),
        replayed_blocks=len(log.newest),
        revoked_blocks=log.revoked_images,
        next_sequence=log.next_sequence,
        error_code=abs(superblock.error_code),
    )
    if read_only or not superblock.start:
        return found
    device = area.device
    if device.read_only:
        raise error(errno.EROFS, "the journal has to be replayed first")
    blocks = sorted(log.newest)
    for start in range(0, len(blocks), RUN_BLOCKS_MAX):
        write_home(device, log.images(blocks[start : start + RUN_BLOCKS_MAX]))
    device.flush()
    superblock.start = 0
    superblock.sequence = found.next_sequence
    area.write(0, superblock.pack())
    device.flush()
    return found


def unreplayed(area: Area) -> dict[int, bytearray]:
    """The images that recovery would write, for who reads a device that can't be written."""
    log = _Log(area)
    return log.images(sorted(log.newest))
