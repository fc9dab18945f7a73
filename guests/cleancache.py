"""The cleancache client: clean pages of one mounted file system, kept in tmem while they may be.

One private ephemeral pool a mount (`sharedcache` has the shared one).  A page is named by (pool,
object id, index): the object id is the inode's number and generation, so an inode number that is
used again never meets old pages.  A get takes the page out of tmem (exclusive), so a page is never
held twice.

The duties of the original (Linux's cleancache document) and where each is met:

  only clean, up-to-date pages that are mapped to the disk    pagecache I4, `_evict`
  a page is forgotten before it becomes dirty                 pagecache I3, `_make_dirty`
  truncate forgets the pages it drops and the one it cuts     pagecache `truncate`
  a removed file's object is forgotten                        pagecache `forget`, from vfs
  unmount forgets the pool                                    `flush_fs`, from kernel `stop`
  one pool a mount, made at mount                             `attach`, from kernel
  names are unique over a file's life                         `object_id`: number and generation
  reads ask before the disk is read                           pagecache `_fill`
  block size = page size                                      fs.block.device; others are refused
  no file system without a disk                               only mounted images have a page cache
  an index beyond 32 bits is not cached                       ext2 files end at 2**30 pages
  clustered file systems use shared pools                     `sharedcache`

When the hypervisor dies
  The guest goes on as if tmem were empty and comes back as `guests.attachment` says.

  A flush that was not delivered, or whose fate is unknown, is *owed*.  Debts are paid before
  anything else is asked after the return, so no page that changed meanwhile can come back.  They
  are bounded: many pages of one file become its whole object, too many files the whole pool.
  A put whose fate is unknown owes nothing: what may be in the pool is what the disk holds, and if
  the page changes its flush comes first as always.  A get whose fate is unknown is a miss.
  If the hypervisor did not keep the pools (`resumed` is False) the debts are void with them.
  A NEW_POOL whose fate is unknown may leave an empty pool behind, until this process ends.

Nobody else puts into a private pool, so of a file of which no page was ever put (`_put_files`)
nothing is asked and nothing need be forgotten.  While memory is not short that is every file, and a
guest makes no call at all.

Differs from Linux: put, get and their counters are in pages of extents (`puts` offered pages,
whether kept or not, as in Linux), and what could not be asked because no hypervisor was there is
not counted as a failed get but as `skipped`; what was known not to be there is `absent`.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from typing import Final

from fs.hooks import Extent, FileKey
from guests.attachment import Attachment
from guests.hypercall import BatchEntry, Hypercalls
from ipc.abi import PAGE_BYTES, CallFlag, Status
from ipc.errors import Disconnected

log = logging.getLogger(__name__)

OWED_PAGES_PER_FILE_MAX: Final = 64
OWED_FILES_MAX: Final = 1024
PUT_FILES_MAX: Final = 1 << 16
"""Files that are known to have been put; with more, all are asked for."""

_pack_oid: Final = struct.Struct("<QI12x").pack
_DONE: Final = int(Status.DONE)
_EEMPTY: Final = int(Status.EEMPTY)
_MISS: Final = int(Status.MISS)
_ENODEV: Final = int(Status.ENODEV)
_ACTIVE: Final = int(CallFlag.ACTIVE)


def object_id(key: FileKey) -> bytes:
    """24 bytes: inode number (64 bits), generation (32 bits), zeros; so never the invalid id."""
    return _pack_oid(key.ino, key.generation)


class Cleancache:
    """A `PageHooks` over hypercalls."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._calls: Hypercalls | None = None
        """None while there is no pool."""
        self._slots = memoryview(b"")
        self._pool: int | None = None
        self._closed = False
        self._owed: dict[FileKey, set[int] | None] = {}
        """Flushes owed: pages of a file, or None for all of it."""
        self._owes_everything = False
        self._put_files: set[FileKey] | None = set()
        """Files that may have pages in the pool; None if that may be any."""
        self.succ_gets = 0
        self.failed_gets = 0
        self.puts = 0
        self.invalidates = 0
        self.skipped = 0
        self.absent = 0
        attachment.join(self)

    @property
    def attached(self) -> bool:
        """Whether there are a hypervisor and a pool, as far as is known."""
        return self._calls is not None

    def counters(self) -> dict[str, int | bool]:
        """Linux's four, in pages, and what is known of the connection."""
        return {
            "succ_gets": self.succ_gets,
            "failed_gets": self.failed_gets,
            "puts": self.puts,
            "invalidates": self.invalidates,
            "skipped": self.skipped,
            "absent": self.absent,
            "attached": self.attached,
            "reattaches": max(0, self._attachment.attaches - 1),
            "disconnects": self._attachment.disconnects,
            "owed_files": len(self._owed),
        }

    # --- PageHooks

    def get_pages(self, key: FileKey, index: int, count: int, into: memoryview) -> int:
        """Take pages out of tmem; bit i of the result = page `index+i` is now in `into`."""
        calls = self._calls or self.attach()
        if calls is None or self._pool is None:
            self.skipped += count
            return 0
        if self._is_absent(key):
            self.absent += count
            return 0
        try:
            reply = calls.get(self._pool, object_id(key), index, count)
        except Disconnected:
            self.failed_gets += count
            self._attachment.lose(calls)
            return 0
        found = reply.map
        hits = found.bit_count()
        self.succ_gets += hits
        self.failed_gets += count - hits
        if hits:
            length = found.bit_length() * PAGE_BYTES
            into[:length] = self._slots[:length]
        elif reply.status not in (_MISS, _EEMPTY):
            self._refused("get", reply.status)
        return found

    def put_pages(
        self, key: FileKey, index: int, count: int, pages: memoryview, *, active: bool = False
    ) -> None:
        """Offer clean pages; each may be kept or not."""
        self.put_extents([Extent(key, index, count, active)], pages)

    def put_extents(self, extents: Sequence[Extent], pages: memoryview) -> None:
        """Offer clean pages of several files, in one call."""
        calls = self._calls or self.attach()
        count = sum(extent.length for extent in extents)
        pool = self._pool
        if calls is None or pool is None:
            self.skipped += count
            return
        self._slots[: count * PAGE_BYTES] = pages[: count * PAGE_BYTES]
        self.puts += count
        self._note_put(extents)
        try:
            if len(extents) == 1:
                key, index, count, active = extents[0]
                flags = _ACTIVE if active else 0
                reply = calls.put(pool, object_id(key), index, count, 0, flags)
            else:
                reply = calls.put_batch(_entries(pool, extents))
        except Disconnected:
            self._attachment.lose(calls)
            return
        if reply.status == _ENODEV:
            self._refused("put", reply.status)

    def _is_absent(self, key: FileKey) -> bool:
        """Whether it is certain that the pool has nothing of a file."""
        return self._put_files is not None and key not in self._put_files

    def _note_put(self, extents: Sequence[Extent]) -> None:
        if self._put_files is not None:
            self._put_files.update(extent.key for extent in extents)
            if len(self._put_files) > PUT_FILES_MAX:
                self._put_files = None

    def flush_page(self, key: FileKey, index: int) -> None:
        """Forget a page, now or before anything is got again."""
        calls = self._calls or self.attach()
        if self._pool is None or self._is_absent(key):
            return
        if calls is not None:
            self.invalidates += 1
            try:
                calls.flush_page(self._pool, object_id(key), index)
                return
            except Disconnected:
                self._attachment.lose(calls)
        self._owe(key, index)

    def flush_inode(self, key: FileKey) -> None:
        """Forget a file, now or before anything is got again."""
        calls = self._calls or self.attach()
        if self._pool is None or self._is_absent(key):
            return
        if calls is not None:
            self.invalidates += 1
            try:
                calls.flush_object(self._pool, object_id(key))
                if self._put_files is not None:
                    self._put_files.discard(key)
                return
            except Disconnected:
                self._attachment.lose(calls)
        self._owe(key, None)

    def flush_fs(self) -> None:
        """Unmount: the pool goes.  There is no other."""
        self._closed = True
        calls, pool = self._calls, self._pool
        self._pool = None
        self._owed.clear()
        if calls is None:
            return
        try:
            if pool is not None:
                calls.destroy_pool(pool)
        except Disconnected:
            self._attachment.lose(calls)
        self.lost()

    # --- attaching (`guests.attachment.User`)

    def attach(self, *, refusal_is_fatal: bool = False) -> Hypercalls | None:
        """Try to be served unless that was tried a moment ago; None without tmem.

        Raises OperatorError for a refusal if that is fatal, as it is at boot.
        """
        self._attachment.attach(refusal_is_fatal=refusal_is_fatal)
        return self._calls

    def serve(self, calls: Hypercalls) -> bool:
        """Pay what is owed, have a pool."""
        if self._closed:
            return True
        kept = self._settle(calls)
        if self._pool is None:
            return False
        self._calls = calls
        self._slots = calls.channel.window.slots
        log.info("cleancache event=ready pool=%d kept=%s", self._pool, kept)
        return True

    def lost(self) -> None:
        """Go on without tmem."""
        self._calls = None
        self._slots = memoryview(b"")

    def _settle(self, calls: Hypercalls) -> bool:
        """Have a pool that holds nothing which it may not; whether it is the old one."""
        if self._pool is not None and not calls.channel.resumed:
            self._forget_pool()
        if self._pool is not None and self._owes_everything:
            calls.destroy_pool(self._pool)
            self._forget_pool()
        while self._owed and self._pool is not None:
            key, indexes = next(iter(self._owed.items()))
            if not self._pay(calls, self._pool, key, indexes):
                # The pool is gone, for a reason that is not ours: so is what it held.
                self._forget_pool()
            else:
                del self._owed[key]
        kept = self._pool is not None
        if not kept:
            reply = calls.new_pool()
            if reply.status == _DONE:
                self._pool = reply.value
            else:
                log.warning("cleancache event=no-pool status=%d", reply.status)
        return kept

    def _pay(self, calls: Hypercalls, pool: int, key: FileKey, indexes: set[int] | None) -> bool:
        """Deliver the flushes owed for a file; False if there is no such pool."""
        self.invalidates += 1 if indexes is None else len(indexes)
        oid = object_id(key)
        if indexes is None:
            return calls.flush_object(pool, oid).status == _DONE
        return all(calls.flush_page(pool, oid, index).status == _DONE for index in indexes)

    def _forget_pool(self) -> None:
        self._pool = None
        self._owed.clear()
        self._owes_everything = False
        self._put_files = set()

    # --- losing

    def _refused(self, what: str, status: int) -> None:
        """The pool isn't served any more: go on without until there is another."""
        log.warning("cleancache event=refused call=%s status=%d", what, status)
        self.lost()
        self._forget_pool()
        self._attachment.unserved(self)

    def _owe(self, key: FileKey, index: int | None) -> None:
        """Remember a flush; bounded, and what is remembered less precisely covers more."""
        if self._owes_everything:
            return
        owed = self._owed.get(key, set())
        if owed is None:
            return
        if index is None or len(owed) >= OWED_PAGES_PER_FILE_MAX:
            self._owed[key] = None
        else:
            owed.add(index)
            self._owed[key] = owed
        if len(self._owed) > OWED_FILES_MAX:
            self._owes_everything = True
            self._owed.clear()


def _entries(pool: int, extents: Sequence[Extent]) -> list[BatchEntry]:
    """The pages of extents, from window slot 0 on."""
    entries: list[BatchEntry] = []
    for key, index, count, active in extents:
        oid = object_id(key)
        flags = _ACTIVE if active else 0
        slot = len(entries)
        entries += [(pool, index + at, slot + at, flags, oid, 0) for at in range(count)]
    return entries
