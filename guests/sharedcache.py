"""The cleancache client of a clustered file system: one shared pool for all nodes that mounted it.

The pool has the file system's uuid, a page is named by its inode block number and generation, and a
get leaves it there for the others.  The file system's lock manager says who may do what: a node
reads a file, gets and puts its pages under the file's lock, and changes it under the exclusive one.

What keeps old bytes away
  C1  What the pool holds of a page is what the disk holds, or nothing: it is flushed under the
      exclusive lock before it becomes dirty, and offered only when it is clean.
  C2  Each put and flush carries the lock's fencing token, so the hypervisor refuses the put of a
      node that lost its lock meanwhile.  `token_of` is asked once there is an attachment, and
      answers None for a lock that is not held in good standing: then nothing is offered.  Between
      that question and the put nothing else is done, so no put under a token that was asked for
      before can reach a pool that was made after.
  C3  A flush that could not be delivered is owed.

The rule for debts
  A write does not wait for a hypervisor that is away: the page becomes dirty and its flush is owed.
  But the others may still reach the pool, or reach it again sooner.  So while anything of a file is
  owed this node gets and puts nothing of it, and **the exclusive lock on the file is not given up
  before the debt is paid (`settle`) or known to whoever gets the lock next (`hand_over`)**: the
  lock's value has a mark, and its next holders `distrust` the file, which makes the debt theirs.
  The mark stays until an exclusive holder owes nothing.  A node that dies with debts leaves lock
  values that are not valid, and these mean the same as the mark.

  A debt is void only if we ourselves made the pool just now, empty.  To be attached as somebody new
  voids nothing here, as it does in `cleancache`: the pool lives on with the other nodes.
  Debts are as many as the exclusive locks that are held, with at most 64 pages each.

  The other rule, that a page can't become dirty before its flush was delivered, would stop every
  writer of the cluster while a cache is away; and it would not do for a node that died with the
  flush under way.

A guest with a reader's grant puts nothing.  It can't flush either: what it distrusts it leaves
alone until the file's token has gone up; what it changes all the same it owes, and hands over.

Tokens after a restart of the hypervisor: the newest of all files is needed for each.  `on_stale` is
told which token would have been needed, and the lock manager lifts that of a lock which is really
held.  The refused pages are lost, as clean pages may be; later puts get in.

Differs from Linux, where ocfs2 had its nodes share a pool and trusted them to be on time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from fs.hooks import Extent, FileKey
from guests.attachment import Attachment
from guests.cleancache import OWED_PAGES_PER_FILE_MAX, Cleancache, object_id
from guests.hypercall import BatchEntry, Hypercalls
from ipc.abi import PAGE_BYTES, CallFlag, Reason, Reply, ReplyFlag, Status
from ipc.errors import Disconnected
from ipc.limits import WINDOW_SLOTS

log = logging.getLogger(__name__)

_ACTIVE: Final = int(CallFlag.ACTIVE)
_DONE: Final = int(Status.DONE)
_ENODEV: Final = int(Status.ENODEV)
_ESTALE: Final = int(Status.ESTALE)


class SharedCleancache(Cleancache):
    """A `SharedPageHooks` over hypercalls.  `uuid` is the file system's."""

    def __init__(
        self,
        attachment: Attachment,
        uuid: bytes,
        token_of: Callable[[FileKey], int | None],
        *,
        on_stale: Callable[[FileKey, int], None] = lambda _key, _needed: None,
    ) -> None:
        super().__init__(attachment)
        self._put_files = None  # others put, too
        self._uuid = uuid
        self._token_of = token_of
        self._on_stale = on_stale
        self._owed_tokens: dict[FileKey, int] = {}
        """For each file that is owed: the highest token under which it is."""
        self.reader = False
        """We may only get from the pool, as far as is known."""
        self.stale = 0
        """Pages whose put was refused for its token, as far as a batch tells."""
        self.handed_over = 0
        self.distrusted = 0
        self._got_index = 0
        self.reported = 0
        """Wrong pages that the hypervisor was told of."""

    def counters(self) -> dict[str, int | bool]:
        """What a private one counts, and what comes of sharing."""
        return {
            **super().counters(),
            "stale": self.stale,
            "reader": self.reader,
            "handed_over": self.handed_over,
            "distrusted": self.distrusted,
            "reported": self.reported,
        }

    # --- PageHooks

    def get_pages(self, key: FileKey, index: int, count: int, into: memoryview) -> int:
        """As that of a private pool, but the pages stay."""
        if key in self._owed and not self._is_clear(key):
            self.skipped += count
            return 0
        self._got_index = index
        return super().get_pages(key, index, count, into)

    def put_extents(self, extents: Sequence[Extent], pages: memoryview) -> None:
        """Offer clean pages under the tokens of their files' locks."""
        calls = self._calls or self.attach()
        pool = self._pool
        if self.reader:
            return
        if calls is None or pool is None:
            self.skipped += sum(extent.length for extent in extents)
            return
        entries: list[BatchEntry] = []
        keys: list[FileKey] = []
        offered = at = 0
        for key, index, count, active in extents:
            token = None if key in self._owed else self._token_of(key)
            if token is None:
                self.skipped += count
            else:
                slot = len(entries)
                self._slots[slot * PAGE_BYTES : (slot + count) * PAGE_BYTES] = pages[
                    at * PAGE_BYTES : (at + count) * PAGE_BYTES
                ]
                flags = _ACTIVE if active else 0
                oid = object_id(key)
                entries += [
                    (pool, index + number, slot + number, flags, oid, token)
                    for number in range(count)
                ]
                keys += [key] * count
                offered += 1
            at += count
        if not entries:
            return
        self.puts += len(entries)
        try:
            if offered == 1:
                _, index, slot, flags, oid, token = entries[0]
                reply = calls.put(pool, oid, index, len(entries), slot, flags, token)
            else:
                reply = calls.put_batch(entries)
        except Disconnected:
            self._attachment.lose(calls)
            return
        if reply.status == _ESTALE:
            self._was_stale(keys, reply)
        elif reply.status == _ENODEV:
            self._refused("put", reply.status)
        elif reply.reason == Reason.NOT_WRITER:
            self.reader = True

    def flush_page(self, key: FileKey, index: int) -> None:
        """Forget a page, now or before the file's exclusive lock is given up."""
        self._flush(key, index)

    def refuse_page(self, key: FileKey, index: int) -> None:
        """A page that was got just now is wrong. The hypervisor is told, while it still knows who
        put it; then a writer takes it out of the pool. A reader, who can't, owes nobody anything:
        it has not changed the page."""
        self._report(key, index)
        if not self.reader:
            self._flush(key, index)

    def flush_inode(self, key: FileKey) -> None:
        """Forget a file, likewise."""
        self._flush(key, None)

    def flush_fs(self) -> None:
        """Unmount: leave the pool; its pages stay with the others."""
        super().flush_fs()
        self._owed_tokens.clear()

    # --- SharedPageHooks

    def settle(self, key: FileKey) -> bool:
        """Try to pay what is owed for a file; whether nothing is."""
        if key not in self._owed:
            return True
        calls = self._calls
        if calls is None:
            self.attach()
        else:
            try:
                status = self._pay_file(calls, key)
            except Disconnected:
                self._attachment.lose(calls)
                return False
            if status == _ENODEV:
                self._refused("flush", status)
        return key not in self._owed

    def settle_all(self) -> bool:
        """The same for all files, before the node leaves."""
        return not [key for key in list(self._owed) if not self.settle(key)]

    def hand_over(self, key: FileKey) -> None:
        """The file's lock tells its next holders to `distrust` it."""
        if key in self._owed:
            self.handed_over += 1
            self._forgive(key)

    def distrust(self, key: FileKey) -> None:
        """Whoever held the lock may not have flushed what it changed: that is ours to do now."""
        self.distrusted += 1
        self._flush(key, None)

    def _report(self, key: FileKey, index: int) -> None:
        """Without an attachment there is nobody to tell, and nothing depends on it.  What was got
        last is in the window still, from slot 0 on."""
        calls, pool, slot = self._calls, self._pool, index - self._got_index
        if calls is None or pool is None or not 0 <= slot < WINDOW_SLOTS:
            return
        self.reported += 1
        try:
            calls.report(pool, object_id(key), index, slot)
        except Disconnected:
            self._attachment.lose(calls)

    # --- flushes and debts

    def _flush(self, key: FileKey, index: int | None) -> None:
        calls = self._calls or self.attach()
        token = self._token_of(key) or 0
        if calls is not None and self._pool is not None and not self.reader:
            try:
                status = self._flush_now(calls, key, index, token)
            except Disconnected:
                self._attachment.lose(calls)
            else:
                if status == _DONE:
                    if index is None:
                        self._forgive(key)
                    return
                if status == _ENODEV:
                    self._refused("flush", status)
        self._owe(key, index)
        self._owed_tokens[key] = max(token, self._owed_tokens.get(key, 0))

    def _flush_now(self, calls: Hypercalls, key: FileKey, index: int | None, token: int) -> int:
        assert self._pool is not None
        self.invalidates += 1
        if index is None:
            return calls.flush_object(self._pool, object_id(key), token).status
        return calls.flush_page(self._pool, object_id(key), index, 1, token).status

    def _owe(self, key: FileKey, index: int | None) -> None:
        owed = self._owed.get(key, set())
        if owed is None:
            return
        if index is None or len(owed) >= OWED_PAGES_PER_FILE_MAX:
            self._owed[key] = None
        else:
            owed.add(index)
            self._owed[key] = owed

    def _pay_file(self, calls: Hypercalls, key: FileKey) -> int:
        """The status of the flushes owed for a file; they are owed no more if it is DONE."""
        indexes = self._owed[key]
        token = self._owed_tokens[key]
        for index in [None] if indexes is None else sorted(indexes):
            status = self._flush_now(calls, key, index, token)
            if status != _DONE:
                return status
        self._forgive(key)
        return _DONE

    def _forgive(self, key: FileKey) -> None:
        self._owed.pop(key, None)
        self._owed_tokens.pop(key, None)

    def _is_clear(self, key: FileKey) -> bool:
        """A file that was owed is no longer: paid just now, or somebody else saw to it."""
        if self.reader and (self._token_of(key) or 0) > self._owed_tokens[key]:
            # There was an exclusive holder since, and its lock does not say that it is in debt.
            self._forgive(key)
            return True
        return self.settle(key)

    def _was_stale(self, keys: list[FileKey], reply: Reply) -> None:
        first_refused = (~reply.map & (reply.map + 1)).bit_length() - 1
        key = keys[first_refused]
        stale = sum(one == key and not reply.map >> number & 1 for number, one in enumerate(keys))
        self.stale += stale
        log.info("cleancache event=stale ino=%d pages=%d needed=%d", key.ino, stale, reply.value)
        self._on_stale(key, reply.value)

    # --- attaching

    def _settle(self, calls: Hypercalls) -> bool:
        """Be in the pool, with as little owed as may be; whether under the id we had."""
        if not calls.channel.resumed:
            self._pool = None
        kept = self._pool is not None
        if not kept and not self._join(calls):
            return False
        for key in list(self._owed):
            if key in self._owed and self._pay_file(calls, key) == _ENODEV:
                # Somebody took our part in the pool away; the pool may still be there.
                kept = False
                if not self._join(calls):
                    return False
                if key in self._owed:
                    self._pay_file(calls, key)
        return kept

    def _join(self, calls: Hypercalls) -> bool:
        self._pool = None
        reply = calls.new_pool(shared=True, uuid=self._uuid)
        if reply.status != _DONE:
            reason = Reason(reply.reason).name.lower()
            log.warning("cleancache event=no-pool status=%d reason=%s", reply.status, reason)
            return False
        self._pool = reply.value
        self.reader = bool(reply.flags & ReplyFlag.READER)
        if not reply.flags & ReplyFlag.JOINED:
            # It was made for us, so it is empty.
            self._owed.clear()
            self._owed_tokens.clear()
        return True

    def _forget_pool(self) -> None:
        """Our id is gone, and not the pages that others may find."""
        self._pool = None
