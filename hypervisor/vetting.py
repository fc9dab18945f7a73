"""Pages that nobody may have, though they are there: disowned ones, and damaged ones.

*Disowned* (quarantine): the pages that one guest put into a shared pool, up to now.  One word in
the segment, the origin of its member record, says up to which sequence (arena A7), so all of them
are out of reach at once, whatever their number, and stay so when the hypervisor is killed.  Their
frames come free in slices like those of doomed pages: a sweep goes once over the arena.  What the
guest puts later is not meant.

*Damaged*: a page that fails its checksum (`beside`).  An ephemeral one goes, and its get is a miss.
A persistent one stays where it is, and each get of it fails: to forget it would tell its guest that
it never put it.

A pool whose pages are all beyond doubt (`Pool.vets` is False) costs a get one comparison.

Invariants
  V1  `Pool.vets` is True from before a member's pages are disowned until none of them is left.
  V2  A slice looks at `_LOOK_FRAMES` frames and frees as many pages at most, between two turns of
      the server.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

from hypervisor.arena import HINTS_MASK, SEQUENCE_SHIFT, SLOT_SHIFT, Arena
from hypervisor.frames import EPHEMERAL
from hypervisor.objects import NO_PAGE, NO_PAGES, TmemObject
from hypervisor.pages import REMOVED, Run, StoreOptions
from hypervisor.pools import Member, Pool
from hypervisor.reclaim import REAP_SLICE_PAGES, Reclaim
from ipc.abi import PAGE_BYTES
from ipc.errors import InvariantError

_LOOK_FRAMES: Final = 512
_LOOK_WORK: Final = 32
"""Freed pages that take as long as to look at so many frames, or at a table of entries."""


class Damage(NamedTuple):
    """A page that is not what was put, as it was found."""

    owner: TmemObject
    page_index: int
    putter: str

    def __str__(self) -> str:
        pool, oid = self.owner.pool, self.owner.oid.rstrip(b"\0").hex()
        return f"{pool.kind} {pool.number} {oid}:{self.page_index} put by {self.putter}"


class Vetting(Reclaim):
    """`damaged` are the pages that the call which is being served found to be wrong."""

    def __init__(self, arena: Arena, options: StoreOptions) -> None:
        super().__init__(arena, options)
        self.damaged: list[Damage] = []
        self.damaged_pages = 0
        """Found since the start; a persistent one each time that it is asked for."""
        self.quarantined: Counter[str] = Counter()
        """Disowned pages that were freed since the start, by who put them."""
        self._sweeping: set[Pool] = set()
        self._next_frame = 0
        self._blocks: list[int] = []
        """Tables of entries that this sweep has not looked at."""

    # --- what a get looks at

    def _passes(self, owner: TmemObject, number: int, index: int) -> bool:
        """Whether a page may be had; a damaged ephemeral one is gone then."""
        pool = owner.pool
        if pool.shared and self._is_disowned(pool, self.state(number)):
            return False
        if not self.beside.sums or self.is_right(owner, number, index):
            return True
        self.damaged_pages += 1
        putter = self.member_of(pool, number).origin[0]
        self.damaged.append(Damage(owner, index, putter))
        if not pool.persistent:
            self._drop(owner, number, index)
        return False

    def is_same(self, pool: Pool, oid: bytes, index: int, page: bytes) -> bool:
        """Whether there is a page under this handle, and it has these bytes."""
        owner = pool.objects.get(oid)
        number = NO_PAGE if owner is None else owner.find(index)
        if number == NO_PAGE:
            return False
        if number < self._entry_base:
            return page == self.arena.data[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
        try:
            return page == self.contents.read(number)
        except (LookupError, ValueError, InvariantError):
            # As in `is_right`.
            return False

    def take_damaged(self) -> list[Damage]:
        """What this call found, once."""
        found, self.damaged = self.damaged, []
        return found

    def is_right(self, owner: TmemObject, number: int, index: int) -> bool:
        """Whether a page is what was put, as far as its checksum tells."""
        if number < self._entry_base:
            return self.beside.is_right(owner, number, index)
        beside = self.entries.read_beside(number)
        try:
            page = self.contents.read(number)
        except (LookupError, ValueError, InvariantError):
            # What the entry says of its page was damaged itself.
            return False
        state = self.entries.state(number)
        return beside is not None and beside[1] == self.beside.sum_of(owner, index, state, page)

    def _passing(
        self, owner: TmemObject, leaf_number: int, place: int, runs: list[Run]
    ) -> list[Run]:
        """Of the runs of a leaf, from `place` on, the pages that may be had."""
        index = (leaf_number << 6) + place
        whole = self.beside.sums and owner.pool not in self._sweeping
        passing: list[Run] = []
        for run in runs:
            at, length, first = run
            if (
                whole
                and first < self._entry_base
                and self.beside.are_right(owner, first, length, index + at)
            ):
                passing.append(run)
                continue
            passing += [
                (at + step, 1, first + step)
                for step in range(length)
                if self._passes(owner, first + step, index + at + step)
            ]
        return passing

    def _drop(self, owner: TmemObject, number: int, index: int) -> None:
        leaf = owner.leaf(index >> 6)
        assert leaf is not None
        self._remove(owner, index >> 6, leaf, index & 63, [(0, 1, number)], REMOVED)

    def spoil(self, owner: TmemObject, number: int, index: int, state: int) -> None:
        """Recovery: a page that is not what was put stays so, under another state word."""
        if number < self._entry_base:
            self._state_column[number] = state
            self.beside.spoil(owner, number, index)
            return
        self.contents.forget_bytes(number)
        wrong = ~self.beside.sum_of(owner, index, state, self.contents.read(number))
        self.entries.spoil(number, state, wrong & 0xFFFFFFFF)

    def forget(self, owner: TmemObject, index: int) -> None:
        """Recovery: the page of this handle is no more; it was not charged yet."""
        leaf = owner.leaf(index >> 6)
        assert leaf is not None
        leaf[index & 63] = NO_PAGE
        owner.pages -= 1
        owner.pool.pages -= 1
        if leaf == NO_PAGES[len(leaf)]:
            self._count_leaf_gone(owner.pool)
            owner.drop_leaf(index >> 6)

    def doom_object(self, found: TmemObject) -> None:
        """Recovery: an object that nobody finds by its id."""
        self._doom_object(found)
        self.doomed = True

    # --- quarantine

    def disown(self, member: Member) -> None:
        """Nobody may have what this member of a shared ephemeral pool has put until now."""
        pool = member.pool
        pool.vets = True
        self.arena.disown(member.record, self.sequence)
        member.disowned = self.sequence
        self._sweeping.add(pool)
        self._next_frame = 0
        self._blocks = self.entries.blocks()
        self.doomed = True

    @property
    def is_sweeping(self) -> bool:
        """Disowned pages still take memory."""
        return bool(self._sweeping)

    def reap(self, limit_pages: int = REAP_SLICE_PAGES) -> int:
        """As the other's; disowned pages are freed before doomed ones."""
        freed = work = 0
        while self._sweeping and work < limit_pages:
            freed_now = self._sweep()
            freed += freed_now
            work += freed_now + _LOOK_WORK
        return freed + (super().reap(limit_pages - work) if work < limit_pages else 0)

    def _is_disowned(self, pool: Pool, state: int) -> bool:
        member = pool.members[state >> SLOT_SHIFT & HINTS_MASK]
        return state >> SEQUENCE_SHIFT <= member.disowned

    def _sweep(self) -> int:
        """Free the disowned pages in some frames, or in a table of entries; how many."""
        first = self._next_frame
        if first < self.arena.frames_count:
            self._next_frame = first + _LOOK_FRAMES
            end = min(self._next_frame, self.arena.frames_count)
            kinds = self.frames.kinds[first:end]
            states = self._state_column[first:end].tolist()
            owners = self._object_column[first:end].tolist()
            return sum(
                self._sweep_page(first + at, states[at], owners[at], self._index_column[first + at])
                for at, kind in enumerate(kinds)
                if kind == EPHEMERAL
            )
        if self._blocks:
            block = self._blocks.pop()
            found = self.entries.of_block(block) if self.entries.has_block(block) else []
            return sum(
                self._sweep_page(number, state, *self.entries.handle(number))
                for number, state, _ in found
            )
        for pool in self._sweeping:
            pool.vets = self.beside.sums
        self._sweeping.clear()
        return 0

    def _sweep_page(self, number: int, state: int, object_number: int, index: int) -> int:
        owner = self.objects[object_number]
        if owner is None or owner.doomed or owner.pool not in self._sweeping:
            return 0
        if not self._is_disowned(owner.pool, state):
            return 0
        self.quarantined[self.member_of(owner.pool, number).origin[0]] += 1
        self._drop(owner, number, index)
        return 1
