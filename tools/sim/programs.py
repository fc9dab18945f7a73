"""Programs that call tmem directly: pools of all four kinds, and a belief about every private page.

A program knows of a call only what its reply says.  A call without a reply may or may not have been
executed, so it widens the belief about its pages; the next reply narrows it again.  What comes out
of shared pools is the ledger's to judge; the program only makes sure that its window holds what was
delivered, however late it looks.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from guests.hypercall import BatchEntry, Hypercalls
from ipc.abi import ANY_UUID, PAGE_BYTES, CallFlag, Priority, Reason, Reply, Status, oid_from_int
from ipc.errors import Disconnected, OperatorError
from ipc.limits import WINDOW_SLOTS
from tools.sim.administrator import SHARED_EPHEMERAL, SHARED_PERSISTENT
from tools.sim.ledger import Key, require

if TYPE_CHECKING:
    from tools.sim.cluster import Cluster
    from tools.sim.lives import Life

ABSENT: Final = b""
_OBJECTS: Final = 4
_INDEXES: Final = (0, 0, 30, 58, 2**32 - 72)
"""Near each other, so that pages are met again; across a leaf of 64; at the end of an object."""
_COUNTS: Final = (1, 1, 1, 2, 3, 8, 24, 64)
_POOL_WEIGHTS: Final = ((4, 1, 3, 2), (4, 1, 3, 2), (1, 6, 1, 3), (6, 1, 1, 1), (1, 1, 6, 6))
"""How often private ephemeral and persistent, shared ephemeral and persistent pools are used."""
_HINTS: Final = (
    0,
    0,
    CallFlag.LOW,
    CallFlag.HIGH,
    CallFlag.ACTIVE,
    CallFlag.HIGH | CallFlag.ACTIVE,
)


def make_page(rng: random.Random) -> bytes:
    """A page that no other equals, or one that several hold, or one pattern over and over: so that
    every way to store a page is taken."""
    choice = rng.random()
    if choice < 0.1:
        return struct.pack("<Q", rng.randrange(3)) * 512
    if choice < 0.3:
        return random.Random(rng.randrange(7)).randbytes(PAGE_BYTES)
    mark = rng.randbytes(8)
    body = rng.randbytes(rng.choice((8, 900, 1900, 3000, 4000)))
    return (mark + body).ljust(PAGE_BYTES - 8, b"\0") + mark


class Belief:
    """A pool as its program knows it: for each page what it may hold, ABSENT among that.

    A page that is not listed is absent for certain.  Shared pools have no beliefs.
    """

    def __init__(self, *, persist: bool, shared: bool) -> None:
        self.persist = persist
        self.shared = shared
        self.number: int | None = None
        self._pages: dict[Key, set[bytes]] = {}

    def known(self) -> list[Key]:
        """Pages that may be there."""
        return list(self._pages)

    def forget(self) -> None:
        """The pool is gone."""
        self.number = None
        self._pages.clear()

    def settle(self, key: Key, page: bytes) -> None:
        """A reply told what the page holds."""
        if self.shared or page == ABSENT:
            self._pages.pop(key, None)
        else:
            self._pages[key] = {page}

    def widen(self, key: Key, page: bytes) -> None:
        """A call without a reply may have done this."""
        if not self.shared:
            self._pages[key] = self._pages.get(key, {ABSENT}) | {page}

    def absent_without_reply(self, condition: Callable[[Key], bool]) -> None:
        """A flush without a reply may have dropped these."""
        for key in self._pages:
            if condition(key):
                self._pages[key] |= {ABSENT}

    def found(self, key: Key, page: bytes, *, stays: bool) -> None:
        """A get found this."""
        if self.shared:
            return
        possible = self._pages.get(key, {ABSENT})
        require(page in possible, f"a program got a page that it did not put there: {key}")
        self.settle(key, page if stays else ABSENT)

    def missed(self, key: Key) -> None:
        """A get found nothing."""
        if self.shared:
            return
        possible = self._pages.get(key, {ABSENT})
        require(not self.persist or ABSENT in possible, f"a program lost a persistent page: {key}")
        self.settle(key, ABSENT)


class Program:
    """One life of a program."""

    def __init__(self, cluster: Cluster, life: Life, rng: random.Random) -> None:
        self._cluster = cluster
        self._life = life
        self._random = rng
        self._calls: Hypercalls | None = None
        self._weights = rng.choice(_POOL_WEIGHTS)
        self._hoards = rng.random() < 0.4
        self._pools = [
            Belief(persist=persist, shared=shared)
            for shared in (False, True)
            for persist in (False, True)
        ]

    # --- what a cluster asks of it

    def step(self) -> None:
        """One call, or as many as it takes to come back."""
        try:
            calls = self._calls or self._attach()
            self._act(calls)
        except Disconnected:
            self._calls = None

    def end(self) -> None:
        """Find everything right, give the pools back and detach."""
        try:
            self._leave(self._calls or self._attach())
        except Disconnected:
            # It had not yet heard of the last crash.
            self._leave(self._attach())

    def _leave(self, calls: Hypercalls) -> None:
        self._verify(calls)
        for pool in self._pools:
            if pool.number is not None:
                calls.destroy_pool(pool.number)
        self._cluster.detach(self._life, calls.channel)

    def bury(self) -> None:
        """Nothing of it is outside."""

    # --- attaching

    def _attach(self) -> Hypercalls:
        try:
            channel = self._cluster.connect(self._life)
        except OperatorError as error:
            raise Disconnected(str(error)) from None
        calls = Hypercalls(channel)
        if not channel.resumed:
            for pool in self._pools:
                pool.forget()
        self._calls = calls
        if channel.resumed and self._random.random() < 0.5:
            self._verify(calls)
        return calls

    def _verify(self, calls: Hypercalls) -> None:
        """Read back everything persistent that is private."""
        for pool in self._pools:
            if pool.persist and not pool.shared:
                for oid, index in pool.known():
                    if pool.number is not None:
                        self._get(calls, pool, oid, index, 1, 0, 0)

    def _new_pool(self, calls: Hypercalls, pool: Belief) -> None:
        uuid = ANY_UUID
        if pool.shared:
            uuid = SHARED_PERSISTENT if pool.persist else SHARED_EPHEMERAL
        # Now and then it is mistaken about what the pool is.
        persist = pool.persist ^ (pool.shared and self._random.random() < 0.05)
        priority = self._random.choice(list(Priority))
        reply = calls.new_pool(persist=persist, shared=pool.shared, uuid=uuid, priority=priority)
        if reply.status != Status.DONE:
            return
        for other in self._pools:
            if other.number == reply.value:
                # The administrator took it away, else its id would not be free.
                other.forget()
        if persist == pool.persist:
            pool.number = reply.value
        else:
            calls.destroy_pool(reply.value)

    # --- calls

    def _act(self, calls: Hypercalls) -> None:
        rng = self._random
        pool = rng.choices(self._pools, self._weights)[0]
        if pool.number is None:
            self._new_pool(calls, pool)
            return
        count = rng.choice(_COUNTS)
        oid = oid_from_int(rng.randrange(_OBJECTS))
        index = rng.choice(_INDEXES) + rng.randrange(8)
        slot = rng.randrange(WINDOW_SLOTS - count + 1)
        known = pool.known()
        if known and rng.random() < 0.4:
            oid, index = rng.choice(known)
            index = min(index, 2**32 - count)
        choice = rng.random()
        if pool.persist and not self._hoards and choice < 0.15:
            # Else persistent pages soon take all there is.
            self._flush_object(calls, pool, oid)
        elif choice < 0.38:
            self._put(calls, pool, oid, index, count, slot)
        elif choice < 0.46:
            self._put_batch(calls)
        elif choice < 0.72:
            keep = CallFlag.KEEP if rng.random() < 0.2 else 0
            self._get(calls, pool, oid, index, count, slot, keep)
        elif choice < 0.78:
            self._get_batch(calls)
        elif choice < 0.90:
            self._flush(calls, pool, oid, index, count)
        elif choice < 0.96:
            self._flush_object(calls, pool, oid)
        elif choice < 0.97:
            self._get(calls, pool, oid, index, 1, slot, CallFlag.KEEP)
            if pool.number is not None:
                self._checked(pool, calls.report(pool.number, oid, index, slot))
        else:
            self._destroy(calls, pool)

    def _checked(self, pool: Belief, reply: Reply) -> bool:
        """Whether the call was allowed; a pool that is no more is forgotten."""
        if reply.status == Status.ENODEV:
            pool.forget()
            return False
        if reply.status == Status.EPERM:
            require(pool.shared, f"not allowed in a private pool: {reply}")
            return False
        return True

    def _delivered(self, calls: Hypercalls, reply: Reply) -> list[bytes]:
        """The window's pages of the call just answered; they are what was delivered then."""
        last = self._life.last_reply
        require(last is not None and last[1] == reply, "a reply to another call")
        assert last is not None
        pages = [bytes(calls.channel.window.slot(entry[2])) for entry in last[0].entries]
        for at, page in enumerate(pages):
            require(not reply.map >> at & 1 or page == last[2][at], "the window was written to")
        return pages

    def _put(
        self, calls: Hypercalls, pool: Belief, oid: bytes, index: int, count: int, slot: int
    ) -> None:
        pages = [make_page(self._random) for _ in range(count)]
        for at, page in enumerate(pages):
            calls.channel.window.slot(slot + at)[:] = page
        assert pool.number is not None
        hints = int(self._random.choice(_HINTS))
        try:
            reply = calls.put(pool.number, oid, index, count, slot, hints)
        except Disconnected:
            for at, page in enumerate(pages):
                # A refusal drops the old page: that may be, too.
                pool.widen((oid, index + at), page)
                pool.widen((oid, index + at), ABSENT)
            raise
        if self._checked(pool, reply):
            for at, page in enumerate(pages):
                pool.settle((oid, index + at), page if reply.map >> at & 1 else ABSENT)

    def _entries(self) -> list[tuple[Belief, BatchEntry]]:
        """Runs of neighbours in several pools and objects, each page in a slot of its own."""
        rng = self._random
        pools = [pool for pool in self._pools if pool.number is not None]
        entries: list[tuple[Belief, BatchEntry]] = []
        length = rng.randrange(2, 33)
        while len(entries) < length:
            pool, oid = rng.choice(pools), oid_from_int(rng.randrange(_OBJECTS))
            index = rng.choice(_INDEXES[:-1]) + rng.randrange(8)
            hint = rng.choice((0, int(CallFlag.ACTIVE)))
            assert pool.number is not None
            for at in range(min(rng.randrange(1, 9), length - len(entries))):
                entry = (pool.number, index + at, len(entries), hint, oid, 0)
                entries.append((pool, entry))
        return entries

    def _put_batch(self, calls: Hypercalls) -> None:
        entries = self._entries()
        pages = [make_page(self._random) for _ in entries]
        calls.channel.window.slots[: len(pages) * PAGE_BYTES] = b"".join(pages)
        try:
            reply = calls.put_batch([entry for _, entry in entries])
        except Disconnected:
            for (pool, (_, index, _, _, oid, _)), page in zip(entries, pages, strict=True):
                pool.widen((oid, index), page)
                pool.widen((oid, index), ABSENT)
            raise
        for at, (pool, (_, index, _, _, oid, _)) in enumerate(entries):
            if reply.map >> at & 1:
                pool.settle((oid, index), pages[at])
            elif reply.reason in (Reason.NO_SUCH_POOL, Reason.SHARED_DENIED, Reason.NOT_WRITER):
                # Whose refusal it was is not told; a forbidden put changes nothing.
                pool.widen((oid, index), ABSENT)
            else:
                pool.settle((oid, index), ABSENT)

    def _get(
        self,
        calls: Hypercalls,
        pool: Belief,
        oid: bytes,
        index: int,
        count: int,
        slot: int,
        flags: int,
    ) -> None:
        assert pool.number is not None
        stays = pool.persist or bool(flags & CallFlag.KEEP)
        try:
            reply = calls.get(pool.number, oid, index, count, slot, flags)
        except Disconnected:
            if not stays:
                pool.absent_without_reply(lambda key: key[0] == oid and 0 <= key[1] - index < count)
            raise
        if self._checked(pool, reply):
            for at, page in enumerate(self._delivered(calls, reply)):
                key = (oid, index + at)
                if reply.map >> at & 1:
                    pool.found(key, page, stays=stays)
                else:
                    pool.missed(key)

    def _get_batch(self, calls: Hypercalls) -> None:
        entries = [
            (pool, (number, index, slot, 0, oid, 0))
            for pool, (number, index, slot, _, oid, _) in self._entries()
        ]
        try:
            reply = calls.get_batch([entry for _, entry in entries])
        except Disconnected:
            self._may_be_gone((pool, (e[4], e[1])) for pool, e in entries if not pool.persist)
            raise
        pages = self._delivered(calls, reply)
        for at, (pool, (_, index, _, _, oid, _)) in enumerate(entries):
            if reply.map >> at & 1:
                pool.found((oid, index), pages[at], stays=pool.persist)
            elif pool.persist and pool.number is not None:
                # The status is that of the first failure: this one's pool may be there no more.
                self._get(calls, pool, oid, index, 1, 0, 0)
            elif reply.reason != Reason.NO_SUCH_POOL:
                pool.missed((oid, index))

    def _may_be_gone(self, pages: Iterable[tuple[Belief, Key]]) -> None:
        for pool, key in pages:
            pool.absent_without_reply(key.__eq__)

    def _flush(self, calls: Hypercalls, pool: Belief, oid: bytes, index: int, count: int) -> None:
        assert pool.number is not None
        try:
            reply = calls.flush_page(pool.number, oid, index, count)
        except Disconnected:
            pool.absent_without_reply(lambda key: key[0] == oid and 0 <= key[1] - index < count)
            raise
        if self._checked(pool, reply):
            for at in range(count):
                pool.settle((oid, index + at), ABSENT)

    def _flush_object(self, calls: Hypercalls, pool: Belief, oid: bytes) -> None:
        assert pool.number is not None
        try:
            reply = calls.flush_object(pool.number, oid)
        except Disconnected:
            pool.absent_without_reply(lambda key: key[0] == oid)
            raise
        if self._checked(pool, reply):
            for key in pool.known():
                if key[0] == oid:
                    pool.settle(key, ABSENT)

    def _destroy(self, calls: Hypercalls, pool: Belief) -> None:
        number = pool.number
        assert number is not None
        # Forgotten before the answer: should it not come, the id is given back once more or lost.
        pool.forget()
        calls.destroy_pool(number)
