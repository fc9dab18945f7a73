"""Deferred compression: a page is compressed when there is a use for the memory, if it still is
there by then.

LZ4 and an entry cost a page some ten times what a copy does, and a page that its guest has back
before memory gets short was compressed for nothing.  So a guest that compresses puts persistent
pages raw as long as there is room (`defers`): an eighth of all frames stays free, and its pages fit
its allotment as they are.  After that its puts compress, and compress pages that were left raw as
well (`squeeze_for`), one for two that come: so room gets less slowly, if at all.  Where it does run
out, what was left raw is compressed before a page is evicted, refused, or asked for.  In the end
memory holds as many pages as if all had been compressed at once.

Ephemeral pages are compressed at once.  Whoever runs out of room evicts them and does not wait for
them to be squeezed: left raw, they cost a build 2 to 5 % more reads.

The hand goes round the frames like that of CLOCK, but looks at no use: a page in tmem is used once,
to go.

A squeezed page has the state word of the raw one, so its age, hints and member stay.  Killed in
between, a hypervisor finds both, which are the same (arena A2).

Not deferred: pages of guests that share with somebody, which are looked for when they come; and
nothing in an arena of which an eighth is less than `KEPT_FRAMES_LEAST`, where there is no time in
which memory is ample.
"""

from __future__ import annotations

from typing import Final

from hypervisor.arena import Arena
from hypervisor.frames import PERSISTENT
from hypervisor.pages import Pages, StoreOptions
from hypervisor.pools import RAW_COST_BYTES, Member
from ipc.abi import PAGE_BYTES

KEPT_FREE_SHARE: Final = 8
"""One frame in so many stays free while pages are left raw."""
KEPT_FRAMES_LEAST: Final = 256
SPARE_FRAMES: Final = 8
"""To begin with: a page is compressed into other frames than its own."""
_PUTS_A_SQUEEZE: Final = 2
_LOOKS: Final = 16
"""Frames looked at for each page that is to be squeezed: others' are among them."""


class Deferral(Pages):
    """`deferred` says whether there may be pages to squeeze."""

    def __init__(self, arena: Arena, options: StoreOptions) -> None:
        super().__init__(arena, options)
        self.deferred = False
        self.squeezed_pages = 0
        """Since the start."""
        self._hand = 0
        self._found_since_start = False
        """Something to squeeze, since the hand went over the first frame."""
        frames = arena.frames_count
        self._kept = frames // KEPT_FREE_SHARE
        self.may_defer = self._kept >= KEPT_FRAMES_LEAST

    @property
    def spare_frames(self) -> int:
        """Frames that whoever makes room leaves free beside, as far as there is something to
        squeeze."""
        return SPARE_FRAMES if self.deferred else 0

    def defers(self, member: Member, count: int) -> bool:
        """Whether `count` pages of a guest that compresses are to be left raw."""
        if (
            member.policy is not None
            or not self.may_defer
            or self.frames.free - count < self._kept
            or member.client.domains[True] is not None
        ):
            return False
        if member.purse.bytes + count * PAGE_BYTES > member.client.allotment_bytes:
            return False
        self.deferred = True
        return True

    def squeeze_for(self, member: Member, count: int) -> None:
        """`count` pages of a member are about to be put compressed: some that were left raw follow,
        its own if it is its allotment that is short; none while there is room."""
        if member.policy is not None and self.frames.free - count >= self._kept:
            return
        over = member.purse.bytes + count * PAGE_BYTES > member.client.allotment_bytes
        only = member if over and member.policy is None else None
        self.squeeze(-(-count // _PUTS_A_SQUEEZE), only)

    def squeeze(self, count: int, only: Member | None = None) -> int:
        """Compress up to `count` persistent pages that were left raw, of one member or of anybody;
        how many were."""
        if not self.deferred:
            return 0
        kinds = self.frames.kinds
        squeezed = 0
        hand = self._hand
        for _ in range(_LOOKS * count):
            frame = kinds.find(PERSISTENT, hand)
            if frame < 0:
                hand = 0
                self.deferred = self._found_since_start
                if not self.deferred:
                    break
                self._found_since_start = False
                continue
            hand = frame + 1
            squeezed += self._squeeze(frame, only)
            if squeezed >= count:
                break
        self._hand = hand
        self.squeezed_pages += squeezed
        return squeezed

    def _squeeze(self, frame: int, only: Member | None) -> bool:
        owner = self.objects[self._object_column[frame]]
        if owner is None or owner.doomed:
            return False
        member = owner.pool.only
        if member is None or not member.client.settings.compress:
            return False
        self._found_since_start = True
        if (only is not None and member is not only) or member.client.domains[True] is not None:
            return False
        index = self._index_column[frame]
        if self.beside.sums and not self.beside.is_right(owner, frame, index):
            return False
        state = self._state_column[frame]
        page = self._data[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES].tobytes()
        # A put is being served, whose tables may be of another kind.
        entries, wide = self.entries, self.entries.wide
        entries.wide = owner.pool.notes
        entries.beside = self.beside.read(owner, frame) if entries.wide else None
        number = self.contents.pack(member, page, owner.number, index, state)
        entries.wide, entries.beside = wide, None
        if number < 0:
            return False
        leaf = owner.leaf(index >> 6)
        assert leaf is not None
        assert leaf[index & 63] == frame
        leaf[index & 63] = number
        self._state_column[frame] = 0
        self.frames.give(frame)
        member.charge(-1, -RAW_COST_BYTES)
        return True
