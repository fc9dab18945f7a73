"""What the administrator does in a simulation: every verb, at random, with any guest."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final

from hypervisor.administration import Administration
from hypervisor.auth import Role
from hypervisor.balance import MODES
from hypervisor.sharing import Sharing
from ipc.abi import PAGE_BYTES, UUID_BYTES
from tools.sim.ledger import require

if TYPE_CHECKING:
    from tools.sim.cluster import Cluster

SHARED_EPHEMERAL: Final = b"E" * UUID_BYTES
SHARED_PERSISTENT: Final = b"P" * UUID_BYTES
UUIDS: Final = (SHARED_EPHEMERAL, SHARED_PERSISTENT)


class Administrator:
    """Asks the machine that is there now, through its real administration."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self._cluster = cluster
        self._random = rng

    def ask(self, **record: Any) -> dict[str, Any]:
        """A verb that must succeed."""
        machine = self._cluster.machine
        assert machine is not None
        answer = Administration(machine).answer(record)
        require("error" not in answer, f"{record}: {answer.get('error')}")
        words = " ".join(f"{key}={_short(value)}" for key, value in record.items() if key != "verb")
        self._cluster.note("admin", f"{record['verb']} {words}".strip())
        return answer

    def grant_all(self, guests: list[str]) -> None:
        """At the beginning most may share."""
        for guest in guests:
            for uuid in UUIDS:
                if self._random.random() < 0.9:
                    self._allow(guest, uuid)

    def _allow(self, guest: str, uuid: bytes) -> None:
        role = self._random.choice(("reader", "writer", "writer", "writer"))
        self.ask(verb="auth", action="allow", guest=guest, uuid=uuid.hex(), role=role)
        require(self._cluster.grants.role(uuid, guest) == Role(role), "a grant was not taken down")

    def act(self) -> None:
        """One verb."""
        rng = self._random
        cluster = self._cluster
        assert cluster.machine is not None
        guest = rng.choice(list(cluster.makers))
        here = list(cluster.machine.clients)
        choice = rng.randrange(11)
        if choice < 2:
            self._freeze(here)
        elif choice == 2:
            self.ask(
                verb="set", guest=guest, compress=rng.random() < 0.5, weight=rng.randrange(300)
            )
        elif choice == 3:
            scope = rng.choice([one.value for one in Sharing])
            self.ask(verb="set", guest=guest, sharing=scope, group=rng.choice(("", "red", "blue")))
        elif choice == 4:
            cap = rng.choice((0, 0, 20, 60)) * PAGE_BYTES
            reserve = min(self._reservable(guest), rng.choice((0, 8, 40)) * PAGE_BYTES)
            reserve = min(reserve, cap) if cap else reserve
            priority = rng.choice(("low", "normal", "normal", "high"))
            self.ask(
                verb="set", guest=guest, cap_bytes=cap, reserve_bytes=reserve, priority=priority
            )
        elif choice in (5, 6):
            uuid = rng.choice(UUIDS)
            if cluster.grants.role(uuid, guest) is not None and rng.random() < 0.4:
                self.ask(verb="auth", action="deny", guest=guest, uuid=uuid.hex())
            else:
                self._allow(guest, uuid)
        elif choice == 7:
            self.ask(verb="schedule", mode=rng.choice(MODES))
        elif choice == 8:
            whom = rng.choice([None, *here])
            answer = self.ask(verb="flush", guest=whom, size_bytes=rng.randrange(1 << 17))
            require(answer["flushed_pages"] >= 0, str(answer))
        elif choice == 9:
            for verb in ("list", "pools", "freeable"):
                self.ask(verb=verb)
        elif here and rng.random() < 0.3:
            self._destroy(rng.choice(here))
        elif here:
            self._set_pool(rng.choice(here))

    def _reservable(self, guest: str) -> int:
        """Bytes that the others have not reserved."""
        machine = self._cluster.machine
        assert machine is not None
        taken = sum(
            settings.reserve_bytes
            for name, settings in self._cluster.settings.items()
            if name != guest
        )
        return machine.store.frames.count * PAGE_BYTES - taken

    def _freeze(self, here: list[str]) -> None:
        rng = self._random
        verb = rng.choice(("freeze", "thaw", "thaw"))
        answer = self.ask(verb=verb, guest=rng.choice([None, *here]))
        frozen = sorted(name for name in here if self._cluster.settings[name].frozen)
        require(answer["frozen"] == frozen, f"frozen: {answer['frozen']}, not {frozen}")

    def _destroy(self, guest: str) -> None:
        pools = [pool for name, pool in self._cluster.ledger.books if name == guest]
        pool = self._random.choice([None, *pools])
        self.ask(verb="destroy", guest=guest, pool=pool)
        for one in pools if pool is None else [pool]:
            self._cluster.ledger.leave(guest, one)

    def _set_pool(self, guest: str) -> None:
        rng = self._random
        pools = [pool for name, pool in self._cluster.ledger.books if name == guest]
        if pools:
            priority = rng.choice(("low", "normal", "high"))
            weight = rng.randrange(300)
            self.ask(
                verb="set", guest=guest, pool=rng.choice(pools), priority=priority, weight=weight
            )


def _short(value: object) -> str:
    return value[:4] if isinstance(value, str) and len(value) == 2 * UUID_BYTES else str(value)
