"""A member's miss-ratio curve, and the histogram of depths that it is read from.

Depths are counted log-linearly, 32 bins an octave: a size is known to 3 % whatever it is, and
that of a terabyte takes no more room than 900 bins.  What was counted fades by period, so that a
guest that changes its behaviour is seen as it is now.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

DECAY: Final = 0.7
"""What the past is worth after one more period: half of it is forgotten in two periods."""

QUIET_SHARE: Final = 0.1
"""A period with less than this part of the usual puts is a quiet one."""

_STEP_BITS: Final = 5
_STEPS: Final = 1 << _STEP_BITS


@dataclass(frozen=True, slots=True)
class Curve:
    """Gets that a member would find per period, by the pages that it may hold.

    `sizes` ascend and `found[i]` is what a cache of `sizes[i]` pages finds; between two sizes the
    smaller one counts, so that a cliff is never climbed half.
    """

    sizes: tuple[int, ...] = ()
    found: tuple[float, ...] = ()
    gets: float = 0.0
    """Pages asked for per period, found or not."""
    puts: float = 0.0
    """Pages put per period."""
    samples: float = 0.0
    """Sampled gets that the curve stands on."""
    periods: int = 0
    """Whole periods since the member came."""
    recent_gets: float = -1.0
    """Of the last period alone; below 0 if that is not known."""
    recent_puts: float = 0.0
    trial: float = 1.0
    """How much of an arena has been put since the member came, or was last quiet: until that is a
    whole one, nobody can know whether the pages will be wanted back."""
    error: float = 0.0
    """Relative standard error of the sizes, from the number of leaves watched."""

    def hits(self, size_pages: float) -> float:
        """Estimated gets per period that find their page, with room for that many pages."""
        at = bisect_right(self.sizes, size_pages)
        return self.found[at - 1] if at else 0.0


def bin_of(size_pages: int) -> int:
    """The bin that a size falls into; one page a bin below 64."""
    shift = size_pages.bit_length() - _STEP_BITS - 1
    return size_pages if shift <= 0 else (shift << _STEP_BITS) + (size_pages >> shift)


def largest_in(number: int) -> int:
    """The largest size that falls into a bin."""
    if number < 2 * _STEPS:
        return number
    shift = (number >> _STEP_BITS) - 1
    return (((number & (_STEPS - 1)) + _STEPS + 1) << shift) - 1


class Depths:
    """What was counted in this period, and in those before it, faded."""

    __slots__ = (
        "_age",
        "_hits",
        "_past",
        "_past_hits",
        "_recent",
        "_trial",
        "gets",
        "limit_pages",
        "periods",
        "puts",
        "samples",
    )

    def __init__(self, limit_pages: int) -> None:
        """`limit_pages` is the largest size of interest."""
        self.limit_pages = limit_pages
        self.gets = self.puts = self.samples = 0.0
        self.periods = 0
        self._hits = array("d", bytes(8 * (bin_of(max(limit_pages, 1)) + 1)))
        self._past_hits = self._hits[:]
        self._past = (0.0, 0.0, 0.0)
        self._age = 0.0
        self._recent = (0.0, 0.0)
        self._trial = 0.0

    def hit(self, size_pages: int, pages: float) -> None:
        """That many gets need a cache of that size to be found."""
        if size_pages <= self.limit_pages:
            self._hits[bin_of(size_pages)] += pages

    def discard(self) -> None:
        """A period ends that tells nothing."""
        self._hits = array("d", bytes(8 * len(self._hits)))
        self.gets = self.puts = self.samples = 0.0
        self.periods += 1

    def advance(self) -> None:
        """A period ends: what was counted becomes the past, and the past fades."""
        for number, hits in enumerate(self._hits):
            self._past_hits[number] = self._past_hits[number] * DECAY + hits
        self._hits = array("d", bytes(8 * len(self._hits)))
        gets, puts, samples = self._past
        self._recent = (self.gets, self.puts)
        if self.puts * self._age < QUIET_SHARE * puts:
            self._trial = 0.0
        else:
            self._trial += self.puts / max(self.limit_pages, 1)
        self._past = (
            gets * DECAY + self.gets,
            puts * DECAY + self.puts,
            samples * DECAY + self.samples,
        )
        self.gets = self.puts = self.samples = 0.0
        self._age = self._age * DECAY + 1
        self.periods += 1

    def curve(self, error: float) -> Curve:
        """The curve of the periods that have ended."""
        if not self.periods:
            return Curve()
        sizes: list[int] = []
        found: list[float] = []
        total = 0.0
        for number, hits in enumerate(self._past_hits):
            if hits > 1e-6:
                total += hits / self._age
                sizes.append(min(largest_in(number), self.limit_pages))
                found.append(total)
        gets, puts, samples = self._past
        return Curve(
            tuple(sizes),
            tuple(found),
            gets / self._age,
            puts / self._age,
            samples,
            self.periods,
            *self._recent,
            self._trial,
            error,
        )
