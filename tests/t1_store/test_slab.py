"""Slabs: pages keep their bytes, spans their frames, and a killed process leaves nothing half."""

from __future__ import annotations

import contextlib
import random
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hypervisor.arena import SLAB_PART, Arena, layout, private_arena
from hypervisor.frames import PERSISTENT, SLAB, Frames
from hypervisor.slab import SIZE_MAX, Slabs, class_bytes
from hypervisor.spans import CLASS_BYTES, SPANS_OF
from ipc.abi import PAGE_BYTES
from ipc.errors import InvariantError

ARENA_BYTES = 600 * 1024


def made(arena_bytes: int = ARENA_BYTES) -> tuple[Arena, Frames, Slabs]:
    """Slabs in an arena of their own."""
    arena = private_arena(arena_bytes)
    frames = Frames(arena.frames_count)
    return arena, frames, Slabs(arena, frames)


def recovered(arena: Arena, live: dict[int, bytes], others: set[int]) -> tuple[Frames, Slabs]:
    """What a hypervisor that starts on this arena knows; `others` are frames not of slabs."""
    frames = Frames(arena.frames_count)
    slabs = Slabs(arena, frames)
    slabs.adopt_spans()
    for frame in others:
        frames.mark(frame, 1, PERSISTENT)
    for place, data in live.items():
        slabs.adopt(place, len(data))
    slabs.release_empty()
    return frames, slabs


def lengths(live: dict[int, bytes]) -> dict[int, int]:
    """What `check` wants to know."""
    return {place: len(data) for place, data in live.items()}


def stored(slabs: Slabs, data: bytes, *, persistent: bool = False) -> int:
    """Store an object; where."""
    place = slabs.allocate(len(data), persistent=persistent)
    slabs.write(place, data)
    return place


def filled(slabs: Slabs, frames: Frames, size: int, seed: int) -> dict[int, bytes]:
    """As many objects of a size as there is room for."""
    rng = random.Random(seed)
    live: dict[int, bytes] = {}
    while slabs.frames_needed(size, persistent=False) <= frames.free:
        data = rng.randbytes(size)
        live[stored(slabs, data)] = data
    return live


def compacted(slabs: Slabs, live: dict[int, bytes], limit: float) -> int:
    """Compact as far as it goes, as the store would; how many objects were moved."""
    moved = 0
    while (span := slabs.compaction_candidate(persistent=False, limit=limit)) is not None:
        for place in slabs.live_places(span):
            new = slabs.move(place, len(live[place]))
            assert new is not None
            assert new >> 8 != span
            live[new] = live.pop(place)
            slabs.free(place)
            moved += 1
    return moved


# --- classes


def test_a_class_is_a_slots_share_of_its_frames() -> None:
    """So what a page is charged is what it takes, and no span wastes a slot."""
    for (frames, slots), size in zip(SPANS_OF, CLASS_BYTES, strict=True):
        assert slots * size <= frames * PAGE_BYTES < slots * (size + 1)


@pytest.mark.parametrize("size", [1, 64, 65, 2048, 2049, SIZE_MAX])
def test_an_object_is_charged_the_smallest_class_that_holds_it(size: int) -> None:
    """Also at the edges."""
    assert class_bytes(size) == min(room for room in CLASS_BYTES if room >= size)


def test_what_is_larger_than_every_class_is_refused() -> None:
    """It is stored raw instead; a fifth of a frame is the least that compression must save."""
    assert class_bytes(SIZE_MAX + 1) == class_bytes(PAGE_BYTES) == 0
    assert PAGE_BYTES * 3 // 4 < SIZE_MAX <= PAGE_BYTES * 4 // 5


# --- objects


def test_objects_keep_their_bytes_in_frames_that_are_no_neighbours() -> None:
    """Slots are cut by frame boundaries; every size is stored, all of them side by side."""
    arena, frames, slabs = made(4 << 20)
    for frame in range(0, arena.frames_count, 2):
        frames.mark(frame, 1, PERSISTENT)
    rng = random.Random(7)
    live = {}
    for size in [*range(1, SIZE_MAX, 37), *CLASS_BYTES]:
        data = rng.randbytes(size)
        live[stored(slabs, data)] = data

    assert all(slabs.read(place, len(data)) == data for place, data in live.items())
    slabs.check(lengths(live))


def test_parts_of_an_object_are_written_and_read_by_offset() -> None:
    """A caller may keep a word of its own in front."""
    _, _, slabs = made()
    places = [slabs.allocate(SIZE_MAX, persistent=False) for _ in range(5)]
    for place in places:
        slabs.write(place, place.to_bytes(4, "little"))
        slabs.write(place, bytes([place & 0xFF]) * (SIZE_MAX - 4), 4)

    for place in places:
        assert slabs.read(place, 4) == place.to_bytes(4, "little")
        assert slabs.read(place, SIZE_MAX - 4, 4) == bytes([place & 0xFF]) * (SIZE_MAX - 4)
        assert slabs.read(place, SIZE_MAX)[:4] == place.to_bytes(4, "little")


def test_an_empty_span_gives_its_frames_back_at_once() -> None:
    """In the segment and here."""
    arena, frames, slabs = made()
    before = frames.free
    places = [slabs.allocate(SIZE_MAX, persistent=True) for _ in range(6)]
    assert frames.free == before - 8

    for place in places[:5]:
        slabs.free(place)
    assert frames.free == before - 4
    slabs.free(places[5])

    assert frames.free == before
    assert SLAB not in frames.kinds
    assert not any(arena.state)
    slabs.check({})


def test_ephemeral_and_persistent_objects_share_no_frame() -> None:
    """Evicting all that is ephemeral frees all its frames, whatever lies between."""
    _, frames, slabs = made()
    before = frames.free
    live = {}
    rng = random.Random(3)
    places = []
    for number in range(60):
        data = rng.randbytes(rng.randint(1, 1500))
        place = stored(slabs, data, persistent=bool(number % 2))
        places.append(place)
        live[place] = data
    for place in places[::2]:
        slabs.free(place)
        del live[place]

    slabs.check(lengths(live))
    persistent = slabs.stats().held_bytes // PAGE_BYTES
    assert frames.free == before - persistent
    assert all(found.persistent for found in slabs.stats().classes)


@pytest.mark.parametrize("objects", [1, 2])
def test_an_object_is_freed_once(objects: int) -> None:
    """Freeing it twice is our bug, whether its span is still there or not."""
    _, _, slabs = made()
    places = [slabs.allocate(3000, persistent=False) for _ in range(objects)]
    slabs.free(places[0])

    with pytest.raises(AssertionError):
        slabs.free(places[0])


# --- compaction


def three_spans(used: tuple[int, int, int]) -> tuple[Slabs, list[int]]:
    """Slabs with three spans of 16 slots of which so many are used; the first frames."""
    _, _, slabs = made()
    size = PAGE_BYTES // 16
    places = [slabs.allocate(size, persistent=False) for _ in range(48)]
    spans = list(dict.fromkeys(place >> 8 for place in places))
    assert len(spans) == 3
    for span, wanted in zip(spans, used, strict=True):
        for place in slabs.live_places(span)[wanted:]:
            slabs.free(place)
    return slabs, spans


def test_the_fullest_span_is_filled_first() -> None:
    """So that the others have a chance to become empty."""
    slabs, spans = three_spans((5, 13, 1))

    got = [slabs.allocate(256, persistent=False) >> 8 for _ in range(15)]

    assert got == [spans[1]] * 3 + [spans[0]] * 11 + [spans[2]]


def test_the_emptiest_span_is_emptied() -> None:
    """It takes the fewest copies to gain a frame."""
    slabs, spans = three_spans((3, 13, 2))

    assert slabs.compaction_candidate(persistent=False) == spans[2]


def test_compaction_gives_frames_back_in_a_full_arena() -> None:
    """With no frame free and every second object gone, half of the frames come back."""
    _, frames, slabs = made()
    live = filled(slabs, frames, 1300, seed=1)
    assert frames.free == 0
    rng = random.Random(2)
    for place in rng.sample(sorted(live), len(live) // 2):
        slabs.free(place)
        del live[place]
    held = slabs.held_bytes

    moved = compacted(slabs, live, 0.0)

    slabs.check(lengths(live))
    assert all(slabs.read(place, len(data)) == data for place, data in live.items())
    assert slabs.held_bytes == -(-len(live) // 3) * PAGE_BYTES < held
    assert 0 < moved < len(live)


def test_compaction_is_not_worth_it_below_its_limit() -> None:
    """A few holes stay."""
    _, frames, slabs = made()
    live = filled(slabs, frames, 1300, seed=1)
    for place in sorted(live)[::6]:
        slabs.free(place)
        del live[place]

    assert 0.15 < slabs.stats().fragmentation < 0.25
    assert slabs.compaction_candidate(persistent=False) is None
    assert slabs.compaction_candidate(persistent=False, limit=0.1) is not None


def test_a_candidate_takes_no_object_until_there_is_no_other_room() -> None:
    """Then it is filled like any other, before a frame is taken."""
    _, frames, slabs = made()
    live = filled(slabs, frames, 1300, seed=1)
    by_span: dict[int, list[int]] = {}
    for place in sorted(live):
        by_span.setdefault(place >> 8, []).append(place)
    spans = list(by_span)
    for span in spans[:2]:
        slabs.free(by_span[span][0])
        slabs.free(by_span[span][1])
    candidate = slabs.compaction_candidate(persistent=False, limit=0.0)
    assert candidate in spans[:2]
    assert slabs.compaction_candidate(persistent=False, limit=0.9) == candidate

    got = [slabs.allocate(1300, persistent=False) >> 8 for _ in range(2)]

    (other,) = set(spans[:2]) - {candidate}
    assert got == [other, other]
    assert slabs.move(slabs.live_places(candidate)[0], 1300) is None
    assert slabs.frames_needed(1300, persistent=False) == 0
    assert slabs.compaction_candidate(persistent=False, limit=0.0) is None
    assert slabs.allocate(1300, persistent=False) >> 8 == candidate


def test_a_candidate_takes_no_object_of_another_class() -> None:
    """Though it is the only span with room."""
    slabs, _ = three_spans((1, 8, 8))
    candidate = slabs.compaction_candidate(persistent=False)

    place = slabs.allocate(3000, persistent=False)

    assert place >> 8 != candidate
    assert slabs.compaction_candidate(persistent=False) == candidate


# --- recovery


class Killed(BaseException):
    """Stands for SIGKILL."""


class Mortal:
    """A view of the segment through which only so many stores are made."""

    left = 0

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def __getitem__(self, key: Any) -> Any:
        return self.view[key]

    def tolist(self) -> list[int]:
        return self.view.tolist()

    def __setitem__(self, key: Any, value: Any) -> None:
        Mortal.left -= 1
        if Mortal.left < 0:
            raise Killed
        self.view[key] = value


def busy_life(slabs: Slabs, live: dict[int, bytes]) -> None:
    """Puts, a flush of most, compaction, eviction of all but three; `live` is what entries say."""
    rng = random.Random(11)
    for size in (3000, 3000, 1500, 3000, 1500, 3000, 3000, 700, 3000, 3000, 3000, 1500) * 3:
        data = rng.randbytes(size)
        place = stored(slabs, data, persistent=size == 1500)
        live[place] = data
    for place in rng.sample(sorted(live), 21):
        live.pop(place)
        slabs.free(place)
    for persistent in (False, True):
        while (span := slabs.compaction_candidate(persistent=persistent, limit=0.0)) is not None:
            for place in slabs.live_places(span):
                new = slabs.move(place, len(live[place]))
                assert new is not None
                live[new] = live.pop(place)
                slabs.free(place)
    for place in sorted(live)[3:]:
        live.pop(place)
        slabs.free(place)


def test_a_process_that_is_killed_at_any_store_loses_nothing_and_leaks_nothing() -> None:
    """What entries name is there, and every other frame is free; so too after a second death."""
    stores = 0
    while survived_death_at(stores, stores % 4):
        stores += 1
    assert stores > 100


def survived_death_at(stores: int, stores_of_recovery: int) -> bool:
    """Die after so many stores, and in the first recovery again.  False: life ended before."""
    arena = private_arena(ARENA_BYTES)
    live: dict[int, bytes] = {}
    mortal = cast("Arena", type("MortalArena", (), dict(vars(arena))))
    for column in ("state", "object", "index", "data"):
        setattr(mortal, column, Mortal(getattr(arena, column)))
    Mortal.left = stores
    try:
        busy_life(Slabs(mortal, Frames(arena.frames_count)), live)
        return False
    except Killed:
        pass
    if stores_of_recovery < 3:
        Mortal.left = stores_of_recovery
        with contextlib.suppress(Killed):
            recovered(mortal, live, set())
    frames, slabs = recovered(arena, live, set())
    slabs.check(lengths(live))
    assert all(slabs.read(place, len(data)) == data for place, data in live.items())
    held_frames = slabs.held_bytes // PAGE_BYTES
    assert frames.free == arena.frames_count - held_frames
    assert sum(state != 0 for state in arena.state) == held_frames
    return True


def test_an_entry_that_names_no_slot_stops_recovery() -> None:
    """It can't come from a kill; going on would return the bytes of another page."""
    arena, _, slabs = made()
    place = stored(slabs, bytes(2000))
    free_frame = next(frame for frame in range(arena.frames_count) if not arena.state[frame])
    frames = Frames(arena.frames_count)
    again = Slabs(arena, frames)
    with pytest.raises(InvariantError, match="no span"):
        again.adopt(place, 2000)
    again.adopt_spans()

    for wrong, length in ((free_frame << 8, 10), (place, 2100), (place + 2, 10), (-1, 10)):
        with pytest.raises(InvariantError):
            again.adopt(wrong, length)
    again.adopt(place, 2000)
    with pytest.raises(InvariantError, match="two owners"):
        again.adopt(place, 2000)


def test_a_span_whose_columns_contradict_each_other_is_not_adopted() -> None:
    """Its frames are freed, and an entry that names it is caught."""
    arena, _, slabs = made()
    place = stored(slabs, bytes(3000))
    arena.index[place >> 8] ^= 4
    frames = Frames(arena.frames_count)
    again = Slabs(arena, frames)

    assert again.adopt_spans() == 3
    assert frames.free == arena.frames_count
    with pytest.raises(InvariantError):
        again.adopt(place, 3000)


# --- proof


def test_the_proof_finds_a_contradiction() -> None:
    """Whatever is kept twice is compared."""
    arena, frames, slabs = made()
    place = stored(slabs, bytes(3000))
    live = {place: 3000}
    first = place >> 8
    slabs.check(live)

    for wrong in ({}, {place: 3100}, {**live, place + 1: 10}):
        with pytest.raises(InvariantError):
            slabs.check(wrong)
    for column in (arena.state, arena.index, arena.object):
        column[first] ^= 2
        with pytest.raises(InvariantError):
            slabs.check(live)
        column[first] ^= 2
    frames.kinds[first] = PERSISTENT
    with pytest.raises(InvariantError):
        slabs.check(live)
    frames.kinds[first] = SLAB
    slabs.check(live)


# --- anything in any order


SIZES = (30, 700, 2000, 3000, 3200)
"""Most objects are of few classes, so that their spans fill."""


class SlabLife(RuleBasedStateMachine):
    """Slabs in an arena that others use as well, against a dictionary of places."""

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.arena, self.frames, self.slabs = made(layout(84).end)
        self.live: dict[int, bytes] = {}
        self.persistent: dict[int, bool] = {}
        self.others: set[int] = set()
        for frame in self.random.sample(range(self.arena.frames_count), 10):
            self.frames.mark(frame, 1, PERSISTENT)
            self.others.add(frame)

    @rule(
        size=st.one_of(st.sampled_from(SIZES), st.integers(1, SIZE_MAX)),
        persistent=st.booleans(),
        count=st.integers(1, 8),
    )
    def put(self, size: int, persistent: bool, count: int) -> None:
        for _ in range(count):
            needed = self.slabs.frames_needed(size, persistent=persistent)
            free = self.frames.free
            if needed > free:
                return
            data = self.random.randbytes(size)
            place = stored(self.slabs, data, persistent=persistent)
            assert place not in self.live
            assert self.frames.free == free - needed
            self.live[place] = data
            self.persistent[place] = persistent

    @precondition(lambda self: self.live)
    @rule(share=st.floats(0, 1))
    def free(self, share: float) -> None:
        for place in self.random.sample(sorted(self.live), int(share * len(self.live))):
            self.forget(place)

    def forget(self, place: int) -> None:
        del self.live[place]
        del self.persistent[place]
        self.slabs.free(place)

    @rule()
    def evict_all(self) -> None:
        for place in [place for place, kept in self.persistent.items() if not kept]:
            self.forget(place)

    @rule(persistent=st.booleans(), limit=st.floats(0, 0.5), objects=st.integers(0, 20))
    def compact_a_little(self, persistent: bool, limit: float, objects: int) -> None:
        span = self.slabs.compaction_candidate(persistent=persistent, limit=limit)
        if span is None:
            return
        free = self.frames.free
        places = self.slabs.live_places(span)
        for place in places[:objects]:
            assert self.persistent[place] == persistent
            new = self.slabs.move(place, len(self.live[place]))
            assert new is not None and new >> 8 != span
            self.live[new] = self.live.pop(place)
            self.persistent[new] = self.persistent.pop(place)
            self.slabs.free(place)
        assert (self.frames.free > free) == (objects >= len(places))

    @rule()
    def somebody_else_takes_a_frame(self) -> None:
        if self.frames.free:
            self.others.add(self.frames.take(PERSISTENT))

    @rule()
    def somebody_else_gives_a_frame(self) -> None:
        if self.others:
            frame = self.random.choice(sorted(self.others))
            self.others.remove(frame)
            # What lies in the columns of a free frame is anything, but for the state.
            self.arena.object[frame] = SLAB_PART
            self.frames.give(frame)

    @rule()
    def restart(self) -> None:
        held = self.slabs.held_bytes
        self.frames, self.slabs = recovered(self.arena, self.live, self.others)
        assert self.slabs.held_bytes == held

    @invariant()
    def agrees(self) -> None:
        self.slabs.check(lengths(self.live))
        for place, data in self.live.items():
            assert self.slabs.read(place, len(data)) == data
        stats = self.slabs.stats()
        assert stats.objects == len(self.live)
        assert stats.used_bytes == sum(class_bytes(len(data)) for data in self.live.values())
        assert stats.held_bytes == self.frames.kinds.count(SLAB) * PAGE_BYTES
        assert sum(found.held_bytes for found in stats.classes) == stats.held_bytes
        assert self.frames.free + len(self.others) + stats.held_bytes // PAGE_BYTES == (
            self.arena.frames_count
        )


TestSlabLife = SlabLife.TestCase
TestSlabLife.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
