"""The machine: every tmem operation, and nothing of the world.

It has no clock, queue, socket or randomness of its own.

`execute(client, message, window) -> reply` is driven alike by the queue server, the simulator and
the tests.  It parses, finds the pool, has `Store` move the pages, names the outcome and accounts
for it.

Kept from the original, and easily broken:
  * a private ephemeral get removes the page, a persistent one keeps it;
  * a duplicate put replaces, or drops the old page and fails: the old one is never readable again;
  * a flush of what is not there is a success;
  * an accepted persistent page is never dropped by us: eviction takes ephemeral pages only;
  * a get from a pool without any page answers EEMPTY (it counts as a miss here; Xen did not count
    it at all, which made hit ratios of young pools look better than they were).
"""

from __future__ import annotations

from typing import Final

from hypervisor.accounting import Account, OpCount
from hypervisor.arena import Arena, GuestRecord
from hypervisor.pools import Client, Pool
from hypervisor.store import NoObjectNumber, Store
from ipc.abi import (
    ABI_REVISION,
    POOL_PAGE_SIZE_MASK,
    POOL_PAGE_SIZE_SHIFT,
    POOL_RESERVED_BITS,
    POOL_VERSION_SHIFT,
    REPLY,
    SPEC_VERSION,
    UUID_BYTES,
    GuestId,
    Op,
    PoolFlag,
    PoolId,
    Reason,
    ReplyFlag,
    Status,
)
from ipc.errors import GuestFault
from ipc.limits import GUESTS_MAX, POOLS_PER_GUEST
from ipc.window import Window
from ipc.wire import decode_batch, decode_request

# Plain integers: looking an enum member up costs more than the comparison.
_PUT_PAGE: Final = int(Op.PUT_PAGE)
_GET_PAGE: Final = int(Op.GET_PAGE)
_DONE: Final = int(Status.DONE)
_MISS: Final = int(Status.MISS)
_pack_reply: Final = REPLY.pack

Answer = tuple[int, int, int, int]
"""status, reason, map, value."""


class Machine:
    """All state of a hypervisor over one arena.  Over an arena that was used before,
    `recovery.recover` fills it before it serves anyone."""

    def __init__(self, arena: Arena, *, policy: str = "clock") -> None:
        self.store = Store(arena, policy)
        self.policy_name = policy
        self.generation = arena.next_generation()
        self.clients: dict[str, Client] = {}
        self.departed = Account()
        self.free_guest_numbers = list(range(GUESTS_MAX - 1, -1, -1))

    # --- guests

    def attach(self, name: str, pid: int, start_ticks: int, uid: int) -> Client | None:
        """The client of this name, made if it is new; None if the guest table is full.

        A client that comes back as the same process keeps its pools.  Another process under the
        same name is another life: the caller departs the old client first.
        """
        client = self.clients.get(name)
        if client is None:
            if not self.free_guest_numbers:
                return None
            number = GuestId(self.free_guest_numbers.pop())
            self.store.arena.publish_guest(GuestRecord(number, name, pid, start_ticks, uid))
            client = Client(number, name, pid, start_ticks, uid)
            self.clients[name] = client
        return client

    def depart(self, client: Client) -> None:
        """The guest is gone: disown its pages now, free them in slices."""
        for pool in list(client.pools.values()):
            self._destroy_pool(client, pool)
        self.store.arena.free_guest(client.number)
        self.free_guest_numbers.append(client.number)
        del self.clients[client.name]
        self.departed.add(client.account)

    # --- calls

    def execute(self, client: Client, untrusted_message: bytes, window: Window) -> bytes:
        """Serve one call; raises nothing for anything that a guest can send."""
        try:
            request = decode_request(untrusted_message)
            sequence, op, _, count, pool_id, index, oid, slot, _, _ = request
            if op == _GET_PAGE:
                status, reason, bitmap, value = self._get(
                    client, client.account.get, pool_id, oid, index, count, window.slots, slot
                )
            elif op == _PUT_PAGE:
                status, reason, bitmap, value = self._put(
                    client, client.account.put, pool_id, oid, index, count, window.slots, slot
                )
            else:
                account = client.account.operations[op]
                if op in (Op.PUT_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH):
                    answer = self._batch(client, account, op, count, window)
                elif op == Op.FLUSH_PAGE:
                    answer = self._flush(client, account, pool_id, oid, index, count)
                else:
                    answer = self._manage(client, account, op, pool_id, oid)
                status, reason, bitmap, value = answer
                account.calls += 1
        except GuestFault as fault:
            return self._fault(client, untrusted_message, fault)
        return _pack_reply(sequence, status, reason, 0, self.generation, bitmap, value)

    def _fault(self, client: Client, untrusted_message: bytes, fault: GuestFault) -> bytes:
        client.account.fault(fault.reason)
        client.account.operations[0].calls += 1
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
        slots: memoryview,
        slot: int,
    ) -> Answer:
        account.calls += 1
        account.pages += count
        pool = client.pools.get(pool_id)
        if pool is None:
            account.refuse(Reason.NO_SUCH_POOL, count)
            return Status.ENODEV, Reason.NO_SUCH_POOL, 0, 0
        was_empty = not pool.pages
        if count == 1:
            got = bitmap = int(self.store.get_one(pool, oid, index, slots, slot))
        else:
            bitmap = self.store.get(pool, oid, index, count, slots, slot)
            got = bitmap.bit_count()
        account.done += got
        if got == count:
            return _DONE, 0, bitmap, 0
        account.missed += count - got
        if was_empty:
            return Status.EEMPTY, Reason.POOL_EMPTY, 0, 0
        return _MISS, 0, bitmap, 0

    def _put(
        self,
        client: Client,
        account: OpCount,
        pool_id: int,
        oid: bytes,
        index: int,
        count: int,
        slots: memoryview,
        slot: int,
    ) -> Answer:
        account.calls += 1
        account.pages += count
        pool = client.pools.get(pool_id)
        if pool is None:
            account.refuse(Reason.NO_SUCH_POOL, count)
            return Status.ENODEV, Reason.NO_SUCH_POOL, 0, 0
        try:
            if count == 1:
                bitmap, dropped = self.store.put_one(pool, oid, index, slots, slot)
            else:
                bitmap, dropped = self.store.put(pool, oid, index, count, slots, slot)
        except NoObjectNumber:
            account.refuse(Reason.NO_OBJECT_SLOT, count)
            return Status.ENOMEM, Reason.NO_OBJECT_SLOT, 0, 0
        done = bitmap.bit_count()
        account.done += done
        if done == count:
            return _DONE, 0, bitmap, 0
        flushed = dropped.bit_count()
        if flushed:
            account.refuse(Reason.DUPLICATE_FLUSHED, flushed)
        if count - done - flushed:
            account.refuse(Reason.NO_MEMORY, count - done - flushed)
        first_refused = ~bitmap & (bitmap + 1)
        if dropped & first_refused:
            return Status.ENOSPC, Reason.DUPLICATE_FLUSHED, bitmap, 0
        return Status.ENOMEM, Reason.NO_MEMORY, bitmap, 0

    def _flush(
        self, client: Client, account: OpCount, pool_id: int, oid: bytes, index: int, count: int
    ) -> Answer:
        account.pages += count
        pool = client.pools.get(pool_id)
        if pool is None:
            account.refuse(Reason.NO_SUCH_POOL, count)
            return Status.ENODEV, Reason.NO_SUCH_POOL, 0, 0
        bitmap = self.store.flush(pool, oid, index, count)
        account.done += bitmap.bit_count()
        account.missed += count - bitmap.bit_count()
        return _DONE, 0, bitmap, 0

    def _batch(
        self, client: Client, account: OpCount, op: int, count: int, window: Window
    ) -> Answer:
        """Entries in order, each as a call of one page; the status is that of the first failure."""
        entries = decode_batch(window.read_table(count), moves_pages=op != Op.FLUSH_BATCH)
        calls = account.calls
        bitmap = 0
        result: Answer | None = None
        for at, (pool_id, index, slot, oid) in enumerate(entries):
            if op == Op.PUT_BATCH:
                answer = self._put(client, account, pool_id, oid, index, 1, window.slots, slot)
            elif op == Op.GET_BATCH:
                answer = self._get(client, account, pool_id, oid, index, 1, window.slots, slot)
            else:
                answer = self._flush(client, account, pool_id, oid, index, 1)
            bitmap |= answer[2] << at
            if answer[0] != _DONE and result is None:
                result = answer
        account.calls = calls
        if result is None:
            return _DONE, 0, bitmap, 0
        return result[0], result[1], bitmap, 0

    # --- operations on pools and objects

    def _manage(
        self, client: Client, account: OpCount, op: int, pool_id: int, oid: bytes
    ) -> Answer:
        if op == Op.NEW_POOL:
            answer = self._new_pool(client, pool_id, oid[:UUID_BYTES])
        elif op == Op.VERSION:
            answer = _DONE, 0, 0, SPEC_VERSION << 32 | ABI_REVISION
        else:
            pool = client.pools.get(pool_id)
            if op == Op.DESTROY_POOL:
                if pool is not None:
                    self._destroy_pool(client, pool)
                answer = (_MISS if pool is None else _DONE), 0, 0, 0
            elif pool is None:
                answer = Status.ENODEV, Reason.NO_SUCH_POOL, 0, 0
            else:
                pages = self.store.flush_object(pool, oid)
                account.pages += pages
                answer = _DONE, 0, 0, pages
        if answer[0] == _DONE:
            account.done += 1
        elif answer[0] == _MISS:
            account.missed += 1
        else:
            account.refuse(answer[1], 1)
        return answer

    def _new_pool(self, client: Client, flags: int, uuid: bytes) -> Answer:
        if flags >> POOL_VERSION_SHIFT != SPEC_VERSION:
            raise GuestFault(Reason.BAD_SPEC_VERSION, str(flags >> POOL_VERSION_SHIFT))
        if flags >> POOL_PAGE_SIZE_SHIFT & POOL_PAGE_SIZE_MASK:
            raise GuestFault(Reason.BAD_PAGE_SIZE, hex(flags))
        if flags & (POOL_RESERVED_BITS | PoolFlag.PRECOMPRESSED):
            raise GuestFault(Reason.BAD_POOL_FLAGS, hex(flags))
        if flags & PoolFlag.SHARED:
            return Status.EPERM, Reason.SHARED_NOT_SERVED, 0, 0
        if len(client.pools) >= POOLS_PER_GUEST:
            return Status.EPERM, Reason.TOO_MANY_POOLS, 0, 0
        number = self.store.take_pool_number()
        if number is None:
            return Status.EPERM, Reason.TOO_MANY_POOLS, 0, 0
        pool_id = PoolId(next(n for n in range(POOLS_PER_GUEST) if n not in client.pools))
        self.store.arena.publish_pool(number, client.number, pool_id, flags, uuid)
        persistent = bool(flags & PoolFlag.PERSIST)
        client.pools[pool_id] = Pool(number, pool_id, flags, uuid, persistent=persistent)
        return _DONE, 0, 0, pool_id

    def _destroy_pool(self, client: Client, pool: Pool) -> None:
        del client.pools[pool.pool_id]
        self.store.doom_pool(pool)

    # --- what others ask

    def accounts(self) -> list[Account]:
        """Of all guests that are here, and of all that have left as one."""
        return [self.departed, *(client.account for client in self.clients.values())]
