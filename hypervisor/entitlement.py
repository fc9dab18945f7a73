"""Who is entitled to how much: weights, reservations and caps (whose page goes: `room`).

    weight       a guest's part of what is not reserved, against the weights of the others
    reservation  bytes that nobody else's put can take from it, used for pages of either kind
    cap          bytes that it never exceeds, 0 for none
    priority     among those over their target, the lower ones lose pages first

Persistent pages can't be evicted, so they are the first charge on a guest's own part: what is left
of its part is for its ephemeral pages.  A persistent put that would take a guest over its
*allotment* is refused, unless the administrator trusts the guest to take pages back when it is
asked (`limits`, `pressure`).  Idle memory of others is lent freely for ephemeral pages only, since
only those can be called back for certain.

Differences from Xen.  Its quota test compared the wrong way round from 2009 on: it divided all
pages by the client's own and all weight by the client's own, and took the larger for a surplus, so
a client with half of the weight and a tenth of the pages was "over".  Caps were stored there and
never enforced; reservations did not exist.  Weight 0 meant "no quota" and was the default, so
weights did nothing.  Here weight 0 means no part: such a guest has its reservation, and beyond it
what nobody else has a use for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Priority(IntEnum):
    """Of a guest or a pool; the administrator's words in lower case."""

    LOW = 0
    NORMAL = 1
    HIGH = 2


@dataclass(frozen=True, slots=True)
class Claim:
    """One of those among whom something is divided by weight."""

    weight: float
    least_bytes: int = 0
    most_bytes: int | None = None
    """None: no limit."""


def share_bytes(total_bytes: int, claims: Sequence[Claim]) -> list[int]:
    """Divide by weight, so that nobody gets less than its least or more than its most.

    Everyone within its limits gets the same bytes per weight.  If all the leasts together are more
    than there is, all are cut in proportion.  What is left when all have their most is not divided.
    """
    leasts = [
        claim.least_bytes
        if claim.most_bytes is None
        else max(min(claim.least_bytes, claim.most_bytes), 0)
        for claim in claims
    ]
    promised = sum(leasts)
    if promised > total_bytes:
        return [least * max(total_bytes, 0) // promised for least in leasts]
    shares = leasts
    open_claims = list(range(len(claims)))
    left = total_bytes
    # As many rounds as claims at worst: each fixes one at its least or at its most.
    while open_claims:
        weights = sum(claims[number].weight for number in open_claims)
        level = left / weights if weights else 0.0
        low: list[int] = []
        high: list[int] = []
        missing = excess = 0.0
        for number in open_claims:
            claim = claims[number]
            part = claim.weight * level
            if part < leasts[number]:
                low.append(number)
                missing += leasts[number] - part
            elif claim.most_bytes is not None and part > claim.most_bytes:
                high.append(number)
                excess += part - claim.most_bytes
        if not low and not high:
            for number in open_claims:
                shares[number] = max(int(claims[number].weight * level), leasts[number])
            break
        fixed = low if missing >= excess else high
        for number in fixed:
            if fixed is high:
                shares[number] = claims[number].most_bytes or 0
            left -= shares[number]
        open_claims = [number for number in open_claims if number not in set(fixed)]
    return shares


@dataclass(frozen=True, slots=True)
class Terms:
    """What the administrator has set for a guest."""

    weight: int = 100
    reserve_bytes: int = 0
    cap_bytes: int = 0
    """0: none."""

    @property
    def most_bytes(self) -> int | None:
        """The cap as a limit."""
        return self.cap_bytes or None


def allotment_bytes(terms: Terms, everyone: Iterable[Terms], arena_bytes: int) -> int:
    """What a guest may hold for certain, hence the limit of its persistent pages.

    `everyone` are the terms of all guests, this one included.  The allotments of all are never more
    than the arena, unless reservations alone are.
    """
    return allotments([terms], everyone, arena_bytes)[0]


def allotments(some: Iterable[Terms], everyone: Iterable[Terms], arena_bytes: int) -> list[int]:
    """`allotment_bytes` of each of some: the sums over everyone are taken once, since this is done
    whenever a guest comes or goes."""
    weights = reserves = 0
    for one in everyone:
        weights += one.weight
        reserves += one.reserve_bytes
    unreserved = max(arena_bytes - reserves, 0)
    found = []
    for terms in some:
        part = unreserved * terms.weight // weights if weights else 0
        allotment = min(terms.reserve_bytes + part, arena_bytes)
        found.append(min(allotment, terms.cap_bytes) if terms.cap_bytes else allotment)
    return found
