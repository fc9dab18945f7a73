"""What pages a machine should hold, as the oracle knows it, and what pages it puts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hypervisor.machine import Machine
from hypervisor.pools import Pool
from ipc.abi import (
    PAGE_BYTES,
    UUID_BYTES,
)

GUESTS: Final = ("a", "b", "c", "d")
UUIDS: Final = {2: b"E" * UUID_BYTES, 3: b"P" * UUID_BYTES}
PERSISTENT: Final = (1, 3)
"""Kinds of pools: 0 private ephemeral, 1 private persistent, 2 shared ephemeral, 3 shared
persistent."""
PARTS: Final = (0, 1, 2, 3, 4)
"""Pools of a guest; 4 is a second membership in the pool of kind 2."""
KIND_OF: Final = (0, 1, 2, 3, 2)
INDEX_LAST: Final = 2**32 - 1
_LATELY: Final = 48
"""Handles of a pool that were put lately and are likely to be used again."""

Handle = tuple[int, int]
"""object, index."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a batch."""

    part: int
    oid: int
    index: int
    slot: int
    flags: int
    token: int = 0


@dataclass(frozen=True, slots=True)
class Intent:
    """What a step that is killed may have done: drop these pages, or put others in their place."""

    owner: str
    kind: int
    oid: int
    first: int
    count: int
    pages: Sequence[bytes] = ()
    token: int = 0

    def touches(self, owner: str, kind: int, oid: int, index: int) -> bool:
        same = (owner, kind, oid) == (self.owner, self.kind, self.oid)
        return same and 0 <= index - self.first < self.count

    def page(self, index: int) -> bytes | None:
        return self.pages[index - self.first] if self.pages else None


class Mismatch(AssertionError):
    """The machine returned what it may not."""


class Known:
    """What the pages of one pool should be; of an ephemeral one, what they are if they are there.

    `seen` is the number of evictions when an ephemeral page was last known to be there: while there
    were none since, it must be there still.
    """

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.persistent = kind in PERSISTENT
        self.objects: dict[int, dict[int, bytes]] = {}
        self.seen: dict[Handle, int] = {}
        self.putters: dict[Handle, tuple[str, int]] = {}
        """Who put a page last, and under which token, as far as is known."""
        self.lately: list[Handle] = []
        self.pages = 0
        self.tokens: dict[int, int] = {}
        """Of the objects of a shared ephemeral pool, since the last restart."""
        self.floor = 0
        self.newest = 0

    @property
    def fenced(self) -> bool:
        """A put needs a token."""
        return self.kind in UUIDS and not self.persistent

    def needed(self, oid: int) -> int:
        """The token that a put needs."""
        return self.tokens.get(oid, self.floor) if self.fenced else 0

    def see(self, oid: int, token: int) -> None:
        """A put or flush was sent that may be done."""
        if self.fenced and token > self.needed(oid):
            self.tokens[oid] = token
            self.newest = max(self.newest, token)

    def restarted(self, newest: int) -> None:
        """The hypervisor knows only the newest of all."""
        self.tokens.clear()
        self.floor = self.newest = newest

    def get(self, oid: int, index: int) -> bytes | None:
        found = self.objects.get(oid)
        return None if found is None else found.get(index)

    def put(self, oid: int, index: int, page: bytes, evictions: int) -> None:
        found = self.objects.setdefault(oid, {})
        self.pages += index not in found
        found[index] = page
        if not self.persistent:
            self.seen[oid, index] = evictions

    def drop(self, oid: int, index: int) -> bool:
        found = self.objects.get(oid)
        if found is None or found.pop(index, None) is None:
            return False
        self.pages -= 1
        self.seen.pop((oid, index), None)
        if not found:
            del self.objects[oid]
        return True

    def drop_object(self, oid: int) -> int:
        found = self.objects.pop(oid, {})
        self.pages -= len(found)
        for index in found:
            self.seen.pop((oid, index), None)
        return len(found)

    def remember(self, oid: int, index: int, place: int) -> None:
        if len(self.lately) < _LATELY:
            self.lately.append((oid, index))
        else:
            self.lately[place % _LATELY] = (oid, index)


def _bodies() -> list[bytes]:
    """What pages are made of, between their versions; the lengths are chosen so that LZ4 gives
    most classes of slabs, and LZ4HC a smaller one for some."""
    rng = random.Random(1)
    length = PAGE_BYTES - 16
    noise = [rng.randbytes(size).ljust(length, b"\0") for size in (8, 400, 900, 1900, 2600, 3000)]
    words = [rng.randbytes(rng.randrange(3, 9)) for _ in range(24)]
    texts = [
        b"".join(rng.choice(words) for _ in range(count)).ljust(length, b".")[:length]
        for count in (60, 150, 250, 400)
    ]
    return [*noise, *texts, rng.randbytes(length)]


BODIES: Final = _bodies()
_COMMON: Final = [
    *(b"common %d" % n + body[:-1] + b"%d" % n + b"-end...." for n, body in enumerate(BODIES[4:])),
    bytes(PAGE_BYTES),
]
COMMON_PAGES: Final = [(page + bytes(PAGE_BYTES))[:PAGE_BYTES] for page in _COMMON]


def held_pages(pool: Pool, machine: Machine) -> dict[Handle, bytes]:
    """All pages of a pool, read without removing any."""
    store = machine.store
    data = store.arena.data
    found: dict[Handle, bytes] = {}
    for oid, one in pool.objects.items():
        for leaf_number, leaf in one.leaves():
            for place, number in enumerate(leaf):
                if number >= store.entries.base:
                    page = store.contents.read(number)
                elif number >= 0:
                    page = bytes(data[number * PAGE_BYTES : (number + 1) * PAGE_BYTES])
                else:
                    continue
                found[int.from_bytes(oid, "little"), leaf_number * 64 + place] = page
    return found
