"""Pools and objects, and how a handle finds its frame.

  client.pools[pool id] -> pool.objects[oid] -> object.leaf(index >> 6)[index & 63] -> frame

A leaf is an `array('i')` of up to 64 frame numbers, -1 where there is no page: a radix tree of
height one over a dictionary, because a page may cost no Python object of its own.  A leaf is only
as long as its highest page needs (in powers of two), and one without pages is dropped at once: a
guest that touches one page in each leaf must not make the hypervisor grow for ever.  Most files
are below 64 pages, so leaf 0 has a slot of its own and the dictionary exists for larger objects.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

from hypervisor.accounting import Account
from ipc.abi import GuestId, PoolId

LEAF_PAGES: Final = 64
NO_FRAME: Final = -1
NO_FRAMES: Final = tuple(array("i", [NO_FRAME]) * n for n in range(LEAF_PAGES + 1))
"""NO_FRAMES[n] is a leaf of n places without a page; shared, never written."""

_LEAF_LENGTHS: Final = tuple(1 << max(0, n - 1).bit_length() for n in range(LEAF_PAGES + 1))


class TmemObject:
    """The pages of one object id.  `key` is its key in `pool.objects`: the oid, or the object
    number once the object was flushed and waits in a graveyard."""

    __slots__ = ("_low", "_rest", "key", "number", "pages", "pool")

    def __init__(self, number: int, pool: Pool, key: bytes | int) -> None:
        self.number = number
        self.pool = pool
        self.key = key
        self.pages = 0
        self._low: array[int] | None = None
        self._rest: dict[int, array[int]] | None = None

    def leaf(self, leaf_number: int) -> array[int] | None:
        if leaf_number == 0:
            return self._low
        return None if self._rest is None else self._rest.get(leaf_number)

    def leaf_for(self, leaf_number: int, places: int) -> array[int]:
        """The leaf, made or lengthened to hold at least `places` pages."""
        leaf = self.leaf(leaf_number)
        if leaf is None:
            leaf = array("i", NO_FRAMES[_LEAF_LENGTHS[places]])
            if leaf_number == 0:
                self._low = leaf
            else:
                if self._rest is None:
                    self._rest = {}
                self._rest[leaf_number] = leaf
        elif len(leaf) < places:
            leaf.extend(NO_FRAMES[_LEAF_LENGTHS[places] - len(leaf)])
        return leaf

    def drop_leaf(self, leaf_number: int) -> None:
        if leaf_number == 0:
            self._low = None
        elif self._rest is not None:
            del self._rest[leaf_number]

    def leaves(self) -> Iterator[tuple[int, array[int]]]:
        """(leaf number, leaf) of all leaves; safe while leaves are dropped."""
        if self._low is not None:
            yield 0, self._low
        if self._rest is not None:
            yield from list(self._rest.items())

    def first_leaf(self) -> tuple[int, array[int]]:
        """Any leaf; precondition: the object has pages."""
        if self._low is not None:
            return 0, self._low
        assert self._rest
        return next(iter(self._rest.items()))


class Pool:
    """`objects` maps an oid to its object; `pages` counts all pages below it."""

    __slots__ = ("flags", "number", "objects", "pages", "persistent", "pool_id", "uuid")

    def __init__(
        self, number: int, pool_id: PoolId, flags: int, uuid: bytes, *, persistent: bool
    ) -> None:
        self.number = number
        self.pool_id = pool_id
        self.flags = flags
        self.uuid = uuid
        self.persistent = persistent
        self.objects: dict[bytes | int, TmemObject] = {}
        self.pages = 0

    @property
    def kind(self) -> str:
        """Xen's two letters: E or P, then P for private."""
        return ("P" if self.persistent else "E") + "P"


class Client:
    """A guest as the machine knows it: its number, its pools, its account."""

    __slots__ = ("account", "name", "number", "pid", "pools", "start_ticks", "uid")

    def __init__(self, number: GuestId, name: str, pid: int, start_ticks: int, uid: int) -> None:
        self.number = number
        self.name = name
        self.pid = pid
        self.start_ticks = start_ticks
        self.uid = uid
        self.pools: dict[int, Pool] = {}
        self.account = Account()

    def pages(self, *, persistent: bool) -> int:
        return sum(pool.pages for pool in self.pools.values() if pool.persistent == persistent)
