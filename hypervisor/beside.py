"""What stands beside a page: the token that it was put under, and its checksum.

Both are in the arena, written before the page is live (arena A7) and only where somebody has a use
for them: tokens of pages in shared ephemeral pools (`pagetokens`), checksums of every page in an
arena that was made with them.  A pool that has neither (`Pool.notes`) costs a put one comparison.

*Checksums* are for memory that does not keep what was written: a bit that flips in the arena.
They are made of the page's bytes, of the object's id, of the pool (a private one by guest and pool
id, a shared one by uuid), of the page's index and of its state word.  So a page whose bytes changed
fails, and so does one that a damaged column, object record or pool record gives to somebody else.
32 bits of xxh3-64: one damaged page in 4 * 10^9 goes unnoticed.  No secret is in them: who writes
into the arena on purpose is the user that runs the hypervisor, and needs no poison.

A raw page is summed where it lies, after the copy: what its guest writes into the window meanwhile
is either in both or in neither.

Pages behind entries (`contents`) have both in the tables of their entries, which are wide then.
Their checksum is that of the page as it was put, not of what is stored.
"""

from __future__ import annotations

from array import array
from typing import Final

from xxhash import xxh3_64_intdigest

from hypervisor.arena import Arena
from hypervisor.objects import TmemObject
from hypervisor.pagetokens import PageTokens
from hypervisor.pools import Pool
from ipc.abi import PAGE_BYTES, PoolFlag

_WORD: Final = (1 << 64) - 1
_SPREAD: Final = 0x9E3779B97F4A7C15
_SUM_MASK: Final = 0xFFFFFFFF
_KIND: Final = int(PoolFlag.PERSIST | PoolFlag.SHARED)
"""Flags that a pool keeps for life."""


class Beside:
    """What is beside pages."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._data = arena.data
        self.sums = arena.checksums
        self.tokens = PageTokens(arena)

    def open_pool(self, pool: Pool) -> None:
        """Whether anything is to be written beside the pages of this pool, or looked at."""
        pool.notes = self.sums or pool.tokens is not None
        pool.vets = pool.vets or self.sums

    def note(self, owner: TmemObject, first: int, count: int, index: int, state: int) -> None:
        """`count` raw pages from frame `first` on are about to be live in this state."""
        if owner.pool.tokens is not None:
            self.tokens.note(owner, first, count)
        if self.sums:
            if count == 1:
                self._arena.sum[first] = self._sum(owner, index, state, first)
            else:
                sums = self._sums(owner, first, index, [state] * count)
                self._arena.sum[first : first + count] = array("I", sums)

    def of_page(
        self, owner: TmemObject, index: int, state: int, page: bytes | memoryview
    ) -> tuple[int, int]:
        """Token and checksum; 0 where there is none."""
        token = 0 if owner.pool.tokens is None else self.tokens.token
        return token, self.sum_of(owner, index, state, page) if self.sums else 0

    def write(self, owner: TmemObject, frame: int, sum_: int) -> None:
        """Beside a raw page of the put that is being served, which is about to be live."""
        if owner.pool.tokens is not None:
            self.tokens.note(owner, frame, 1)
        if self.sums:
            self._arena.sum[frame] = sum_

    def read(self, owner: TmemObject, frame: int) -> tuple[int, int]:
        """What stands beside a raw page."""
        token = 0 if owner.pool.tokens is None else self.tokens.of_frame(owner, frame)
        return token, self._arena.sum[frame] if self.sums else 0

    def is_right(self, owner: TmemObject, number: int, index: int) -> bool:
        """Whether a raw page is what was put."""
        state = self._arena.state[number]
        return self._arena.sum[number] == self._sum(owner, index, state, number)

    def are_right(self, owner: TmemObject, first: int, count: int, index: int) -> bool:
        """Whether `count` raw pages from frame `first` on all are what was put."""
        arena = self._arena
        states = arena.state[first : first + count].tolist()
        sums = arena.sum[first : first + count].tolist()
        return sums == self._sums(owner, first, index, states)

    def spoil(self, owner: TmemObject, number: int, index: int) -> None:
        """Let a raw page that is not what was put stay so."""
        wrong = ~self._sum(owner, index, self._arena.state[number], number)
        self._arena.sum[number] = wrong & _SUM_MASK

    def _sum(self, owner: TmemObject, index: int, state: int, frame: int) -> int:
        page = self._data[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES]
        return self.sum_of(owner, index, state, page)

    def _sums(self, owner: TmemObject, first: int, index: int, states: list[int]) -> list[int]:
        salt = owner.salt or _salt(owner)
        data, start = self._data, first * PAGE_BYTES
        return [
            xxh3_64_intdigest(
                data[start + PAGE_BYTES * at : start + PAGE_BYTES * (at + 1)],
                (salt + (index + at) * _SPREAD ^ state) & _WORD,
            )
            & _SUM_MASK
            for at, state in enumerate(states)
        ]

    def sum_of(self, owner: TmemObject, index: int, state: int, page: bytes | memoryview) -> int:
        """Of a page under its handle."""
        salt = owner.salt or _salt(owner)
        seed = salt + index * _SPREAD ^ state
        return xxh3_64_intdigest(page, seed & _WORD) & _SUM_MASK


def _salt(owner: TmemObject) -> int:
    pool = owner.pool
    whose = pool.uuid
    if pool.only is not None:
        whose = f"{pool.only.client.name} {pool.only.pool_id}".encode()
    text = b"%d %s %s" % (pool.flags & _KIND, whose, owner.oid)
    owner.salt = xxh3_64_intdigest(text) | 1
    return owner.salt
