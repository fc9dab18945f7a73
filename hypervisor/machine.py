"""The machine: every tmem operation, and nothing of the world.

It has no clock, queue, socket or randomness of its own; what it needs of them is passed in.

`execute(client, message, window) -> reply` is driven alike by the queue server, the simulator and
the tests.  It parses, finds the guest's part in the pool, has `Store` move the pages, names the
outcome and accounts for it.

Kept from the original, and easily broken:
  * a private ephemeral get removes the page, a shared and a persistent one keep it;
  * a duplicate put replaces, or drops the old page and fails: the old one is never readable again;
  * a flush of what is not there is a success, and flushes, gets and duplicate puts go on while the
    guest is frozen;
  * an accepted persistent page is never dropped by us: eviction takes ephemeral pages only;
  * a get from a pool without any page answers EEMPTY (it counts as a miss here; Xen did not count
    it at all, which made hit ratios of young pools look better than they were).

Ours: a put into a shared ephemeral pool under an older fencing token than was seen for its object
is refused and changes nothing (`tokens`); other pools don't look at it.  A guest that would hold
more than it may is told OVER_ALLOTMENT (`limits`); when there is no room though it may, another one
that holds too much is asked for some (`pressure`).  Near the limit a put goes page by page, so that
replacing a page is never refused.  With `lends` the guests' RAM comes out of the same memory.
"""

from __future__ import annotations

from typing import Final

from hypervisor.accounting import OpCount
from hypervisor.limits import may_hold, may_replace
from hypervisor.management import Management
from hypervisor.objects import LEAF_PAGES, NO_PAGE
from hypervisor.pools import Client, Member
from hypervisor.reclaim import NoObjectNumber
from hypervisor.residents import Answer
from hypervisor.store import PutExtent
from ipc.abi import REPLY, Op, Reason, ReplyFlag, Status
from ipc.errors import GuestFault
from ipc.window import Window
from ipc.wire import EntryTuple, decode_batch, decode_request

# Plain integers: looking an enum member up costs more than the comparison.
_PUT_PAGE: Final = int(Op.PUT_PAGE)
_GET_PAGE: Final = int(Op.GET_PAGE)
_DONE: Final = int(Status.DONE)
_MISS: Final = int(Status.MISS)
_pack_reply: Final = REPLY.pack

_COLD_SHARE: Final = 8
_COLD_PUTS_LEAST: Final = 256
"""A page is cold after as many puts as an eighth of the frames, and at least so many."""

BatchExtent = tuple[int, int, int, int, int, bytes, int]
"""Entries of a batch that are neighbours: pool, index, count, slot, flags, object id, token."""


class Machine(Management):
    """Serves calls, and does in idle time what can wait.  Its state is that of `Residents`."""

    _recompressed_at = -1
    """The put sequence at which nothing was old enough to be recompressed."""

    # --- calls

    def execute(self, client: Client, untrusted_message: bytes, window: Window) -> bytes:
        """Serve one call; raises nothing for anything that a guest can send."""
        try:
            request = decode_request(untrusted_message)
            sequence, op, flags, count, pool_id, index, oid, slot, token, _ = request
            if op == _GET_PAGE:
                self.booked = account = client.account.get
                status, reason, bitmap, value, reply_flags = self._get(
                    client, account, pool_id, oid, index, count, window, slot, flags
                )
            elif op == _PUT_PAGE:
                self.store.begin_call()
                self.booked = account = client.account.put
                status, reason, bitmap, value, reply_flags = self._put(
                    client,
                    account,
                    pool_id,
                    oid,
                    index,
                    count,
                    window,
                    slot,
                    flags,
                    token,
                )
                if status < 0 or self.store.squeezed:
                    self._ask_for_room(client)
            else:
                self.booked = account = client.account.operations[op]
                if op in (Op.PUT_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH):
                    answer = self._batch(client, account, op, count, window)
                    if op == Op.PUT_BATCH:
                        self._ask_for_room(client)
                elif op == Op.FLUSH_PAGE:
                    answer = self._flush(client, account, pool_id, oid, index, count, token)
                elif op == Op.LEND:
                    answer = self._lend(client, account, index)
                elif op == Op.REPORT:
                    answer = self._report(client, account, pool_id, oid, index, window, slot)
                else:
                    answer = self._manage(client, account, op, pool_id, oid, token)
                status, reason, bitmap, value, reply_flags = answer
                account.calls += 1
        except GuestFault as fault:
            return self._fault(client, untrusted_message, fault)
        return _pack_reply(sequence, status, reason, reply_flags, self.generation, bitmap, value)

    def _fault(self, client: Client, untrusted_message: bytes, fault: GuestFault) -> bytes:
        client.account.fault(fault.reason)
        self.witness(client, "fault", fault.reason.name.lower(), fault.detail)
        self.booked = client.account.operations[0]
        self.booked.calls += 1
        sequence = int.from_bytes(untrusted_message[:4], "little")
        status = Status.ENOSYS if fault.reason is Reason.UNKNOWN_OP else Status.EINVAL
        return _pack_reply(sequence, status, fault.reason, ReplyFlag.FAULT, self.generation, 0, 0)

    # --- operations on pages

    def _get(
        self,
        client: Client,
        account: OpCount,
        pool_id: int,
        oid: bytes,
        index: int,
        count: int,
        window: Window,
        slot: int,
        flags: int,
    ) -> Answer:
        account.calls += 1
        account.pages += count
        member = client.members.get(pool_id)
        if member is None or not member.may_get:
            return self._no_member(client, account, member, count)
        if count == 1:
            got = bitmap = self.store.get_one(member, oid, index, window, slot, flags)
        else:
            bitmap = self.store.get(member, oid, index, count, window, slot, flags)
            got = bitmap.bit_count()
        account.done += got
        if got == count:
            return _DONE, 0, bitmap, 0, 0
        if self.store.damaged:
            return self._damaged(client, account, bitmap, count - got)
        account.missed += count - got
        if not got and not member.pool.pages:
            return Status.EEMPTY, Reason.POOL_EMPTY, 0, 0, 0
        return _MISS, 0, bitmap, 0, 0

    def _damaged(self, client: Client, account: OpCount, bitmap: int, absent: int) -> Answer:
        """Pages that were asked for are not what was put: a persistent one is an error, an
        ephemeral one a miss."""
        lost = 0
        for damage in self.store.take_damaged():
            lost += damage.owner.pool.persistent
            self.witness(client, "checksum", Reason.DAMAGED.name.lower(), str(damage))
        account.missed += absent - lost
        if not lost:
            return _MISS, 0, bitmap, 0, 0
        account.refuse(Reason.DAMAGED, lost)
        return Status.EIO, Reason.DAMAGED, bitmap, 0, 0

    def _put(
        self,
        client: Client,
        account: OpCount,
        pool_id: int,
        oid: bytes,
        index: int,
        count: int,
        window: Window,
        slot: int,
        flags: int,
        token: int,
    ) -> Answer:
        account.calls += 1
        account.pages += count
        member = client.members.get(pool_id)
        if member is None or not member.may_get:
            return self._no_member(client, account, member, count)
        if member.tokens is not None and member.writer:
            needed = member.tokens.needed(oid)
            if token < needed:
                return self._stale(member, account, oid, count, token, needed)
            if token > needed:
                member.tokens.see(oid, token)
            self.store.put_under(member.pool, oid, token)
        try:
            if not member.may_put:
                if not member.writer:
                    account.refuse(Reason.NOT_WRITER, count)
                    self._deny(client, "put", Reason.NOT_WRITER, member)
                    return Status.EPERM, Reason.NOT_WRITER, 0, 0, 0
                return self._put_some(member, account, oid, index, count, window, slot, flags)
            if (member.policy is None or client.settings.cap_bytes) and not may_hold(
                self.store, member, count
            ):
                return self._put_some(member, account, oid, index, count, window, slot, flags)
            if count == 1:
                bitmap, dropped = self.store.put_one(member, oid, index, window, slot, flags)
            else:
                bitmap, dropped = self.store.put(member, oid, index, count, window, slot, flags)
        except NoObjectNumber:
            return self._put_some(
                member, account, oid, index, count, window, slot, flags, full=True
            )
        done = bitmap.bit_count()
        account.done += done
        if done == count:
            return _DONE, 0, bitmap, 0, 0
        self._found_no_room = True
        flushed = dropped.bit_count()
        if flushed:
            account.refuse(Reason.DUPLICATE_FLUSHED, flushed)
        if count - done - flushed:
            account.refuse(Reason.NO_MEMORY, count - done - flushed)
        first_refused = ~bitmap & (bitmap + 1)
        if dropped & first_refused:
            return Status.ENOSPC, Reason.DUPLICATE_FLUSHED, bitmap, 0, 0
        return Status.ENOMEM, Reason.NO_MEMORY, bitmap, 0, 0

    def _ask_for_room(self, client: Client) -> None:
        """A put or LEND was not served whole, or took pages of one who had not too many.  If it was
        for want of room, and none is on its way, another guest may have too much."""
        short = self._found_no_room or self.store.squeezed
        self._found_no_room = self.store.squeezed = False
        if short and not self.store.doomed:
            self.pressure.refused(client)

    def _stale(
        self, member: Member, account: OpCount, oid: bytes, count: int, token: int, needed: int
    ) -> Answer:
        """The putter no longer has the lock that it thinks it has: nothing changes, for what is
        there may be another's newer page."""
        assert member.tokens is not None
        member.tokens.stale += count
        account.refuse(Reason.STALE_TOKEN, count)
        reason = Reason.STALE_TOKEN.name.lower()
        what = f"{member.pool.uuid.hex()} {oid.rstrip(bytes(1)).hex()} {token:#x}<{needed:#x}"
        self.witness(member.client, "stale", reason, what)
        return Status.ESTALE, Reason.STALE_TOKEN, 0, needed, 0

    def _put_some(
        self,
        member: Member,
        account: OpCount,
        oid: bytes,
        index: int,
        count: int,
        window: Window,
        slot: int,
        flags: int,
        *,
        full: bool = False,
    ) -> Answer:
        """A put of a guest that is frozen or at its limit, page by page: what is only replaced is
        taken as long as that costs the guest nothing more, what is new may be refused.  `full`: it
        needs a leaf that it can't have, so what is new is refused."""
        store = self.store
        bitmap = 0
        first_refusal = 0
        for at in range(count):
            number = self._find(member, oid, index + at)
            reason = 0
            if number == NO_PAGE and member.client.settings.frozen:
                reason = Reason.FROZEN
            elif number == NO_PAGE and full:
                reason = Reason.NO_OBJECT_SLOT
            elif not may_replace(store, member, number) and not may_hold(store, member, 1):
                reason = Reason.OVER_ALLOTMENT
            if not reason:
                stored = dropped = 0
                try:
                    stored, dropped = store.put_one(
                        member, oid, index + at, window, slot + at, flags
                    )
                    reason = Reason.DUPLICATE_FLUSHED if dropped else Reason.NO_MEMORY
                except NoObjectNumber:
                    reason = Reason.NO_OBJECT_SLOT
                if stored:
                    bitmap |= 1 << at
                    account.done += 1
                    continue
                self._found_no_room = self._found_no_room or reason != Reason.NO_OBJECT_SLOT
            elif self._find(member, oid, index + at) != NO_PAGE:
                store.flush(member, oid, index + at, 1)
                reason = Reason.DUPLICATE_FLUSHED
            account.refuse(reason, 1)
            first_refusal = first_refusal or reason
        if not first_refusal:
            return _DONE, 0, bitmap, 0, 0
        status = {Reason.DUPLICATE_FLUSHED: Status.ENOSPC, Reason.FROZEN: Status.EFROZEN}
        return status.get(Reason(first_refusal), Status.ENOMEM), first_refusal, bitmap, 0, 0

    def _find(self, member: Member, oid: bytes, index: int) -> int:
        found = member.pool.objects.get(oid)
        return NO_PAGE if found is None else found.find(index)

    def _flush(
        self,
        client: Client,
        account: OpCount,
        pool_id: int,
        oid: bytes,
        index: int,
        count: int,
        token: int,
    ) -> Answer:
        account.pages += count
        member = client.members.get(pool_id)
        if member is None or not member.may_get:
            return self._no_member(client, account, member, count)
        if not member.writer:
            account.refuse(Reason.NOT_WRITER, count)
            self._deny(client, "flush", Reason.NOT_WRITER, member)
            return Status.EPERM, Reason.NOT_WRITER, 0, 0, 0
        if member.tokens is not None:
            member.tokens.see(oid, token)
        bitmap = self.store.flush(member, oid, index, count)
        account.done += bitmap.bit_count()
        account.missed += count - bitmap.bit_count()
        if member.policy is None:
            self._note_taken_back(member, bitmap.bit_count())
        return _DONE, 0, bitmap, 0, 0

    def _batch(
        self, client: Client, account: OpCount, op: int, count: int, window: Window
    ) -> Answer:
        """Entries in order, each as a call of one page; the status is that of the first failure.

        Puts and flushes of neighbours are done as one extent: to whoever sent them it is all one.
        """
        extents = _extents(decode_batch(window.read_table(count), op), op)
        self.store.begin_call()
        calls = account.calls
        bitmap = 0
        result: Answer | None = None
        number = at = 0
        while number < len(extents):
            if op == Op.PUT_BATCH:
                stored = self._put_at_once(client, account, extents[number:], window)
                if stored:
                    pages = sum(extent[2] for extent in extents[number : number + stored])
                    bitmap |= (1 << pages) - 1 << at
                    number += stored
                    at += pages
                    continue
            pool_id, index, length, slot, flags, oid, token = extents[number]
            if op == Op.PUT_BATCH:
                answer = self._put(
                    client, account, pool_id, oid, index, length, window, slot, flags, token
                )
            elif op == Op.GET_BATCH:
                answer = self._get(client, account, pool_id, oid, index, 1, window, slot, flags)
            else:
                answer = self._flush(client, account, pool_id, oid, index, length, token)
            bitmap |= answer[2] << at
            number += 1
            at += length
            if answer[0] != _DONE and result is None:
                result = answer
        account.calls = calls
        if result is None:
            return _DONE, 0, bitmap, 0, 0
        return result[0], result[1], bitmap, result[3], 0

    def _put_at_once(
        self, client: Client, account: OpCount, extents: list[BatchExtent], window: Window
    ) -> int:
        """Put extents of a private ephemeral pool whose pages stand side by side, if nothing but
        room is to be looked at; how many of them, from the first on."""
        pool_id, _, _, first_slot, _, _, _ = extents[0]
        member = client.members.get(pool_id)
        if (
            member is None
            or member.pool.only is None
            or member.policy is None
            or not member.may_put
            or client.encodes
            or client.settings.cap_bytes
        ):
            return 0
        simple: list[PutExtent] = []
        slot = first_slot
        for its_pool_id, index, length, its_slot, flags, oid, _ in extents:
            if its_pool_id != pool_id or its_slot != slot or (index & 63) + length > LEAF_PAGES:
                break
            simple.append((oid, index, length, flags))
            slot += length
        if not simple:
            return 0
        stored = self.store.put_extents(member, simple, window, first_slot, slot - first_slot)
        pages = sum(extent[2] for extent in simple[:stored])
        account.pages += pages
        account.done += pages
        return stored

    def _lend(self, client: Client, account: OpCount, wanted: int) -> Answer:
        if not self.lending.on:
            account.refuse(Reason.LENDING_OFF, 1)
            return Status.ENOSYS, Reason.LENDING_OFF, 0, 0, 0
        before = len(client.lent)
        self._found_no_room = not self.lending.resize(client, wanted)
        self._ask_for_room(client)
        account.done += 1
        account.pages += abs(len(client.lent) - before)
        return _DONE, 0, 0, len(client.lent), 0

    # --- what others ask

    def idle(self, limit: int) -> int:
        """Work that can wait, at most so many pages of it: compaction, then recompression of pages
        that have lain long enough; 0 when there is nothing to do."""
        store = self.store
        done = store.contents.compact(limit)
        if done < limit and store.sequence != self._recompressed_at:
            age_puts = max(store.frames.count // _COLD_SHARE, _COLD_PUTS_LEAST)
            tries = store.contents.recompress(store.sequence, age_puts, limit - done)
            if not tries:
                # Nothing gets old enough until somebody puts.
                self._recompressed_at = store.sequence
            done += tries
        return done


def _extents(entries: list[EntryTuple], op: int) -> list[BatchExtent]:
    """The entries of a batch, neighbours as one: to whoever sent them it is all the same.  A get is
    answered for each by itself."""
    extents: list[BatchExtent] = []
    if op == Op.GET_BATCH:
        return [
            (pool, index, 1, slot, flags, oid, token)
            for pool, index, slot, flags, oid, token in entries
        ]
    step = int(op == Op.PUT_BATCH)
    length = 0
    pool_id = next_index = next_slot = hints = fence = -1
    name = b""
    for pool, index, slot, flags, oid, token in entries:
        if (
            index == next_index
            and oid == name
            and slot == next_slot
            and flags == hints
            and pool == pool_id
            and token == fence
        ):
            length += 1
        else:
            if length:
                start = next_index - length, length, next_slot - step * length
                extents.append((pool_id, *start, hints, name, fence))
            length = 1
            pool_id, hints, name, fence = pool, flags, oid, token
        next_index = index + 1
        next_slot = slot + step
    start = next_index - length, length, next_slot - step * length
    extents.append((pool_id, *start, hints, name, fence))
    return extents
