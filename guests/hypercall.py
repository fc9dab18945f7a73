"""The guest's end of every hypercall: pack 64 bytes, call, unpack 32.

The hot path of a client.  Page bytes are not touched here: they stand in the window's slots before
a put and after a get (`channel.window`).  Nothing is checked: the hypervisor checks everything, and
a call that breaks the ABI comes back with ReplyFlag.FAULT.

Every method raises `ipc.errors.Disconnected` when the hypervisor is gone; the outcome of that call
is then unknown.
"""

from __future__ import annotations

from typing import Final

from ipc.abi import (
    ANY_UUID,
    OID_BYTES,
    REPLY,
    REQUEST,
    UUID_BYTES,
    Op,
    Priority,
    Reply,
    pool_flag_word,
)
from ipc.channel import Channel

# Plain names and integers: attribute and enum look-ups cost as much as the packing.
_pack: Final = REQUEST.pack
_unpack: Final = REPLY.unpack
_new_reply: Final = tuple.__new__
_NEW_POOL: Final = int(Op.NEW_POOL)
_DESTROY_POOL: Final = int(Op.DESTROY_POOL)
_PUT_PAGE: Final = int(Op.PUT_PAGE)
_GET_PAGE: Final = int(Op.GET_PAGE)
_FLUSH_PAGE: Final = int(Op.FLUSH_PAGE)
_FLUSH_OBJECT: Final = int(Op.FLUSH_OBJECT)
_VERSION: Final = int(Op.VERSION)
_PUT_BATCH: Final = int(Op.PUT_BATCH)
_GET_BATCH: Final = int(Op.GET_BATCH)
_FLUSH_BATCH: Final = int(Op.FLUSH_BATCH)
_LEND: Final = int(Op.LEND)
_REPORT: Final = int(Op.REPORT)
_NO_OID: Final = bytes(OID_BYTES)
_UUID_TAIL: Final = bytes(OID_BYTES - UUID_BYTES)
_SEQUENCE_MASK: Final = 0xFFFFFFFF

BatchEntry = tuple[int, int, int, int, bytes, int]
"""pool, index, slot, flags, object id, token: the fields of `ipc.abi.BATCH_ENTRY`."""


class Hypercalls:
    """Typed calls over one channel.  An object id is 24 bytes (`ipc.abi.oid_from_int`)."""

    __slots__ = ("_call", "_sequence", "channel")

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._call = channel.call
        self._sequence = 0

    # --- pages

    def put(
        self,
        pool: int,
        oid: bytes,
        index: int,
        count: int,
        slot: int = 0,
        flags: int = 0,
        token: int = 0,
    ) -> Reply:
        """Put `count` pages from the window's `slot` on; bit i of `map` = page i was kept.

        `flags` are hints: `CallFlag` LOW or HIGH, ACTIVE.  `token` is of the lock under which the
        pages are put into a shared ephemeral pool; too old, and `value` is the one needed.
        """
        self._sequence = sequence = (self._sequence + 1) & _SEQUENCE_MASK
        request = _pack(sequence, _PUT_PAGE, flags, count, pool, index, oid, slot, token, 0)
        return _new_reply(Reply, _unpack(self._call(request)))

    def get(
        self, pool: int, oid: bytes, index: int, count: int, slot: int = 0, flags: int = 0
    ) -> Reply:
        """Get `count` pages into the window from `slot` on; bit i of `map` = page i is there.

        `flags` may be `CallFlag.KEEP`: leave them in a private ephemeral pool.
        """
        self._sequence = sequence = (self._sequence + 1) & _SEQUENCE_MASK
        request = _pack(sequence, _GET_PAGE, flags, count, pool, index, oid, slot, 0, 0)
        return _new_reply(Reply, _unpack(self._call(request)))

    def flush_page(
        self, pool: int, oid: bytes, index: int, count: int = 1, token: int = 0
    ) -> Reply:
        """Forget `count` pages; bit i of `map` = page i was there."""
        return self._ask(_FLUSH_PAGE, count, pool, index, oid, token)

    def flush_object(self, pool: int, oid: bytes, token: int = 0) -> Reply:
        """Forget all pages of an object; `value` is how many there were."""
        return self._ask(_FLUSH_OBJECT, 0, pool, 0, oid, token)

    def report(self, pool: int, oid: bytes, index: int, slot: int) -> Reply:
        """Say, before it is flushed, that a page is not what it must be; it is in the window's
        `slot` as it was got.  MISS: it is another page that is there, or none."""
        self._sequence = sequence = (self._sequence + 1) & _SEQUENCE_MASK
        request = _pack(sequence, _REPORT, 0, 0, pool, index, oid, slot, 0, 0)
        return _new_reply(Reply, _unpack(self._call(request)))

    # --- unrelated handles, described in the window's batch table

    def put_batch(self, entries: list[BatchEntry]) -> Reply:
        """Put one page an entry, from the entry's slot."""
        return self._batch(_PUT_BATCH, entries)

    def get_batch(self, entries: list[BatchEntry]) -> Reply:
        """Get one page an entry, into the entry's slot."""
        return self._batch(_GET_BATCH, entries)

    def flush_batch(self, entries: list[BatchEntry]) -> Reply:
        """Forget one page an entry."""
        return self._batch(_FLUSH_BATCH, entries)

    # --- pools

    def version(self) -> Reply:
        """`value` is the spec version in the upper and the ABI revision in the lower 32 bits."""
        return self._ask(_VERSION, 0, 0, 0, _NO_OID)

    def new_pool(
        self,
        *,
        persist: bool = False,
        shared: bool = False,
        uuid: bytes = ANY_UUID,
        priority: Priority = Priority.NORMAL,
    ) -> Reply:
        """A new pool; with status DONE its id is `value` and `flags` say JOINED, READER."""
        flags = pool_flag_word(persist=persist, shared=shared, priority=priority)
        return self._ask(_NEW_POOL, 0, flags, 0, uuid + _UUID_TAIL)

    def destroy_pool(self, pool: int) -> Reply:
        """Forget a pool and all its pages; MISS if there is no such pool."""
        return self._ask(_DESTROY_POOL, 0, pool, 0, _NO_OID)

    # --- RAM

    def lend(self, pages: int) -> Reply:
        """Have so many pages as RAM in all, or as many as one call brings: `value`."""
        return self._ask(_LEND, 0, 0, pages, _NO_OID)

    # --- helpers

    def _ask(self, op: int, count: int, pool: int, index: int, oid: bytes, token: int = 0) -> Reply:
        self._sequence = sequence = (self._sequence + 1) & _SEQUENCE_MASK
        request = _pack(sequence, op, 0, count, pool, index, oid, 0, token, 0)
        return _new_reply(Reply, _unpack(self._call(request)))

    def _batch(self, op: int, entries: list[BatchEntry]) -> Reply:
        self.channel.window.write_table(entries)
        return self._ask(op, len(entries), 0, 0, _NO_OID)
