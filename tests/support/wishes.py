"""What guests should read in their windows, as the oracle works it out from what they hold.

It knows W1 to W6 of `hypervisor.pressure` and none of its code: what a guest is over is added up
from the charges of all pools, how many pages it could take back from the oracle's own pages, and
what it has taken back from the answers to its flushes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from hypervisor.machine import Machine
from hypervisor.pools import Client
from hypervisor.pressure import shared_info
from ipc.abi import PAGE_BYTES, Op, Reason, Reply, Status
from ipc.window import Window
from tests.support.expectations import Mismatch

CALL_NS: Final = 40_000_000
"""What a call takes by the clock of the model: 25 of them make a second."""
_REQUEST_MAX: Final = 256
_SECOND_NS: Final = 10**9


@dataclass
class Told:
    """What stands in a guest's window, and what was counted since it came."""

    notifications: int = 0
    writeback_pages: int = 0
    """As it stands there."""
    left: int = 0
    """What is still to do of it."""
    at_ns: int = 0
    in_vain: int = 0
    """Requests in a row of which nothing was done, the last one included."""
    asked: int = 0
    done: int = 0


class Wishes:
    """`windows` are those of the guests; `pages_of` counts what a guest has in private persistent
    pools."""

    def __init__(self, windows: Mapping[str, Window], pages_of: Callable[[str], int]) -> None:
        self._windows = windows
        self._pages_of = pages_of
        self._told: dict[str, Told] = {}
        self._balloons: dict[str, int] = {}
        self._notified: list[str] = []
        self.now_ns = 0
        self.requests = 0
        self.taken_back = 0

    def started(self, machine: Machine) -> None:
        """A hypervisor has started, and its guests have come back."""
        self._machine = machine
        machine.pressure.notify = self._notify
        for name in machine.clients:
            self.came(name)

    def came(self, name: str) -> None:
        """A guest has attached."""
        client = self._machine.clients[name]
        self._windows[name].publish_info(self._machine.generation, **shared_info(client))
        self._told[name] = Told()
        self._check_window(name)

    def _notify(self, client: Client) -> None:
        self._windows[client.name].notify(**shared_info(client))
        self._notified.append(client.name)

    def _check_window(self, name: str) -> None:
        told = self._told[name]
        expected = (
            self._machine.generation,
            told.notifications,
            self._balloons.get(name, 0),
            told.writeback_pages,
        )
        info = self._windows[name].info()
        if info != expected:
            raise Mismatch(f"the window of {name} says {info}, not {expected}")

    # --- the administrator

    def balloon(self, name: str, pages: int) -> None:
        """A target was set."""
        self._balloons[name] = pages
        if self._notified != [name]:
            raise Mismatch(f"{self._notified} were told of the target of {name}")
        self._notified.clear()
        told = self._told[name]
        told.notifications += 1
        told.writeback_pages = told.left
        self._check_window(name)

    def listed(self, guests: Mapping[str, Mapping[str, int]]) -> None:
        """What the administrator sees."""
        for name, record in guests.items():
            told = self._told[name]
            found = tuple(record[f"writeback_{what}_pages"] for what in ("asked", "done", "wanted"))
            if found != (told.asked, told.done, told.left):
                raise Mismatch(f"{name} is listed with {found}: {told}")
            over = self._over_bytes(name)
            settled = not self._machine.store.doomed
            if settled and record["persistent_over_bytes"] != max(over, 0):
                raise Mismatch(f"{name} is {over} bytes over: {record['persistent_over_bytes']}")
            if record["balloon_bytes"] != self._balloons.get(name, 0) * PAGE_BYTES:
                raise Mismatch(f"{name} is listed with a target of {record['balloon_bytes']}")

    # --- calls

    def took_back(self, name: str, pages: int) -> None:
        """A guest has flushed pages of a private persistent pool."""
        told = self._told[name]
        done = min(pages, told.left)
        told.left -= done
        told.in_vain = 0 if done else told.in_vain
        told.done += done
        self.taken_back += done

    def called(self, name: str, op: Op, count: int, reply: Reply, *, short: bool = False) -> None:
        """A call was answered: whoever had to be asked was, and nobody else.  `short`: a LEND that
        found no room for all that it could have."""
        self.now_ns += CALL_NS
        notified, self._notified = self._notified, []
        lacking = op in (Op.PUT_PAGE, Op.PUT_BATCH) and reply.map != (1 << count) - 1
        # RAM that took pages of one who had not too many lacks nothing, and asks for room.
        lacking |= op == Op.LEND
        whom = self._whom(name) if lacking else []
        if notified:
            if self._machine.store.doomed:
                raise Mismatch(f"{notified} were asked though pages wait to be reaped")
            if len(notified) != 1 or notified[0] not in whom:
                raise Mismatch(f"{notified} were asked after {op.name} of {name}, not {whom}")
            self._asked(notified[0])
        elif whom and (short or reply[1:3] == (Status.ENOMEM, Reason.NO_MEMORY)):
            if not self._machine.store.doomed and all(map(self._may_be_asked, whom)):
                raise Mismatch(f"none of {whom} was asked after {op.name} of {name}")
        for one in self._machine.clients:
            self._check_window(one)

    def _whom(self, refused: str) -> list[str]:
        """Of the others that are further over than the refused one those that are furthest, after
        they have let as few requests go by as any; several if equally far."""
        least = max(self._over_bytes(refused), 0)
        ranks = {
            name: (-self._gone_by(name), self._over_bytes(name))
            for name in self._machine.clients
            if name != refused and self._pages_of(name) and self._over_bytes(name) > least
        }
        return [name for name, rank in ranks.items() if rank == max(ranks.values())]

    def _gone_by(self, name: str) -> int:
        told = self._told[name]
        return told.in_vain - bool(told.in_vain and not self._may_be_asked(name))

    def _may_be_asked(self, name: str) -> bool:
        told = self._told[name]
        # The clock was read within the call.
        return not told.left or self.now_ns - CALL_NS - told.at_ns >= _SECOND_NS

    def _asked(self, name: str) -> None:
        if not self._may_be_asked(name):
            raise Mismatch(f"{name} is asked again: {self._told[name]}")
        told = self._told[name]
        pages = self._windows[name].info().writeback_pages
        held = self._pages_of(name)
        private = self._charges(name, shared=(False,))
        over = self._over_bytes(name)
        # One page less would leave it above its allotment, if all cost the same.
        if not 0 < pages <= min(_REQUEST_MAX, held) or (pages - 1) * private >= over * held:
            raise Mismatch(f"{name} is asked for {pages} of {held} pages, {over} bytes over")
        told.notifications += 1
        told.writeback_pages = told.left = pages
        told.asked += pages
        told.in_vain += 1
        told.at_ns = self.now_ns - CALL_NS
        self.requests += 1

    def _over_bytes(self, name: str) -> int:
        return self._charges(name) - self._machine.clients[name].allotment_bytes

    def _charges(self, name: str, shared: tuple[bool, ...] = (False, True)) -> int:
        """What a guest's own persistent pages cost: not those of guests that have gone."""
        machine = self._machine
        client = machine.clients[name]
        return sum(
            member.cost_bytes
            for pool in machine.memberships.all_pools(machine.clients)
            for member in pool.members.values()
            if pool.persistent and pool.shared in shared
            if member.client is client and not member.foreign
        )
