"""The eviction policies once more: lists of pages, one page at a time, nothing clever.

A page is (leaf key, place).  Written from the rules in the policies' docstrings, for the tests to
compare with; the rule that bounds one search's work is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from ipc.abi import CallFlag

Page = tuple[int, int]


class ModelGhosts:
    """Leaves in the order of their last addition."""

    def __init__(self) -> None:
        self.leaves: dict[int, set[int]] = {}

    @property
    def pages(self) -> int:
        return sum(len(places) for places in self.leaves.values())

    def add(self, pages: list[Page]) -> None:
        for key, run in groupby(pages, key=lambda page: page[0]):
            self.leaves[key] = self.leaves.pop(key, set()) | {place for _, place in run}

    def take(self, pages: list[Page]) -> list[Page]:
        found = [page for page in pages if page[1] in self.leaves.get(page[0], ())]
        for key, place in found:
            self.leaves[key].remove(place)
            if not self.leaves[key]:
                del self.leaves[key]
        return found

    def trim(self, pages: int, leaves: int | None = None) -> None:
        while self.pages > pages or (leaves is not None and len(self.leaves) > leaves):
            del self.leaves[next(iter(self.leaves))]


class ModelFifo:
    """`line` is all there is."""

    def __init__(self, _admission: bool) -> None:
        self.capacity_pages = 0
        self.are_neighbours: Callable[[Page, Page], bool] = lambda _one, _other: False
        self.line: list[Page] = []

    def listed(self) -> list[Page]:
        return self.line

    def inserted(self, pages: list[Page], _hints: int) -> None:
        self.line += pages

    def used(self, pages: list[Page]) -> None:
        pass

    def removed(self, pages: list[Page]) -> None:
        for page in pages:
            self.line.remove(page)

    def taken(self, pages: list[Page]) -> None:
        self.removed(pages)

    def evicted(self, pages: list[Page]) -> None:
        self.removed(pages)

    def victims(self, count: int) -> list[Page]:
        return self.line[:count]


class ModelClock(ModelFifo):
    """FIFO, and a set of the pages that were used."""

    def __init__(self, admission: bool) -> None:
        super().__init__(admission)
        self.hot: set[Page] = set()

    def inserted(self, pages: list[Page], hints: int) -> None:
        self.hot -= set(pages)
        super().inserted(pages, hints)

    def used(self, pages: list[Page]) -> None:
        self.hot |= set(pages)

    def victims(self, count: int) -> list[Page]:
        named: list[Page] = []
        while len(named) < min(count, len(self.line)):
            page = self.line[len(named)]
            if page in self.hot:
                self.hot.remove(page)
                self.line.remove(page)
                self.line.append(page)
            else:
                named.append(page)
        return named


class ModelS3Fifo:
    """Two lists, the number of uses of each page, and what is remembered."""

    promoting_uses = 2

    def __init__(self, admission: bool) -> None:
        self.admission = admission
        self.capacity_pages = 0
        self.small: list[Page] = []
        self.main: list[Page] = []
        self.uses: dict[Page, int] = {}
        self.ghosts = ModelGhosts()
        self.gone = ModelGhosts()
        self.has_evicted = False
        self.are_neighbours: Callable[[Page, Page], bool] = lambda _one, _other: False

    def listed(self) -> list[Page]:
        return self.small + self.main

    def limit(self) -> int:
        return max(self.capacity_pages, len(self.listed()))

    def inserted(self, pages: list[Page], _hints: int) -> None:
        after = max(self.capacity_pages, len(self.listed()) + len(pages))
        known = self.recall(pages, after) if self.admission else pages
        if self.admission:
            self.ghosts.trim(after * 9 // 10)
        for is_known, run in groupby(pages, key=lambda page: page in known):
            part = list(run)
            filling = 0 < self.capacity_pages // 10 <= len(self.small) and not self.has_evicted
            self.enter(self.main if is_known or filling else self.small, part, 0)

    def enter(self, line: list[Page], pages: list[Page], uses: int) -> None:
        line += pages
        self.uses |= dict.fromkeys(pages, uses)

    def recall(self, pages: list[Page], _limit: int) -> list[Page]:
        return self.ghosts.take(pages) + self.gone.take(pages)

    def used(self, pages: list[Page]) -> None:
        for page in pages:
            self.uses[page] = min(3, self.uses[page] + 1)

    def removed(self, pages: list[Page]) -> None:
        for page in pages:
            self.line_of(page).remove(page)

    def line_of(self, page: Page) -> list[Page]:
        return self.small if page in self.small else self.main

    def taken(self, pages: list[Page]) -> None:
        if self.admission:
            limit = max(self.limit(), 64)
            self.gone.trim(limit, limit // 2)
            self.gone.add(pages)
        self.removed(pages)

    def evicted(self, pages: list[Page]) -> None:
        self.has_evicted = True
        if self.admission:
            self.ghosts.trim(self.limit() * 9 // 10)
            self.ghosts.add([page for page in pages if page in self.small])
        self.removed(pages)

    def small_max(self, pages: int) -> int:
        return pages // 10

    def victims(self, count: int) -> list[Page]:
        total = len(self.small) + len(self.main)
        main_max = total - self.small_max(total)
        named: list[Page] = []
        small_at = main_at = 0
        while (left := min(count, total) - len(named)) > 0:
            if small_at < len(self.small) and len(self.main) - main_at <= main_max:
                while small_at < len(self.small):
                    page = self.small[small_at]
                    if self.uses[page] < self.promoting_uses:
                        run = self.run(self.small[small_at:], self.promoting_uses, left)
                        named += run
                        small_at += len(run)
                        break
                    self.small.remove(page)
                    self.enter(self.main, [page], 0)
            else:
                while self.uses[page := self.main[main_at]]:
                    self.main.remove(page)
                    self.enter(self.main, [page], self.uses[page] - 1)
                run = self.run(self.main[main_at:], 1, left)
                named += run
                main_at += len(run)
        return named

    def run(self, line: list[Page], uses: int, limit: int) -> list[Page]:
        """The first page, and what may go with it: neighbours that were used no more than that."""
        run = line[:1]
        for page in line[1 : min(limit, 64)]:
            if self.uses[page] >= uses or not self.are_neighbours(run[-1], page):
                break
            run.append(page)
        return run


class ModelHinted(ModelS3Fifo):
    """A third list, and a share that moves."""

    promoting_uses = 1

    def __init__(self, admission: bool) -> None:
        super().__init__(admission)
        self.low: list[Page] = []
        self.main_ghosts = ModelGhosts()
        self.share = 0.1

    def listed(self) -> list[Page]:
        return self.low + super().listed()

    def line_of(self, page: Page) -> list[Page]:
        return self.low if page in self.low else super().line_of(page)

    def inserted(self, pages: list[Page], hints: int) -> None:
        if not hints:
            super().inserted(pages, hints)
            return
        if self.admission:
            self.recall(pages, max(self.capacity_pages, len(self.listed()) + len(pages)))
        if hints & CallFlag.LOW:
            self.enter(self.low, pages, 0)
        else:
            self.enter(self.main, pages, 1 if hints & CallFlag.HIGH else 0)

    def recall(self, pages: list[Page], limit: int) -> list[Page]:
        small = self.ghosts.take(pages)
        ratio = self.main_ghosts.pages / (self.ghosts.pages + 1)
        self.learn(0.1 * (len(small) * max(1.0, ratio)) / limit)
        main = self.main_ghosts.take(pages)
        ratio = self.ghosts.pages / (self.main_ghosts.pages + 1)
        self.learn(0.1 * (-len(main) * max(1.0, ratio)) / limit)
        return small + self.gone.take(pages)

    def learn(self, step: float) -> None:
        self.share = min(max(self.share + step, 0.1), 0.5)

    def small_max(self, pages: int) -> int:
        return int(pages * self.share)

    def evicted(self, pages: list[Page]) -> None:
        if self.admission:
            self.main_ghosts.trim(self.limit(), self.limit() // 2)
            self.main_ghosts.add([page for page in pages if page in self.main])
        super().evicted(pages)

    def victims(self, count: int) -> list[Page]:
        named = self.low[:count]
        return named + super().victims(count - len(named))


Model = ModelFifo | ModelS3Fifo

MODELS: dict[str, type[ModelFifo | ModelS3Fifo]] = {
    "fifo": ModelFifo,
    "clock": ModelClock,
    "s3fifo": ModelS3Fifo,
    "hinted": ModelHinted,
}
