"""A guest's timed calls, as a guest's kernel makes them.

A page of the working set has a number; it stands at index `number % 1024` of object
`number // 1024` (files of 4 MiB).  Its first eight bytes are its number: stamped before each put
and looked at after each get, outside the time that is measured, so that no figure can come from
calls that moved nothing.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Final

from guests.hypercall import BatchEntry, Hypercalls
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES, Reply, Status, oid_from_int
from ipc.errors import InvariantError
from ipc.mqueue import QueueChannel

OBJECT_PAGES: Final = 1024

_ORDER_LENGTH: Final = 1 << 14
_now = time.perf_counter_ns
_stamp = struct.Struct("<Q").pack_into
_read_stamp = struct.Struct("<Q").unpack_from


class Guest:
    """One attached guest with one pool, and a working set of `pages` pages (a multiple of 64)."""

    def __init__(self, channel: QueueChannel, pages: int, *, persist: bool, seed: int) -> None:
        self.channel = channel
        self.pages = pages
        self._calls = Hypercalls(channel)
        self._slots = channel.window.slots
        self._random = random.Random(seed)
        self._orders: dict[int, cycle[int]] = {}
        self._oids = [oid_from_int(number + 1) for number in range(-(-pages // OBJECT_PAGES))]
        self._pool = _done(self._calls.new_pool(persist=persist)).value
        for slot in range(EXTENT_PAGES_MAX):
            channel.window.slot(slot)[:] = self._random.randbytes(PAGE_BYTES)

    def fill(self) -> None:
        """Put the whole working set."""
        for number in range(0, self.pages, EXTENT_PAGES_MAX):
            self._stamp(number, EXTENT_PAGES_MAX)
            oid = self._oids[number // OBJECT_PAGES]
            _done(self._calls.put(self._pool, oid, number % OBJECT_PAGES, EXTENT_PAGES_MAX))

    def time_gets(self, count: int, seconds: float) -> list[int]:
        """Durations (ns) of extent gets at random places; every page must be there."""
        durations: list[int] = []
        get, pool, oids = self._calls.get, self._pool, self._oids
        deadline = _now() + int(seconds * 1e9)
        for number in self._places(count):
            oid, index = oids[number // OBJECT_PAGES], number % OBJECT_PAGES
            begin = _now()
            reply = get(pool, oid, index, count)
            end = _now()
            durations.append(end - begin)
            _done(reply)
            self._check(0, number)
            self._check(count - 1, number + count - 1)
            if end > deadline:
                break
        return durations

    def time_puts(self, count: int, seconds: float) -> list[int]:
        """Durations (ns) of extent puts over pages that are there; every page must be accepted."""
        durations: list[int] = []
        put, pool, oids = self._calls.put, self._pool, self._oids
        deadline = _now() + int(seconds * 1e9)
        for number in self._places(count):
            oid, index = oids[number // OBJECT_PAGES], number % OBJECT_PAGES
            self._stamp(number, count)
            begin = _now()
            reply = put(pool, oid, index, count)
            end = _now()
            durations.append(end - begin)
            _done(reply)
            if end > deadline:
                break
        return durations

    def time_refaults(self, count: int, seconds: float) -> tuple[list[int], list[int], float]:
        """What a page cache does that is too small: get an extent, later put it again.

        Durations of the gets, of the puts, and the share of pages that the gets found.
        """
        gets: list[int] = []
        puts: list[int] = []
        found = 0
        get, put, pool, oids = self._calls.get, self._calls.put, self._pool, self._oids
        deadline = _now() + int(seconds * 1e9)
        for number in self._places(count):
            oid, index = oids[number // OBJECT_PAGES], number % OBJECT_PAGES
            begin = _now()
            reply = get(pool, oid, index, count)
            gets.append(_now() - begin)
            found += reply.map.bit_count()
            if reply.status == Status.DONE:
                self._check(count - 1, number + count - 1)
            self._stamp(number, count)
            begin = _now()
            reply = put(pool, oid, index, count)
            end = _now()
            puts.append(end - begin)
            _done(reply)
            if end > deadline:
                break
        return gets, puts, found / (count * len(gets))

    def time_get_batches(self, count: int, seconds: float) -> list[int]:
        """Durations (ns) of gets of unrelated pages, building and writing the table included."""
        return self._time_batches(self._calls.get_batch, count, seconds)

    def time_put_batches(self, count: int, seconds: float) -> list[int]:
        """Durations (ns) of puts of unrelated pages, building and writing the table included."""
        return self._time_batches(self._calls.put_batch, count, seconds)

    def _time_batches(
        self, call: Callable[[list[BatchEntry]], Reply], count: int, seconds: float
    ) -> list[int]:
        durations: list[int] = []
        pool, oids = self._pool, self._oids
        getting = call == self._calls.get_batch
        deadline = _now() + int(seconds * 1e9)
        end = 0
        while end < deadline:
            numbers = self._random.sample(range(self.pages), count)
            if not getting:
                for slot, number in enumerate(numbers):
                    _stamp(self._slots, slot * PAGE_BYTES, number)
            begin = _now()
            reply = call(
                [
                    (pool, number % OBJECT_PAGES, slot, 0, oids[number // OBJECT_PAGES], 0)
                    for slot, number in enumerate(numbers)
                ]
            )
            end = _now()
            durations.append(end - begin)
            _done(reply)
            if getting:
                self._check(0, numbers[0])
                self._check(count - 1, numbers[-1])
        return durations

    def _places(self, count: int) -> Iterator[int]:
        """First pages of extents in random order, without end; none leaves its object.

        The order is made once: making it anew for each short phase would cost more than the phase.
        """
        if count not in self._orders:
            extents = range(self.pages // count)
            chosen = self._random.choices(extents, k=_ORDER_LENGTH)
            self._orders[count] = cycle([number * count for number in chosen])
        return self._orders[count]

    def _stamp(self, number: int, count: int) -> None:
        for at in range(count):
            _stamp(self._slots, at * PAGE_BYTES, number + at)

    def _check(self, slot: int, number: int) -> None:
        (found,) = _read_stamp(self._slots, slot * PAGE_BYTES)
        if found != number:
            raise InvariantError(f"slot {slot} should hold page {number} and holds page {found}")

    def close(self) -> None:
        """Close the channel; the pages stay until this process or the hypervisor ends."""
        self._slots.release()
        self.channel.close()


def _done(reply: Reply) -> Reply:
    if reply.status != Status.DONE:
        raise InvariantError(f"a call that must succeed here did not: {reply}")
    return reply
