"""The memory scheduler: how many bytes each member should hold, from what its pages were used for.

One pure function, `targets`.  A target takes nothing away by itself: while there is room everybody
may hold more, and when there is none the member furthest over its target loses pages (module
`room`).  So the targets add up to all there is, and memory of an idle guest is used.

    greedy      no targets: the oldest page goes, whosesoever it is (Xen with its default weights)
    static      by weight, reservation and cap alone
    scheduled   so that the fewest pages are read from disk, as far as the curves can tell

**Scheduled.**  Hits that a size brings come from the member's curve, times the guest's weight and
the priorities.  Curves have cliffs (a loop of N pages finds nothing in less than N), so marginal
utility alone does not find the best division: it is a knapsack, solved by dynamic programming over
equal units, first among the members of a guest, then among guests.  With very many members the
upper hulls of the curves are climbed instead, steepest part first.  Either way what the rounding
left over is dealt along the hulls again, and what nobody has a use for goes by weight.

Reservations and caps hold for a guest's persistent and ephemeral pages together.  A member that is
too new to be judged gets its static share; one that was watched and asked for nothing gets none.

**Hysteresis.**  Pages that one period moves and the next moves back are read from disk twice, so
the targets of the last round stay unless new ones promise at least `GAIN_LEAST` more hits.

Xen has nothing of this kind: its only input is the weight, compared the wrong way round.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from hypervisor.curve import Curve
from hypervisor.entitlement import Claim, Priority, Terms, share_bytes
from hypervisor.knapsack import (
    Ascent,
    Knapsack,
    Step,
    ascents,
    coarse,
    steepest_first,
    worth_of,
)
from ipc.abi import PAGE_BYTES

MEMBERS_EXACT_MAX: Final = 64
"""Members for which the knapsack is solved; beyond, hulls are climbed."""

GAIN_LEAST: Final = 0.02
"""Targets stay if new ones promise less than this part more."""

SAMPLES_LEAST: Final = 32
PERIODS_LEAST: Final = 3
"""A member with fewer samples and fewer periods than that is not judged."""

_UNITS_WORK: Final = 2048
_UNITS_LEAST: Final = 64
_UNITS_MOST: Final = 256
"""Memory is cut into units for the knapsack: the more members, the fewer units."""

_STEPS_MOST: Final = 32
"""Steps of a curve that the knapsack looks at; smaller ones are taken together."""

_ASCENTS_A_PIECE: Final = 32

_MARGIN_SHARE: Final = 1 / 64
_MARGIN_PAGES: Final = 16
"""Added to every size, with the curve's own error: one page short of a cliff is all short, and
a sampler knows depths no better than the extents that it saw."""

_HOPE: Final = 0.25
"""Of pages that are put after a quiet time, the part that is taken to be wanted back, until an
arena's worth of them has shown what is.  Without it a guest that becomes busy would have to live
through two rounds of its work in the memory that it had while it was idle."""
_HOPE_PARTS: Final = 8

_WORTH: Final = {Priority.LOW: 0.25, Priority.NORMAL: 1.0, Priority.HIGH: 4.0}
_WORTH_OF_NO_WEIGHT: Final = 0.001


class Scheduling(StrEnum):
    """How targets are set."""

    GREEDY = "greedy"
    STATIC = "static"
    SCHEDULED = "scheduled"


@dataclass(frozen=True, slots=True)
class GuestState:
    """A guest with its terms, and what its persistent pages cost."""

    number: int
    terms: Terms = field(default_factory=Terms)
    persistent_bytes: int = 0
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True)
class MemberState:
    """A guest's part in one pool of ephemeral pages."""

    number: int
    guest: int
    curve: Curve = field(default_factory=Curve)
    weight: int = 100
    """Against the guest's other members."""
    priority: Priority = Priority.NORMAL
    held_pages: int = 0
    held_bytes: int = 0
    """Charged for these pages: fewer than a page each, if they are compressed."""
    target_bytes: int | None = None
    """From the last round; None: none yet."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that `targets` looks at."""

    mode: Scheduling
    total_bytes: int
    """What can be charged: the arena without tables."""
    guests: tuple[GuestState, ...]
    members: tuple[MemberState, ...]


Targets = dict[int, int | None]


def targets(snapshot: Snapshot) -> Targets:
    """The target of each member in bytes; None for all if there are to be no targets."""
    pieces = divide(snapshot)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            found: Targets = end.value
            return found


def divide(snapshot: Snapshot) -> Generator[None, None, Targets]:
    """`targets` in pieces of some tenths of a millisecond: whoever serves guests meanwhile serves
    them between two.  It takes 10 ms for a few guests and 100 for many."""
    if snapshot.mode == Scheduling.GREEDY:
        return {member.number: None for member in snapshot.members}
    shares = yield from _static(snapshot)
    if snapshot.mode == Scheduling.STATIC:
        return dict(shares)
    division = _Division(snapshot)
    yield from division.weigh(shares)
    return dict((yield from division.targets()))


def _static(snapshot: Snapshot) -> Generator[None, None, dict[int, int]]:
    """Every guest its share, less what its persistent pages cost, divided among its members."""
    parts = share_bytes(
        snapshot.total_bytes,
        [
            Claim(
                guest.terms.weight,
                max(guest.terms.reserve_bytes, guest.persistent_bytes),
                guest.terms.most_bytes,
            )
            for guest in snapshot.guests
        ],
    )
    shares: dict[int, int] = {}
    of_guest: dict[int, list[MemberState]] = {guest.number: [] for guest in snapshot.guests}
    for member in snapshot.members:
        of_guest[member.guest].append(member)
    for guest, part in zip(snapshot.guests, parts, strict=True):
        yield
        members = of_guest[guest.number]
        claims = [Claim(member.weight) for member in members]
        left = max(part - guest.persistent_bytes, 0)
        for member, share in zip(members, share_bytes(left, claims), strict=True):
            shares[member.number] = share
    return shares


def steps_of(member: MemberState, factor: float, limit_bytes: int) -> list[Step]:
    """What sizes bring to a member, up to a limit."""
    curve = member.curve
    page_bytes = float(PAGE_BYTES)
    if member.held_pages >= 64:
        page_bytes = max(member.held_bytes / member.held_pages, 1.0)
    margin = 1 + _MARGIN_SHARE + curve.error
    # A guest that has gone quiet does not get the hits that it used to.
    known = curve.gets > 0 and curve.recent_gets >= 0
    fresh = min(curve.recent_gets / curve.gets, 1.0) if known else 1.0
    steps: list[Step] = [(0, 0.0)]
    for size, found in zip(curve.sizes, curve.found, strict=True):
        needed = int((size * margin + min(size / 8, _MARGIN_PAGES)) * page_bytes) + 1
        if needed > limit_bytes:
            break
        steps.append((needed, found * factor * fresh))
    hope = _HOPE * curve.recent_puts * max(1 - curve.trial, 0.0)
    return _with_hope(steps, hope * factor, limit_bytes) if hope >= 1 else steps


def _with_hope(steps: Sequence[Step], hope: float, limit_bytes: int) -> list[Step]:
    """The steps, and on top what pages may bring of which nothing is known yet: less for each byte
    more, so that guests with equal hopes get equal parts and not one of them all."""
    sizes = {limit_bytes * part // _HOPE_PARTS for part in range(1, _HOPE_PARTS + 1)}
    known = dict(steps)
    worth = 0.0
    hopeful = []
    for size in sorted(sizes | known.keys()):
        worth = known.get(size, worth)
        part = size / max(limit_bytes, 1)
        hopeful.append((size, worth + hope * part * (2 - part)))
    return hopeful


class _Division:
    """One round of `scheduled`: what is to be divided, among whom."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.guests = snapshot.guests
        self.members = snapshot.members
        self.pot = max(
            snapshot.total_bytes - sum(guest.persistent_bytes for guest in self.guests), 0
        )
        # What a guest's ephemeral pages may take at least and at most, and its members by place.
        self.most: dict[int, int] = {}
        self.least: dict[int, int] = {}
        self.of_guest: dict[int, list[int]] = {guest.number: [] for guest in self.guests}
        for place, member in enumerate(self.members):
            self.of_guest[member.guest].append(place)
        for guest in self.guests:
            cap = guest.terms.cap_bytes or snapshot.total_bytes
            most = max(min(cap - guest.persistent_bytes, self.pot), 0)
            self.most[guest.number] = most
            least = guest.terms.reserve_bytes - guest.persistent_bytes
            members = self.of_guest[guest.number]
            self.least[guest.number] = min(max(least, 0), most) if members else 0
        promised = sum(self.least.values())
        if promised > self.pot:
            self.least = {key: least * self.pot // promised for key, least in self.least.items()}
        self.steps: list[list[Step]] = []
        self.rough: list[list[Step]] = []
        self.small = 0.0
        self.fixed: dict[int, int] = {}
        """Members that can't be judged keep their share whatever the others need."""

    def weigh(self, shares: dict[int, int]) -> Iterator[None]:
        """What sizes bring to each member."""
        weights = [guest.terms.weight for guest in self.guests if guest.terms.weight]
        mean = sum(weights) / len(weights) if weights else 1.0
        factors = {
            guest.number: (guest.terms.weight / mean or _WORTH_OF_NO_WEIGHT)
            * _WORTH[guest.priority]
            for guest in self.guests
        }
        for place, member in enumerate(self.members):
            if _is_unknown(member):
                self.steps.append([(0, 0.0)])
                self.fixed[place] = shares[member.number]
                continue
            factor = factors[member.guest] * _WORTH[member.priority]
            self.steps.append(steps_of(member, factor, self.most[member.guest]))
            yield
        self.small = sum(steps[-1][1] for steps in self.steps) / _UNITS_MOST
        yield
        for steps in self.steps:
            self.rough.append(coarse(steps, max(self.small, steps[-1][1] / _STEPS_MOST)))
            if len(steps) > 1:
                yield

    def targets(self) -> Generator[None, None, dict[int, int]]:
        """By member number."""
        sizes = [self.fixed.get(place, 0) for place in range(len(self.members))]
        if len(self.members) <= MEMBERS_EXACT_MAX:
            yield from self._solve(sizes)
        yield from self._climb(sizes)
        best = yield from self._fill(sizes)
        kept = yield from self._kept()
        if kept is not None:
            promised = yield from self._promise(best)
            kept_promise = yield from self._promise(kept)
            if promised - kept_promise <= GAIN_LEAST * promised:
                best = kept
        return {member.number: best[place] for place, member in enumerate(self.members)}

    def _promise(self, sizes: Sequence[int]) -> Generator[None, None, float]:
        promised = 0.0
        for steps, size in zip(self.steps, sizes, strict=True):
            if len(steps) > 1:
                promised += worth_of(steps, size)
                yield
        return promised

    def _charges(self, sizes: Sequence[int]) -> dict[int, int]:
        """What each guest takes from the pot: at least what it has reserved."""
        return {
            number: max(sum(sizes[place] for place in places), self.least[number])
            for number, places in self.of_guest.items()
        }

    # --- the best division

    def _solve(self, sizes: list[int]) -> Iterator[None]:
        """Add to the sizes the best division of what is left, in equal units: among the members of
        each guest for all that the guest may get, then among guests.  What a guest has reserved
        is free for it."""
        left = self.pot - sum(self._charges(sizes).values())
        units = min(max(_UNITS_WORK // max(len(self.members), 1), _UNITS_LEAST), _UNITS_MOST)
        unit = max(-(-self.pot // units), 1)
        if left < 0:
            return
        inner: list[Knapsack] = []
        uses: list[list[tuple[int, int]]] = []
        offers: list[list[Step]] = []
        for number, places in self.of_guest.items():
            own = sum(sizes[place] for place in places)
            free = max(self.least[number] - own, 0) // unit
            choices = [
                [(-(-size // unit), worth) for size, worth in self.rough[place]] for place in places
            ]
            sack = Knapsack(max(self.most[number] - own, 0) // unit)
            for choice in choices:
                yield from sack.add(choice)
            inner.append(sack)
            worth = sack.worth
            # (units of the pot, units used): what is free, then every amount that brings more.
            use = [(0, min(free, len(worth) - 1))]
            least = max(worth[-1] / _STEPS_MOST, self.small)
            for used in range(use[0][1] + 1, len(worth)):
                rise = worth[used] - worth[use[-1][1]]
                if rise > 0 and (rise >= least or worth[used] == worth[-1]):
                    use.append((used - free, used))
            uses.append(use)
            offers.append([(charged, worth[used]) for charged, used in use])
            yield
        outer = Knapsack(left // unit)
        for offer in offers:
            yield from outer.add(offer)
        for places, sack, use, at in zip(
            self.of_guest.values(), inner, uses, outer.choose(left // unit), strict=True
        ):
            for place, step in zip(places, sack.choose(use[at][1]), strict=True):
                sizes[place] += self.rough[place][step][0]
            yield

    def _climb(self, sizes: list[int]) -> Iterator[None]:
        """Add to the sizes what is still left, along the hulls."""
        left = self.pot - sum(self._charges(sizes).values())
        held = {
            number: sum(sizes[place] for place in places)
            for number, places in self.of_guest.items()
        }
        blocked: set[int] = set(self.fixed)
        parts: list[Ascent] = []
        for place, (steps, size) in enumerate(zip(self.rough, sizes, strict=True)):
            if len(steps) > 1:
                parts += ascents(place, steps, size)
                yield
        for count, (place, size, wanted) in enumerate(steepest_first(parts)):
            if count % _ASCENTS_A_PIECE == 0:
                yield
            if place in blocked:
                continue
            guest = self.members[place].guest
            # What is reserved for the guest and not yet used does not come out of the pot.
            reserved = max(self.least[guest] - held[guest], 0)
            room = min(left + reserved, self.most[guest] - held[guest])
            if wanted - size > room:
                # Not all of this part: the largest step within it that fits, and no more.
                blocked.add(place)
                within = [step[0] for step in self.steps[place] if size < step[0] <= size + room]
                added = max(within, default=size) - size
            else:
                added = wanted - size
            sizes[place] += added
            held[guest] += added
            left -= max(added - reserved, 0)

    def _fill(self, sizes: Sequence[int]) -> Generator[None, None, list[int]]:
        """Divide what nobody has a use for by weight and demand: among guests, then among their
        members."""
        guests = [guest for guest in self.guests if self.of_guest[guest.number]]
        charges = self._charges(sizes)
        parts = share_bytes(
            self.pot,
            [
                Claim(
                    guest.terms.weight * sum(map(self._demand, self.of_guest[guest.number])),
                    charges[guest.number],
                    self.most[guest.number],
                )
                for guest in guests
            ],
        )
        filled = list(sizes)
        for guest, part in zip(guests, parts, strict=True):
            yield
            places = self.of_guest[guest.number]
            claims = [
                Claim(self.members[place].weight * self._demand(place), sizes[place])
                for place in places
            ]
            for place, size in zip(places, share_bytes(part, claims), strict=True):
                filled[place] = size
        return filled

    def _demand(self, place: int) -> float:
        """Pages that a member puts, which is how fast it fills what it gets."""
        return 1 + self.members[place].curve.recent_puts

    # --- hysteresis

    def _kept(self) -> Generator[None, None, list[int] | None]:
        """What the last targets have a use for, if that can stay."""
        sizes: list[int] = []
        for place, member in enumerate(self.members):
            target = member.target_bytes
            if target is None:
                return None
            # What a member has beyond its last step it won't miss.
            steps = self.steps[place]
            needed = 0
            if len(steps) > 1:
                needed = max(size for size, worth in steps if size <= target)
                yield
            sizes.append(self.fixed.get(place, needed))
        charges = self._charges(sizes)
        if sum(charges.values()) > self.pot:
            return None
        if any(charges[number] > self.most[number] for number in charges):
            return None
        return (yield from self._fill(sizes))


def _is_unknown(member: MemberState) -> bool:
    curve = member.curve
    return curve.samples < SAMPLES_LEAST and curve.periods < PERIODS_LEAST
