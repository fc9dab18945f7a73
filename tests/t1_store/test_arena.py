"""The arena: layout, records, refusals."""

from __future__ import annotations

import mmap

import pytest

from hypervisor.arena import (
    FRAMES_MIN,
    Arena,
    GuestRecord,
    MemberRecord,
    format_arena,
    frames_that_fit,
    layout,
    private_arena,
)
from ipc.abi import GuestId, PoolId, oid_from_int
from ipc.errors import OperatorError


@pytest.mark.parametrize("arena_bytes", [1 << 20, 5_000_001, 64 << 20, 1 << 30])
def test_the_whole_segment_fits_in_what_was_asked_for(arena_bytes: int) -> None:
    """Metadata is part of the arena's size, and not one more frame would fit."""
    frames = frames_that_fit(arena_bytes)

    assert layout(frames).end <= arena_bytes
    assert layout(frames + 1).end > arena_bytes


def test_columns_are_aligned() -> None:
    """A state word that crossed a cache line could be torn."""
    for frames in (64, 65, 1001):
        where = layout(frames)
        assert where.state_column % 8 == 0
        assert where.object_column % 4 == where.index_column % 4 == where.object_word % 4 == 0
        assert where.data % 4096 == 0


def test_an_arena_that_holds_too_few_frames_is_refused() -> None:
    """The message says how much is needed."""
    with pytest.raises(OperatorError, match=str(layout(FRAMES_MIN).end)):
        frames_that_fit(layout(FRAMES_MIN).end - 1)


def test_a_segment_that_is_no_arena_is_refused() -> None:
    """A foreign or damaged header is never interpreted."""
    mapping = mmap.mmap(-1, 1 << 20)
    mapping[:8] = b"whatever"
    with pytest.raises(OperatorError, match="tmem clean"):
        Arena(mapping)

    short = mmap.mmap(-1, 1 << 20)
    format_arena(short).close()
    long = mmap.mmap(-1, 2 << 20)
    long[:4096] = private_arena(1 << 20).mapping[:4096]
    with pytest.raises(OperatorError):
        Arena(long)


def test_records_survive_a_new_mapping_of_the_same_bytes() -> None:
    """What was published is read back; what was killed is not live."""
    arena = private_arena(1 << 20)
    guest = GuestRecord(GuestId(3), "web", 1234, 99, 1000)
    arena.publish_guest(guest)
    arena.publish_pool(7, GuestId(3), PoolId(2), 0x01000001, b"u" * 16)
    arena.publish_object(5, 7, oid_from_int(77))
    arena.publish_object(6, 7, oid_from_int(78))
    arena.kill_object(6)

    again = Arena(arena.mapping)

    assert again.read_guests() == [guest]
    (pool,) = again.read_pools()
    assert (pool.number, pool.guest, pool.pool_id, pool.dead) == (7, 3, 2, False)
    assert again.read_object(5) == (7, oid_from_int(77))
    assert again.read_object(6) is None
    arena.kill_pool(7)
    assert again.read_pools()[0].dead
    arena.free_pool(7)
    arena.free_guest(GuestId(3))
    assert again.read_pools() == []
    assert again.read_guests() == []


def test_the_generation_goes_up_with_each_start() -> None:
    """Guests tell a restart by it."""
    arena = private_arena(1 << 20)

    assert [arena.next_generation(), Arena(arena.mapping).next_generation()] == [1, 2]


def test_member_records_turn_into_heirs_and_go() -> None:
    """Word and guest change by one store; the rest of a record stays."""
    arena = private_arena(1 << 20)
    record = MemberRecord(1023, False, GuestId(3), 4095, PoolId(63), 255)
    arena.publish_member(record)
    arena.publish_member(record._replace(number=0, slot=7))

    assert Arena(arena.mapping).read_members() == [record._replace(number=0, slot=7), record]
    heir = record._replace(heir=True, guest=GuestId(9), pool_id=PoolId(0))
    arena.publish_member(heir)
    arena.free_member(0)
    assert Arena(arena.mapping).read_members() == [heir]


def test_punched_frames_read_as_zeros_and_neighbours_stay() -> None:
    """What is given back to the host is gone, and nothing else."""
    arena = private_arena(1 << 20)
    arena.data[:] = b"x" * len(arena.data)

    assert arena.punch(3, 2) == 2 * 4096

    expected = bytearray(b"x" * len(arena.data))
    expected[3 * 4096 : 5 * 4096] = bytes(2 * 4096)
    assert arena.data.tobytes() == bytes(expected)
