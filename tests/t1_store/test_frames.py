"""Frames: allocation never hands a frame out twice and prefers neighbours."""

from __future__ import annotations

import random

import pytest

from hypervisor.frames import COLD, FREE, HOT, PERSISTENT, RUN_MAX, Frames


def take_run(frames: Frames, count: int, kind: int = HOT) -> list[int]:
    """Allocate and mark."""
    runs = frames.allocate(count)
    for first, length in runs:
        frames.mark(first, length, kind)
    return [frame for first, length in runs for frame in range(first, first + length)]


def test_an_allocation_from_fresh_frames_is_one_run() -> None:
    """Neighbours are what makes an extent one copy."""
    frames = Frames(1000)

    assert frames.allocate(RUN_MAX) == [(1000 - RUN_MAX, RUN_MAX)]


def test_a_run_that_was_freed_last_is_used_first() -> None:
    """It is the one that is still in the CPU's cache."""
    frames = Frames(1000)
    first = take_run(frames, 32)
    take_run(frames, 32)
    frames.release(first[0], 32)

    assert frames.allocate(32) == [(first[0], 32)]


def test_scattered_frames_are_gathered_without_repeating_one() -> None:
    """With every second frame free, an extent gets single frames, each once."""
    frames = Frames(64)
    taken = take_run(frames, 64)
    for frame in taken[::2]:
        frames.give(frame)

    got = [frames.take(HOT) for _ in range(16)] + take_run(frames, 16)

    assert sorted(got) == taken[::2]
    assert frames.free == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_allocation_agrees_with_a_set(seed: int) -> None:
    """Counts, kinds and a plain set of free frames say the same after every step."""
    rng = random.Random(seed)
    frames = Frames(rng.choice((64, 100, 500)))
    held: dict[int, int] = {}
    for _ in range(400):
        kind = rng.choice((HOT, PERSISTENT))
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
        assert frames.persistent == sum(kind == PERSISTENT for kind in held.values())
        assert frames.ephemeral == sum(kind == HOT for kind in held.values())
    assert COLD not in frames.kinds
