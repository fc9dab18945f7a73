"""Fencing tokens: exact while they are few, never too low, and bounded."""

from __future__ import annotations

import random
import sys

import pytest

from hypervisor.arena import NOBODY, private_arena
from hypervisor.tokens import COARSE, EXACT_MAX, Tokens
from ipc.abi import GuestId, PoolId, oid_from_int, pool_flag_word

SHARED = pool_flag_word(shared=True)


def tokens_of(floor: int = 0) -> Tokens:
    """Of pool 3 of an arena."""
    arena = private_arena(1 << 20)
    arena.publish_pool(3, GuestId(NOBODY), PoolId(0), SHARED, b"u" * 16)
    arena.set_pool_token(3, floor)
    return Tokens(arena, 3, floor)


def recorded(tokens: Tokens) -> int:
    """What the segment says."""
    (record,) = tokens._arena.read_pools()
    assert record.guest == NOBODY
    return record.token


def test_the_newest_of_each_object_counts() -> None:
    """Older ones, and those of other objects, change nothing."""
    tokens = tokens_of()
    one, two = oid_from_int(1), oid_from_int(2)
    for token in (5, 3, 5, 9, 8):
        tokens.see(one, token)
    tokens.see(two, 4)

    assert [tokens.needed(oid) for oid in (one, two, oid_from_int(3))] == [9, 4, 0]
    assert tokens.newest == recorded(tokens) == 9
    assert not tokens.check()


@pytest.mark.parametrize("token", [1, 2**31, 2**32, 2**63, 2**64 - 1])
def test_all_64_bits_reach_the_segment(token: int) -> None:
    """Neighbouring records and the rest of this one stay as they are."""
    tokens = tokens_of()
    before = tokens._arena.read_pools()[0]
    tokens.see(oid_from_int(1), token)

    assert tokens._arena.read_pools() == [before._replace(token=token)]


def test_a_restart_makes_the_newest_the_floor() -> None:
    """Of objects that were never heard of, too."""
    tokens = tokens_of(7)

    assert tokens.needed(oid_from_int(1)) == 7
    tokens.see(oid_from_int(1), 6)
    assert tokens.needed(oid_from_int(1)) == 7
    tokens.see(oid_from_int(1), 8)
    assert (tokens.needed(oid_from_int(1)), tokens.needed(oid_from_int(2))) == (8, 7)
    assert not tokens.check()


def test_never_too_low_and_bounded_however_many_objects() -> None:
    """T1 and T3 on random histories of many more objects than are known exactly."""
    seed = random.SystemRandom().randrange(1 << 30)
    rng = random.Random(seed)
    tokens = tokens_of()
    truth: dict[int, int] = {}
    for step in range(20_000):
        oid, token = rng.randrange(3 * EXACT_MAX), rng.randrange(1, 1 << 20)
        tokens.see(oid_from_int(oid), token)
        truth[oid] = max(truth.get(oid, 0), token)
        assert tokens.needed(oid_from_int(oid)) >= truth[oid], f"seed {seed} step {step}"
    for oid, token in truth.items():
        assert token <= tokens.needed(oid_from_int(oid)) <= tokens.newest, f"seed {seed}"
    assert not tokens.check(), f"seed {seed}"
    assert tokens.newest == recorded(tokens) == max(truth.values())
    assert len(tokens._exact) == EXACT_MAX
    assert tokens._coarse is not None
    assert len(tokens._coarse) == COARSE
    held = sum(sys.getsizeof(oid) + sys.getsizeof(token) for oid, token in tokens._exact.items())
    assert held + sys.getsizeof(tokens._exact) + sys.getsizeof(tokens._coarse) < 1 << 20


def test_exact_while_the_objects_are_few() -> None:
    """No refusal of a good page."""
    seed = random.SystemRandom().randrange(1 << 30)
    rng = random.Random(seed)
    tokens = tokens_of(3)
    truth: dict[int, int] = {}
    for _ in range(10_000):
        oid, token = rng.randrange(EXACT_MAX), rng.randrange(1000)
        tokens.see(oid_from_int(oid), token)
        truth[oid] = max(truth.get(oid, 3), token)
    assert all(tokens.needed(oid_from_int(oid)) == token for oid, token in truth.items()), seed
