"""The pages that live: which object and member each belongs to, and how it goes.

    page number -> frame or entry -> state word, object, index -> leaf of an object -> page number

`Pages` knows the arena and everything that says what is in it; it moves no bytes and chooses no
victims.  The store has layers, each of which knows those below:

    store      how pages come: puts
    retrieval  how they are had and dropped: gets and flushes
    vetting    pages that nobody may have
    reclaim    whose pages go, and when
    deferral   when pages are compressed
    pages      what there is, and the one way in which a page stops being live
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hypervisor.arena import HINTS_MASK, SLOT_SHIFT, Arena
from hypervisor.beside import Beside
from hypervisor.entries import Entries
from hypervisor.eviction import make_policy
from hypervisor.eviction.links import Links
from hypervisor.frames import Frames
from hypervisor.inventory import Inventory
from hypervisor.lending import Loans
from hypervisor.objects import LEAF_PAGES, NO_PAGES, TmemObject
from hypervisor.pools import RAW_COST_BYTES, Client, Member, Pool
from hypervisor.room import Victims
from ipc.abi import EXTENT_PAGES_MAX

_KEY_MASK: Final = (1 << 63) - 1
_FREE_STATES: Final = tuple(array("Q", [0]) * n for n in range(EXTENT_PAGES_MAX + 1))

Run = tuple[int, int, int]
"""Pages whose numbers are neighbours: place in a slice of a leaf, count, first number."""

TAKEN: Final = 0
EVICTED: Final = 1
REMOVED: Final = 2
"""Why a page goes: what its eviction policy is told."""

LeafKey = Callable[[bytes, int], int]


def leaf_key(oid: bytes, leaf_number: int) -> int:
    """What policies and samplers know a leaf by, 63 bits; seeded by Python at every start, so that
    no guest can choose object ids that all samplers watch."""
    return hash((oid, leaf_number)) & _KEY_MASK


@dataclass(frozen=True)
class StoreOptions:
    """How a store is to behave.  `secret` seeds the hash that finds equal pages, `now_ns` measures
    what encoding costs."""

    policy: str = "clock"
    admission: bool = True
    scheduling: str = "scheduled"
    secret: bytes = b""
    now_ns: Callable[[], int] = lambda: 0
    leaf_key: LeafKey = leaf_key


class Pages:
    """`objects[n]` is the object with number n."""

    def __init__(self, arena: Arena, options: StoreOptions) -> None:
        self.arena = arena
        self.leaf_key = options.leaf_key
        self._data = arena.data
        self._state_column = arena.state
        self._object_column = arena.object
        self._index_column = arena.index
        self.frames = Frames(arena.frames_count)
        self.loans = Loans(arena, self.frames)
        self.links = Links(arena.frames_count)
        self.entries = Entries(arena, self.frames, self.links)
        self.contents = Inventory(arena, self.frames, self.entries, options.secret, options.now_ns)
        self.contents.member_at = self._member_at
        self._entry_base = self.entries.base
        self.beside = self.contents.beside = Beside(arena)
        self.policy_name = options.policy
        self.admission = options.admission
        # Refuses a wrong name now.
        make_policy(options.policy, self.links, admission=options.admission).close()
        self.victims = Victims(options.scheduling)
        self.sequence = 0
        self.objects: list[TmemObject | None] = []
        self.free_object_numbers: list[int] = []
        self.leaves = 0
        """Of all objects, doomed ones too."""
        # The frame numbers themselves: a slice compared with a slice of a leaf tells a run, and
        # copied into a leaf writes one.
        self._ident = array("i", range(max(arena.frames_count, LEAF_PAGES)))

    # --- members

    def open_member(self, member: Member) -> None:
        """A member may put pages from now on."""
        if not member.pool.persistent:
            member.policy = make_policy(self.policy_name, self.links, admission=self.admission)
            member.keyed = member.policy.wants_keys or member.sampler is not None
            self.victims.add(member)
        self.contents.admit(member)
        self.beside.open_pool(member.pool)
        member.pool.members[member.slot] = member
        if not member.pool.shared:
            member.pool.only = member

    def bequeath(self, member: Member, heir: Client) -> None:
        """Another guest pays for a member's pages from now on."""
        if member.policy is not None:
            self.victims.remove(member)
        member.pass_to(heir)
        if member.policy is not None:
            self.victims.add(member)

    def close_member(self, member: Member) -> None:
        """A member without pages is no more."""
        assert not member.pages
        member.aim(0)
        if member.policy is not None:
            member.policy.close()
            self.victims.remove(member)
        self.contents.dismiss(member)
        del member.pool.members[member.slot]

    # --- whose a page is

    def state(self, number: int) -> int:
        """State word of a page."""
        if number < self._entry_base:
            return self._state_column[number]
        return self.entries.state(number)

    def member_of(self, pool: Pool, number: int) -> Member:
        """Who put a page."""
        if pool.only is not None:
            return pool.only
        return pool.members[self.state(number) >> SLOT_SHIFT & HINTS_MASK]

    def _member_at(self, number: int) -> Member:
        """Who put the page behind an entry."""
        owner = self.objects[self.entries.handle(number)[0]]
        assert owner is not None
        return self.member_of(owner.pool, number)

    def _by_member(self, pool: Pool, first: int, count: int) -> list[tuple[Member, int, int]]:
        """(member, first number, count) of neighbouring pages of one pool, by who put them."""
        if pool.only is not None:
            return [(pool.only, first, count)]
        parts: list[tuple[Member, int, int]] = []
        slot = -1
        for number in range(first, first + count):
            its_slot = self.state(number) >> SLOT_SHIFT & HINTS_MASK
            if its_slot == slot:
                member, start, length = parts[-1]
                parts[-1] = (member, start, length + 1)
            else:
                parts.append((pool.members[its_slot], number, 1))
                slot = its_slot
        return parts

    # --- how a page goes

    def _remove(
        self,
        owner: TmemObject,
        leaf_number: int,
        leaf: array[int],
        place: int,
        runs: list[Run],
        why: int,
        key: int = -1,
    ) -> None:
        """Pages of a leaf are no more: `runs` are all that there are between `place`, from which
        they count, and the end of the last run.  `key` is the leaf's, -1 if it was not computed."""
        pool = owner.pool
        only = pool.only
        if key < 0:
            known = why == REMOVED or (only is not None and not only.keyed)
            key = 0 if known else self.leaf_key(owner.oid, leaf_number)
        if only is not None and not owner.doomed:
            gone = self._release_own(only, runs, why, key, place)
        else:
            gone = 0
            for at, length, first in runs:
                self._release(owner, first, length, why, key, place + at)
                gone += length
        owner.pages -= gone
        if not owner.doomed:
            pool.pages -= gone
        if not owner.pages:
            self._count_leaf_gone(pool)
            self._drop_object(owner)
            return
        end = place + runs[-1][0] + runs[-1][1]
        leaf[place:end] = NO_PAGES[end - place]
        if leaf == NO_PAGES[len(leaf)]:
            self._count_leaf_gone(pool)
            owner.drop_leaf(leaf_number)

    def _release_own(self, only: Member, runs: list[Run], why: int, key: int, place: int) -> int:
        """`_release` of runs of a private pool; how many pages went."""
        policy = only.policy
        frames, states = self.frames, self._state_column
        gone = raw = 0
        for at, length, first in runs:
            gone += length
            if policy is not None:
                if why == TAKEN:
                    policy.taken(first, length, key, place + at)
                elif why == EVICTED:
                    policy.evicted(first, length, key, place + at)
                else:
                    policy.removed(first, length)
            if first >= self._entry_base:
                self.contents.release_run(only, first, length)
                continue
            raw += length
            if length == 1:
                states[first] = 0
                frames.give(first)
            else:
                states[first : first + length] = _FREE_STATES[length]
                frames.release(first, length)
        only.charge(-raw, -raw * RAW_COST_BYTES)
        return gone

    def _release(
        self, owner: TmemObject, first: int, count: int, why: int, key: int, place: int
    ) -> None:
        """Pages of one leaf stop being live, in the segment first (arena A1), and are no longer
        charged."""
        for member, number, length in self._by_member(owner.pool, first, count):
            if member.policy is not None:
                if why == TAKEN:
                    member.policy.taken(number, length, key, place + number - first)
                elif why == EVICTED and not owner.doomed:
                    member.policy.evicted(number, length, key, place + number - first)
                else:
                    member.policy.removed(number, length)
            if number >= self._entry_base:
                self.contents.release_run(member, number, length)
                continue
            member.charge(-length, -length * RAW_COST_BYTES)
            if length == 1:
                self._state_column[number] = 0
                self.frames.give(number)
            else:
                self._state_column[number : number + length] = _FREE_STATES[length]
                self.frames.release(number, length)

    # --- objects and leaves

    def _new_leaf(self, target: TmemObject, leaf_number: int, places: int) -> array[int]:
        self.leaves += 1
        target.pool.leaves += 1
        return target.new_leaf(leaf_number, places)

    def _count_leaf_gone(self, pool: Pool) -> None:
        self.leaves -= 1
        pool.leaves -= 1

    def _new_object(self, pool: Pool, oid: bytes) -> TmemObject:
        """Precondition: `_allow_leaves`, so there is a number."""
        if self.free_object_numbers:
            number = self.free_object_numbers.pop()
        else:
            number = len(self.objects)
            assert number < self.arena.frames_count
            self.objects.append(None)
        made = TmemObject(number, pool, oid)
        self.objects[number] = made
        pool.objects[oid] = made
        if pool.tokens is not None:
            self.beside.tokens.begin_object(number)
        self.arena.publish_object(number, pool.number, oid)
        return made

    def _drop_object(self, owner: TmemObject) -> None:
        self.arena.free_object(owner.number)
        if not owner.doomed:
            del owner.pool.objects[owner.oid]
        self.objects[owner.number] = None
        self.free_object_numbers.append(owner.number)

    def _runs(self, numbers: array[int]) -> list[Run]:
        """The runs in a slice of a leaf."""
        total = len(numbers)
        if not total:
            return []
        first = numbers[0]
        if first >= 0 and numbers == self._ident[first : first + total]:
            return [(0, total, first)]
        runs = []
        at = 0
        while at < total:
            first = numbers[at]
            start = at
            at += 1
            if first < 0:
                continue
            while at < total and numbers[at] == first + at - start:
                at += 1
            runs.append((start, at - start, first))
        return runs
