"""Writing to the journal: a transaction is committed to the log, and checkpointed home later.

    commit      revoke blocks, descriptors and images go into the log; flush; commit block; flush
    checkpoint  images go home; flush; the log's start moves on in the superblock; flush

Invariants:
  I1  a commit block is written only when everything before it is durable;
  I2  a block is written home only from a committed transaction, its newest one;
  I3  the log's start on the device moves past a transaction only when every image of it that
      matters is durable at home, and a block of the log is written again only when the start on
      the device is past it;
  I4  a freed block is written home no more once the transaction that frees it is committed. Until
      then it is: a crash would bring the old state back, which still needs it.

Sequence numbers only grow, so what an earlier turn of the ring left behind is never taken for new.

Simpler than Linux: no running transaction of many threads (the caller collects the blocks of one
and commits them), no ordered data (the caller writes data before it commits), and checkpoints are
made in the caller's time: when the log is short of room, or when asked. Committed images that are
not home yet are kept in memory, at most as many as the log has blocks.

Errors: what can't be written aborts the journal. It notes EIO in the superblock if it can, and
everything is refused with EROFS from then on; the log stays for recovery.
"""

from __future__ import annotations

import contextlib
import errno
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fs.block.device import BLOCK_BYTES
from fs.errors import error
from fs.jbd2.area import RUN_BLOCKS_MAX, Area, write_home
from fs.jbd2.format import INCOMPAT_REVOKE, Superblock, empty_superblock, following
from fs.jbd2.layout import Crc32, Layout, Tag, escape
from fs.jbd2.recovery import recover


def format_journal(
    area: Area,
    uuid: bytes,
    *,
    compat: int = 0,
    incompat: int = 0,
    started: bool = False,
    zero: bool = True,
) -> None:
    """Make an empty journal in `area`; the caller flushes.

    `compat` and `incompat` are feature bits of `fs.jbd2.format`; mke2fs and mkfs.ocfs2 set none.
    `started` gives the form of mkfs.ocfs2, see `empty_superblock`. `zero` wipes the log, so that
    an older journal in the same place can't be taken for this one's; without it the blocks must
    be known to hold none.
    """
    superblock = empty_superblock(
        len(area), uuid, compat=compat, incompat=incompat, started=started
    )
    for index in range(1, len(area) if zero else 0, RUN_BLOCKS_MAX):
        area.write(index, bytes(min(RUN_BLOCKS_MAX, len(area) - index) * BLOCK_BYTES))
    area.write(0, superblock.pack())


@dataclass(frozen=True)
class _Logged:
    """A committed transaction that the log still holds."""

    tid: int
    start: int
    length_blocks: int
    blocks: tuple[int, ...]


class Journal:
    """The journal in `area`, open for writing.

    Opening replays what an earlier crash left (`recovered` tells what). `now_ns` gives commit
    blocks their time.

    `ocfs2_tools` writes revoke blocks for fsck.ocfs2 1.8.7: it reads only the first half of the
    records, so the list comes twice; and it wants the same features in all slots' journals, so
    `journal_incompat_revoke` is not set. Linux minds neither.
    """

    def __init__(self, area: Area, *, now_ns: Callable[[], int], ocfs2_tools: bool = False) -> None:
        if area.device.read_only:
            raise error(errno.EROFS, "a journal is for writing")
        self._area = area
        self._now_ns = now_ns
        self._ocfs2_tools = ocfs2_tools
        self.recovered = recover(area)
        self._superblock = Superblock(area.read(0), len(area))
        self._superblock.upgrade()
        self._layout = Layout(
            self._superblock.compat, self._superblock.incompat, self._superblock.uuid
        )
        self._revokes_max = self._layout.records_max // (2 if ocfs2_tools else 1)
        self.max_transaction_blocks = self._superblock.blocks // 4
        """Images in one transaction at most: a quarter of the journal."""
        self._next_tid = self.recovered.next_sequence
        self._head = self._superblock.first
        self._free_blocks = self._superblock.log_blocks
        self._transactions: deque[_Logged] = deque()
        self._held: Counter[int] = Counter()
        self._images: dict[int, tuple[int, bytes]] = {}
        self._forgotten: set[int] = set()
        self._why_not = ""

    @property
    def is_aborted(self) -> bool:
        """True after an error of the device, and after `close`."""
        return bool(self._why_not)

    @property
    def free_blocks(self) -> int:
        """Blocks of the log that hold nothing."""
        return self._free_blocks

    @property
    def error_code(self) -> int:
        """The error (positive errno) noted in the superblock, 0 for none.

        An earlier writer had it, or this one; the file system makes a note of it for its checker
        and then calls `clear_error`.
        """
        return abs(self._superblock.error_code)

    def clear_error(self) -> None:
        """The error of an earlier writer is known to the file system now; forget it."""
        self._check_usable()
        if self._superblock.error_code:
            self._superblock.error_code = 0
            self._do(self._write_superblock)

    def commit(self, writes: Mapping[int, bytes], revoked: Iterable[int] = ()) -> int:
        """Make these block images durable in the log as one transaction; returns its tid.

        `revoked` blocks and those of `forget` are freed by it. A block that is in `writes` too is
        in use again and not revoked. The data that the images point to must have been written
        before (not flushed: the flush before the commit block is for them too). The caller may
        write the blocks home itself only afterwards; `checkpoint` does it otherwise.

        Without anything to write nothing is written, and the tid is the last one's. EFBIG for
        more than `max_transaction_blocks` images or more than the log holds; nothing has changed
        then. EIO aborts the journal, and whether the transaction is durable is not known.
        """
        self._check_usable()
        self._check_writes(writes)
        gone = self._forgotten.union(revoked).difference(writes)
        # What the log doesn't hold can't be replayed.
        revokes = sorted(block for block in gone if self._held[block])
        if writes or revokes:
            length = self._room(len(writes), len(revokes))
            if length > self._superblock.log_blocks:
                raise error(
                    errno.EFBIG,
                    f"a transaction of {length} blocks, the journal takes"
                    f" {self._superblock.log_blocks}",
                )
            self._do(lambda: self._commit(writes, revokes, length))
        for block in gone:
            self._images.pop(block, None)
        self._forgotten.clear()
        return following(self._next_tid, -1)

    def forget(self, block: int) -> None:
        """A metadata block was freed: the next commit revokes it.

        Its older images are replayed no more then, nor written home. The block must not be used
        for data before that commit.
        """
        self._forgotten.add(block)

    def pending(self, block: int) -> bytes | None:
        """The committed image of `block` that is not home yet: what a reader must see."""
        tid_and_image = self._images.get(block)
        return tid_and_image[1] if tid_and_image else None

    def checkpoint(self) -> None:
        """Write home all that the log holds, newest images only, and mark the log empty."""
        self._check_usable()
        if self._transactions:
            self._do(lambda: self._checkpoint(self._superblock.log_blocks))

    def close(self) -> None:
        """Checkpoint; the journal is clean and can't be used any more.

        After an abort nothing is left to do: its error was raised then.
        """
        if not self._why_not:
            self.checkpoint()
            self._why_not = "the journal is closed"

    def _check_usable(self) -> None:
        if self._why_not:
            raise error(errno.EROFS, self._why_not)

    def _check_writes(self, writes: Mapping[int, bytes]) -> None:
        if len(writes) > self.max_transaction_blocks:
            raise error(
                errno.EFBIG,
                f"a transaction of {len(writes)} blocks, the journal takes"
                f" {self.max_transaction_blocks}",
            )
        for block, image in writes.items():
            if len(image) != BLOCK_BYTES or not self._area.is_home(block):
                raise error(errno.EINVAL, f"{len(image)} bytes for block {block}")
            if block >= self._layout.block_limit:
                raise error(errno.EFBIG, f"block {block} needs the feature journal_64bit")

    def _do(self, work: Callable[[], None]) -> None:
        """Do something with the device; an error aborts the journal."""
        try:
            work()
        except OSError as reason:
            self._why_not = f"the journal was aborted ({reason.strerror})"
            self._superblock.error_code = -errno.EIO
            with contextlib.suppress(OSError):
                self._write_superblock()
            raise error(errno.EIO, f"the journal can't be written: {reason.strerror}") from reason

    def _write_superblock(self) -> None:
        self._area.write(0, self._superblock.pack())
        self._area.device.flush()

    def _room(self, images: int, revokes: int) -> int:
        """Blocks of the log that such a transaction takes."""
        return -(-revokes // self._revokes_max) + -(-images // self._layout.tags_max) + images + 1

    def _commit(self, writes: Mapping[int, bytes], revokes: list[int], length: int) -> None:
        if self._free_blocks < length:
            self._checkpoint(length)
        superblock = self._superblock
        tid = self._next_tid
        if revokes and not superblock.incompat & INCOMPAT_REVOKE and not self._ocfs2_tools:
            superblock.incompat |= INCOMPAT_REVOKE
            self._area.write(0, superblock.pack())
        if not self._transactions:
            # Until the flush below the log may look empty, or begun without a commit block.
            superblock.start, superblock.sequence = self._head, tid
            self._area.write(0, superblock.pack())
        body, crc32 = self._body(tid, writes, revokes)
        self._write_log(self._head, body)
        self._area.device.flush()
        self._write_log(
            superblock.advance(self._head, length - 1),
            [self._layout.commit(tid, self._now_ns(), crc32)],
        )
        self._area.device.flush()
        self._transactions.append(_Logged(tid, self._head, length, tuple(writes)))
        self._held.update(writes.keys())
        for block, image in writes.items():
            self._images[block] = (tid, image)
        self._head = superblock.advance(self._head, length)
        self._free_blocks -= length
        self._next_tid = following(tid)

    def _body(
        self, tid: int, writes: Mapping[int, bytes], revokes: list[int]
    ) -> tuple[list[bytes], Crc32]:
        """All blocks of a transaction but its commit block, in the order of the log."""
        layout, crc32 = self._layout, Crc32()
        body = []
        for start in range(0, len(revokes), self._revokes_max):
            records = revokes[start : start + self._revokes_max]
            body.append(layout.revoke(tid, records * (2 if self._ocfs2_tools else 1)))
        blocks = sorted(writes)
        for start in range(0, len(blocks), layout.tags_max):
            tags, images = [], []
            for block in blocks[start : start + layout.tags_max]:
                stored, escaped = escape(bytes(writes[block]))
                tags.append(Tag(block, escaped, layout.image_checksum(tid, stored)))
                images.append(stored)
            part = [layout.descriptor(tid, tags), *images]
            if layout.has_crc32:
                for stored in part:
                    crc32.add(stored)
            body += part
        return body, crc32

    def _write_log(self, index: int, blocks: list[bytes]) -> None:
        """Write blocks into the ring."""
        before_end = self._superblock.blocks - index
        for start, part in (
            (index, blocks[:before_end]),
            (self._superblock.first, blocks[before_end:]),
        ):
            if part:
                self._area.write(start, b"".join(part))

    def _checkpoint(self, free_blocks: int) -> None:
        """Make at least so many blocks of the log free, oldest transactions first."""
        left = deque(self._transactions)
        done = []
        freed = self._free_blocks
        while left and freed < free_blocks:
            done.append(left.popleft())
            freed += done[-1].length_blocks
        tids = {transaction.tid for transaction in done}
        home = {block: image for block, (tid, image) in self._images.items() if tid in tids}
        write_home(self._area.device, home)
        self._area.device.flush()
        self._superblock.start = left[0].start if left else 0
        self._superblock.sequence = left[0].tid if left else self._next_tid
        self._write_superblock()
        for block in home:
            del self._images[block]
        for transaction in done:
            self._held.subtract(transaction.blocks)
        self._held = +self._held
        self._transactions = left
        self._free_blocks = freed
