"""Transcendent memory for an ordinary program.

    with Tmem.connect(run_directory, "worker", token) as tmem:
        pool = tmem.pool(persist=True)
        if not pool.put(7, 0, page):       # object 7, page 0, 4096 bytes
            ...                            # refused: keep it yourself
        page = pool.get(7, 0)              # None if it is not there

An ephemeral pool may lose any page at any time, and a get takes the page out of it.  A persistent
pool keeps what it accepted, and a get leaves it there, until it is flushed or the program ends.
A shared pool is one for all programs that name its uuid and whom the administrator allows; a get
leaves the page there for the others.  Whoever is refused one is told why (`PoolRefused`), and gets
no private pool instead.

The program must have been enrolled in the run directory (`ipc.attach.enrol`) under its name and
token.  Calls raise `ipc.errors.Disconnected` when the hypervisor is gone: what happened to that
call is unknown.  `reconnect` comes back, as the same process, to the same pools.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from guests.hypercall import Hypercalls
from ipc import attach
from ipc.abi import (
    ANY_UUID,
    EXTENT_PAGES_MAX,
    INVALID_OID,
    OID_BYTES,
    PAGE_BYTES,
    UUID_BYTES,
    CallFlag,
    Priority,
    Reason,
    Reply,
    ReplyFlag,
    Status,
    oid_from_int,
)
from ipc.errors import OperatorError
from ipc.mqueue import QueueChannel

_OIDS: Final = 1 << (8 * OID_BYTES)
_INDEXES: Final = 1 << 32
_HINTS: Final = {
    Priority.NORMAL: CallFlag.NONE,
    Priority.LOW: CallFlag.LOW,
    Priority.HIGH: CallFlag.HIGH,
}
_WHY: Final = {
    Reason.TOO_MANY_POOLS: "this program has 64 pools, or all programs together 4096",
    Reason.SHARED_DENIED: "the administrator has not allowed it, or no longer",
    Reason.SHARED_NEEDS_UUID: "the uuid of all ones means none",
    Reason.KIND_DIFFERS: "ephemeral and persistent pools do not mix",
    Reason.TOO_MANY_SHARERS: "the pool has as many members as there may be",
    Reason.NOT_WRITER: "this program may only get from the pool",
}


class DamagedPage(OSError):
    """A page of a persistent pool is not what was put: the memory that held it has changed by
    itself.  It is lost; a put or a flush ends this."""


class NoSuchPool(Exception):
    """The pool is gone: it was destroyed, or the hypervisor that had it lost its memory."""


class PoolRefused(OperatorError):
    """There is no such pool for us; `reason` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(f"no pool: {reason.name.lower()}: {_WHY.get(reason, '')}".rstrip(": "))
        self.reason = reason


class NotAllowed(Exception):
    """What was asked of a shared pool is not ours to ask, or no longer; nothing has changed."""

    def __init__(self, pool: int, reason: Reason) -> None:
        super().__init__(f"pool {pool}: {reason.name.lower()}: {_WHY.get(reason, '')}".rstrip(": "))
        self.reason = reason


class Tmem:
    """One attachment.  Not safe for use by several threads at once."""

    def __init__(
        self,
        channel: QueueChannel,
        run_directory: Path,
        name: str,
        token: bytes,
        ring: bool | None = None,
    ) -> None:
        self._run_directory = run_directory
        self._name = name
        self._token = token
        self._ring = ring
        self._channel = channel
        self.calls = Hypercalls(channel)
        """The hypercalls themselves, for what this class does not offer."""

    @classmethod
    def connect(
        cls,
        run_directory: str | os.PathLike[str],
        name: str,
        token: bytes,
        *,
        ring: bool | None = None,
    ) -> Self:
        """Attach; raises OperatorError when refused, Disconnected when no hypervisor answers.

        `ring` says whether to ask for calls through shared memory instead of message queues; None
        asks where this machine's memory order allows it.
        """
        path = Path(run_directory)
        return cls(attach.connect(path, name, token, ring=ring), path, name, token, ring)

    def reconnect(self) -> bool:
        """Attach again after Disconnected; True if the pools are as they were.

        When False they are gone, and every `Pool` raises NoSuchPool from now on.
        """
        self._channel.close()
        self._channel = attach.connect(
            self._run_directory, self._name, self._token, ring=self._ring
        )
        self.calls = Hypercalls(self._channel)
        return self._channel.resumed

    def pool(
        self,
        *,
        persist: bool = False,
        shared_uuid: bytes | None = None,
        priority: Priority = Priority.NORMAL,
    ) -> Pool:
        """A new private pool, or with `shared_uuid` (16 bytes) the shared one of that name.

        Pages of a pool of low priority go before those of our other pools, those of high priority
        after them; a shared pool has the priority that whoever made it asked for.  Raises
        PoolRefused.
        """
        if shared_uuid is not None and len(shared_uuid) != UUID_BYTES:
            raise ValueError(f"a uuid has {UUID_BYTES} bytes, not {len(shared_uuid)}")
        reply = self.calls.new_pool(
            persist=persist,
            shared=shared_uuid is not None,
            uuid=ANY_UUID if shared_uuid is None else shared_uuid,
            priority=priority,
        )
        if reply.status != Status.DONE:
            raise PoolRefused(Reason(reply.reason))
        return Pool(
            self,
            reply.value,
            persist=persist,
            shared=shared_uuid is not None,
            joined=bool(reply.flags & ReplyFlag.JOINED),
            reader=bool(reply.flags & ReplyFlag.READER),
        )

    def close(self) -> None:
        """Give all pools back and end the attachment.  Twice is once."""
        attach.detach(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Pool:
    """Pages of 4096 bytes by (object id below 2**192 - 1, index below 2**32).

    `joined`: another program had made this shared pool.  `reader`: we may only get from it, as far
    as is known; the administrator can change that.  Calls raise NoSuchPool, and in a shared pool
    NotAllowed.
    """

    def __init__(
        self,
        tmem: Tmem,
        number: int,
        *,
        persist: bool,
        shared: bool = False,
        joined: bool = False,
        reader: bool = False,
    ) -> None:
        self._tmem = tmem
        self.number = number
        self.persist = persist
        self.shared = shared
        self.joined = joined
        self.reader = reader

    def put(
        self,
        oid: int,
        index: int,
        page: bytes,
        *,
        priority: Priority = Priority.NORMAL,
        active: bool = False,
        token: int = 0,
    ) -> bool:
        """Store a page; False if it was refused.

        Whatever was stored there before is gone in either case, unless `token` was too old: in a
        shared ephemeral pool it numbers the lock under which the program puts.  `priority` and
        `active` (it was used more than once) are hints for what goes first from an ephemeral pool.
        """
        return self.put_extent(oid, index, page, priority=priority, active=active, token=token)[0]

    def get(self, oid: int, index: int, *, keep: bool = False) -> bytes | None:
        """A page, None if it is not there.

        A page of a private ephemeral pool leaves it, unless we `keep` it there.
        """
        return self.get_extent(oid, index, 1, keep=keep)[0]

    def put_extent(
        self,
        oid: int,
        index: int,
        pages: bytes,
        *,
        priority: Priority = Priority.NORMAL,
        active: bool = False,
        token: int = 0,
    ) -> list[bool]:
        """Store neighbouring pages, the first at `index`; for each whether it was kept."""
        count, rest = divmod(len(pages), PAGE_BYTES)
        if rest or not count:
            raise ValueError(f"{len(pages)} bytes are not whole pages of {PAGE_BYTES}")
        key = _key(oid, index, count)
        flags = _HINTS[priority] | (CallFlag.ACTIVE if active else 0)
        kept: list[bool] = []
        while len(kept) < count:
            done = len(kept)
            step = min(EXTENT_PAGES_MAX, count - done)
            calls = self._tmem.calls
            start = done * PAGE_BYTES
            calls.channel.window.slots[: step * PAGE_BYTES] = pages[
                start : start + step * PAGE_BYTES
            ]
            reply = self._checked(calls.put(self.number, key, index + done, step, 0, flags, token))
            kept += [bool(reply.map >> number & 1) for number in range(step)]
        return kept

    def get_extent(
        self, oid: int, index: int, count: int, *, keep: bool = False
    ) -> list[bytes | None]:
        """Neighbouring pages, the first from `index`; None where there is none."""
        key = _key(oid, index, count)
        flags = CallFlag.KEEP if keep else 0
        pages: list[bytes | None] = []
        while len(pages) < count:
            step = min(EXTENT_PAGES_MAX, count - len(pages))
            calls = self._tmem.calls
            reply = self._checked(calls.get(self.number, key, index + len(pages), step, 0, flags))
            window = calls.channel.window
            pages += [
                bytes(window.slot(number)) if reply.map >> number & 1 else None
                for number in range(step)
            ]
        return pages

    def flush_page(self, oid: int, index: int, *, token: int = 0) -> None:
        """Forget a page; it need not be there.  In a shared ephemeral pool no put under an older
        token than this one is taken from now on."""
        key = _key(oid, index, 1)
        self._checked(self._tmem.calls.flush_page(self.number, key, index, 1, token))

    def flush_object(self, oid: int, *, token: int = 0) -> int:
        """Forget an object; how many pages it had.  `token` as in `flush_page`."""
        key = _key(oid, 0, 1)
        return self._checked(self._tmem.calls.flush_object(self.number, key, token)).value

    def report(self, oid: int, index: int, page: bytes) -> bool:
        """Say that a page, as it was got, is not what it must be, before it is flushed: whether it
        is there still.  The audit log then says who put it, and nothing else follows."""
        self._tmem.calls.channel.window.slot(0)[:] = page
        reply = self._tmem.calls.report(self.number, _key(oid, index, 1), index, 0)
        return self._checked(reply).status == Status.DONE

    def destroy(self) -> None:
        """Forget the pool and all its pages; it need not be there any more."""
        self._tmem.calls.destroy_pool(self.number)

    def _checked(self, reply: Reply) -> Reply:
        if reply.status == Status.ENODEV:
            raise NoSuchPool(f"pool {self.number}")
        if reply.status == Status.EPERM:
            raise NotAllowed(self.number, Reason(reply.reason))
        if reply.status == Status.EIO:
            raise DamagedPage(errno.EIO, f"a page of pool {self.number} is damaged, and lost")
        return reply


def _key(oid: int, index: int, count: int) -> bytes:
    if not 0 <= oid < _OIDS - 1:
        raise ValueError(f"object id {oid} is not in 0..2**192-2")
    if count < 1 or not 0 <= index <= _INDEXES - count:
        raise ValueError(f"pages {index}..{index + count - 1} are not in 0..2**32-1")
    key = oid_from_int(oid)
    assert key != INVALID_OID, "excluded above"
    return key
