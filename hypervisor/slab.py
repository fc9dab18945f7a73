"""Slabs: compressed pages in slots of a few sizes.

`spans` has the frames and the slots; here are objects of any size, their bytes, what compaction
needs and what recovery does.  A *place* names an object's slot for as long as it lives there.

A page that is compressed is charged its class, which is its share of a span's frames; what spans
hold beyond that is fragmentation, and is nobody's.  Compaction is the caller's to drive, in slices
of its own, because only it knows which entries name a place:

    span = slabs.compaction_candidate(persistent=...)
    for place in slabs.live_places(span):           as many as the slice allows
        new = slabs.move(place, length)             the bytes are in both places now
        (the entry names `new`, by one store)
        slabs.free(place)                           the last one gives the frames back

No step needs a free frame, so it also helps an arena that is full.  A process that is killed
between two of these steps leaves entries that name one place or the other.

Xen kept compressed pages in a heap of neighbouring bytes (xvmalloc, then TLSF) that never moved
anything: evicting many pages might free no frame at all, and compression was off by default for
that reason.  Classes, scattered frames and lists by fullness are zsmalloc's idea.  It also writes
an owner in front of each object; here the caller may, as `write` and `read` take an offset.
"""

from __future__ import annotations

from operator import mul
from typing import Final, NamedTuple

from hypervisor.arena import SLAB_PART, Arena
from hypervisor.frames import SLAB, Frames
from hypervisor.spans import (
    CLASS_BYTES,
    CLASSES,
    PERSISTENT_BIT,
    PLACE_SHIFT,
    SLOT_MASK,
    SPAN_FRAMES_MAX,
    SPANS_OF,
    Spans,
)
from ipc.abi import PAGE_BYTES
from ipc.errors import InvariantError

SIZE_MAX: Final = CLASS_BYTES[-1]
"""What is larger is stored raw, a page in a frame."""

BACK_BYTES: Final = 4
"""What `contents` puts in front of each compressed page, so that compaction finds its owner."""

COMPACTION_LIMIT: Final = 0.25
"""Share of the held bytes that may be idle before compaction is worth its copies."""

CLASS_OF: Final = bytes(
    next(number for number, room in enumerate(CLASS_BYTES) if size <= room)
    for size in range(SIZE_MAX + 1)
)
"""By size."""


class ClassStats(NamedTuple):
    """The spans of one class and kind."""

    class_bytes: int
    persistent: bool
    spans: int
    objects: int
    held_bytes: int


class SlabStats(NamedTuple):
    """What the slabs hold; `classes` lists those that have a span."""

    objects: int
    used_bytes: int
    """The taken slots, each at its class."""
    held_bytes: int
    """The frames."""
    fragmentation: float
    """Share of the held bytes that is not used."""
    classes: list[ClassStats]


def class_bytes(size: int) -> int:
    """What an object of `size` bytes takes and is charged; 0 if it is too large for any class."""
    return CLASS_BYTES[CLASS_OF[size]] if size <= SIZE_MAX else 0


class Slabs:
    """Objects of 1 to SIZE_MAX bytes; ephemeral and persistent ones never share a frame."""

    def __init__(self, arena: Arena, frames: Frames) -> None:
        self._arena = arena
        self._data = arena.data
        self._frames = frames
        self._spans = Spans(arena, frames)

    def frames_needed(self, size: int, *, persistent: bool) -> int:
        """Frames that must be free for `allocate`: none if a span has room."""
        column = CLASS_OF[size] + CLASSES * persistent
        return 0 if self._spans.free_slots(column) else SPANS_OF[column % CLASSES][0]

    def is_open(self, size: int, *, persistent: bool) -> bool:
        """Whether `allocate` is sure to find room at once."""
        return self._spans.filling[CLASS_OF[size] + CLASSES * persistent] >= 0

    def room(self, size: int, *, persistent: bool) -> int:
        """Objects of that size that fit without another frame."""
        return self._spans.free_slots(CLASS_OF[size] + CLASSES * persistent)

    # --- objects

    def allocate(self, size: int, *, persistent: bool) -> int:
        """A place for `size` bytes.  Precondition: `frames_needed` frames are free."""
        return self._spans.take(CLASS_OF[size] + CLASSES * persistent)

    def write(self, place: int, data: bytes, at: int = 0) -> None:
        """Fill an object from byte `at` on, before an entry names its place."""
        part, offset = self._where(place, at)
        frames = self._spans.frames
        first = frames[part] * PAGE_BYTES + offset
        length = len(data)
        fits = PAGE_BYTES - offset
        if length <= fits:
            self._data[first : first + length] = data
        else:
            self._data[first : first + fits] = data[:fits]
            second = frames[part + 1] * PAGE_BYTES
            self._data[second : second + length - fits] = data[fits:]

    def write_whole(self, place: int, back: int, data: bytes) -> None:
        """Fill an object with its BACK_BYTES and what follows them."""
        spans = self._spans
        span = spans.at[place >> PLACE_SHIFT]
        start = CLASS_BYTES[spans.columns[span] % CLASSES] * (place & SLOT_MASK)
        offset = start % PAGE_BYTES
        whole = back.to_bytes(BACK_BYTES, "little") + data
        if offset + len(whole) > PAGE_BYTES:
            self.write(place, whole)
            return
        first = spans.frames[SPAN_FRAMES_MAX * span + start // PAGE_BYTES] * PAGE_BYTES + offset
        self._data[first : first + len(whole)] = whole

    def read(self, place: int, length: int, at: int = 0) -> bytes:
        """A copy of `length` bytes of an object, from byte `at` on."""
        part, offset = self._where(place, at)
        frames = self._spans.frames
        first = frames[part] * PAGE_BYTES + offset
        fits = PAGE_BYTES - offset
        if length <= fits:
            return self._data[first : first + length].tobytes()
        second = frames[part + 1] * PAGE_BYTES
        return b"".join(
            (self._data[first : first + fits], self._data[second : second + length - fits])
        )

    def free(self, place: int) -> None:
        """An object that no entry names any more goes; an empty span's frames are free at once."""
        self._spans.drop(place)

    def free_all(self, places: list[int]) -> int:
        """`free` of many; the bytes that they took, each its class."""
        return self._spans.drop_all(places)

    def view(self, place: int, length: int, at: int = 0) -> memoryview | bytes:
        """`read` without a copy where the bytes lie in one frame; good until the object goes."""
        spans = self._spans
        span = spans.at[place >> PLACE_SHIFT]
        start = CLASS_BYTES[spans.columns[span] % CLASSES] * (place & SLOT_MASK) + at
        offset = start % PAGE_BYTES
        if offset + length > PAGE_BYTES:
            return self.read(place, length, at)
        first = spans.frames[SPAN_FRAMES_MAX * span + start // PAGE_BYTES] * PAGE_BYTES + offset
        return self._data[first : first + length]

    def _where(self, place: int, at: int) -> tuple[int, int]:
        """Of a byte of an object: the place of its frame in `Spans.frames`, and its offset."""
        spans = self._spans
        span = spans.at[place >> PLACE_SHIFT]
        start = CLASS_BYTES[spans.columns[span] % CLASSES] * (place & SLOT_MASK) + at
        return SPAN_FRAMES_MAX * span + start // PAGE_BYTES, start % PAGE_BYTES

    # --- compaction

    def compaction_candidate(
        self, *, persistent: bool, limit: float = COMPACTION_LIMIT
    ) -> int | None:
        """A span to empty, named by its first frame, whose objects all fit into other spans.

        None if at most `limit` of the held bytes is idle, or if no frame can be had.  The span
        takes no new object until it is empty or its room is the last of its class; a call before
        that names it again.
        """
        spans = self._spans
        span = spans.closed(persistent=persistent)
        if span >= 0:
            column = spans.columns[span]
            if spans.free_slots(column) >= SPANS_OF[column % CLASSES][1]:
                return spans.frames[SPAN_FRAMES_MAX * span]
            spans.reopen(span)
        base = CLASSES if persistent else 0
        held = spans.held_frames[persistent] * PAGE_BYTES
        used = sum(map(mul, spans.objects[base : base + CLASSES], CLASS_BYTES))
        if held - used <= limit * held:
            return None
        gain = 0
        best = -1
        for column in range(base, base + CLASSES):
            frames, slots = SPANS_OF[column - base]
            idle_frames = spans.free_slots(column) // slots * frames
            if idle_frames > gain:
                gain, best = idle_frames, column
        return spans.frames[SPAN_FRAMES_MAX * spans.close_emptiest(best)] if gain else None

    def live_places(self, first_frame: int) -> list[int]:
        """The places of the objects in the span that begins with this frame."""
        slots = self._spans.slots(self._spans.at[first_frame])
        return [first_frame << PLACE_SHIFT | slot for slot in slots]

    def move(self, place: int, length: int) -> int | None:
        """Copy an object of the candidate into another span; None if none of its class has room.

        Both places are taken then: publish the new one and free the old one.
        """
        spans = self._spans
        span = spans.at[place >> PLACE_SHIFT]
        column = spans.columns[span]
        assert span == spans.closed(persistent=column >= CLASSES)
        free_here = SPANS_OF[column % CLASSES][1] - spans.taken[span].bit_count()
        if spans.free_slots(column) == free_here:
            return None
        new = spans.take(column)
        self.write(new, self.read(place, length))
        return new

    # --- recovery

    def adopt_spans(self) -> int:
        """Find the spans of a killed process; how many frames of incomplete ones were freed.

        Precondition: none is known, and their frames are not marked yet.  All slots are free then;
        `adopt` what lives and `release_empty`.
        """
        arena = self._arena
        states = arena.state.tolist()
        parts: dict[int, list[tuple[int, int]]] = {}
        for frame, object_ in enumerate(arena.object.tolist()):
            state = states[frame]
            if object_ == SLAB_PART and state:
                parts.setdefault(state >> 8, []).append((state >> 1 & 3, frame))
        freed = 0
        for first, found in parts.items():
            frames = [frame for _, frame in sorted(found)]
            column = self._column_of(first, frames)
            if column is None:
                for frame in frames:
                    arena.state[frame] = 0
                freed += len(frames)
                continue
            for frame in frames:
                self._frames.mark(frame, 1, SLAB)
            self._spans.enlist(column, frames)
        return freed

    def _column_of(self, first: int, frames: list[int]) -> int | None:
        """The column of a span, by its frames in order of position; None if it is incomplete."""
        index = self._arena.index
        head = index[frames[0]] & ~3
        number = (head & ~PERSISTENT_BIT) >> 2
        if frames[0] != first or number >= CLASSES or len(frames) != SPANS_OF[number][0]:
            return None
        if any(index[frame] != head | position for position, frame in enumerate(frames)):
            return None
        return number + (CLASSES if head & PERSISTENT_BIT else 0)

    def adopt(self, place: int, length: int) -> None:
        """A live entry names this place.  Raises InvariantError if that can't be."""
        spans = self._spans
        frame, slot = place >> PLACE_SHIFT, place & SLOT_MASK
        span = spans.at[frame] if 0 <= frame < len(spans.at) else -1
        if span < 0:
            raise InvariantError(f"place {place:#x} lies in no span")
        number = spans.columns[span] % CLASSES
        if slot >= SPANS_OF[number][1] or length > CLASS_BYTES[number]:
            raise InvariantError(f"place {place:#x} of class {number} can't hold {length} bytes")
        if spans.taken[span] >> slot & 1:
            raise InvariantError(f"place {place:#x} has two owners")
        spans.adopt(span, slot)

    def release_empty(self) -> int:
        """Free the spans in which nothing lives; how many frames."""
        before = self._frames.free
        for span in self._spans.numbers():
            if not self._spans.taken[span]:
                self._spans.give(span)
        return self._frames.free - before

    # --- what is known about them

    @property
    def used_bytes(self) -> int:
        """The taken slots, each at its class."""
        return sum(map(mul, self._spans.objects, CLASS_BYTES * 2))

    @property
    def held_bytes(self) -> int:
        """The frames of all spans."""
        return sum(self._spans.held_frames) * PAGE_BYTES

    @property
    def ephemeral_frames(self) -> int:
        """Frames of spans that hold ephemeral pages."""
        return self._spans.held_frames[False]

    def stats(self) -> SlabStats:
        """A walk over the classes, not over the spans."""
        spans = self._spans
        held, used = self.held_bytes, self.used_bytes
        classes = [
            ClassStats(
                CLASS_BYTES[column % CLASSES],
                column >= CLASSES,
                count,
                spans.objects[column],
                count * SPANS_OF[column % CLASSES][0] * PAGE_BYTES,
            )
            for column, count in enumerate(spans.counts)
            if count
        ]
        return SlabStats(sum(spans.objects), used, held, 1 - used / held if held else 0.0, classes)

    def check(self, live: dict[int, int]) -> None:
        """Raises InvariantError unless exactly the places of `live` (place to length) are taken,
        none is too small, and spans, counts and frame columns agree."""
        spans = self._spans
        spans.check()
        taken = {
            place
            for span in spans.numbers()
            for place in self.live_places(spans.frames[SPAN_FRAMES_MAX * span])
        }
        if taken != live.keys():
            raise InvariantError(
                f"slots without owner: {sorted(taken - live.keys())[:5]}, "
                f"places that are free: {sorted(live.keys() - taken)[:5]}"
            )
        for place, length in live.items():
            number = spans.columns[spans.at[place >> PLACE_SHIFT]] % CLASSES
            if length > CLASS_BYTES[number]:
                raise InvariantError(f"place {place:#x} is too small for {length} bytes")
