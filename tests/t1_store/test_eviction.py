"""Eviction: one conformance suite for every policy, then what each is for."""

from __future__ import annotations

import random

import pytest

from hypervisor.eviction import POLICIES, EvictionPolicy, make_policy
from hypervisor.frames import COLD, HOT, PERSISTENT, Frames
from ipc.errors import OperatorError


class Filled:
    """Frames full of ephemeral pages that came in frame order."""

    def __init__(self, policy: str, count: int) -> None:
        self.frames = Frames(count)
        self.policy: EvictionPolicy = make_policy(policy, self.frames)
        for frame in range(count):
            self.insert(frame)

    def insert(self, frame: int) -> None:
        self.frames.mark(frame, 1, HOT)
        self.policy.inserted(frame, 1)

    def remove(self, frame: int) -> None:
        self.policy.removed(frame, 1)
        self.frames.give(frame)

    def evict(self, count: int) -> list[int]:
        """Evict until `count` are out or nothing is left; the frames in order."""
        out: list[int] = []
        while len(out) < count:
            runs = self.policy.victims(count - len(out))
            if not runs:
                break
            for first, length in runs:
                for frame in range(first, first + length):
                    self.remove(frame)
                    out.append(frame)
        self.policy.check()
        return out


@pytest.fixture(params=list(POLICIES))
def policy(request: pytest.FixtureRequest) -> str:
    """Every policy by its name."""
    return str(request.param)


def test_every_ephemeral_page_is_named_once(policy: str) -> None:
    """Asked often enough, a policy names all pages and none twice."""
    filled = Filled(policy, 200)

    assert sorted(filled.evict(1000)) == list(range(200))


def test_no_policy_names_a_persistent_or_free_frame(policy: str) -> None:
    """Whatever is mixed in, victims are ephemeral."""
    filled = Filled(policy, 100)
    for frame in range(0, 100, 3):
        filled.remove(frame)
    for frame in range(0, 100, 6):
        filled.frames.mark(frame, 1, PERSISTENT)

    out = filled.evict(1000)

    assert sorted(out) == [frame for frame in range(100) if frame % 3]


def test_nothing_to_evict_is_said_at_once(policy: str) -> None:
    """Frames that are all persistent give no victim and no endless walk."""
    frames = Frames(100)
    frames.mark(0, 64, PERSISTENT)

    assert make_policy(policy, frames).victims(10) == []


def test_pages_that_came_first_go_first(policy: str) -> None:
    """Untouched pages that came in frame order leave in that order, under both policies."""
    filled = Filled(policy, 64)

    assert filled.evict(20) == list(range(20))


@pytest.mark.parametrize("seed", range(10))
def test_a_random_life_keeps_the_policy_consistent(policy: str, seed: int) -> None:
    """Insertions, removals and evictions in any order never lose or repeat a page."""
    rng = random.Random(seed)
    filled = Filled(policy, 128)
    held = set(range(128))
    for _ in range(300):
        choice = rng.random()
        if choice < 0.4 and held:
            frame = rng.choice(sorted(held))
            filled.remove(frame)
            held.remove(frame)
        elif choice < 0.8 and len(held) < 128:
            frame = rng.choice(sorted(set(range(128)) - held))
            filled.insert(frame)
            held.add(frame)
        else:
            out = filled.evict(rng.randint(1, 8))
            assert set(out) <= held
            held -= set(out)
        assert filled.frames.ephemeral == len(held)
    assert set(filled.evict(1000)) == held


def test_fifo_forgets_the_order_of_frames() -> None:
    """A page put into an early frame late leaves late."""
    filled = Filled("fifo", 64)
    filled.remove(0)
    filled.insert(0)

    assert filled.evict(64)[-1] == 0


def test_clock_gives_a_page_that_came_while_the_hand_moved_a_full_round() -> None:
    """A new page right before the hand is not the next victim."""
    filled = Filled("clock", 64)
    filled.evict(10)
    filled.insert(9)
    filled.remove(20)
    filled.insert(20)

    assert filled.evict(20)[:11] == [*range(10, 20), 21]


def test_clock_spares_a_page_that_was_used() -> None:
    """HOT is set on use; the hand cools it and takes the next one."""
    filled = Filled("clock", 64)
    filled.evict(1)
    filled.frames.kinds[1] = HOT

    assert filled.evict(1) == [2]
    assert filled.frames.kinds[1] == COLD


def test_an_unknown_policy_is_refused_with_the_choice() -> None:
    """The message names what there is."""
    with pytest.raises(OperatorError, match="clock, fifo"):
        make_policy("lru", Frames(64))
