"""Lending: the RAM of guests and tmem share one memory, the arena's frames.

  alpha's LEND 900 --> free frames, else ephemeral pages go --> holes in the segment
                       marked with alpha's number               (the host has their memory)
  alpha touches its RAM ----------------------------------------> and alpha gets it
  alpha's LEND 300 --> 600 frames are free again --> the next put of anybody

A lent frame holds no bytes here: `arena` has the guest's number where the page's index would be.
A guest says how many it wants in all, so a call of unknown fate is repeated as it is, and a
hypervisor that was killed in the middle has lent some of them and knows which.

* L1  The memory of a frame is given back before the segment says that it is lent, and a frame that
  comes back is taken as a hole: what a guest had in its RAM is never to be found here.
* L2  Room is made as for a persistent put: free frames, then ephemeral pages that are not within
  another guest's reservation.  No persistent page goes for it, and as many frames as guests have
  reserved for their tmem are not lent to anybody.
* L3  A call moves at most `FRAMES_A_CALL` frames, and takes nobody further below its target than an
  extent would.
* L4  What is lent is in nobody's charge, cap or allotment.  What is to be shared out is the rest.
* L5  A guest that has gone is disowned by one word, the end of its record; its frames are freed in
  slices, and its number is nobody's until then.

Nothing holds a guest to what it was lent.  In Xen page tables do; here a process that touches more
memory than it asked for has it, and the host has less than all believe.  So this is for guests
whose kernel is ours, and no defence: tmem itself loses nothing by a guest that lies.  A guest that
was expelled may go on living, as a process that nobody serves; its frames come back all the same.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from hypervisor.arena import HELD, LENT_FRAME, Arena
from hypervisor.frames import LENT, RUN_MAX, Frames, Run
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES, GuestId

if TYPE_CHECKING:
    from hypervisor.balance import Balance
    from hypervisor.pools import Client, Settings
    from hypervisor.store import Store

FRAMES_A_CALL: Final = 1024
_FREE_STATES: Final = tuple(array("Q", [0]) * n for n in range(RUN_MAX + 1))
_LENT_STATES: Final = tuple(array("Q", [HELD]) * n for n in range(RUN_MAX + 1))


class Loans:
    """Which frames are lent to whom, in the segment and out of it; `client.lent` has a guest's."""

    def __init__(self, arena: Arena, frames: Frames) -> None:
        self._arena = arena
        self._frames = frames
        self.lent = 0
        """Frames of guests that are here."""
        self._returning: deque[tuple[GuestId, array[int], Callable[[GuestId], None]]] = deque()

    @property
    def returning(self) -> dict[GuestId, int]:
        """Frames of guests that have gone, which wait to be freed."""
        return {number: len(frames) for number, frames, _ in self._returning}

    def lend(self, client: Client, count: int) -> None:
        """Precondition: as many frames are free, and `count` is at most RUN_MAX."""
        arena = self._arena
        for first, length in self._frames.allocate(count, LENT):
            arena.punch(first, length)
            arena.object[first : first + length] = array("I", [LENT_FRAME]) * length
            arena.index[first : first + length] = array("I", [client.number]) * length
            arena.state[first : first + length] = _LENT_STATES[length]
            client.lent.extend(range(first, first + length))
        self.lent += count

    def take_back(self, client: Client, count: int) -> None:
        """Precondition: the guest has as many."""
        self._release(client.lent, count)
        self.lent -= count

    def adopt(self, client: Client, frame: int) -> None:
        """A frame that a hypervisor that was killed has lent."""
        self._frames.mark(frame, 1, LENT)
        client.lent.append(frame)
        self.lent += 1

    def doom(self, client: Client, number_is_free: Callable[[GuestId], None]) -> bool:
        """The guest's record is gone, and with it its claim; whether frames wait to be freed."""
        if not client.lent:
            number_is_free(client.number)
            return False
        self.lent -= len(client.lent)
        self._returning.append((client.number, client.lent, number_is_free))
        client.lent = array("I")
        return True

    def reap(self, limit: int) -> int:
        """Free at most so many frames of guests that have gone; how many."""
        freed = 0
        while self._returning and freed < limit:
            number, frames, number_is_free = self._returning[0]
            count = min(limit - freed, len(frames))
            self._release(frames, count)
            freed += count
            if not frames:
                self._returning.popleft()
                number_is_free(number)
        return freed

    def _release(self, lent: array[int], count: int) -> None:
        """Free the last frames of those."""
        start = len(lent) - count
        for first, length in _runs(sorted(lent[start:])):
            self._arena.state[first : first + length] = _FREE_STATES[length]
            self._frames.release(first, length)
        del lent[start:]


class Lending:
    """What LEND does, for one machine; with `on` false guests have their RAM for themselves."""

    def __init__(
        self, store: Store, balance: Balance, settings: dict[str, Settings], *, on: bool
    ) -> None:
        self._store = store
        self._balance = balance
        self._settings = settings
        self.on = on

    def resize(self, client: Client, wanted: int) -> bool:
        """Bring what a guest is lent nearer to so many frames; false if there was no room for all
        that it needs and may have."""
        store = self._store
        before = len(client.lent)
        has_room = True
        if wanted < before:
            store.loans.take_back(client, min(before - wanted, FRAMES_A_CALL))
        else:
            store.begin_call()
            has_room = self._grow(client, min(wanted - before, FRAMES_A_CALL))
        moved = abs(len(client.lent) - before)
        if moved:
            self._balance.lent(moved)
        return has_room

    def _grow(self, client: Client, wanted: int) -> bool:
        store = self._store
        frames = store.frames
        left = min(wanted, self.lendable)
        while left > 0:
            piece = min(left, EXTENT_PAGES_MAX)
            if frames.free < piece + store.spare_frames:
                store.make_room(piece, client)
            granted = min(piece, frames.free)
            if granted:
                store.loans.lend(client, granted)
            if granted < piece:
                return False
            left -= piece
        return True

    @property
    def lendable(self) -> int:
        """Frames that could be lent if nothing were in them."""
        reserved_bytes = sum(one.reserve_bytes for one in self._settings.values())
        reserved = -(-reserved_bytes // PAGE_BYTES)
        return max(0, self._store.frames.count - self._store.loans.lent - reserved)


def _runs(frames: list[int]) -> Iterator[Run]:
    """Neighbours among sorted numbers, at most RUN_MAX of them."""
    at = 0
    while at < len(frames):
        end = at + 1
        limit = min(len(frames), at + RUN_MAX)
        while end < limit and frames[end] == frames[at] + end - at:
            end += 1
        yield frames[at], end - at
        at = end
