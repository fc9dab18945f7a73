"""How much memory would serve a member's gets: its miss-ratio curve, from a sample of its pages.

The hypervisor sees an exclusive second-level cache: a put says that the guest dropped a page, a get
that it wants the page back, and a page that is found leaves.  So the usual stack distance is not
the answer.  A cache of C pages that evicts the oldest holds page x exactly as long as fewer than C
pages younger than x were in it *at the same time*: what counts is the greatest depth that x ever
had, because a page which was evicted does not come back when others leave.

**Holes.**  A page that leaves stays in the line as a hole, and a put fills the youngest hole there
is.  Then the greatest depth of x is simply all that is younger than x now, pages and unfilled
holes: a page that leaves makes no older page less deep, and a put makes deeper only the pages
between the youngest hole and the top.  That is one line of counts, kept in buckets, so an event
costs two sums over short slices.

**Sampling** is spatial as in SHARDS (Waldspurger et al., FAST 2015): a leaf of 64 pages is watched
or it is not, by its hash, so an event on any other leaf costs one comparison that the caller makes:
`key & SAMPLE_MASK < threshold`.  Depths and counts are divided by the share that is watched.  Where
more than `capacity` extents would be watched the share drops (their fixed-size variant), and
pages deeper than the arena are forgotten: no target could keep them.

Unlike SHARDS, pages are handled in extents, because guests put and get them in extents, and of a
watched leaf only every 2nd, 4th, 8th... place may be watched: for a guest that works page by page
that saves most of the time, and for the same memory more leaves are seen.
"""

from __future__ import annotations

from array import array
from bisect import insort
from typing import Final

from hypervisor.curve import Curve, Depths

SAMPLE_MASK: Final = (1 << 24) - 1
"""The bits of a leaf's hash that decide whether it is watched."""

CAPACITY_EXTENTS: Final = 2048
"""Extents watched at most, for each of which a sampler takes up to 250 bytes."""

_LEAF_PAGES: Final = 64

_EXTENTS_A_LEAF: Final = 4
"""With more than that, places are thinned out before leaves are."""

CALLS_A_PERIOD: Final = 4096
"""With more watched puts than that before a period ends, fewer leaves are watched."""

_LEAVES_LEAST: Final = 64
"""Time is not saved below that: what is left would say nothing."""

_CALLS_QUIET: Final = CALLS_A_PERIOD // 8
_PATIENCE_PERIODS: Final = 8
_SETTLING_PERIODS: Final = 4

_LEVEL_MAX: Final = 4
_GRIDS: Final = tuple(
    tuple(
        sum(1 << place for place in range(at, _LEAF_PAGES, 1 << level)) for at in range(1 << level)
    )
    for level in range(_LEVEL_MAX + 1)
)
"""By level: one place in 2**level, in every way.  Those of the next level are half of them."""

_PLACE_SHIFT: Final = 24
"""The bits of the hash above SAMPLE_MASK choose which places."""

_BUCKET_BITS: Final = 6
_BUCKET: Final = 1 << _BUCKET_BITS
_RUNS: Final = tuple((1 << n) - 1 for n in range(_LEAF_PAGES + 1))


class ReuseSampler:
    """The watched pages of one member, oldest first: an extent has a position in the line, and the
    pages that were put by one call and are still out are a bitmap of its leaf."""

    def __init__(self, limit_pages: int, capacity: int = CAPACITY_EXTENTS) -> None:
        """`limit_pages` is the largest size of interest: the frames of the arena."""
        positions = -(-2 * capacity // _BUCKET) * _BUCKET
        self.threshold = SAMPLE_MASK + 1
        """A leaf is watched if `key & SAMPLE_MASK < threshold`."""
        self._scale = 1.0
        self._capacity = capacity
        self._depths = Depths(limit_pages)
        self._patience = _PATIENCE_PERIODS
        self._settling = 0
        self._asked = self._offered = 0
        """Watched pages since the scale changed."""
        self._begin(positions)

    def _begin(self, positions: int) -> None:
        """Nothing is known of any leaf."""
        self._quiet = 0
        self._calls = 0
        # In a small arena a few pages matter; in a large one they cost more time than they tell.
        limit_pages = self._depths.limit_pages
        self._watch_places(min(max(limit_pages.bit_length() - 11, 0), _LEVEL_MAX - 1))
        # By position: leaf, its pages that are out, these and all that older extents of the leaf
        # may have, holes, pages and holes, next older extent of the leaf.
        self._keys = array("Q", bytes(8 * positions))
        self._live = array("Q", bytes(8 * positions))
        self._union = array("Q", bytes(8 * positions))
        self._holes = array("i", bytes(4 * positions))
        self._counts = array("i", bytes(4 * positions))
        self._chain = array("i", bytes(4 * positions))
        self._buckets = array("q", bytes(8 * (positions >> _BUCKET_BITS)))
        self._latest: dict[int, int] = {}
        self._hollow: list[int] = []
        """Positions with holes, ascending."""
        self._bottom = 0
        self._top = 0
        self._total = 0
        self._extents = 0

    def _watch_places(self, level: int) -> None:
        """Also when the threshold has changed: what was counted so far has the old scale."""
        self._settle()
        self._level = level
        self._grids = _GRIDS[level]
        self._grids_mask = (1 << level) - 1
        self._scale = (SAMPLE_MASK + 1) / self.threshold * (1 << level)

    def _settle(self) -> None:
        self._depths.gets += self._asked * self._scale
        self._depths.puts += self._offered * self._scale
        self._depths.samples += self._asked
        self._asked = self._offered = 0

    @property
    def rate(self) -> float:
        """The share of all pages that is watched."""
        return 1 / self._scale

    @property
    def watched_extents(self) -> int:
        """Extents of pages that are out and watched: at most the capacity."""
        return self._extents

    # --- events

    def put(self, key: int, first: int, count: int) -> None:
        """The guest put pages `first` and on of a leaf that is watched."""
        bits = _RUNS[count] << first & self._grids[key >> _PLACE_SHIFT & self._grids_mask]
        if not bits:
            return
        self._offered += bits.bit_count()
        latest = self._latest.get(key, -1)
        if latest >= 0 and self._union[latest] & bits:
            self._take(latest, key, bits, counted=False)
        self._insert(key, bits)
        self._calls += 1
        if self._calls > CALLS_A_PERIOD:
            self._calls = 0
            if len(self._latest) > _LEAVES_LEAST:
                self._watch_less(thin=False)

    def get(self, key: int, first: int, count: int, *, keep: bool = False) -> int:
        """The guest asked for pages of a leaf that is watched, whether or not it found them; bits
        (0 for page `first`) of those watched that an endless cache would have found.

        `keep`: a page that is found stays and is the youngest now.
        """
        bits = _RUNS[count] << first & self._grids[key >> _PLACE_SHIFT & self._grids_mask]
        if not bits:
            return 0
        self._asked += bits.bit_count()
        latest = self._latest.get(key, -1)
        if latest < 0 or not self._union[latest] & bits:
            return 0
        known = self._take(latest, key, bits, counted=True)
        if keep and known:
            self._insert(key, known)
        return known >> first

    def flush(self, key: int, first: int, count: int) -> None:
        """Pages of a leaf that is watched are gone for good."""
        bits = _RUNS[count] << first & self._grids[key >> _PLACE_SHIFT & self._grids_mask]
        latest = self._latest.get(key, -1)
        if latest >= 0 and self._union[latest] & bits:
            self._take(latest, key, bits, counted=False)

    def _take(self, position: int, key: int, bits: int, *, counted: bool) -> int:
        """Make holes of those pages that are out; their bits.  Nothing of `bits` is out then, so
        the unions stay true without a second walk."""
        live, union, chain, holes = self._live, self._union, self._chain, self._holes
        gone = ~bits
        younger = -1
        known = 0
        while position >= 0 and union[position] & bits:
            older = chain[position]
            here = live[position]
            overlap = here & bits
            union[position] &= gone
            if overlap:
                taken = overlap.bit_count()
                if counted:
                    # Pages that are taken together lie side by side: one depth stands for all.
                    end = (position | _BUCKET - 1) + 1
                    depth = (
                        sum(self._counts[position + 1 : end])
                        + sum(self._buckets[end >> _BUCKET_BITS : self._top // _BUCKET + 1])
                        + (here >> overlap.bit_length()).bit_count()
                        + (taken + 1) / 2
                    )
                    self._depths.hit(int(depth * self._scale + 0.5), taken * self._scale)
                known |= overlap
                bits ^= overlap
                if not holes[position]:
                    insort(self._hollow, position)
                holes[position] += taken
                live[position] = here = here ^ overlap
            if here:
                younger = position
            else:
                self._extents -= 1
                if younger >= 0:
                    chain[younger] = older
                elif older >= 0:
                    self._latest[key] = older
                else:
                    del self._latest[key]
            position = older
        return known

    def _insert(self, key: int, bits: int) -> None:
        """Pages become the youngest, and fill the youngest holes."""
        pages = bits.bit_count()
        counts, buckets = self._counts, self._buckets
        hollow, holes = self._hollow, self._holes
        left = pages
        while left and hollow:
            position = hollow[-1]
            filled = min(left, holes[position])
            left -= filled
            holes[position] -= filled
            counts[position] -= filled
            buckets[position >> _BUCKET_BITS] -= filled
            if not holes[position]:
                hollow.pop()
        self._total += left - pages
        top = self._top
        latest = self._latest.get(key, -1)
        if latest == top - 1 >= 0 and bits & -bits > self._live[latest]:
            # One file's pages one after the other, in calls of a page each: one extent.
            self._live[latest] |= bits
            self._union[latest] |= bits
            counts[latest] += pages
            buckets[latest >> _BUCKET_BITS] += pages
        else:
            if top == len(counts):
                self._compact()
                top = self._top
                latest = self._latest.get(key, -1)
            self._keys[top] = key
            self._live[top] = bits
            self._union[top] = bits if latest < 0 else bits | self._union[latest]
            self._chain[top] = latest
            counts[top] = pages
            holes[top] = 0
            buckets[top >> _BUCKET_BITS] += pages
            self._latest[key] = top
            self._top = top + 1
            self._extents += 1
        self._total += pages
        if self._total * self._scale > self._depths.limit_pages:
            self._forget_deepest()
        if self._extents > self._capacity:
            crowded = self._extents > _EXTENTS_A_LEAF * len(self._latest)
            self._watch_less(thin=crowded and self._level < _LEVEL_MAX)

    # --- bounds

    def _forget_deepest(self) -> None:
        """Drop what is deeper than the arena."""
        limit = self._depths.limit_pages / self._scale
        position = self._bottom
        while self._total > limit and position < self._top - 1:
            count = self._counts[position]
            if count:
                if self._live[position]:
                    self._unchain(position)
                if self._holes[position]:
                    self._hollow.remove(position)
                self._total -= count
                self._buckets[position >> _BUCKET_BITS] -= count
                self._counts[position] = self._live[position] = self._holes[position] = 0
            position += 1
        self._bottom = position

    def _unchain(self, position: int) -> None:
        """The oldest extent of a leaf leaves its chain."""
        key = self._keys[position]
        self._extents -= 1
        younger = self._latest[key]
        if younger == position:
            del self._latest[key]
            return
        while self._chain[younger] != position:
            younger = self._chain[younger]
        self._chain[younger] = -1

    def _watch_less(self, *, thin: bool) -> None:
        """Watch half of the places, or three quarters of the leaves: those with lower hashes."""
        if not thin:
            self.threshold = max(self.threshold * 3 // 4, 1)
        self._watch_places(self._level + thin)
        keys, live, holes = self._keys, self._live, self._holes
        for position in range(self._bottom, self._top):
            key = keys[position]
            if thin:
                live[position] &= self._grids[key >> _PLACE_SHIFT & self._grids_mask]
                holes[position] = (holes[position] + (position & 1)) >> 1
            elif key & SAMPLE_MASK >= self.threshold:
                live[position] = holes[position] = 0
        self._compact()

    def _compact(self) -> None:
        """Close the line up.  Holes at a position without pages move to the next younger one: they
        lie between the same pages there."""
        keys, live, holes, counts = self._keys, self._live, self._holes, self._counts
        union, chain = self._union, self._chain
        latest: dict[int, int] = {}
        hollow: list[int] = []
        adrift = 0
        to = 0
        for position in range(self._bottom, self._top):
            pages = live[position]
            hole = holes[position] + adrift
            if not pages and position < self._top - 1:
                adrift = hole
                continue
            adrift = 0
            key = keys[position]
            older = latest.get(key, -1)
            keys[to] = key
            live[to] = pages
            holes[to] = hole
            counts[to] = pages.bit_count() + hole
            chain[to] = older
            union[to] = pages if older < 0 else pages | union[older]
            if pages:
                latest[key] = to
            if hole:
                hollow.append(to)
            to += 1
        for column in (counts, holes, live):
            column[to:] = array(column.typecode, bytes(column.itemsize * (len(column) - to)))
        for number in range(len(self._buckets)):
            begin = number << _BUCKET_BITS
            self._buckets[number] = sum(counts[begin : begin + _BUCKET])
        self._latest = latest
        self._hollow = hollow
        self._bottom = 0
        self._top = to
        self._total = sum(self._buckets)
        self._extents = to - (to > 0 and not live[to - 1])

    # --- periods

    def advance(self) -> None:
        """A period ends.

        After many quiet ones more leaves are watched, from nothing: a stream of long ago may have
        left too few for what the guest does now.  Until they have been seen for a while the curve
        stays as it is, and if it comes to nothing again, it is tried half as often.
        """
        self._settle()
        if self._settling:
            self._settling -= 1
            self._depths.discard()
        else:
            self._depths.advance()
        quiet = self._calls < _CALLS_QUIET and self.threshold <= SAMPLE_MASK
        self._quiet = self._quiet + 1 if quiet else 0
        self._calls = 0
        if self._quiet >= self._patience:
            self._patience *= 2
            self._settling = _SETTLING_PERIODS
            self.threshold = min(self.threshold * 4, SAMPLE_MASK + 1)
            self._begin(len(self._counts))

    def curve(self) -> Curve:
        """The curve of the periods that have ended."""
        leaves = len(self._latest)
        unwatched = 1 - self.threshold / (SAMPLE_MASK + 1)
        return self._depths.curve((unwatched / leaves) ** 0.5 if leaves else 0.0)
