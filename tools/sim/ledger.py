"""The oracle: what every page must hold, known from every call in the order of execution.

One process executes one call at a time, so there is one order, and the ledger sees each call when
it is executed, whatever its guest gets to see of it.  It may lose an ephemeral page at any time,
but then it is gone: a page that was not there once and is there again without a put is stale.
Of a persistent page nothing is left to chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from hypervisor.auth import Grants, Role
from hypervisor.machine import Machine
from hypervisor.pools import Settings
from ipc.abi import (
    BATCH_ENTRY,
    REQUEST,
    UUID_BYTES,
    CallFlag,
    Op,
    PoolFlag,
    Reason,
    Reply,
    ReplyFlag,
    Status,
)
from ipc.limits import POOLS_PER_GUEST
from ipc.window import Window
from ipc.wire import decode_reply

Key = tuple[bytes, int]
"""object id, index"""
Entry = tuple[int, Key, int, int]
"""pool id, key, window slot, flags of one page of a call"""

PUTS: Final = (Op.PUT_PAGE, Op.PUT_BATCH)
GETS: Final = (Op.GET_PAGE, Op.GET_BATCH)
FLUSHES: Final = (Op.FLUSH_PAGE, Op.FLUSH_BATCH)
BATCHES: Final = (Op.PUT_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH)


class Broken(Exception):
    """A promise was not kept."""


def require(condition: bool, what: str) -> None:
    """A promise."""
    if not condition:
        raise Broken(what)


class Book:
    """One pool: its pages, and who is in it (guest, pool id)."""

    def __init__(self, flags: int, uuid: bytes) -> None:
        self.persistent = bool(flags & PoolFlag.PERSIST)
        self.shared = bool(flags & PoolFlag.SHARED)
        self.uuid = uuid
        self.pages: dict[Key, bytes] = {}
        self.members: set[tuple[str, int]] = set()

    @property
    def kind(self) -> str:
        """Xen's two letters."""
        return ("P" if self.persistent else "E") + ("S" if self.shared else "P")


class Call:
    """A request, and the pages that it brings, as they are when it is executed."""

    def __init__(self, request: bytes, window: Window) -> None:
        _, op, flags, count, self.pool, self.index, self.oid, slot, _, _ = REQUEST.unpack(request)
        self.op = Op(op)
        self.slot = slot
        self.count = count
        self.entries: list[Entry] = []
        if self.op in BATCHES:
            for pool, index, its_slot, its_flags, oid, _ in BATCH_ENTRY.iter_unpack(
                window.read_table(count)
            ):
                self.entries.append((pool, (oid, index), its_slot, its_flags))
        elif self.op in (Op.PUT_PAGE, Op.GET_PAGE, Op.FLUSH_PAGE):
            self.entries = [
                (self.pool, (self.oid, self.index + at), slot + at, flags) for at in range(count)
            ]
        self.pages: list[bytes] = []
        if self.op in PUTS:
            self.pages = [bytes(window.slot(entry[2])) for entry in self.entries]


class Ledger:
    """All pools of all guests; `grants` and `settings` are the administrator's as they are now."""

    def __init__(self, grants: Grants, settings: dict[str, Settings]) -> None:
        self._grants = grants
        self._settings = settings
        self.books: dict[tuple[str, int], Book] = {}
        self.shared: dict[bytes, Book] = {}
        self.checked_persistent = 0
        self.checked_ephemeral = 0

    # --- calls

    def settle(self, guest: str, call: Call, message: bytes, window: Window) -> Reply:
        """Hold a reply to what it must be."""
        reply = decode_reply(message)
        require(not reply.flags & ReplyFlag.FAULT, f"a fault: {reply}")
        if call.op in PUTS or call.op in GETS or call.op in FLUSHES:
            self._settle_pages(guest, call, reply, window)
        elif call.op == Op.FLUSH_OBJECT:
            self._settle_flush_object(guest, call, reply)
        elif call.op == Op.NEW_POOL:
            self._settle_new_pool(guest, call, reply)
        elif call.op == Op.DESTROY_POOL:
            known = (guest, call.pool) in self.books
            require((reply.status == Status.DONE) == known, f"pool known={known}: {reply}")
            if known:
                self.leave(guest, call.pool)
        elif call.op == Op.REPORT:
            self._settle_report(guest, call, reply, window)
        elif call.op == Op.LEND:
            # Kernels ask for their RAM; here they have it for themselves.
            require(reply.reason == Reason.LENDING_OFF, f"RAM was lent: {reply}")
        return reply

    def _settle_pages(self, guest: str, call: Call, reply: Reply, window: Window) -> None:
        first_refusal: int | None = None
        for at, (pool, key, slot, flags) in enumerate(call.entries):
            served = bool(reply.map >> at & 1)
            book = self.books.get((guest, pool))
            forbidden = self._forbidden(guest, book, writing=call.op not in GETS)
            if forbidden is not None or book is None:
                require(not served, f"page {at} served in spite of {forbidden}")
                first_refusal = forbidden if first_refusal is None else first_refusal
            elif call.op in PUTS:
                self._put(guest, book, key, call.pages[at], served=served)
                if not served and first_refusal is None:
                    first_refusal = -1
            elif call.op in GETS:
                self._get(book, key, bytes(window.slot(slot)), flags, served=served)
                if not served and first_refusal is None:
                    first_refusal = -1
            else:
                self._flush(book, key, served=served)
        require((reply.status == Status.DONE) == (first_refusal is None), f"status of {reply}")
        if first_refusal is not None and first_refusal >= 0:
            require(reply.reason == first_refusal, f"reason {reply.reason}, not {first_refusal}")

    def _forbidden(self, guest: str, book: Book | None, *, writing: bool) -> int | None:
        """The reason for which nothing may be done in a pool."""
        if book is None:
            return Reason.NO_SUCH_POOL
        if book.shared:
            role = self._grants.role(book.uuid, guest)
            if role is None:
                return Reason.SHARED_DENIED
            if writing and role is Role.READER:
                return Reason.NOT_WRITER
        return None

    def _put(self, guest: str, book: Book, key: Key, page: bytes, *, served: bool) -> None:
        if served:
            frozen = self._settings[guest].frozen
            require(not frozen or key in book.pages, f"a frozen guest put a new page {key}")
            book.pages[key] = page
        else:
            book.pages.pop(key, None)

    def _get(self, book: Book, key: Key, found: bytes, flags: int, *, served: bool) -> None:
        expected = book.pages.get(key)
        if served:
            require(expected is not None, f"a page that was gone is back: {book.kind} {key}")
            require(found == expected, f"wrong, stale or foreign bytes: {book.kind} {key}")
            if not (book.persistent or book.shared or flags & CallFlag.KEEP):
                del book.pages[key]
        elif expected is not None:
            require(not book.persistent, f"a persistent page is lost: {book.kind} {key}")
            del book.pages[key]
        self.checked_persistent += book.persistent and expected is not None
        self.checked_ephemeral += served and not book.persistent

    def _flush(self, book: Book, key: Key, *, served: bool) -> None:
        expected = book.pages.pop(key, None) is not None
        require(expected or not served, f"a page that was gone was flushed: {book.kind} {key}")
        require(served or not (expected and book.persistent), f"a persistent page is lost: {key}")

    def _settle_report(self, guest: str, call: Call, reply: Reply, window: Window) -> None:
        book = self.books.get((guest, call.pool))
        forbidden = self._forbidden(guest, book, writing=False)
        if forbidden is not None or book is None:
            require(reply.reason == forbidden, f"reason {reply.reason}, not {forbidden}")
            return
        expected = book.pages.get((call.oid, call.index)) == bytes(window.slot(call.slot))
        there = reply.status == Status.DONE
        require(expected or not there, f"a page that is another or gone is there: {book.kind}")
        require(there or not (expected and book.persistent), "a persistent page is lost")

    def _settle_flush_object(self, guest: str, call: Call, reply: Reply) -> None:
        book = self.books.get((guest, call.pool))
        forbidden = self._forbidden(guest, book, writing=True)
        if forbidden is not None or book is None:
            require(reply.reason == forbidden, f"reason {reply.reason}, not {forbidden}")
            return
        require(reply.status == Status.DONE, f"status of {reply}")
        keys = [key for key in book.pages if key[0] == call.oid]
        require(
            reply.value <= len(keys) and (not book.persistent or reply.value == len(keys)),
            f"{reply.value} pages flushed of {len(keys)}",
        )
        for key in keys:
            del book.pages[key]

    def _settle_new_pool(self, guest: str, call: Call, reply: Reply) -> None:
        flags, uuid = call.pool, call.oid[:UUID_BYTES]
        shared = bool(flags & PoolFlag.SHARED)
        role = self._grants.role(uuid, guest) if shared else Role.WRITER
        book = self.shared.get(uuid) if shared else None
        mine = [pool for name, pool in self.books if name == guest]
        if reply.status == Status.DONE:
            pool = reply.value
            require(role is not None, "a pool that was not granted")
            require((guest, pool) not in self.books, f"pool id {pool} twice")
            require(pool == next(n for n in range(64) if n not in mine), "not the lowest id")
            require(bool(reply.flags & ReplyFlag.JOINED) == (book is not None), "JOINED")
            require(bool(reply.flags & ReplyFlag.READER) == (role is Role.READER), "READER")
            if book is None:
                book = Book(flags, uuid)
                if shared:
                    self.shared[uuid] = book
            require(book.persistent == bool(flags & PoolFlag.PERSIST), "kinds mix")
            book.members.add((guest, pool))
            self.books[guest, pool] = book
        elif reply.reason == Reason.SHARED_DENIED:
            require(role is None, "denied in spite of a grant")
        elif reply.reason == Reason.TOO_MANY_POOLS:
            require(len(mine) == POOLS_PER_GUEST, "refused a pool with ids to spare")
        elif reply.reason == Reason.KIND_DIFFERS:
            require(book is not None, "there is no pool of another kind")
        else:
            require(reply.reason == Reason.TOO_MANY_SHARERS, f"refused a pool: {reply}")

    # --- what happens without a call

    def leave(self, guest: str, pool: int) -> None:
        """A guest's id of a pool is gone."""
        book = self.books.pop((guest, pool))
        book.members.discard((guest, pool))
        if not book.members and book.shared:
            del self.shared[book.uuid]

    def depart(self, guest: str) -> None:
        """A guest is gone."""
        for name, pool in list(self.books):
            if name == guest:
                self.leave(name, pool)

    def forget_everything(self) -> None:
        """The arena is lost."""
        self.books.clear()
        self.shared.clear()

    # --- sums

    def audit(self, machine: Machine) -> None:
        """The machine has the same pools, and as many pages in each as there may be."""
        theirs = {
            (client.name, pool_id)
            for client in machine.clients.values()
            for pool_id in client.members
        }
        require(theirs == self.books.keys(), "other pools than the ledger's")
        for (guest, pool_id), book in self.books.items():
            pool = machine.clients[guest].members[pool_id].pool
            least = len(book.pages) if book.persistent else 0
            require(
                pool.kind == book.kind and least <= pool.pages <= len(book.pages),
                f"{guest}'s pool {pool_id}:{book.kind} has {pool.pages} pages; "
                f"the ledger has {len(book.pages)}",
            )

    def persistent_pages(self) -> Iterator[tuple[str, int, Key]]:
        """(guest, pool id, key) of every persistent page that somebody may get now."""
        seen: set[int] = set()
        for (guest, pool), book in self.books.items():
            if book.persistent and id(book) not in seen:
                if self._forbidden(guest, book, writing=False) is None:
                    seen.add(id(book))
                    for key in list(book.pages):
                        yield guest, pool, key
