"""Calls that move no page: pools, whole objects, reports, the version.

Rare, so they are written for the reader.  What a page's way needs is in `machine`.
"""

from __future__ import annotations

from hypervisor.accounting import OpCount
from hypervisor.pools import Client, Member
from hypervisor.residents import Answer, Report, Residents
from ipc.abi import (
    ABI_REVISION,
    POOL_PAGE_SIZE_MASK,
    POOL_PAGE_SIZE_SHIFT,
    POOL_PRIORITY_MASK,
    POOL_PRIORITY_SHIFT,
    POOL_RESERVED_BITS,
    POOL_VERSION_SHIFT,
    SPEC_VERSION,
    UUID_BYTES,
    Op,
    PoolFlag,
    Priority,
    Reason,
    Status,
)
from ipc.errors import GuestFault
from ipc.window import Window


class Management(Residents):
    """The operations that manage what others use."""

    def _manage(
        self, client: Client, account: OpCount, op: int, pool_id: int, oid: bytes, token: int
    ) -> Answer:
        if op == Op.NEW_POOL:
            answer = self._new_pool(client, pool_id, oid[:UUID_BYTES])
        elif op == Op.VERSION:
            answer = Status.DONE, 0, 0, SPEC_VERSION << 32 | ABI_REVISION, 0
        elif op == Op.DESTROY_POOL:
            answer = self._destroy_pool(client, pool_id)
        else:
            answer = self._flush_object(client, account, pool_id, oid, token)
        if answer[0] == Status.DONE:
            account.done += 1
        elif answer[0] == Status.MISS:
            account.missed += 1
        else:
            account.refuse(answer[1], 1)
        return answer

    def _new_pool(self, client: Client, flags: int, uuid: bytes) -> Answer:
        if flags >> POOL_VERSION_SHIFT != SPEC_VERSION:
            raise GuestFault(Reason.BAD_SPEC_VERSION, str(flags >> POOL_VERSION_SHIFT))
        if flags >> POOL_PAGE_SIZE_SHIFT & POOL_PAGE_SIZE_MASK:
            raise GuestFault(Reason.BAD_PAGE_SIZE, hex(flags))
        if (
            flags & (POOL_RESERVED_BITS | PoolFlag.PRECOMPRESSED)
            or flags >> POOL_PRIORITY_SHIFT & POOL_PRIORITY_MASK > Priority.HIGH
        ):
            raise GuestFault(Reason.BAD_POOL_FLAGS, hex(flags))
        made = self.memberships.new_pool(client, flags, uuid)
        if made.member is None:
            if flags & PoolFlag.SHARED:
                reason = Reason(made.reason).name.lower()
                self.witness(client, "denied", reason, f"new_pool {uuid.hex()}")
            return Status.EPERM, made.reason, 0, 0, 0
        self.balance.welcome(made.member)
        return Status.DONE, 0, 0, made.member.pool_id, made.flags

    def _destroy_pool(self, client: Client, pool_id: int) -> Answer:
        member = client.members.get(pool_id)
        if member is None:
            return Status.MISS, 0, 0, 0, 0
        if member.policy is None:
            self._note_taken_back(member, member.pool.pages)
        self.memberships.leave(member)
        return Status.DONE, 0, 0, 0, 0

    def _flush_object(
        self, client: Client, account: OpCount, pool_id: int, oid: bytes, token: int
    ) -> Answer:
        member = client.members.get(pool_id)
        if member is None:
            return Status.ENODEV, Reason.NO_SUCH_POOL, 0, 0, 0
        if not member.may_get or not member.writer:
            reason = Reason.NOT_WRITER if member.may_get else Reason.SHARED_DENIED
            self._deny(client, "flush", reason, member)
            return Status.EPERM, reason, 0, 0, 0
        if member.tokens is not None:
            member.tokens.see(oid, token)
        pages = self.store.flush_object(member.pool, oid)
        account.pages += pages
        if member.policy is None:
            self._note_taken_back(member, pages)
        return Status.DONE, 0, 0, pages, 0

    def _report(
        self,
        client: Client,
        account: OpCount,
        pool_id: int,
        oid: bytes,
        index: int,
        window: Window,
        slot: int,
    ) -> Answer:
        """A guest says that a page is wrong.  It is heard, and that is all: it may lie."""
        account.pages += 1
        member = client.members.get(pool_id)
        if member is None or not member.may_get:
            return self._no_member(client, account, member, 1)
        is_there = self.store.is_same(member.pool, oid, index, bytes(window.slot(slot)))
        self.hear(client, Report(member.pool, oid, index, is_there))
        if not is_there:
            account.missed += 1
            return Status.MISS, 0, 0, 0, 0
        account.done += 1
        return Status.DONE, 0, 0, 0, 0

    def _note_taken_back(self, member: Member, pages: int) -> None:
        """Its guest has flushed persistent pages."""
        if not member.pool.shared:
            self.pressure.flushed(member.client, pages)
