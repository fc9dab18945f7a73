"""A guest of the simulation: its lives one after the other, and what lives in each."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ipc.abi import Reply
from ipc.local import Fault, LocalChannel
from tools.sim.ledger import Call

if TYPE_CHECKING:
    from tools.sim.cluster import Cluster


class Killed(Exception):
    """Unwinds a guest that died while it was in a call."""


class Guest(Protocol):
    """What lives in a guest; made anew for each of its lives."""

    def step(self) -> None:
        """Do one thing, and find one's own data right."""
        ...

    def end(self) -> None:
        """Exit in good order."""
        ...

    def bury(self) -> None:
        """Give back what a dead guest leaves in this process."""
        ...


class Life:
    """One process of a guest: its attachment, and what it waits for."""

    def __init__(self, name: str, number: int, pid: int) -> None:
        self.name = name
        self.number = number
        self.pid = pid
        self.guest: Guest | None = None
        self.channel: LocalChannel | None = None
        self.dead = False
        self.in_call = 0
        self.fault = Fault.NONE
        self.last_reply: tuple[Call, Reply, list[bytes]] | None = None

    def __str__(self) -> str:
        at = f"@{self.channel.generation}" if self.channel is not None else ""
        return f"{self.name}.{self.number}{at}"


GuestMaker = Callable[["Cluster", Life, random.Random], Guest]
