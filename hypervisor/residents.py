"""Who is here: the guests of a machine, and all that a machine consists of.

A guest comes by `attach`, is found again after a restart by `adopt`, and goes by `depart`; what it
did is in its account, and in `departed` when it has left.  No call of a guest comes here (`machine`
has those on pages, `management` the others), except for what both of them answer alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hypervisor.accounting import Account, OpCount
from hypervisor.arena import Arena, GuestRecord
from hypervisor.auth import Grants
from hypervisor.balance import Balance
from hypervisor.lending import Lending
from hypervisor.membership import Memberships
from hypervisor.moments import Moments
from hypervisor.pages import LeafKey, StoreOptions, leaf_key
from hypervisor.pools import Client, Member, Pool, Settings
from hypervisor.pressure import Pressure
from hypervisor.store import Store
from ipc.abi import GuestId, Reason, Status
from ipc.limits import GUESTS_MAX

Answer = tuple[int, int, int, int, int]
"""status, reason, map, value, reply flags."""


class Report(NamedTuple):
    """A page that a guest says is wrong.  `is_there`: what it says it got is what is there."""

    pool: Pool
    oid: bytes
    page_index: int
    is_there: bool


class Residents:
    """All state of a hypervisor over one arena.  Over an arena that was used before,
    `recovery.recover` fills it before it serves anyone.

    `settings` and `grants` are the administrator's, kept by guest name and read here as they are.
    `secret` seeds the hash that finds equal pages; `now_ns` measures what encoding costs,
    `clock_ns` how long ago a guest was asked for room; `leaf_key` is for whoever must have the same
    samples in every process.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        policy: str = "clock",
        scheduling: str = "scheduled",
        admission: bool = True,
        lends: bool = False,
        settings: dict[str, Settings] | None = None,
        grants: Grants | None = None,
        secret: bytes = b"",
        now_ns: Callable[[], int] = lambda: 0,
        clock_ns: Callable[[], int] = lambda: 0,
        leaf_key: LeafKey = leaf_key,
    ) -> None:
        options = StoreOptions(policy, admission, scheduling, secret, now_ns, leaf_key)
        self.store = Store(arena, options)
        self.policy_name = policy
        self.generation = arena.next_generation()
        self.settings = {} if settings is None else settings
        self.memberships = Memberships(self.store, Grants() if grants is None else grants)
        self.clients: dict[str, Client] = {}
        self.balance = Balance(self.store, self.clients)
        self.lending = Lending(self.store, self.balance, self.settings, on=lends)
        self.pressure = Pressure(self.clients, clock_ns)
        self._found_no_room = False
        """The put that is being served, or some of it."""
        self.moments = Moments(arena)
        self.departed = Account()
        self.booked = self.departed.get
        """Where the call that was served last is counted; whoever times it says so there."""
        self.witness: Callable[[Client, str, str, str], None] = _look_away
        """Told of (guest, event, reason, detail) when a guest breaks a rule or is denied."""
        self.hear: Callable[[Client, Report], None] = _do_not_listen
        """Told when a guest reports a page."""
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
                # Those of guests that have gone are free when what they were lent is.
                self.store.begin_call()
                self.store.reap_until(lambda: bool(self.free_guest_numbers))
            if not self.free_guest_numbers:
                return None
            number = GuestId(self.free_guest_numbers.pop())
            self.store.arena.publish_guest(GuestRecord(number, name, pid, start_ticks, uid))
            client = self.adopt(GuestRecord(number, name, pid, start_ticks, uid))
            self.balance.allot()
        return client

    def adopt(self, record: GuestRecord) -> Client:
        """The client of a guest record."""
        settings = self.settings.setdefault(record.name, Settings())
        client = Client(
            record.number, record.name, record.pid, record.start_ticks, record.uid, settings
        )
        self.clients[record.name] = client
        return client

    def depart(self, client: Client) -> None:
        """The guest is gone: disown its private pages now, free them in slices; what it put into
        shared pools stays with the other sharers."""
        for member in list(client.members.values()):
            self.memberships.leave(member, for_good=True)
        self.memberships.part_with(client)
        self.store.contents.retire(client)
        self.store.arena.free_guest(client.number)
        if self.store.loans.doom(client, self.free_guest_numbers.append):
            self.store.doomed = True
        del self.clients[client.name]
        self.departed.add(client.account)
        self.balance.allot()

    def accounts(self) -> list[Account]:
        """Of all guests that are here, and of all that have left as one."""
        return [self.departed, *(client.account for client in self.clients.values())]

    # --- what calls of all kinds answer to whom they are not for

    def _no_member(
        self, client: Client, account: OpCount, member: Member | None, count: int
    ) -> Answer:
        """The pool id is nobody's, or its grant was taken back."""
        if member is None:
            account.refuse(Reason.NO_SUCH_POOL, count)
            return Status.ENODEV, Reason.NO_SUCH_POOL, 0, 0, 0
        account.refuse(Reason.SHARED_DENIED, count)
        self._deny(client, "call", Reason.SHARED_DENIED, member)
        return Status.EPERM, Reason.SHARED_DENIED, 0, 0, 0

    def _deny(self, client: Client, what: str, reason: Reason, member: Member) -> None:
        self.witness(client, "denied", reason.name.lower(), f"{what} {member.pool.uuid.hex()}")


def _look_away(_client: Client, _event: str, _reason: str, _detail: str) -> None:
    """Nobody asked to be told."""


def _do_not_listen(_client: Client, _report: Report) -> None:
    """Nobody asked to be told."""
