"""What lock managers say to each other; `codec` makes bytes of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from fs.dlm.modes import Mode

VALUE_BYTES = 64
"""Of a lock value block, as in o2dlm."""
NAME_BYTES_MAX = 64
"""OCFS2's names have 31."""
NODE_MAX = 254
FRAME_BYTES_MAX = 1 << 16
TOKEN_MAX = 1 << 63
"""Far above any; a token above it is a lie that would leave no room to grow."""

Value: TypeAlias = bytes | None
"""A lock value block; None: not valid."""


class MessageError(ValueError):
    """These bytes are no message."""


class Kind(enum.IntEnum):
    """The kind of a frame."""

    ACK = 0
    REQUEST = 1
    CANCEL = 2
    DOWN = 3
    GRANT = 4
    DENY = 5
    BAST = 6
    RECORD = 7
    CLAIM = 8
    DONE = 9
    RELEASE = 10
    LIFT = 11
    LIFTED = 12


class Flag(enum.IntFlag):
    """Of a request."""

    NOQUEUE = 1
    """Answer at once; nobody is told that he is in the way."""
    RECOVERING = 2
    """Of the node that replays a dead node's journal: goes past what is held for that node."""


NO_FLAG = Flag(0)


class Reason(enum.IntEnum):
    """Why a request was denied."""

    AGAIN = 1
    """NOQUEUE, and it can't be granted now (EAGAIN)."""
    DEADLOCK = 2
    """Another reader converts to EX already; give up PR, then ask again (EDEADLK)."""
    CANCELLED = 3
    INVALID = 4
    """The holder asked for less than it has."""


class Death(NamedTuple):
    """One death of a node whose locks are held back: the node and the first view without it."""

    node: int
    epoch: int


class Member(NamedTuple):
    """A member of a view, and the epoch since which it has been one without a break."""

    node: int
    since: int


class Grave(NamedTuple):
    """What was lost with masters: see `recovery`."""

    lost: frozenset[int]
    members: frozenset[int]
    deaths: frozenset[Death]


@dataclass(frozen=True, slots=True)
class Request:
    """Node to master: a new lock, or a conversion upwards."""

    name: bytes
    request: int
    mode: Mode
    flags: Flag = NO_FLAG


@dataclass(frozen=True, slots=True)
class Cancel:
    """Node to master: take the request back. The answer is a denial, or the grant under way."""

    name: bytes
    request: int


@dataclass(frozen=True, slots=True)
class Down:
    """Node to master: the node has gone down to `mode`, or has no lock any more (`gone`)."""

    name: bytes
    mode: Mode
    gone: bool
    value: Value


@dataclass(frozen=True, slots=True)
class Grant:
    """Master to node (AST)."""

    name: bytes
    request: int
    mode: Mode
    token: int
    value: Value


@dataclass(frozen=True, slots=True)
class Deny:
    """Master to node: there will be no grant."""

    name: bytes
    request: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Bast:
    """Master to holder: somebody waits until you go down to `mode`."""

    name: bytes
    mode: Mode


@dataclass(frozen=True, slots=True)
class Record:
    """Old master to new master: what only a master knows."""

    name: bytes
    token: int
    stamp: int
    exclusive: int | None
    value: Value
    deaths: frozenset[Death]


@dataclass(frozen=True, slots=True)
class Claim:
    """Node to new master: what the node holds and what it waits for."""

    name: bytes
    granted: Mode | None
    wanted: Mode | None
    request: int
    flags: Flag
    token: int
    value: Value


@dataclass(frozen=True, slots=True)
class Done:
    """Node to every member: all records and claims of this epoch were sent; what else I know."""

    epoch_before: int
    """0: this node remembers nothing."""
    ready: bool
    """It was complete as a master in that epoch."""
    highest_token: int
    members_before: tuple[Member, ...]
    held: frozenset[Death]
    released: frozenset[Death]
    graves: frozenset[Grave]


@dataclass(frozen=True, slots=True)
class Release:
    """Node to every member: the journal of `death.node` was replayed."""

    death: Death


@dataclass(frozen=True, slots=True)
class Lift:
    """Holder to master: something that remembers tokens wants at least this one."""

    name: bytes
    token: int


@dataclass(frozen=True, slots=True)
class Lifted:
    """Master to holder: the token now."""

    name: bytes
    token: int


Message: TypeAlias = (
    Request | Cancel | Down | Grant | Deny | Bast | Record | Claim | Done | Release | Lift | Lifted
)


class Frame(NamedTuple):
    """One frame, checked."""

    epoch: int
    sequence: int
    acknowledged: int
    message: Message | None
