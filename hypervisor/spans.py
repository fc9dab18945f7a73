"""Spans: one to four page frames, not neighbours, cut into slots as if they lay end to end.

A span's frames are no more in the segment than their columns (arena A1, A6):

  object  SLAB_PART
  index   class << 2 | position in the span, and PERSISTENT_BIT
  state   first frame << 8 | position << 1 | 1

State is written last and cleared first.  A span of which a position is missing was being made, or
given back, when the process died; nothing lives in it and its frames are free.  Which slots are
taken is not in the segment: recovery learns it from the entries, which are the only truth.

Here a span is a number and 33 bytes of arrays; its taken slots are the bits of one word.  Each
class has one span that is being filled.  When it is full the fullest of the others that have room
follows, so that the rest become empty; lists by how full they are say which.  Listed are all spans
but full ones, those being filled, and the *closed* one of each kind, which compaction empties.
"""

from __future__ import annotations

from array import array
from typing import Final

from hypervisor.arena import SLAB_PART, Arena
from hypervisor.frames import SLAB, Frames
from ipc.abi import PAGE_BYTES
from ipc.errors import InvariantError

SPANS_OF: Final = (
    *((1, 64), (1, 48), (1, 32), (1, 24), (1, 20), (1, 16), (1, 14), (1, 12), (1, 10), (1, 9)),
    *((1, 8), (1, 7), (1, 6), (2, 11), (1, 5), (2, 9), (1, 4), (2, 7), (3, 10), (1, 3)),
    *((4, 11), (3, 8), (2, 5), (3, 7), (4, 9), (1, 2), (4, 7), (3, 5), (2, 3), (3, 4), (4, 5)),
)
"""Frames and slots of a span, by class: those at which next to nothing is left over, so that a
class is a slot's share of the frames.  Steps of at most an eighth from 1 KiB on, where most
compressed pages are, and of a quarter or so below; finer ones leave more spans half filled than
they save."""

CLASS_BYTES: Final = tuple(frames * PAGE_BYTES // slots for frames, slots in SPANS_OF)
CLASSES: Final = len(SPANS_OF)
SPAN_FRAMES_MAX: Final = 4
SLOTS_MAX: Final = 64

PERSISTENT_BIT: Final = 1 << 31
PLACE_SHIFT: Final = 8
"""A place is first frame << PLACE_SHIFT | slot."""
SLOT_MASK: Final = 0xFF

_GROUPS: Final = 4
_FULL: Final = _GROUPS
_GROUP_OF: Final = tuple(
    bytes(used * _GROUPS // slots for used in range(slots + 1)) for _, slots in SPANS_OF
)
"""By class and used slots: the list that a span stands in, _FULL for none."""
_ALL_TAKEN: Final = tuple((1 << slots) - 1 for _, slots in SPANS_OF) * 2
"""By column."""
_CANDIDATES_MAX: Final = 16
"""Spans looked at for the emptiest of the emptiest quarter."""
_NO_FRAMES: Final = array("i", [-1]) * SPAN_FRAMES_MAX

assert max(slots for _, slots in SPANS_OF) == SLOTS_MAX
assert max(frames for frames, _ in SPANS_OF) == SPAN_FRAMES_MAX
assert list(CLASS_BYTES) == sorted(set(CLASS_BYTES))


class Spans:
    """All spans of an arena and which of their slots are taken.

    A *column* is a class and a kind: class, plus CLASSES if persistent.  Columns share no span, so
    when every ephemeral page is evicted no ephemeral span is left.
    """

    def __init__(self, arena: Arena, frames: Frames) -> None:
        self._arena = arena
        self._frames = frames
        self.at = array("i")
        """Span by first frame, -1 elsewhere; of no length until there is a span."""
        self.frames = array("i")
        """SPAN_FRAMES_MAX a span, -1 for none."""
        self.columns = bytearray()
        self.taken = array("Q")
        self._next = array("i")
        self._previous = array("i")
        self._free_numbers: list[int] = []
        self._heads = array("i", [-1]) * (2 * CLASSES * _GROUPS)
        self.filling = array("i", [-1]) * (2 * CLASSES)
        """By column: the span that is being filled, -1 if none; it has room."""
        self._closed = [-1, -1]
        self.counts = array("i", [0]) * (2 * CLASSES)
        """Spans by column."""
        self.objects = array("i", [0]) * (2 * CLASSES)
        """Taken slots by column."""
        self.held_frames = [0, 0]
        """By kind."""

    def numbers(self) -> list[int]:
        """All spans."""
        first_frames = self.frames[::SPAN_FRAMES_MAX]
        return [span for span, frame in enumerate(first_frames) if frame >= 0]

    # --- slots

    def take(self, column: int) -> int:
        """A free slot's place; makes a span if none has room."""
        span = self.filling[column]
        if span < 0:
            span = self._next_to_fill(column)
        before = self.taken[span]
        bit = ~before & (before + 1)
        after = before | bit
        self.taken[span] = after
        self.objects[column] += 1
        if after == _ALL_TAKEN[column]:
            self.filling[column] = -1
        return self.frames[SPAN_FRAMES_MAX * span] << PLACE_SHIFT | bit.bit_length() - 1

    def adopt(self, span: int, slot: int) -> None:
        """Take a certain free slot of a listed span."""
        column = self.columns[span]
        self.taken[span] |= 1 << slot
        self.objects[column] += 1
        used = self.taken[span].bit_count()
        self._relist(span, column, used - 1, used)

    def drop(self, place: int) -> None:
        """Free a slot; an empty span's frames are free at once."""
        span = self.at[place >> PLACE_SHIFT]
        assert span >= 0
        column = self.columns[span]
        before = self.taken[span]
        after = before ^ 1 << (place & SLOT_MASK)
        assert after < before
        self.taken[span] = after
        self.objects[column] -= 1
        if span != self.filling[column] and span != self._closed[column >= CLASSES]:
            used = after.bit_count()
            self._relist(span, column, used + 1, used)
        if not after:
            self.give(span)

    def drop_all(self, places: list[int]) -> int:
        """`drop` of many; the bytes that they took, each its class.

        Written out: this is a good part of what a page costs that leaves tmem.
        """
        at, columns, taken, objects = self.at, self.columns, self.taken, self.objects
        filling, closed = self.filling, self._closed
        bytes_ = 0
        for place in places:
            span = at[place >> PLACE_SHIFT]
            column = columns[span]
            number = column % CLASSES
            before = taken[span]
            after = before ^ 1 << (place & SLOT_MASK)
            assert after < before
            taken[span] = after
            objects[column] -= 1
            bytes_ += CLASS_BYTES[number]
            if span != filling[column] and span != closed[column >= CLASSES]:
                groups = _GROUP_OF[number]
                used = after.bit_count()
                if groups[used] != groups[used + 1]:
                    self._relist(span, column, used + 1, used)
            if not after:
                self.give(span)
        return bytes_

    def free_slots(self, column: int) -> int:
        return self.counts[column] * SPANS_OF[column % CLASSES][1] - self.objects[column]

    def slots(self, span: int) -> list[int]:
        """The taken slots of a span."""
        taken = self.taken[span]
        return [slot for slot in range(SLOTS_MAX) if taken >> slot & 1]

    def _next_to_fill(self, column: int) -> int:
        """The fullest listed span, or else the closed one, or else a new one."""
        first = column * _GROUPS
        for at in range(first + _GROUPS - 1, first - 1, -1):
            span = self._heads[at]
            if span >= 0:
                self._unlink(span, at)
                break
        else:
            span = self._closed[column >= CLASSES]
            if span >= 0 and self.columns[span] == column:
                self._closed[column >= CLASSES] = -1
            else:
                span = self._make(column)
        self.filling[column] = span
        return span

    # --- spans

    def _make(self, column: int) -> int:
        number = column % CLASSES
        frames = [self._frames.take(SLAB) for _ in range(SPANS_OF[number][0])]
        index = number << 2 | (PERSISTENT_BIT if column >= CLASSES else 0)
        state = frames[0] << 8 | 1
        arena = self._arena
        for frame in frames:
            arena.object[frame] = SLAB_PART
            arena.index[frame] = index
            arena.state[frame] = state
            index += 1
            state += 2
        return self._number(column, frames)

    def _number(self, column: int, frames: list[int]) -> int:
        """Give a span a number; its frames are marked and their columns written."""
        if not self.at:
            self.at.extend(array("i", [-1]) * self._arena.frames_count)
        if self._free_numbers:
            span = self._free_numbers.pop()
            self.columns[span] = column
        else:
            span = len(self.taken)
            self.taken.append(0)
            self.columns.append(column)
            self._next.append(-1)
            self._previous.append(-1)
            self.frames.extend(_NO_FRAMES)
        for part, frame in enumerate(frames, SPAN_FRAMES_MAX * span):
            self.frames[part] = frame
        self.at[frames[0]] = span
        self.counts[column] += 1
        self.held_frames[column >= CLASSES] += len(frames)
        return span

    def enlist(self, column: int, frames: list[int]) -> int:
        """A span that is in the segment already; it stands in the list of empty ones until slots
        are adopted."""
        span = self._number(column, frames)
        self._link(span, column * _GROUPS)
        return span

    def give(self, span: int) -> None:
        """Free the frames of an empty span, in the segment first."""
        column = self.columns[span]
        persistent = column >= CLASSES
        if self.filling[column] == span:
            self.filling[column] = -1
        elif self._closed[persistent] == span:
            self._closed[persistent] = -1
        else:
            self._unlink(span, column * _GROUPS)
        count = SPANS_OF[column % CLASSES][0]
        start = SPAN_FRAMES_MAX * span
        frames = self.frames[start : start + count]
        for frame in frames:
            self._arena.state[frame] = 0
        for frame in frames:
            self._frames.give(frame)
        self.at[frames[0]] = -1
        self.frames[start : start + SPAN_FRAMES_MAX] = _NO_FRAMES
        self._free_numbers.append(span)
        self.counts[column] -= 1
        self.held_frames[persistent] -= count

    # --- compaction

    def closed(self, *, persistent: bool) -> int:
        """The span that is being emptied, -1 if none."""
        return self._closed[persistent]

    def close_emptiest(self, column: int) -> int:
        """Take the emptiest listed span out of its list.  Precondition: the column has a listed
        span, and no span of that kind is closed."""
        first = column * _GROUPS
        at = next(at for at in range(first, first + _GROUPS) if self._heads[at] >= 0)
        span = emptiest = self._heads[at]
        for _ in range(_CANDIDATES_MAX):
            if self.taken[span].bit_count() < self.taken[emptiest].bit_count():
                emptiest = span
            span = self._next[span]
            if span < 0:
                break
        self._unlink(emptiest, at)
        self._closed[column >= CLASSES] = emptiest
        return emptiest

    def reopen(self, span: int) -> None:
        """A closed span may be filled again."""
        column = self.columns[span]
        self._closed[column >= CLASSES] = -1
        group = _GROUP_OF[column % CLASSES][self.taken[span].bit_count()]
        self._link(span, column * _GROUPS + group)

    # --- lists

    def _relist(self, span: int, column: int, old_used: int, used: int) -> None:
        groups = _GROUP_OF[column % CLASSES]
        old, new = groups[old_used], groups[used]
        if old != new:
            if old != _FULL:
                self._unlink(span, column * _GROUPS + old)
            if new != _FULL:
                self._link(span, column * _GROUPS + new)

    def _link(self, span: int, at: int) -> None:
        head = self._heads[at]
        self._next[span] = head
        self._previous[span] = -1
        if head >= 0:
            self._previous[head] = span
        self._heads[at] = span

    def _unlink(self, span: int, at: int) -> None:
        after, before = self._next[span], self._previous[span]
        if before >= 0:
            self._next[before] = after
        else:
            self._heads[at] = after
        if after >= 0:
            self._previous[after] = before

    # --- proof

    def check(self) -> None:
        """Raises InvariantError unless spans, lists, counts, kinds and frame columns agree."""
        spans = self.numbers()
        owner: dict[int, int] = {}
        for span in spans:
            self._check_span(span, owner)
        for frame in range(self._arena.frames_count):
            in_segment = self._arena.object[frame] == SLAB_PART and self._arena.state[frame] != 0
            marked = self._frames.kinds[frame] == SLAB
            if not in_segment == marked == (frame in owner):
                _fail(f"whether frame {frame} is part of a slab: opinions differ")
        self._check_lists(spans)
        self._check_counts(spans)

    def _check_span(self, span: int, owner: dict[int, int]) -> None:
        column = self.columns[span]
        number = column % CLASSES
        count, slots = SPANS_OF[number]
        start = SPAN_FRAMES_MAX * span
        first = self.frames[start]
        if self.at[first] != span:
            _fail(f"span {span} is not found by its first frame")
        if not 0 < self.taken[span] < 1 << slots:
            _fail(f"span {span} is empty, or has more than {slots} objects")
        if self.frames[start + count : start + SPAN_FRAMES_MAX] != _NO_FRAMES[count:]:
            _fail(f"span {span} has a frame too many")
        kind = PERSISTENT_BIT if column >= CLASSES else 0
        for position, frame in enumerate(self.frames[start : start + count]):
            if owner.setdefault(frame, span) != span:
                _fail(f"frame {frame} is in two spans")
            found = (self._arena.index[frame], self._arena.state[frame])
            if found != (kind | number << 2 | position, first << 8 | position << 1 | 1):
                _fail(f"frame {frame} has columns {found} in span {span}")

    def _check_lists(self, spans: list[int]) -> None:
        wanted: dict[int, list[int]] = {}
        for span in spans:
            column = self.columns[span]
            group = _GROUP_OF[column % CLASSES][self.taken[span].bit_count()]
            if group != _FULL and span not in self._closed and span not in self.filling:
                wanted.setdefault(column * _GROUPS + group, []).append(span)
        for column, span in enumerate(self.filling):
            if span >= 0 and self.columns[span] != column:
                _fail(f"span {span} of column {self.columns[span]} is filled for {column}")
        for at, head in enumerate(self._heads):
            listed: list[int] = []
            span, before = head, -1
            while span >= 0 and len(listed) <= len(spans):
                if self._previous[span] != before:
                    _fail(f"span {span} has a wrong predecessor")
                listed.append(span)
                span, before = self._next[span], span
            if sorted(listed) != wanted.get(at, []):
                _fail(f"list {at} has spans {listed}, not {wanted.get(at)}")

    def _check_counts(self, spans: list[int]) -> None:
        counts = array("i", [0]) * (2 * CLASSES)
        objects = array("i", [0]) * (2 * CLASSES)
        held = [0, 0]
        for span in spans:
            column = self.columns[span]
            counts[column] += 1
            objects[column] += self.taken[span].bit_count()
            held[column >= CLASSES] += SPANS_OF[column % CLASSES][0]
        if (self.counts, self.objects, self.held_frames) != (counts, objects, held):
            _fail("spans, objects or frames are miscounted")
        if len(self._free_numbers) + len(spans) != len(self.taken):
            _fail("a span number is neither used nor free, or both")


def _fail(text: str) -> None:
    raise InvariantError(text)
