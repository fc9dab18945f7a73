"""Guests of a machine in this process, which do what they like with it.

`tests.support.hostile` has them over a real channel; here every piece of work can be counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guests.adversaries.raw import Calls
from hypervisor.arena import layout, private_arena
from hypervisor.machine import Machine
from hypervisor.pools import Client
from ipc.abi import PAGE_BYTES, Op, Reply, Status, oid_from_int
from ipc.window import Window, anonymous_window


def make_machine(frames: int = 4096, **options: Any) -> Machine:
    """Over an arena of so many frames."""
    return Machine(private_arena(layout(frames).end), secret=b"hostile!", **options)


class _Line:
    def __init__(self, machine: Machine, client: Client) -> None:
        self.window: Window = anonymous_window()
        self._machine = machine
        self._client = client

    def call(self, request: bytes) -> bytes:
        return self._machine.execute(self._client, request, self.window)


class Guest:
    """A client and its window."""

    def __init__(self, machine: Machine, name: str = "guest", **settings: Any) -> None:
        client = machine.attach(name, 1, 1, 0)
        assert client is not None
        self.client: Client = client
        for key, value in settings.items():
            setattr(client.settings, key, value)
        client.apply_settings()
        line = _Line(machine, client)
        self.window = line.window
        self._calls = Calls(line)

    def call(self, op: Op, pool: int = 0, oid: int = 0, index: int = 0, count: int = 0) -> Reply:
        """The reply."""
        return self._calls.call(op, pool=pool, oid=oid, index=index, count=count)

    def pool(self, *, persist: bool = False, uuid: bytes | None = None) -> int:
        """A pool that must be had."""
        reply = self._calls.new_pool(persist=persist, uuid=uuid)
        assert reply.status == Status.DONE, reply
        return reply.value

    def batch(self, pool: int, handles: list[tuple[int, int]]) -> int:
        """Put one page under each (object, index); how many were stored."""
        self.window.write_table(
            [
                (pool, index, slot, 0, oid_from_int(oid), 0)
                for slot, (oid, index) in enumerate(handles)
            ]
        )
        return self.call(Op.PUT_BATCH, count=len(handles)).map.bit_count()

    def fill_window(self, page: Callable[[int], bytes]) -> None:
        """A page of it in each slot."""
        for slot in range(64):
            self.window.slot(slot)[:] = page(slot)


def filled(slot: int) -> bytes:
    """A page of one byte."""
    return bytes([slot]) * PAGE_BYTES
