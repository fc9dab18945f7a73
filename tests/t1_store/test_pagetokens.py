"""Tokens of the pages of shared pools: exact after any restart, and next to no memory."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from hypervisor.arena import (
    CODES_BLOCK_SHIFT,
    TOKEN_BASES,
    Arena,
    format_arena,
    layout,
    private_arena,
)
from hypervisor.auth import Grants, Role
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pagetokens import NEAR
from hypervisor.pools import Settings
from hypervisor.provenance import pages_of
from hypervisor.recovery import recover
from ipc.abi import REPLY, REQUEST, Op, oid_from_int, pool_flag_word
from ipc.names import Registry
from ipc.segment import allocated_bytes, create_segment, remove_segment
from ipc.window import anonymous_window
from tests.support.kills import RECOVERERS, WRITERS, images_of

UUID = b"u" * 16
FRAMES = 3 << CODES_BLOCK_SHIFT
Pages = dict[tuple[int, int], int]
"""(object, index) -> the token that it was put under."""


class Rig:
    """A machine with one guest in a shared pool; `made`: it has to make it."""

    def __init__(self, arena: Arena, *, made: bool = True, compress: bool = False) -> None:
        grants = Grants()
        grants.allow(UUID, "a", Role.WRITER)
        settings = {"a": Settings(compress=compress)}
        self.machine = Machine(arena, scheduling="static", grants=grants, settings=settings)
        self.window = anonymous_window()
        recover(self.machine)
        if made:
            self.call(Op.NEW_POOL, pool=pool_flag_word(shared=True), oid=UUID + bytes(8))

    def call(
        self,
        op: Op,
        *,
        pool: int = 0,
        oid: bytes = b"",
        index: int = 0,
        count: int = 0,
        token: int = 0,
    ) -> tuple[int, ...]:
        client = self.machine.attach("a", 1, 1, 0)
        assert client is not None
        request = REQUEST.pack(1, op, 0, count, pool, index, oid, 0, token, 0)
        return REPLY.unpack(self.machine.execute(client, request, self.window))

    def put(self, oid: int, index: int, count: int, token: int, content: bytes = b"") -> int:
        """Incompressible pages, or of this content; how many were kept."""
        for slot in range(count):
            page = content or random.Random(f"{oid} {index + slot} {token}").randbytes(4096)
            self.window.slot(slot)[:] = page.ljust(4096, b"\0")
        key = oid_from_int(oid)
        return self.call(Op.PUT_PAGE, oid=key, index=index, count=count, token=token)[5].bit_count()

    def flush(self, oid: int, index: int, count: int) -> None:
        self.call(Op.FLUSH_PAGE, oid=oid_from_int(oid), index=index, count=count)

    def tokens(self) -> Pages:
        """What is told of all pages that are there."""
        pool = self.machine.memberships.shared[UUID]
        found: Pages = {}
        for oid, one in pool.objects.items():
            for leaf_number, leaf in one.leaves():
                for place, number in enumerate(leaf):
                    if number >= 0:
                        index = leaf_number * 64 + place
                        (page,) = pages_of(self.machine, [pool], oid, index)
                        found[int.from_bytes(oid, "little"), index] = page["token"]
        return found


@pytest.mark.parametrize("compress", [False, True])
def test_pages_have_the_tokens_that_they_were_put_under(*, compress: bool) -> None:
    """Of files that are changed and of some that are not, in raw frames and behind entries, over
    frames that were used before and restarts."""
    rng = random.Random(5)
    arena = private_arena(layout(FRAMES).end)
    rig = Rig(arena, compress=compress)
    token = dict.fromkeys(range(9), 7)
    expected: Pages = {}
    for step in range(400):
        oid, index, count = rng.randrange(9), rng.randrange(0, 400, 8), rng.choice((1, 2, 40))
        token[oid] += rng.choice((0, 0, 0, 1, 1, 40_000, 1 << 33)) if step > 100 and oid else 0
        if rng.random() < 0.2:
            rig.flush(oid, index, count)
            for at in range(count):
                expected.pop((oid, index + at), None)
        else:
            content = b"lean" if rng.random() < 0.2 else b""
            assert rig.put(oid, index, count, token[oid], content) == count
            expected |= {(oid, index + at): token[oid] for at in range(count)}
        # What an object loses that begins anew is gone, and nothing else changes.
        found = rig.tokens()
        assert found.items() <= expected.items(), step
        assert {key for key in expected if key[0] == 0} <= found.keys(), "its token never changed"
        expected = found
        if step % 90 == 89:
            check(rig.machine)
            rig = Rig(arena, made=False, compress=compress)
            # All objects have the newest of all as their floor now.
            token = dict.fromkeys(range(9), max(token.values())) | {0: max(token.values())}
            assert rig.tokens() == expected
            expected = {}
            for oid in range(9):
                rig.call(Op.FLUSH_OBJECT, oid=oid_from_int(oid))


def test_an_object_that_has_no_place_for_its_token_begins_anew() -> None:
    """And keeps its tokens exact; others lose nothing, and a restart makes places free."""
    arena = private_arena(layout(FRAMES).end)
    rig = Rig(arena)
    rig.put(1, 0, 2, 5)
    rig.put(2, 0, 2, 5)
    for jump in range(1, TOKEN_BASES + 1):
        assert rig.put(2, 2 + jump, 1, jump * NEAR + 5) == 1
    assert len(rig.tokens()) == 4 + TOKEN_BASES
    evictions = rig.machine.store.evictions

    # The last base covers tokens near it.
    assert rig.put(2, 300, 1, TOKEN_BASES * NEAR + 9) == 1
    assert len(rig.tokens()) == 5 + TOKEN_BASES
    last = (TOKEN_BASES + 1) * NEAR + 5
    assert rig.put(2, 301, 1, last) == 1
    assert rig.tokens() == {(1, 0): 5, (1, 1): 5, (2, 301): last}
    assert rig.machine.store.evictions == evictions + 3 + TOKEN_BASES
    assert rig.put(2, 302, 2, last + 3) == 2
    check(rig.machine)

    rig.machine.store.reap()
    rig = Rig(arena, made=False)
    assert rig.tokens() == {
        (1, 0): 5, (1, 1): 5, (2, 301): last, (2, 302): last + 3, (2, 303): last + 3,
    }  # fmt: skip
    assert rig.put(1, 7, 1, 2**64 - 1) == 1
    assert rig.tokens()[1, 7] == 2**64 - 1
    assert rig.tokens()[1, 0] == 5
    assert [base for base in arena.token_base if base] == [(2**64 - 1) >> 9]


@pytest.fixture
def segment_name(tmp_path: Path) -> Iterator[str]:
    """Of a segment of three blocks of codes, filled by nobody."""
    name = f"/tmem-test-{os.getpid()}-pagetokens"
    registry = Registry(tmp_path)
    mapping = create_segment(name, layout(FRAMES).end, registry)
    try:
        format_arena(mapping)
        mapping.close()
        yield name
    finally:
        remove_segment(name, registry)


def test_files_that_nobody_changes_take_no_memory_for_it(segment_name: str) -> None:
    """To ask for their tokens takes none either; codes take two bytes a page where they are."""
    with Path("/dev/shm", segment_name[1:]).open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    rig = Rig(Arena(mapping))
    for oid in range(FRAMES // 512):
        for index in range(0, 512, 64):
            assert rig.put(oid, index, 64, 1 << 40 | 3) == 64
    assert set(rig.tokens().values()) == {1 << 40 | 3}
    full = allocated_bytes(segment_name)
    where = rig.machine.store.arena.layout
    # Its beginning, and objects' records and tokens: a page of the host's each.
    assert full - FRAMES * 4096 - where.data <= 4 * 4096

    rig.flush(0, 8, 1)
    rig.put(0, 8, 1, 1 << 40 | 4)
    assert rig.tokens()[0, 8] == 1 << 40 | 4
    assert rig.tokens()[0, 9] == 1 << 40 | 3
    assert allocated_bytes(segment_name) - full == 4096
    del rig


def test_a_kill_at_any_moment_leaves_no_wrong_token() -> None:
    """Of puts of new pages, over old ones, with a new base, and of an object that begins anew; and
    of the recovery that makes bases free."""
    arena = private_arena(-(-layout(96).end // 4096) * 4096)
    rig = Rig(arena)
    rig.put(1, 0, 3, 5)
    rig.put(2, 0, 2, 9)
    puts = [
        (1, 2, 3, 8),
        (1, 4, 2, NEAR + 9),
        (3, 0, 2, 4 * NEAR),
        (1, 1, 1, NEAR + 10),
        (2, 1, 1, 1 << 50),
    ]
    for number in range(TOKEN_BASES - 2):
        rig.machine.store.beside.tokens._places[1 << 60 | number] = 0  # taken
    puts.append((2, 0, 1, 1 << 52))
    images = 0
    after: Pages = {}
    for oid, index, count, token in puts:
        before = rig.tokens()
        put = {(oid, index + at): token for at in range(count)}
        for image in images_of(arena, WRITERS, partial(rig.put, oid, index, count, token)):
            images += 1
            again = Rig(copy_of(image), made=False)
            for key, known in again.tokens().items():
                assert known in (before.get(key), put.get(key)), (put, key)
            # Nothing that the dead process has left of what it had not finished comes to light.
            for at, its in ((0, 1 << 60), (50, 1 << 60 | 1)):
                again.put(9, at, 9, its)
            of_new = {key: its for key, its in again.tokens().items() if key[0] == 9}
            assert set(of_new.values()) == {1 << 60, 1 << 60 | 1}
            assert {index // 50 for _, index in of_new} == {0, 1}
            assert all(its == 1 << 60 | index // 50 for (_, index), its in of_new.items())
        after = rig.tokens()
        assert put.items() <= after.items()
        assert after.items() <= (before | put).items()
    assert after.keys() >= {(2, 0)}
    assert (2, 1) not in after, "there was no base left"
    assert images > 40

    for image in images_of(arena, RECOVERERS, lambda: Rig(arena, made=False)):
        assert Rig(copy_of(image), made=False).tokens() == after


def copy_of(image: bytes) -> Arena:
    """An arena as a killed process has left it."""
    arena = private_arena(len(image))
    arena.mapping[:] = image
    return Arena(arena.mapping)
