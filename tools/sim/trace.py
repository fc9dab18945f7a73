"""The lines of a simulation: its last ones, and a digest of all.  `tools.sim` has the legend."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from typing import Final

from hypervisor.machine import Machine
from ipc.abi import Op, Reason, Reply, Status
from tools.sim.ledger import Book, Call

LINES_KEPT: Final = 40
"""The last lines, told with a failure."""

_OP_NAMES: Final = {
    Op.NEW_POOL: "pool",
    Op.DESTROY_POOL: "leave",
    Op.PUT_PAGE: "put",
    Op.GET_PAGE: "get",
    Op.FLUSH_PAGE: "flush",
    Op.FLUSH_OBJECT: "forget",
    Op.PUT_BATCH: "put*",
    Op.GET_BATCH: "get*",
    Op.FLUSH_BATCH: "flush*",
    Op.VERSION: "version",
    Op.LEND: "lend",
    Op.REPORT: "report",
}


class Trace:
    """Takes lines; `emit` gets each at once."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self.lines: deque[str] = deque(maxlen=LINES_KEPT)
        self.digest = 0

    def add(self, event: int, who: str, text: str, machine: Machine | None, fault: str) -> None:
        """A line, with what the machine holds now."""
        line = f"{event:>9} {who:<10} {text:<58} {_holds(machine)} {fault}".rstrip()
        self.lines.append(line)
        self.digest = zlib.crc32(line.encode(), self.digest)
        self._emit(line)


def describe(call: Call, reply: Reply, book: Book | None) -> str:
    """A call and its reply; `book` is of the pool that it names or made."""
    kind = book.kind if book is not None else "--"
    status = (Reason(reply.reason) if reply.reason else Status(reply.status)).name.lower()
    what, served = "", ""
    if call.op == Op.NEW_POOL:
        what = f"{reply.value}:{kind}" if not reply.reason else ""
    elif call.entries:
        _, (oid, index), _, _ = call.entries[0]
        name = f"{int.from_bytes(oid[:4], 'little')}:{index:#x}+{call.count}"
        what = f"{call.pool}:{kind:<4} {name:<16}"
        served = f"{reply.map.bit_count()}/{call.count}"
    elif call.op == Op.FLUSH_OBJECT:
        what = f"{call.pool}:{kind:<4} {int.from_bytes(call.oid[:4], 'little'):<16}"
        served = str(reply.value)
    elif call.op == Op.REPORT:
        name = f"{int.from_bytes(call.oid[:4], 'little')}:{call.index:#x}"
        what = f"{call.pool}:{kind:<4} {name:<16}"
    elif call.op == Op.LEND:
        what = f"{call.index}"
    else:
        what = f"{call.pool}"
    return f"{_OP_NAMES[call.op]:<7} {what:<23} {served:>6} {status}"


def _holds(machine: Machine | None) -> str:
    if machine is None:
        return "f down"
    pages = [0, 0]
    for client in machine.clients.values():
        for member in client.charged():
            pages[member.pool.persistent] += member.pages
    return f"e {pages[0]:>3} p {pages[1]:>3} f {machine.store.frames.free:>3}"
