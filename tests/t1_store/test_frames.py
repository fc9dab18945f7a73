"""Frames: allocation never hands a frame out twice and prefers neighbours."""

from __future__ import annotations

import random

import pytest

from hypervisor.frames import (
    CONTENT,
    EPHEMERAL,
    FREE,
    KINDS,
    PERSISTENT,
    RUN_MAX,
    SLAB,
    TABLE,
    Frames,
)


def take_run(frames: Frames, count: int, kind: int = EPHEMERAL) -> list[int]:
    """Allocate and mark."""
    runs = frames.allocate(count, kind)
    return [frame for first, length in runs for frame in range(first, first + length)]


def test_an_allocation_from_fresh_frames_is_one_run() -> None:
    """Neighbours are what makes an extent one copy."""
    frames = Frames(1000)

    assert frames.allocate(RUN_MAX, EPHEMERAL) == [(1000 - RUN_MAX, RUN_MAX)]


def test_a_run_that_was_freed_last_is_used_first() -> None:
    """It is the one that is still in the CPU's cache."""
    frames = Frames(1000)
    first = take_run(frames, 32)
    take_run(frames, 32)
    frames.release(first[0], 32)

    assert frames.allocate(32, EPHEMERAL) == [(first[0], 32)]


def test_a_full_arena_gives_the_run_that_fits() -> None:
    """Longer ones are left whole for who needs them."""
    frames = Frames(64)
    take_run(frames, 64)
    for first, count in ((10, 4), (20, 8), (40, 16)):
        frames.release(first, count)

    assert frames.allocate(7, EPHEMERAL) == [(20, 7)]
    assert frames.allocate(16, EPHEMERAL) == [(40, 16)]


@pytest.mark.parametrize("order", [(0, 4, 8), (8, 4, 0), (4, 0, 8)])
def test_neighbours_that_were_freed_one_by_one_are_one_run(order: tuple[int, ...]) -> None:
    """Whichever of them came first, and if one was given as a single frame."""
    frames = Frames(640)
    for _ in range(10):
        take_run(frames, 64)
    frames.give(7)
    for first in order:
        frames.release(first, {0: 4, 4: 3, 8: 8}[first])

    assert frames.allocate(16, EPHEMERAL) == [(0, 16)]


def test_scattered_frames_are_gathered_without_repeating_one() -> None:
    """With every second frame free, an extent gets single frames, each once."""
    frames = Frames(64)
    taken = take_run(frames, 64)
    for frame in taken[::2]:
        frames.give(frame)

    got = [frames.take(EPHEMERAL) for _ in range(16)] + take_run(frames, 16)

    assert sorted(got) == taken[::2]
    assert frames.free == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_allocation_agrees_with_a_set(seed: int) -> None:
    """Counts, kinds and a plain set of free frames say the same after every step."""
    rng = random.Random(seed)
    frames = Frames(rng.choice((64, 100, 500)))
    held: dict[int, int] = {}
    for _ in range(400):
        kind = rng.choice((EPHEMERAL, PERSISTENT, TABLE, SLAB, CONTENT))
        if held and rng.random() < 0.5:
            frame = rng.choice(list(held))
            run = 1
            while held.get(frame + run) == held[frame] and run < 20:
                run += 1
            if run == 1:
                frames.give(frame)
            else:
                frames.release(frame, run)
            for gone in range(frame, frame + run):
                del held[gone]
        elif rng.random() < 0.5:
            if frames.free:
                frame = frames.take(kind)
                assert frame not in held
                held[frame] = kind
        else:
            count = rng.randint(1, min(RUN_MAX, max(1, frames.free)))
            if count <= frames.free:
                got = take_run(frames, count, kind)
                assert len(set(got)) == count
                assert not held.keys() & set(got)
                held.update(dict.fromkeys(got, kind))
        assert frames.free == frames.count - len(held) == frames.kinds.count(FREE)
        for kind in range(1, len(KINDS)):
            assert frames.count_kind(kind) == sum(one == kind for one in held.values())


def test_free_runs_are_found_whatever_lies_between() -> None:
    """What is given back to the host: every free frame of a slice, each once."""
    frames = Frames(200)
    rng = random.Random(5)
    for frame in rng.sample(range(200), 90):
        frames.mark(frame, 1, PERSISTENT)

    runs = [run for start in range(0, 200, 37) for run in frames.free_runs(start, 37)]

    found = [frame for first, count in runs for frame in range(first, first + count)]
    assert found == [frame for frame in range(200) if not frames.kinds[frame]]
