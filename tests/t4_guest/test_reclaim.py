"""Whose pages go: what each kind costs the disk decides, and who can't give any is passed over."""

from __future__ import annotations

import errno
import random

import pytest

from guests.reclaim import BATCH_PAGES, FILES_FLOOR_PAGES, PageLists, Reclaim

FRAMES = 2000


class Kind:
    """Pages of one kind; `stuck` says how an attempt to evict ends."""

    def __init__(self, world: World, pages: int) -> None:
        self.lists = PageLists(FRAMES)
        self.world = world
        self.stuck: int | None = None
        self.evicted = 0
        for _ in range(pages):
            self.bring_in()

    def bring_in(self) -> None:
        self.lists.add(self.world.free.pop())

    def evict(self, frames: list[int]) -> int:
        if self.stuck:
            raise OSError(self.stuck, "stuck")
        if self.stuck == 0:
            return 0
        for frame in frames:
            self.lists.remove(frame)
            self.world.free.append(frame)
        self.evicted += len(frames)
        return len(frames)


class World:
    """Files and anonymous memory over one set of frames."""

    def __init__(self, files: int = 900, anonymous: int = 900) -> None:
        self.free = list(range(FRAMES))
        self.reclaim = Reclaim(FRAMES, lambda: len(self.free))
        self.files, self.anonymous = Kind(self, files), Kind(self, anonymous)
        self.reclaim.serve(files=self.files, anonymous=self.anonymous)

    def press(self, batches: int) -> float:
        """Evict so many batches, each brought in again; the share that was anonymous."""
        before = self.files.evicted, self.anonymous.evicted
        for _ in range(batches):
            self.reclaim.make_room(len(self.free) + 1)
            for kind, had in ((self.files, before[0]), (self.anonymous, before[1])):
                while len(kind.lists) < 900 and kind.evicted > had:
                    kind.bring_in()
        files, anonymous = (
            kind.evicted - had
            for kind, had in zip((self.files, self.anonymous), before, strict=True)
        )
        return anonymous / (files + anonymous)


def test_swappiness_is_the_share_while_nobody_costs_anything() -> None:
    """60 of 200; 0 is none as long as there are files."""
    world = World()
    assert world.press(200) == pytest.approx(0.3, abs=0.01)
    world.reclaim.swappiness = 100
    assert world.press(200) == pytest.approx(0.5, abs=0.01)
    world.reclaim.swappiness = 0
    assert world.press(100) == 0


def test_the_dearer_kind_is_spared() -> None:
    """As in get_scan_count: the share goes with the inverse of the cost, and costs fade."""
    world = World()
    world.reclaim.note_cost(anonymous=90)
    assert world.press(300) < 0.01
    world.reclaim.note_cost(files=300)
    dearer_files = world.press(300)
    assert dearer_files > 0.5
    for _ in range(100):
        world.reclaim.note_cost(files=100, anonymous=100)
    assert world.press(300) == pytest.approx(0.3, abs=0.05)


def test_who_has_nothing_to_give_is_passed_over() -> None:
    """No swap left, or a disk that fails: the others' pages go; the failure is told if none do."""
    world = World()
    world.anonymous.stuck = 0
    assert world.press(50) == 0
    world.anonymous.stuck = errno.EIO
    assert world.press(50) == 0
    world.files.stuck = 0
    with pytest.raises(OSError, match="stuck"):
        world.reclaim.make_room(len(world.free) + 1)
    world.anonymous.stuck = 0
    asked: list[int] = []

    def kill() -> bool:
        asked.append(1)
        world.files.stuck = None
        return True

    world.reclaim.exhausted = kill
    with pytest.raises(OSError, match="nobody can be killed") as failed:
        world.reclaim.make_room(len(world.free) + 1, may_kill=False)
    assert failed.value.errno == errno.ENOMEM
    assert not asked
    world.reclaim.make_room(len(world.free) + 1)
    assert asked == [1]


def test_the_last_file_pages_stay() -> None:
    """Below the floor anonymous memory goes, whatever it costs."""
    world = World(files=FILES_FLOOR_PAGES)
    world.reclaim.note_cost(anonymous=400)
    world.reclaim.make_room(len(world.free) + 1)
    assert world.anonymous.evicted == BATCH_PAGES
    assert world.files.evicted == 0


def test_the_background_keeps_some_frames_free() -> None:
    """It begins below the low mark and ends at twice that, a batch at a time."""
    world = World(files=990, anonymous=1000)
    low = world.reclaim.low_pages
    rng = random.Random(1)
    seen: set[bool] = set()
    for _ in range(400):
        before = len(world.free)
        world.reclaim.in_background()
        seen.add(len(world.free) > before)
        assert len(world.free) - before in (0, BATCH_PAGES)
        assert len(world.free) >= low or len(world.free) == before + BATCH_PAGES
        for _ in range(min(rng.randrange(6), len(world.free))):
            rng.choice((world.files, world.anonymous)).bring_in()
    assert seen == {True, False}
    assert world.reclaim.direct_pages == 0 < world.reclaim.background_pages
