"""FIFO: the page that came first goes first, whatever happened to it meanwhile.

This is what Xen's global list amounts to for private pools, whose pages leave when they are used.
A doubly linked list through two arrays of frame numbers (8 bytes a frame), so that a page that
leaves early is unlinked at once and the list never holds a stale entry.
"""

from __future__ import annotations

from array import array

from hypervisor.frames import HOT, RUN_MAX, Frames, Run
from ipc.errors import InvariantError


class Fifo:
    """Frame `count` (one past the last) is the list's head and tail."""

    listens = True

    def __init__(self, frames: Frames) -> None:
        end = frames.count
        self._frames = frames
        self._end = end
        self._next = array("i", [-1]) * (end + 1)
        self._previous = array("i", [-1]) * (end + 1)
        self._next[end] = self._previous[end] = end

    def inserted(self, first: int, count: int) -> None:
        following, previous, end = self._next, self._previous, self._end
        last = previous[end]
        for frame in range(first, first + count):
            following[last] = frame
            previous[frame] = last
            last = frame
        following[last] = end
        previous[end] = last

    def removed(self, first: int, count: int) -> None:
        following, previous = self._next, self._previous
        for frame in range(first, first + count):
            before, after = previous[frame], following[frame]
            following[before] = after
            previous[after] = before

    def victims(self, count: int) -> list[Run]:
        runs: list[Run] = []
        frame = self._next[self._end]
        while count and frame != self._end:
            first, length = frame, 1
            frame = self._next[frame]
            while length < min(count, RUN_MAX) and frame == first + length != self._end:
                length += 1
                frame = self._next[frame]
            runs.append((first, length))
            count -= length
        return runs

    def check(self) -> None:
        listed: list[int] = []
        frame = self._next[self._end]
        while frame != self._end and len(listed) <= self._frames.count:
            listed.append(frame)
            frame = self._next[frame]
        ephemeral = [n for n, kind in enumerate(self._frames.kinds) if kind == HOT]
        if sorted(listed) != ephemeral:
            raise InvariantError(f"{len(listed)} pages are in line, {len(ephemeral)} are ephemeral")
