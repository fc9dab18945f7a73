"""Compression is put off while there is room, and made up for when there is none."""

from __future__ import annotations

import mmap
import random

from hypervisor.arena import Arena, format_arena, layout
from hypervisor.deferral import KEPT_FRAMES_LEAST, KEPT_FREE_SHARE
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pools import Settings
from hypervisor.recovery import recover
from ipc.abi import PAGE_BYTES, REPLY, REQUEST, Op, Status, oid_from_int, pool_flag_word
from ipc.window import anonymous_window

FRAMES = KEPT_FREE_SHARE * KEPT_FRAMES_LEAST + 64
SIZE = -(-layout(FRAMES).end // mmap.PAGESIZE) * mmap.PAGESIZE
E, P = 0, 1
COUNT = 32


def page_of(number: int) -> bytes:
    """A page that LZ4 brings to less than a quarter."""
    return number.to_bytes(8, "little") + random.Random(number).randbytes(700).ljust(
        PAGE_BYTES - 8, b"."
    )


class Guests:
    """Guests with a pool of each kind; all but `plain` compress."""

    def __init__(self, arena: Arena, *names: str) -> None:
        settings = {name: Settings(compress=name != "plain") for name in names}
        self.machine = Machine(arena, settings=settings)
        recover(self.machine)
        self._window = anonymous_window()
        for name in names:
            if name not in self.machine.clients:
                for persist in (False, True):
                    self.call(name, Op.NEW_POOL, pool_flag_word(persist=persist), oid=bytes(24))

    @property
    def packed(self) -> int:
        """Compressed pages."""
        return self.machine.store.contents.compressed.pages

    def call(
        self,
        name: str,
        op: Op,
        pool: int,
        index: int = 0,
        count: int = 0,
        oid: bytes = oid_from_int(1),
    ) -> tuple[int, int]:
        """Status and map."""
        client = self.machine.attach(name, 1, 1, 0)
        assert client is not None
        request = REQUEST.pack(1, op, 0, count, pool, index, oid, 0, 0, 0)
        reply = REPLY.unpack(self.machine.execute(client, request, self._window))
        return reply[1], reply[5]

    def put(self, name: str, pool: int, index: int, count: int = COUNT) -> int:
        """How many of neighbouring pages were kept."""
        for at in range(count):
            self._window.slot(at)[:] = page_of(index + at)
        return self.call(name, Op.PUT_PAGE, pool, index, count)[1].bit_count()

    def fill(self, name: str, pool: int, pages: int) -> int:
        """Put pages until one is refused; how many were kept."""
        for index in range(0, pages, COUNT):
            kept = self.put(name, pool, index)
            if kept < COUNT:
                return index + kept
        return pages

    def is_there(self, name: str, pool: int, index: int) -> bool:
        """Whether the page is there, and as it was put."""
        status, _ = self.call(name, Op.GET_PAGE, pool, index, 1)
        return status == Status.DONE and self._window.slot(0) == page_of(index)


def arena() -> Arena:
    """One of the least size in which anything is deferred."""
    mapping = mmap.mmap(-1, SIZE)
    format_arena(mapping)
    return Arena(mapping)


def test_nothing_is_compressed_while_there_is_room() -> None:
    """But for ephemeral pages, which can only be evicted later."""
    guests = Guests(arena(), "a")
    for pool, packed in ((P, 0), (E, FRAMES // 4)):
        assert guests.fill("a", pool, FRAMES // 4) >= FRAMES // 4
        assert packed <= guests.packed < packed + COUNT
    assert all(guests.is_there("a", pool, index) for pool in (E, P) for index in range(0, 200, 9))
    check(guests.machine)


def test_in_the_end_as_many_pages_fit_as_if_all_had_been_compressed() -> None:
    """What was left raw is compressed before a page is refused."""
    guests = Guests(arena(), "a")
    kept = guests.fill("a", P, 8 * FRAMES)
    assert kept > 3 * FRAMES
    assert guests.packed > 0.99 * kept
    assert all(guests.is_there("a", P, index) for index in range(0, kept, 97))
    check(guests.machine)


def test_a_guest_is_not_refused_for_what_it_left_raw_itself() -> None:
    """It holds in its allotment, a half, what fits there compressed; the arena is never short."""
    guests = Guests(arena(), "a", "b")
    kept = guests.fill("a", P, 8 * FRAMES)
    assert kept > 1.5 * FRAMES
    assert guests.machine.store.frames.free > FRAMES // 4
    check(guests.machine)


def test_raw_pages_of_one_make_room_for_another() -> None:
    """No ephemeral page goes for one that can be compressed, whoever puts."""
    guests = Guests(arena(), "a", "plain")
    guests.fill("a", P, FRAMES * 2 // 5)
    assert guests.packed == 0
    guests.fill("plain", E, FRAMES * 3 // 4)
    assert guests.machine.store.evictions == 0
    assert guests.packed > FRAMES // 8
    for name, pool, pages in (("a", P, FRAMES * 2 // 5), ("plain", E, FRAMES * 3 // 4)):
        assert all(guests.is_there(name, pool, index) for index in range(0, pages - COUNT, 31))
    check(guests.machine)


def test_what_was_left_raw_before_a_restart_is_compressed_after_it() -> None:
    """The segment does not say why a page is raw."""
    segment = arena()
    before = Guests(segment, "a")
    before.fill("a", P, FRAMES // 2)
    assert before.packed == 0
    after = Guests(segment, "a")
    assert after.machine.store.squeeze(FRAMES) > FRAMES // 8
    assert all(after.is_there("a", P, index) for index in range(0, FRAMES // 2, 31))
    check(after.machine)
