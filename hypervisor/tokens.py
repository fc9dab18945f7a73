"""Fencing tokens: what keeps an old page out of a shared ephemeral pool.

The pool is the cleancache of a clustered file system.  Whoever puts a page of a file holds the
file's cluster lock, and sends with the put the number of that lock's last exclusive grant, its
token.  A node that was paused, cut off or declared dead holds an old one: its put is refused, so a
page that another node has changed meanwhile can't come back.

  put    older than the newest token seen for the object: refused.  Else the token is remembered
  flush  always done, and a newer token is remembered: from then on no older put gets in
  get    not looked at; what the pool holds is what the disk holds, or nothing

Invariants
  T1  `needed(oid)` is never below a token that was seen for this object, also after a restart.  It
      may be above: that refuses a good page, which a cache may.
  T2  The segment holds the pool's highest token before any call acts on it (one aligned word), and
      that is the floor of all its objects after a restart.
  T3  Memory is bounded: `EXACT_MAX` objects exactly; of those that were not heard of for longest
      only the maximum of each of `COARSE` groups, by Python's seeded hash, so that nobody can
      choose object ids which spoil others'.

A token is whatever the lock manager says; the members of one pool trust each other with it, as with
the pages.  A member that sends 2**64 - 1 stops all puts of objects that it names, and after a
restart all puts of that pool, and of no other.

Xen had nothing like it: any sharer could put any page at any time.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import Final

from hypervisor.arena import Arena

EXACT_MAX: Final = 2048
"""Objects of a pool whose tokens are known exactly; about 200 bytes each."""
COARSE: Final = 1024
"""A power of two."""


class Tokens:
    """The newest tokens of one pool.  `newest` is the highest of all, as in the segment; `stale`
    counts the pages whose put was refused."""

    __slots__ = ("_arena", "_coarse", "_exact", "_floor", "newest", "pool_number", "stale")

    def __init__(self, arena: Arena, pool_number: int, newest: int) -> None:
        self._arena = arena
        self.pool_number = pool_number
        self.newest = newest
        self.stale = 0
        self._floor = newest
        self._exact: OrderedDict[bytes, int] = OrderedDict()
        self._coarse: array[int] | None = None

    def needed(self, oid: bytes) -> int:
        """A put into this object must have at least this token."""
        exact = self._exact.get(oid)
        if exact is not None:
            return exact
        if self._coarse is None:
            return self._floor
        return max(self._floor, self._coarse[hash(oid) & (COARSE - 1)])

    def see(self, oid: bytes, token: int) -> None:
        """A put or a flush of this object carries this token."""
        if token > self.needed(oid):
            if token > self.newest:
                self._arena.set_pool_token(self.pool_number, token)
                self.newest = token
            self._exact[oid] = token
            self._exact.move_to_end(oid)
            if len(self._exact) > EXACT_MAX:
                self._forget_oldest()

    def _forget_oldest(self) -> None:
        oid, token = self._exact.popitem(last=False)
        if self._coarse is None:
            self._coarse = array("Q", bytes(8 * COARSE))
        group = hash(oid) & (COARSE - 1)
        self._coarse[group] = max(self._coarse[group], token)

    def check(self) -> str:
        """What is wrong, for the invariants."""
        if len(self._exact) > EXACT_MAX:
            return f"{len(self._exact)} objects have tokens of their own"
        seen = [self._floor, *self._exact.values(), *(self._coarse or ())]
        if max(seen) != self.newest:
            return f"the newest token is {max(seen)}, not {self.newest}"
        if any(token <= self._floor for token in self._exact.values()):
            return "an object has a token that is not above the floor"
        return ""
