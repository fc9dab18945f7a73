"""Under which fencing token each page of a shared ephemeral pool was put.

Only the administrator asks for it (`provenance`), and it has to outlive a kill, so it is in the
segment; but 8 bytes beside each page would be a fifth of all that a page costs there.  A token
belongs to a file's lock and goes up when somebody gets it exclusively.  So an object has the token
of the put that made it, and a page a *code* of 16 bits:

    0 .. 32767       the token of its object, and so much more
    1bbbbbbn nnnnnnnn  base b << 9 | n, for what is further away: tokens of another epoch

No page of a file that nobody has changed since its first page was put has a code other than 0, and
codes that are 0 are not written where their neighbours are not: the codes of 2048 frames, which
share a page of the host's memory, have a mark that says whether any of them ever was.  A hypervisor
may not even read others, or the host would give them memory.

There are 64 bases.  They come free at a restart, if no page needs them any more.  When they are
used up an object that would need another one begins anew: its pages go, as ephemeral pages may.  So
a member that sends absurd tokens spoils nobody's provenance, and costs others, until a restart, the
pages of files whose token jumps by more than 32767.

Invariants
  K1  The token of an object is not above that of any of its pages: puts under older ones than was
      seen for it are refused (`tokens`).  In a damaged arena it may seem to be; that needs a base.
  K2  Written in this order, each before anything that needs it: object token, object record; base,
      mark, code, state (arena A3, A7).  A base changes only if it is 0, and to 0 only in recovery.

Pages behind entries have their token whole, in the table of their entry (`entries`).
"""

from __future__ import annotations

from array import array
from typing import Final

from hypervisor.arena import CODES_BLOCK_SHIFT, TOKEN_BASES, Arena
from hypervisor.objects import TmemObject

NEAR: Final = 1 << 15
"""Tokens from here on, counted from the object's, need a base."""
_LOW_BITS: Final = 9
_LOW_MASK: Final = (1 << _LOW_BITS) - 1

assert NEAR == TOKEN_BASES << _LOW_BITS


class PageTokens:
    """Tokens of raw pages.  `token` is that of the put that is being served."""

    def __init__(self, arena: Arena) -> None:
        self._object_token = arena.object_token
        self._codes = arena.token_code
        self._marks = arena.token_blocks
        self._base_column = arena.token_base
        self._places = {base: place for place, base in enumerate(arena.token_base) if base}
        self.token = 0

    def begin_object(self, number: int) -> None:
        """An object is about to be published, and made by the put that is being served."""
        self._object_token[number] = self.token

    def find_base(self) -> bool:
        """Whether the token can stand beside pages of an object whose own one is far away."""
        return self._place() >= 0

    def note(self, owner: TmemObject, first: int, count: int) -> None:
        """`count` frames from `first` on (at most 64) are about to hold pages of an object.
        Precondition: their token is near that of the object, or there is a base."""
        code = self.token - self._object_token[owner.number]
        if not 0 <= code < NEAR:
            code = NEAR | self._place() << _LOW_BITS | self.token & _LOW_MASK
        marks = self._marks
        block, last = first >> CODES_BLOCK_SHIFT, first + count - 1 >> CODES_BLOCK_SHIFT
        if not (code or marks[block] or marks[last]):
            return
        marks[block] = marks[last] = 1
        if count == 1:
            self._codes[first] = code
        else:
            self._codes[first : first + count] = array("H", [code]) * count

    def of_frame(self, owner: TmemObject, frame: int) -> int:
        """The token of a raw page."""
        code = self._codes[frame] if self._marks[frame >> CODES_BLOCK_SHIFT] else 0
        if code < NEAR:
            return self._object_token[owner.number] + code
        return self._base_column[code - NEAR >> _LOW_BITS] << _LOW_BITS | code & _LOW_MASK

    def recover(self, states: list[int]) -> None:
        """Give up bases that no page needs; `states` are those of all frames."""
        if not self._places:
            return
        used = set()
        for block, mark in enumerate(self._marks):
            if mark:
                first = block << CODES_BLOCK_SHIFT
                codes = self._codes[first : first + (1 << CODES_BLOCK_SHIFT)].tolist()
                used |= {
                    code - NEAR >> _LOW_BITS
                    for code, state in zip(codes, states[first:], strict=False)
                    if state and code >= NEAR
                }
        for base, place in list(self._places.items()):
            if place not in used:
                self._base_column[place] = 0
                del self._places[base]

    def _place(self) -> int:
        """Where the base of the token is, -1 if there is no room for it."""
        base = self.token >> _LOW_BITS
        place = self._places.get(base, -1)
        if place < 0 and len(self._places) < TOKEN_BASES:
            place = next(at for at, known in enumerate(self._base_column) if not known)
            self._base_column[place] = base
            self._places[base] = place
        return place
