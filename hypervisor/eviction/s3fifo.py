"""S3-FIFO: a probation queue, a main queue, and ghosts of what left from probation.

A new page waits in the *small* queue, a tenth of all pages.  Used twice there, it moves to the main
queue when its turn comes; otherwise it goes and leaves a ghost.  A page that is put while its ghost
is there comes into the main queue at once.  In the main queue the oldest page goes, unless it was
used: then it is spared, once for each use but at most three times.  A stream of pages that are seen
once so never takes more than the small queue, and that is the *admission* filter; without it every
page comes into the main queue.

This is libCacheSim's `S3FIFO` with its defaults (0.10, 0.90, threshold 2), down to the rule that as
long as nothing was ever evicted, pages that find the small queue full come into the main queue.
With one page a leaf and pages that stay on a get, hits are the same, one by one.  Differences:

* The queues share what is there at the moment, not what may be there: the small queue's part is a
  tenth of `pages`.  In a full cache that is the same, and a member whose share shrinks or grows
  keeps its proportions.  Ghosts are remembered for nine tenths of `capacity_pages` or of `pages`,
  whichever is more, so that they outlive a moment in which the guest has taken most pages out.
* A page may be *taken* out by a use (tmem's exclusive get), which the reference does not know.  It
  is remembered apart from the ghosts, where no stream can push it out, and when it is put again it
  comes into the main queue: the guest has used it at least twice.
* A run of neighbours is not cut because half of it would do to bring the queues into proportion: an
  extent that goes whole leaves room for one.
* One search spares at most SPARED_MAX pages, then the oldest page goes, used or not.
"""

from __future__ import annotations

from typing import Final

from hypervisor.eviction.clock import SPARED_MAX
from hypervisor.eviction.ghosts import PLACES, Ghosts
from hypervisor.eviction.links import Links
from hypervisor.frames import RUN_MAX, Run
from ipc.errors import InvariantError

SMALL: Final = 0
MAIN: Final = 4
LOW: Final = 8
"""A mark is a queue and the number of uses, 0 to 3.  LOW is for `hinted`."""

PAGES_PER_LEAF: Final = 2
"""What the reference does not remember is remembered in half as many leaves as there may be pages:
lone pages would cost more than they are worth."""

_SMALL_SHARE: Final = 10
_GHOST_TENTHS: Final = 9
_TAKEN_MIN: Final = 64

_USED: Final = bytes(mark if mark & 3 == 3 else mark + 1 for mark in range(256))
_SPARED: Final = bytes(max(mark - 1, mark & ~3) for mark in range(256))
_QUEUE: Final = bytes(mark & ~3 for mark in range(256))
_SMALL_MARKS: Final = bytes(range(SMALL, SMALL + 4))
_MAIN_MARKS: Final = bytes(range(MAIN, MAIN + 4))
_MAIN_UNUSED: Final = bytes([MAIN])
_MAIN_USED: Final = bytes([MAIN + 1, MAIN + 2, MAIN + 3])


class S3Fifo:
    """Two lists and two kinds of ghosts."""

    promoting_uses = 2
    """Uses in the small queue that let a page into the main queue."""

    def __init__(self, links: Links, *, admission: bool) -> None:
        self.pages = 0
        self.capacity_pages = 0
        self.wants_keys = admission
        self._links = links
        self._small = links.new_list()
        self._main = links.new_list()
        self._small_pages = 0
        self._main_pages = 0
        self._ghosts = Ghosts()
        self._taken = Ghosts()
        self._ghosts_of = {SMALL: self._ghosts}
        self._has_evicted = False
        self._spare = 0
        self._unpromoted = bytes(range(self.promoting_uses))
        self._promoted = bytes(range(self.promoting_uses, 4))

    def inserted(self, first: int, count: int, key: int, place: int, _hints: int, /) -> None:
        self.pages += count
        if not self.wants_keys:
            self._into_main(first, count, MAIN)
            return
        known = self._recall(key, place, count)
        self._trim_ghosts()
        if not known:
            self._into_small(first, count)
        elif known == PLACES[count]:
            self._into_main(first, count, MAIN)
        else:
            self._let_in(first, count, known)

    def used(self, first: int, count: int, /) -> None:
        marks = self._links.marks
        if count == 1:
            marks[first] = _USED[marks[first]]
        else:
            marks[first : first + count] = marks[first : first + count].translate(_USED)

    def taken(self, first: int, count: int, key: int, place: int, /) -> None:
        if self.wants_keys:
            limit = max(self.capacity_pages, self.pages, _TAKEN_MIN)
            self._taken.trim(limit, limit // PAGES_PER_LEAF)
            self._taken.add(key, place, count)
        self.removed(first, count)

    def evicted(self, first: int, count: int, key: int, place: int, /) -> None:
        self._has_evicted = True
        if self.wants_keys:
            self._trim_ghosts()
            self._leave_ghosts(first, count, key, place)
        self.removed(first, count)

    def removed(self, first: int, count: int, /) -> None:
        self.pages -= count
        marks = self._links.marks[first : first + count]
        if not marks.lstrip(_SMALL_MARKS):
            self._small_pages -= count
        elif not marks.lstrip(_MAIN_MARKS):
            self._main_pages -= count
        else:
            queues = marks.translate(_QUEUE)
            self._small_pages -= queues.count(SMALL)
            self._main_pages -= queues.count(MAIN)
        self._links.remove(first, count)

    def victims(self, count: int, /) -> list[Run]:
        runs: list[Run] = []
        self._spare = SPARED_MAX
        listed = self._small_pages + self._main_pages
        main_max = listed - self._small_max(listed)
        # Victims stay in line until they are evicted; each search goes on behind the last one.
        small_last, main_last = self._small, self._main
        small_named = main_named = 0
        while count > 0:
            limit = min(count, RUN_MAX)
            if self._small_pages > small_named and self._main_pages - main_named <= main_max:
                run = self._search_small(small_last, limit)
                if run is None:
                    continue
                small_last = run[0] + run[1] - 1
                small_named += run[1]
            elif self._main_pages > main_named:
                run = self._search_main(main_last, limit)
                main_last = run[0] + run[1] - 1
                main_named += run[1]
            else:
                break
            runs.append(run)
            count -= run[1]
        return runs

    def front(self) -> int:
        listed = self._small_pages + self._main_pages
        if self._small_pages and self._main_pages <= listed - self._small_max(listed):
            return self._links.front(self._small)
        return self._links.front(self._main)

    def check(self, numbers: set[int], /) -> None:
        self._ghosts.check()
        self._taken.check()
        listed = 0
        for sentinel, queue, pages in self._queues():
            line = list(self._links.walk(sentinel))
            listed += pages
            if len(line) != pages or not numbers.issuperset(line):
                raise InvariantError(f"{len(line)} pages are in a queue, {pages} counted")
            if any(self._links.marks[number] & ~3 != queue for number in line):
                raise InvariantError("a page is in a queue that its mark does not name")
        # Each number is in at most one list, so the sums say the rest.
        if listed != self.pages or listed != len(numbers):
            raise InvariantError(
                f"{listed} pages are in line, {self.pages} counted, {len(numbers)} there"
            )

    def close(self) -> None:
        for sentinel, _, _ in self._queues():
            self._links.drop_list(sentinel)

    def _small_max(self, listed: int) -> int:
        """The small queue's part of so many pages."""
        return listed // _SMALL_SHARE

    # --- coming

    def _recall(self, key: int, place: int, count: int) -> int:
        """Which of the pages were evicted or taken lately."""
        known = self._ghosts.take(key, place, count) if self._ghosts.pages else 0
        return known | self._taken.take(key, place, count) if self._taken.pages else known

    def _let_in(self, first: int, count: int, known: int) -> None:
        """Known pages come into the main queue, others into the small one."""
        while count:
            other = ~known if known & 1 else known
            length = min(count, (other & -other).bit_length() - 1) if other else count
            if known & 1:
                self._into_main(first, length, MAIN)
            else:
                self._into_small(first, length)
            known >>= length
            first += length
            count -= length

    def _into_small(self, first: int, count: int) -> None:
        small_max = self.capacity_pages // _SMALL_SHARE
        if not self._has_evicted and 0 < small_max <= self._small_pages:
            self._into_main(first, count, MAIN)
            return
        self._small_pages += count
        self._links.append(self._small, first, count, SMALL)

    def _into_main(self, first: int, count: int, mark: int) -> None:
        self._main_pages += count
        self._links.append(self._main, first, count, mark)

    # --- going

    def _search_small(self, last: int, limit: int) -> Run | None:
        """Victims behind `last`; pages that were used enough on the way move to the main queue.
        None if all did."""
        links = self._links
        following, marks = links.following, links.marks
        while (first := last + following[last]) != self._small:
            length = links.run_length(first, limit)
            window = marks[first : first + length]
            others = len(window.lstrip(self._unpromoted)) if self._spare > 0 else 0
            if others < length:
                return first, length - others
            length -= len(window.lstrip(self._promoted))
            self._spare -= length
            self._small_pages -= length
            links.remove(first, length)
            self._into_main(first, length, MAIN)
        return None

    def _search_main(self, last: int, limit: int) -> Run:
        """Victims behind `last`; pages that were used become the youngest.

        Precondition: there are pages behind `last`.
        """
        links = self._links
        following, marks = links.following, links.marks
        while True:
            first = last + following[last]
            length = links.run_length(first, limit)
            window = marks[first : first + length]
            others = len(window.lstrip(_MAIN_UNUSED)) if self._spare > 0 else 0
            if others < length:
                return first, length - others
            length -= len(window.lstrip(_MAIN_USED))
            self._spare -= length
            links.remove(first, length)
            links.append(self._main, first, length, MAIN)
            marks[first : first + length] = window[:length].translate(_SPARED)

    def _trim_ghosts(self) -> None:
        tenths = self._ghosts.pages * 10
        if tenths > self.capacity_pages * _GHOST_TENTHS and tenths > self.pages * _GHOST_TENTHS:
            self._ghosts.trim(max(self.capacity_pages, self.pages) * _GHOST_TENTHS // 10)

    def _leave_ghosts(self, first: int, count: int, key: int, place: int) -> None:
        """Evicted pages are remembered, if their queue's are."""
        queues = self._links.marks[first : first + count].translate(_QUEUE)
        while queues:
            others = queues.lstrip(queues[:1])
            length = len(queues) - len(others)
            ghosts = self._ghosts_of.get(queues[0])
            if ghosts is not None:
                ghosts.add(key, place, length)
            place += length
            queues = others

    def _queues(self) -> list[tuple[int, int, int]]:
        """(sentinel, mark, pages) of each queue."""
        return [(self._small, SMALL, self._small_pages), (self._main, MAIN, self._main_pages)]
