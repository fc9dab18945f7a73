"""Lists of page numbers: all of a store's lists share two arrays, so that a page costs 8 bytes.

Each number is in at most one list.  A list is a ring through its sentinel, which is a number too,
so that appending and leaving need no special case.  The arrays hold *steps*, the distance to the
number before and to the one behind, instead of numbers: pages that are neighbours and follow each
other in line then read 1, 1, 1, and whether a run of them is in order is one comparison with a
constant, as putting them in line is one copy of it.  Nothing here is a loop over pages as long as
what came together stays together.

Invariants: `following[n] == -previous[n + following[n]]` for every number in line; a sentinel of
an empty list has steps of 0; the first number of a block of sentinels is no sentinel, so that
nothing in line can step by 1 into one.

`marks` is one byte a number and belongs to the policy that has the number in line.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

from hypervisor.frames import RUN_MAX
from ipc.errors import InvariantError

BLOCK_NUMBERS: Final = 128
"""Numbers come into being by the block: as many as there are entries in a table frame."""

MARKS_COUNT: Final = 16
"""Pages get marks below this when they are put in line."""

_FORWARD: Final = tuple(array("i", [1]) * n for n in range(RUN_MAX + 1))
_BACKWARD: Final = tuple(array("i", [-1]) * n for n in range(RUN_MAX + 1))
_MARKS: Final = tuple(
    tuple(bytes([mark]) * n for n in range(RUN_MAX + 1)) for mark in range(MARKS_COUNT)
)
_EMPTY: Final = array("i", [0]) * BLOCK_NUMBERS
_STEP_BYTES: Final = array("i").itemsize


class Links:
    """The lists; `following` and `previous` are read by the policies and written only here."""

    def __init__(self, frames_count: int) -> None:
        self.following = array("i", [0]) * (frames_count + 1)
        self.previous = array("i", [0]) * (frames_count + 1)
        self.marks = bytearray(frames_count + 1)
        self._sentinels: list[int] = []

    def new_block(self) -> int:
        """Let there be 128 more numbers; the first of them."""
        first = len(self.following)
        self.following.extend(_EMPTY)
        self.previous.extend(_EMPTY)
        self.marks.extend(bytes(BLOCK_NUMBERS))
        return first

    def new_list(self) -> int:
        """The sentinel of an empty list."""
        if not self._sentinels:
            first = self.new_block()
            self._sentinels.extend(range(first + BLOCK_NUMBERS - 1, first, -1))
        return self._sentinels.pop()

    def drop_list(self, sentinel: int) -> None:
        """Nobody uses this list any more.  Precondition: it is empty."""
        assert not self.following[sentinel]
        self._sentinels.append(sentinel)

    def append(self, sentinel: int, first: int, count: int, mark: int) -> None:
        """Neighbours that are in no list become the youngest, in order; `count` <= RUN_MAX."""
        following, previous = self.following, self.previous
        last = first
        if count == 1:
            self.marks[first] = mark
        else:
            last += count - 1
            self.marks[first : last + 1] = _MARKS[mark][count]
            following[first:last] = _FORWARD[count - 1]
            previous[first + 1 : last + 1] = _BACKWARD[count - 1]
        step = previous[sentinel]
        before = sentinel + step
        step = first - before
        following[before] = step
        previous[first] = -step
        step = last - sentinel
        previous[sentinel] = step
        following[last] = -step

    def remove(self, first: int, count: int) -> None:
        """Neighbours leave the lists they are in."""
        following, previous = self.following, self.previous
        last = first
        if count > 1:
            last += count - 1
            if following[first:last] != _FORWARD[count - 1]:
                self._remove_parts(first, last)
                return
        before = first + previous[first]
        step = last + following[last] - before
        following[before] = step
        previous[before + step] = -step

    def _remove_parts(self, first: int, last: int) -> None:
        """Numbers `first` to `last` leave, of which only parts follow each other in line."""
        following, previous = self.following, self.previous
        start = first
        for number, step in enumerate(following[first : last + 1].tolist(), first):
            if step != 1 or number == last:
                before = start + previous[start]
                joined = number + following[number] - before
                following[before] = joined
                previous[before + joined] = -joined
                start = number + 1

    def replace(self, old: int, new: int) -> None:
        """A page gets another number: `new`, which is in no list, takes the place and the mark."""
        following, previous = self.following, self.previous
        before = old + previous[old]
        behind = old + following[old]
        following[before] = new - before
        previous[new] = before - new
        following[new] = behind - new
        previous[behind] = new - behind
        self.marks[new] = self.marks[old]

    def front(self, sentinel: int) -> int:
        """The oldest number, -1 if there is none."""
        step = self.following[sentinel]
        return sentinel + step if step else -1

    def front_run(self, sentinel: int, limit: int) -> tuple[int, int] | None:
        """The oldest number and how many neighbours follow it in order, itself counted in."""
        step = self.following[sentinel]
        return (sentinel + step, self.run_length(sentinel + step, limit)) if step else None

    def run_length(self, first: int, limit: int) -> int:
        """How many neighbours are in line in order from `first` on; 1 <= `limit` <= RUN_MAX."""
        following = self.following
        if limit == 1 or following[first] != 1:
            return 1
        window = following[first : first + limit - 1]
        if window == _FORWARD[limit - 1]:
            return limit
        # Where do the ones end?  Stripping bytes finds it at once, but for some steps that are made
        # of the same bytes (256 and the like), which the comparison shows.
        raw = window.tobytes()
        length = (len(raw) - len(raw.lstrip(b"\0\1"))) // _STEP_BYTES
        if window[:length] != _FORWARD[length]:
            length = next(at for at, step in enumerate(window) if step != 1)
        return length + 1

    def walk(self, sentinel: int) -> Iterator[int]:
        """All numbers from the oldest on; raises InvariantError where the ring is broken."""
        number = sentinel
        for _ in range(len(self.following)):
            step = self.following[number]
            if self.previous[number + step] != -step:
                raise InvariantError(f"the page behind {number} in line is not behind it")
            number += step
            if number == sentinel:
                return
            yield number
        raise InvariantError(f"the list of {sentinel} has no end")
