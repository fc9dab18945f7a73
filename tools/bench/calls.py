"""A guest's timed calls, on the bare channel.

A page of the working set has a number; it stands at index `number % 1024` of object
`number // 1024` (files of 4 MiB).  Its first eight bytes are its number: stamped before each put
and looked at after each get, outside the time that is measured, so that no figure can come from
calls that moved nothing.
"""

from __future__ import annotations

import random
import struct
import time
from typing import Final

from ipc.abi import (
    BATCH_ENTRY,
    EXTENT_PAGES_MAX,
    PAGE_BYTES,
    REPLY,
    REQUEST,
    Op,
    Status,
    oid_from_int,
    pool_flag_word,
)
from ipc.channel import Channel
from ipc.errors import InvariantError

OBJECT_PAGES: Final = 1024

_ORDER_LENGTH: Final = 1 << 14
_now = time.perf_counter_ns
_pack = REQUEST.pack
_unpack = REPLY.unpack
_stamp = struct.Struct("<Q").pack_into
_read_stamp = struct.Struct("<Q").unpack_from
_NO_OID: Final = bytes(24)


class Guest:
    """One attached guest with one pool, and a working set of `pages` pages (a multiple of 64)."""

    def __init__(self, channel: Channel, pages: int, *, persist: bool, seed: int) -> None:
        self.channel = channel
        self.pages = pages
        self._sequence = 0
        self._random = random.Random(seed)
        self._oids = [oid_from_int(number + 1) for number in range(-(-pages // OBJECT_PAGES))]
        flags = pool_flag_word(persist=persist)
        self._pool = self._checked(Op.NEW_POOL, 0, flags, 0, _NO_OID)[6]
        for slot in range(EXTENT_PAGES_MAX):
            channel.window.slot(slot)[:] = self._random.randbytes(PAGE_BYTES)

    def fill(self) -> None:
        """Put the whole working set."""
        for number in range(0, self.pages, EXTENT_PAGES_MAX):
            self._stamp(number, EXTENT_PAGES_MAX)
            oid = self._oids[number // OBJECT_PAGES]
            self._checked(Op.PUT_PAGE, EXTENT_PAGES_MAX, self._pool, number % OBJECT_PAGES, oid)

    def time_gets(self, count: int, seconds: float) -> list[int]:
        """Durations (ns) of extent gets at random places; every page must be there."""
        return self._time(Op.GET_PAGE, count, seconds)

    def time_puts(self, count: int, seconds: float) -> list[int]:
        """Durations (ns) of extent puts over pages that are there; every page must be accepted."""
        return self._time(Op.PUT_PAGE, count, seconds)

    def time_refaults(self, count: int, seconds: float) -> tuple[list[int], list[int], float]:
        """What a page cache does that is too small: get an extent, later put it again.

        Durations of the gets, of the puts, and the share of pages that the gets found."""
        gets: list[int] = []
        puts: list[int] = []
        found = 0
        call, pool, oids = self.channel.call, self._pool, self._oids
        deadline = _now() + int(seconds * 1e9)
        for number in self._places(count):
            oid, index = oids[number // OBJECT_PAGES], number % OBJECT_PAGES
            sequence = self._next()
            begin = _now()
            reply = _unpack(call(_pack(sequence, Op.GET_PAGE, 0, count, pool, index, oid, 0, 0, 0)))
            gets.append(_now() - begin)
            found += reply[5].bit_count()
            self._stamp(number, count)
            sequence = self._next()
            begin = _now()
            reply = _unpack(call(_pack(sequence, Op.PUT_PAGE, 0, count, pool, index, oid, 0, 0, 0)))
            end = _now()
            puts.append(end - begin)
            if reply[1] != Status.DONE:
                raise InvariantError(f"a put into an arena with evictable pages failed: {reply}")
            if end > deadline:
                break
        return gets, puts, found / (count * len(gets))

    def time_batches(self, op: Op, count: int, seconds: float) -> list[int]:
        """Durations (ns) of calls for `count` unrelated pages, writing the table included."""
        durations: list[int] = []
        call, pool, oids = self.channel.call, self._pool, self._oids
        table, pack_entry = self.channel.window.table, BATCH_ENTRY.pack_into
        slots = self.channel.window.slots
        width = BATCH_ENTRY.size
        deadline = _now() + int(seconds * 1e9)
        end = 0
        while end < deadline:
            numbers = self._random.sample(range(self.pages), count)
            if op == Op.PUT_BATCH:
                for slot, number in enumerate(numbers):
                    _stamp(slots, slot * PAGE_BYTES, number)
            sequence = self._next()
            begin = _now()
            for at, number in enumerate(numbers):
                pack_entry(
                    table,
                    at * width,
                    pool,
                    number % OBJECT_PAGES,
                    at,
                    0,
                    oids[number // OBJECT_PAGES],
                    0,
                )
            reply = _unpack(call(_pack(sequence, op, 0, count, 0, 0, _NO_OID, 0, 0, 0)))
            end = _now()
            durations.append(end - begin)
            self._check(reply, numbers[-1], count - 1)
        return durations

    def _time(self, op: Op, count: int, seconds: float) -> list[int]:
        durations: list[int] = []
        call, pool, oids = self.channel.call, self._pool, self._oids
        putting = op == Op.PUT_PAGE
        operation = int(op)
        deadline = _now() + int(seconds * 1e9)
        end = 0
        while end < deadline:
            for number in self._places(count):
                oid, index = oids[number // OBJECT_PAGES], number % OBJECT_PAGES
                if putting:
                    self._stamp(number, count)
                sequence = self._next()
                begin = _now()
                reply = _unpack(
                    call(_pack(sequence, operation, 0, count, pool, index, oid, 0, 0, 0))
                )
                end = _now()
                durations.append(end - begin)
                self._check(reply, number + count - 1, count - 1)
                if end > deadline:
                    break
        return durations

    def _places(self, count: int) -> list[int]:
        """First pages of extents in random order; an extent does not leave its object."""
        extents = range(self.pages // count)
        return [number * count for number in self._random.choices(extents, k=_ORDER_LENGTH)]

    def _next(self) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        return self._sequence

    def _stamp(self, number: int, count: int) -> None:
        slots = self.channel.window.slots
        for at in range(count):
            _stamp(slots, at * PAGE_BYTES, number + at)

    def _check(self, reply: tuple[int, ...], number: int, slot: int) -> None:
        """The call succeeded and page `number` is what the window's slot holds."""
        (found,) = _read_stamp(self.channel.window.slots, slot * PAGE_BYTES)
        if reply[1] != Status.DONE or found != number:
            raise InvariantError(f"page {number}: status {reply[1]}, slot holds page {found}")

    def _checked(self, op: Op, count: int, pool: int, index: int, oid: bytes) -> tuple[int, ...]:
        sequence = self._next()
        request = _pack(sequence, op, 0, count, pool, index, oid, 0, 0, 0)
        reply: tuple[int, ...] = _unpack(self.channel.call(request))
        if reply[1] != Status.DONE:
            raise InvariantError(f"{op.name} of the set-up failed: {reply}")
        return reply
