"""Objects: the pages of one object id, and all objects of a pool.

A leaf is an `array('i')` of up to 64 page numbers, -1 where there is no page: a radix tree over
dictionaries, because a page may cost no Python object of its own.  A leaf is only as long as its
highest page needs (in powers of two), and one without pages is dropped at once: a guest that
touches one page in each leaf must not make the hypervisor grow for ever.  Most files are below 64
pages, so leaf 0 has a slot of its own and the dictionaries exist for larger objects.

No dictionary here holds more than some thousand entries, however many a guest makes.  A Python
dictionary that grows is copied whole, and one of a million entries takes 70 ms for it, in which
nobody is served; one whose front was emptied is searched from the front each time.  So leaves are
found over two dictionaries, by the halves of their number, objects in one of many when they are
many, and what is to be reaped is taken from the back (`popitem`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hypervisor.pools import Pool

LEAF_PAGES: Final = 64
NO_PAGE: Final = -1
NO_PAGES: Final = tuple(array("i", [NO_PAGE]) * n for n in range(LEAF_PAGES + 1))
"""NO_PAGES[n] is a leaf of n places without a page; shared, never written."""

FEW_MAX: Final = 8192
"""Objects that a pool has in a single dictionary."""
SHARDS: Final = 256
"""Dictionaries for those beyond; a power of two."""

_LEAF_LENGTHS: Final = tuple(1 << max(0, n - 1).bit_length() for n in range(LEAF_PAGES + 1))
_HALF_BITS: Final = 13
"""Of the 26 bits of a leaf's number."""


class TmemObject:
    """The pages of one object id.  A `doomed` one was flushed, or its pool was destroyed, and waits
    to be reaped; nobody finds it by its oid any more."""

    __slots__ = ("_low", "_rest", "doomed", "number", "oid", "pages", "pool", "salt")

    def __init__(self, number: int, pool: Pool, oid: bytes) -> None:
        self.number = number
        self.pool = pool
        self.oid = oid
        self.pages = 0
        self.doomed = False
        self.salt = 0
        """What its checksums begin with; 0 before the first one."""
        self._low: array[int] | None = None
        self._rest: dict[int, dict[int, array[int]]] | None = None

    def leaf(self, leaf_number: int) -> array[int] | None:
        if leaf_number == 0:
            return self._low
        if self._rest is None:
            return None
        part = self._rest.get(leaf_number >> _HALF_BITS)
        return None if part is None else part.get(leaf_number)

    def new_leaf(self, leaf_number: int, places: int) -> array[int]:
        """A leaf that is not there, made to hold at least `places` pages; whoever asks counts."""
        leaf = array("i", NO_PAGES[_LEAF_LENGTHS[places]])
        if leaf_number == 0:
            self._low = leaf
        else:
            if self._rest is None:
                self._rest = {}
            self._rest.setdefault(leaf_number >> _HALF_BITS, {})[leaf_number] = leaf
        return leaf

    def lengthen(self, leaf: array[int], places: int) -> None:
        """Let a shorter leaf hold at least `places` pages."""
        leaf.extend(NO_PAGES[_LEAF_LENGTHS[places] - len(leaf)])

    def drop_leaf(self, leaf_number: int) -> None:
        if leaf_number == 0:
            self._low = None
        elif self._rest is not None:
            part = self._rest[leaf_number >> _HALF_BITS]
            del part[leaf_number]
            if not part:
                del self._rest[leaf_number >> _HALF_BITS]

    def leaves(self) -> Iterator[tuple[int, array[int]]]:
        """(leaf number, leaf) of all leaves; safe while leaves are dropped."""
        if self._low is not None:
            yield 0, self._low
        if self._rest is not None:
            for part in list(self._rest.values()):
                yield from list(part.items())

    def take_leaf(self) -> array[int]:
        """Some leaf, which is the object's no more; precondition: it has pages, and they go."""
        leaf = self._low
        if leaf is not None:
            self._low = None
            return leaf
        assert self._rest
        half, part = self._rest.popitem()
        _, leaf = part.popitem()
        if part:
            self._rest[half] = part
        return leaf

    def find(self, index: int) -> int:
        """The number of a page, NO_PAGE if it is not there."""
        leaf = self.leaf(index >> 6)
        place = index & 63
        return NO_PAGE if leaf is None or place >= len(leaf) else leaf[place]


class Objects:
    """The objects of a pool by their ids.  `get` is the dictionary's own as long as there are few:
    each call of a guest looks an object up."""

    __slots__ = ("_few", "_hand", "_many", "_many_count", "get")

    def __init__(self) -> None:
        self._few: dict[bytes, TmemObject] = {}
        self._many: list[dict[bytes, TmemObject]] = []
        """By the hash of the id, which Python seeds at every start: no guest can fill one only."""
        self._many_count = 0
        self._hand = 0
        self.get: Callable[[bytes], TmemObject | None] = self._few.get

    def _get(self, oid: bytes) -> TmemObject | None:
        found = self._few.get(oid)
        return found if found is not None else self._many[hash(oid) & SHARDS - 1].get(oid)

    def __setitem__(self, oid: bytes, added: TmemObject) -> None:
        """Precondition: the id is not there."""
        if len(self._few) < FEW_MAX:
            self._few[oid] = added
            return
        if not self._many:
            self._many = [{} for _ in range(SHARDS)]
            self.get = self._get
        self._many[hash(oid) & SHARDS - 1][oid] = added
        self._many_count += 1

    def pop(self, oid: bytes) -> TmemObject | None:
        """Take one out; None if it is not there."""
        found = self._few.pop(oid, None)
        if found is None and self._many:
            found = self._many[hash(oid) & SHARDS - 1].pop(oid, None)
            if found is not None:
                self._many_count -= 1
        return found

    def __delitem__(self, oid: bytes) -> None:
        """Precondition: it is there."""
        self.pop(oid)

    def take(self) -> TmemObject:
        """Take any out; precondition: there is one."""
        if self._few:
            return self._few.popitem()[1]
        while not self._many[self._hand]:
            # The memory of an emptied dictionary goes now, not that of all together in the end.
            self._many[self._hand] = {}
            self._hand = (self._hand + 1) % SHARDS
        self._many_count -= 1
        return self._many[self._hand].popitem()[1]

    def values(self) -> Iterator[TmemObject]:
        """All of them, in no order."""
        return chain(self._few.values(), *(shard.values() for shard in self._many))

    def items(self) -> Iterator[tuple[bytes, TmemObject]]:
        """All of them with their ids, in no order."""
        return chain(self._few.items(), *(shard.items() for shard in self._many))

    def __len__(self) -> int:
        return len(self._few) + self._many_count
