"""Who may hold how much, kept up to date: allotments, targets, and what watches the guests.

`entitlement` and `scheduler` say how memory is to be divided, as pure functions; this module feeds
them and puts their answers where the hot path reads them:

  client.allotment_bytes     what its persistent pages may cost
  member.target_bytes        beyond which its ephemeral pages are the first to go
  policy.capacity_pages      the target in pages, for policies that divide what they have
  member.sampler             watches a member's puts and gets while the mode is `scheduled`

Targets are looked at again when the administrator changes something, and after every period.  A
period is a number of evicted pages: while nothing is evicted nobody needs a target, and there is no
clock in here.  What a guest can do as often as it likes, making and leaving pools, costs no such
look: a new member begins with its part of the guest's allotment.

To divide anew takes 10 ms with a few guests and 100 with many, so at the end of a period it is only
begun: `dividing` is what is left to do, a piece at a time between two turns of the server.  Until
it is done the old targets hold.  A thread would not do: it holds the interpreter when it loses the
processor, and then nobody is served for a time slice.

Samplers are bounded: so many in all, so many a guest, each as large as the arena deserves.  A
member without one keeps its share by weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from hypervisor.curve import Curve
from hypervisor.entitlement import Priority as Rank
from hypervisor.entitlement import Terms, allotments
from hypervisor.pools import Client, Member, Settings
from hypervisor.reuse import ReuseSampler
from hypervisor.room import RANKS
from hypervisor.scheduler import GuestState, MemberState, Scheduling, Snapshot, divide
from hypervisor.store import Store
from ipc.abi import PAGE_BYTES

MODES: Final = tuple(mode.value for mode in Scheduling)

SAMPLERS_MAX: Final = 64
SAMPLERS_PER_GUEST: Final = 4
_EXTENTS_LEAST: Final = 64
_EXTENTS_MOST: Final = 1024
_FRAMES_PER_EXTENT: Final = 16

_PERIODS_A_TURNOVER: Final = 8
_PERIOD_PAGES_LEAST: Final = 256
_PERIOD_DOUBLINGS_MAX: Final = 3
"""A period ends when an eighth of the arena was evicted.  As long as periods change no target they
become twice as long, up to a whole arena: what a division costs (2 ms for four guests) is spent
where the load moves."""

_PUNCH_FRAMES: Final = 65536
_PUNCH_RUNS: Final = 4096
"""Frames looked at, and holes made, in one slice of giving memory back."""


_PIECE_MEMBERS: Final = 64
"""Members described, or told their targets, in one piece of a division."""


class Balance:
    """Feeds the scheduler from one store and its clients.  With `in_pieces` whoever drives the
    machine calls `divide` until nothing is left to do."""

    def __init__(self, store: Store, clients: dict[str, Client]) -> None:
        self._store = store
        self._clients = clients
        self._evicted = 0
        self._moved = 0
        self._period_pages = max(store.frames.count // _PERIODS_A_TURNOVER, _PERIOD_PAGES_LEAST)
        self._doublings = 0
        self._extents = min(
            max(store.frames.count // _FRAMES_PER_EXTENT, _EXTENTS_LEAST), _EXTENTS_MOST
        )
        self._punch_at: int | None = None
        self.in_pieces = False
        self.dividing: Iterator[None] | None = None
        """A division that was begun; a plain attribute, the server reads it every turn."""
        self.periods = 0
        store.evicted_pages = self._count_evicted

    @property
    def mode(self) -> str:
        """One of MODES."""
        return self._store.victims.mode

    def set_mode(self, mode: str) -> None:
        """Choose how targets are set; what was learned for another mode is forgotten."""
        self._store.victims.mode = mode
        for member in self._store.victims.members.values():
            self._equip(member)
        self.retarget()

    def welcome(self, member: Member) -> None:
        """A guest has made or joined a pool."""
        self._equip(member)
        if member.policy is not None:
            client = member.client
            parts = sum(one.policy is not None for one in client.members.values())
            member.aim(client.allotment_bytes // parts)
            self._set_capacity(member)

    def recovered(self) -> None:
        """All clients and members were found in the arena."""
        for member in self._store.victims.members.values():
            self._equip(member)
        self.retarget()

    def _equip(self, member: Member) -> None:
        """Give a member its sampler, or take it away."""
        if member.policy is None:
            return
        member.sampler = None
        if self.mode == Scheduling.SCHEDULED and not member.heir:
            member.sampler = self._sampler_for(member)
        member.keyed = member.policy.wants_keys or member.sampler is not None

    def _sampler_for(self, member: Member) -> ReuseSampler | None:
        """A new one, or that of the shared pool: what one sharer put the other one gets."""
        for other in member.pool.members.values():
            if other is not member and other.sampler is not None:
                return other.sampler
        watched = [one for one in self._store.victims.members.values() if one.sampler is not None]
        own = sum(one.client is member.client for one in watched)
        if len(watched) >= SAMPLERS_MAX or own >= SAMPLERS_PER_GUEST:
            return None
        return ReuseSampler(self._store.frames.count, self._extents)

    def _curve(self, member: Member) -> Curve:
        """A member's part of what its pool's sampler says: sharers bring in equal parts."""
        if member.sampler is None:
            return Curve()
        curve = member.sampler.curve()
        parts = sum(one.sampler is member.sampler for one in member.pool.members.values())
        if parts == 1:
            return curve
        return replace(
            curve,
            sizes=tuple(-(-size // parts) for size in curve.sizes),
            found=tuple(found / parts for found in curve.found),
            gets=curve.gets / parts,
            puts=curve.puts / parts,
        )

    # --- targets

    def _count_evicted(self, pages: int) -> None:
        self._evicted += pages
        if self._evicted >= self._period_pages << self._doublings and self.dividing is None:
            self._evicted = 0
            self.periods += 1
            self.dividing = self._period()
            self._divide_at_once()

    def lent(self, frames: int) -> None:
        """So many frames were lent, or came back: allotments change with what is left.  Targets
        follow when it was a good many, or a guest that is lent the same frames over and over would
        have them computed all the time."""
        self.allot()
        self._moved += frames
        if self._moved >= self._period_pages and self.dividing is None:
            self._moved = 0
            self.dividing = self._division()
            self._divide_at_once()

    def _divide_at_once(self) -> None:
        while not self.in_pieces and self.dividing is not None:
            self.divide()

    def _period(self) -> Iterator[None]:
        """What there is to do at the end of one."""
        members = self._store.victims.members.values()
        for sampler in {id(one.sampler): one.sampler for one in members}.values():
            if sampler is not None:
                sampler.advance()
                yield
        yield from self._division()

    def divide(self) -> None:
        """A piece of the division that was begun."""
        if self.dividing is not None and next(self.dividing, self) is self:
            self.dividing = None

    @property
    def _total_bytes(self) -> int:
        """What can be charged: tables of entries are nobody's, and what is lent is RAM."""
        store = self._store
        return (store.frames.count - store.entries.tables - store.loans.lent) * PAGE_BYTES

    def allot(self) -> dict[str, Terms]:
        """Set every allotment, as it is to be when guests come and go; their terms."""
        terms = {name: _terms(client.settings) for name, client in self._clients.items()}
        self._store.somebody_borrows = any(
            client.settings.borrow for client in self._clients.values()
        )
        self._store.reserved_bytes = sum(one.reserve_bytes for one in terms.values())
        total_bytes = self._total_bytes
        found = allotments(terms.values(), terms.values(), total_bytes)
        for client, allotment_bytes in zip(self._clients.values(), found, strict=True):
            client.allotment_bytes = allotment_bytes
        return terms

    def retarget(self) -> None:
        """Set every allotment and target, now."""
        self.dividing = None
        doublings = self._doublings
        for _ in self._division():
            pass
        self._doublings = doublings

    def _division(self) -> Iterator[None]:
        """Set every allotment and target, in pieces; guests and members may come and go between
        two of them."""
        members = list(self._store.victims.members.values())
        described: list[tuple[Member, MemberState]] = []
        for number, member in enumerate(members):
            if self._is_open(member):
                described.append((member, self._describe(number, member)))
            if number % _PIECE_MEMBERS == _PIECE_MEMBERS - 1 or member.sampler is not None:
                yield
        terms = self.allot()
        answers = yield from divide(
            Snapshot(
                Scheduling(self.mode),
                # What guests left that have gone is taken from all.
                self._total_bytes - sum(one.foreign_bytes for one in self._clients.values()),
                tuple(
                    GuestState(
                        client.number,
                        terms[name],
                        client.purses[True].bytes - client.foreign_bytes,
                        Rank(RANKS[client.settings.priority]),
                    )
                    for name, client in self._clients.items()
                ),
                # What a guest that has left held goes first.
                tuple(state for member, state in described if self._is_open(member)),
            )
        )
        changed = False
        for number, member in enumerate(members):
            if self._store.victims.members.get(id(member)) is member:
                target_bytes = (answers.get(number) or 0) if self._is_open(member) else 0
                changed = changed or target_bytes != member.target_bytes
                member.aim(target_bytes)
                self._set_capacity(member)
            if number % _PIECE_MEMBERS == _PIECE_MEMBERS - 1:
                yield
        if changed:
            self._doublings = 0
        elif self._doublings < _PERIOD_DOUBLINGS_MAX:
            self._doublings += 1

    def _describe(self, number: int, member: Member) -> MemberState:
        return MemberState(
            number,
            member.client.number,
            self._curve(member),
            weight=member.weight,
            priority=Rank(RANKS[member.pool.priority]),
            held_pages=member.pages,
            held_bytes=member.cost_bytes,
            target_bytes=member.target_bytes if self.periods else None,
        )

    def _set_capacity(self, member: Member) -> None:
        assert member.policy is not None
        if self.mode == Scheduling.GREEDY:
            member.policy.capacity_pages = self._store.frames.count
        else:
            member.policy.capacity_pages = max(1, _pages(member))

    def _is_open(self, member: Member) -> bool:
        """The guest is here and in the pool; what was left in one has no target."""
        client = member.client
        if self._clients.get(client.name) is not client:
            return False
        return client.members.get(member.pool_id) is member

    # --- memory for the host

    def give_back(self, freed: int) -> int:
        """Return the memory of free frames to the host, a slice at a time; bytes returned now.

        `freed` frames came free lately: then the whole arena is gone through once, by this call and
        those that follow while `is_giving_back`.
        """
        if freed:
            self._punch_at = 0
        if self._punch_at is None:
            return 0
        frames = self._store.frames
        start = self._punch_at
        returned = 0
        runs = frames.free_runs(start, _PUNCH_FRAMES)
        for first, count in runs[:_PUNCH_RUNS]:
            returned += self._store.arena.punch(first, count)
        if len(runs) > _PUNCH_RUNS:
            self._punch_at = runs[_PUNCH_RUNS][0]
        else:
            self._punch_at = start + _PUNCH_FRAMES
        if self._punch_at >= frames.count:
            self._punch_at = None
        return returned

    @property
    def is_giving_back(self) -> bool:
        """Some of the arena has still to be gone through."""
        return self._punch_at is not None


def _terms(settings: Settings) -> Terms:
    return Terms(settings.weight, settings.reserve_bytes, settings.cap_bytes)


def _pages(member: Member) -> int:
    """The target in pages, as large as the member's are on the average."""
    if not member.pages or not member.cost_bytes:
        return member.target_bytes // PAGE_BYTES
    return member.target_bytes * member.pages // member.cost_bytes
