"""Who may share which pool, as reader or writer.

Deny by default: a guest that the administrator has not allowed on a uuid is refused, and told so.
The uuid is a name and no key: knowing it gives nothing.  Grants are by guest name, outlive the
guest and the hypervisor (`settings`), and a grant that is taken back stops the guest at its next
call, though it has joined already.

Xen took the uuid for the key at first, made authorization mandatory in 2017 only, gave a guest that
was denied a private pool without a word, and lost grants in a migration.  There a guest could also
grant itself (TMEM_AUTH); here no guest channel leads to this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Final

from ipc.abi import ANY_UUID, UUID_BYTES
from ipc.errors import OperatorError

GRANTS_MAX: Final = 65536
"""Grants in all; the administrator's mistakes are bounded, too."""


class Role(Enum):
    """What a grant allows: a reader gets, a writer also puts and flushes."""

    READER = "reader"
    WRITER = "writer"


class Grants:
    """uuid -> guest name -> role."""

    def __init__(self) -> None:
        self._roles: dict[bytes, dict[str, Role]] = {}
        self._count = 0

    def allow(self, uuid: bytes, guest: str, role: Role) -> None:
        """Grant, or change the role of an earlier grant."""
        if len(uuid) != UUID_BYTES or uuid == ANY_UUID:
            raise OperatorError("a shared pool needs a uuid of 32 hex digits that are not all f")
        roles = self._roles.setdefault(uuid, {})
        if guest not in roles:
            if self._count >= GRANTS_MAX:
                raise OperatorError(f"there are {GRANTS_MAX} grants already; deny some first")
            self._count += 1
        roles[guest] = role

    def deny(self, uuid: bytes, guest: str) -> bool:
        """Take a grant back; False if there was none."""
        roles = self._roles.get(uuid)
        if roles is None or roles.pop(guest, None) is None:
            return False
        self._count -= 1
        if not roles:
            del self._roles[uuid]
        return True

    def role(self, uuid: bytes, guest: str) -> Role | None:
        """What this guest may do, None for nothing."""
        return self._roles.get(uuid, {}).get(guest)

    def __iter__(self) -> Iterator[tuple[bytes, str, Role]]:
        for uuid in sorted(self._roles):
            for guest, role in sorted(self._roles[uuid].items()):
                yield uuid, guest, role
