"""Transactions: what operations change of the metadata, on its way through the slot's journal.

    operation   changes buffers in place; when it fails, all of them are put back as they were
    commit      the blocks that finished operations changed go to the log, together
    checkpoint  what is in the log goes home, and the log is empty

Invariants:
  I1  a buffer is told to `modify` before its first change in an operation, so an operation that
      fails leaves nothing behind, neither in buffers nor in inodes that it told to `touch`;
  I2  a transaction holds whole operations only: no commit happens inside one;
  I3  a block that was freed is not given out again before the commit (`freed`): else its new
      content could reach the disk, the power go, and the old file be there still;
  I4  file data is written before the transaction that makes it reachable (`before_commit`), as
      Linux's data=ordered has it.

Differs from jbd2, which works with handles and credits: one thread, so an operation needs no
credits; what is running is committed early when half of the largest transaction is in use.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from fs.block.device import BlockDevice
from fs.errors import error
from fs.ocfs2.blocks import LOGGED, RUNNING, BlockCache, Buffer


class MetadataJournal(Protocol):
    """What is needed of `fs.jbd2.journal.Journal`."""

    @property
    def max_transaction_blocks(self) -> int:
        """The most blocks of one transaction."""
        ...

    def commit(self, writes: Mapping[int, bytes], revoked: Iterable[int] = ()) -> int:
        """Make block images durable in the log."""
        ...

    def checkpoint(self) -> None:
        """Write home what the log holds."""
        ...

    def forget(self, block: int) -> None:
        """A metadata block was freed."""
        ...

    def close(self) -> None:
        """Checkpoint and mark clean."""
        ...


class Undoable(Protocol):
    """An object in memory (an inode) that an operation changes."""

    def snapshot(self) -> tuple[object, ...]:
        """All that an operation may change."""
        ...

    def restore(self, snapshot: tuple[object, ...]) -> None:
        """Put it back."""
        ...


class _Operation:
    __slots__ = ("created", "forgotten", "freed", "images", "owners", "snapshots")

    def __init__(self) -> None:
        self.images: dict[Buffer, tuple[bytes, int, int]] = {}
        self.created: set[Buffer] = set()
        self.snapshots: dict[Undoable, tuple[object, ...]] = {}
        self.freed: list[int] = []
        self.forgotten: list[int] = []
        self.owners: set[int] = set()


class Transactions:
    """The running transaction of one mount, over `cache` and `journal`."""

    def __init__(
        self,
        device: BlockDevice,
        cache: BlockCache,
        journal: MetadataJournal | None,
        logged_blocks_max: int,
    ) -> None:
        self._device = device
        self.cache = cache
        self._journal = journal
        self._logged_blocks_max = logged_blocks_max
        self._running: dict[int, Buffer] = {}
        self._logged: dict[int, Buffer] = {}
        self._forgotten: set[int] = set()
        self._operation: _Operation | None = None
        self.freed: set[int] = set()
        """Blocks freed since the last commit."""
        self.before_commit: Callable[[], bool] = lambda: False
        """Whether something is left for which only another commit has room."""
        self.aborted = False
        """The journal could not be written: nothing may be changed any more."""
        self._committing = False
        self.commits = 0
        self.modified_owners: set[int] = set()
        """Owners of the buffers that the last finished operation changed."""

    def use_journal(self, journal: MetadataJournal) -> None:
        """From now on blocks may be changed."""
        self._journal = journal

    @property
    def room_blocks(self) -> int:
        """That may be changed before the running transaction is too large."""
        assert self._journal is not None, "a mount that may write has a journal"
        return self._journal.max_transaction_blocks - len(self._running)

    # Changes

    def get(self, block: int, owner: int) -> Buffer:
        """The buffer of a metadata block of the inode `owner`."""
        return self.cache.get(block, owner)

    def modify(self, buffer: Buffer) -> None:
        """`buffer.data` is about to be changed by the operation."""
        operation = self._current()
        if buffer not in operation.images and buffer not in operation.created:
            operation.images[buffer] = (bytes(buffer.data), buffer.pins, buffer.owner)
        self._dirty(operation, buffer)

    def create(self, block: int, owner: int) -> Buffer:
        """A block of zeros for new metadata."""
        operation = self._current()
        known = self.cache.find(block)
        if known is not None and known not in operation.created:
            operation.images.setdefault(known, (bytes(known.data), known.pins, known.owner))
        buffer = self.cache.create(block, owner)
        if known is None:
            operation.created.add(buffer)
        buffer.data[:] = bytes(len(buffer.data))
        self._dirty(operation, buffer)
        return buffer

    def _dirty(self, operation: _Operation, buffer: Buffer) -> None:
        buffer.pins |= RUNNING
        self._running[buffer.block] = buffer
        operation.owners.add(buffer.owner)
        self.cache.create(buffer.block, buffer.owner)  # back into the cache if it was evicted

    def touch(self, thing: Undoable) -> None:
        """`thing` is about to be changed by the operation."""
        snapshots = self._current().snapshots
        if thing not in snapshots:
            snapshots[thing] = thing.snapshot()

    def free(self, first: int, count: int, *, metadata: bool = False) -> None:
        """The operation gave these blocks back.

        `metadata`: their old content is void, also in the log.
        """
        operation = self._current()
        blocks = range(first, first + count)
        operation.freed += [block for block in blocks if block not in self.freed]
        self.freed.update(blocks)
        if metadata:
            operation.forgotten += blocks

    def _current(self) -> _Operation:
        assert self._operation is not None, "metadata is changed inside an operation only"
        return self._operation

    @property
    def active(self) -> bool:
        """True inside an operation."""
        return self._operation is not None

    @contextmanager
    def operation(self, *, may_commit: bool = True) -> Iterator[None]:
        """All of what happens inside, or nothing. Inside another one it is part of that.

        What is running may be committed before, unless the caller has seen that there is room.
        """
        if self._operation is not None:
            yield
            return
        if self.aborted:
            raise error(errno.EROFS, "the journal could not be written")
        if may_commit:
            self._make_room()
        self._operation = operation = _Operation()
        try:
            yield
        except BaseException:
            self._undo(operation)
            raise
        finally:
            self._operation = None
        self.modified_owners = operation.owners
        for block in operation.forgotten:
            self._running.pop(block, None)
            self._logged.pop(block, None)
            self.cache.forget(block)
            self._forgotten.add(block)

    def _undo(self, operation: _Operation) -> None:
        for buffer in operation.created:
            self._running.pop(buffer.block, None)
            self.cache.forget(buffer.block)
        for buffer, (image, pins, owner) in operation.images.items():
            buffer.data[:] = image
            buffer.pins = pins
            if not pins & RUNNING:
                self._running.pop(buffer.block, None)
            self.cache.create(buffer.block, owner)
        self.freed.difference_update(operation.freed)
        for thing, snapshot in operation.snapshots.items():
            thing.restore(snapshot)

    # The journal

    def _make_room(self) -> None:
        assert self._journal is not None, "a mount that may write has a journal"
        if len(self._running) + len(self._forgotten) > self._journal.max_transaction_blocks // 2:
            self.commit()
        if len(self._logged) > self._logged_blocks_max:
            self.checkpoint()

    def commit(self) -> None:
        """Put all finished operations into the log; after it they survive a power cut."""
        assert self._operation is None, "no commit inside an operation"
        if self._committing or self._journal is None:
            return
        if self.aborted:
            raise error(errno.EROFS, "the journal could not be written")
        self._committing = True
        try:
            more = True
            while more:
                more = self.before_commit()
                if not self._running and not self._forgotten:
                    break
                self._write_log(self._journal)
        finally:
            self._committing = False

    def _write_log(self, journal: MetadataJournal) -> None:
        images = {block: bytes(buffer.data) for block, buffer in self._running.items()}
        try:
            for block in sorted(self._forgotten - images.keys()):
                journal.forget(block)
            journal.commit(images)
        except OSError:
            self.aborted = True
            raise
        for buffer in self._running.values():
            buffer.pins = LOGGED
        self._logged.update(self._running)
        self._running.clear()
        self._forgotten.clear()
        self.freed.clear()
        self.commits += 1

    def checkpoint(self) -> None:
        """Write home what is in the log, so that other nodes can read it from the disk."""
        if self._journal is None or not self._logged:
            return
        try:
            self._journal.checkpoint()
        except OSError:
            self.aborted = True
            raise
        for buffer in self._logged.values():
            buffer.pins &= ~LOGGED
        self._logged.clear()

    @property
    def clean(self) -> bool:
        """True when the disk holds everything."""
        return not self._running and not self._logged and not self._forgotten

    def sync(self) -> None:
        """Commit, and flush the device also when there was nothing to commit."""
        before = self.commits
        self.commit()
        if self.commits == before:
            self._device.flush()

    def close(self) -> None:
        """Commit, write everything home, and mark the log clean."""
        if self._journal is not None and not self.aborted:
            self.commit()
            self.checkpoint()
            self._journal.close()
