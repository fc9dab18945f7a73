"""No adversary but the victim of all others: pages of known content, put, fetched and compared.

It is run as adversaries are, since it needs the same raw calls.  A page is named by (owner, pool
kind, file, index) and a version, and its bytes follow from that (`raw.page_of`), so that one guest
can check what another has put.

    task    fill   make or join the pool, put the pages, say how many were kept
            check  fetch the pages and compare; with `rounds` again and again
            work   both, round after round, each with a new version
            drop   flush the file

A file has an `owner`, `ino`, `generation`, so many `pages`, a `version`; it is in the `pool` of
this id, or in a new one, private or that of `uuid`, of a `kind` (ephemeral, persistent).  `token`
goes with each put.  `rounds` and `seconds` bound the work, `pause_seconds` are between two rounds.

What it reports: `pool`, `kept`, `checked` (pages whose bytes were compared), `mismatches`,
`missing`, `lost` (missing from a persistent pool, where nothing may be), `refused`, `rounds`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from guests.adversaries.raw import Raw, file_oid, page_of, why
from guests.adversary import Cell
from guests.workloads.job import BadParameters
from ipc.abi import Op, Status

_EXTENT = 16
_TASKS = ("fill", "check", "work", "drop")


class _Witness:
    def __init__(self, cell: Cell) -> None:
        self.raw = Raw(cell)
        self.report = cell.report
        self.uuid = cell.uuid("uuid") if cell.text("uuid", "") else None
        self.persist = cell.text("kind", "ephemeral") == "persistent"
        self.owner = cell.text("owner", cell.spec.name)
        self.ino = cell.count("ino", 7, 0, 2**63)
        self.oid = file_oid(self.ino, cell.count("generation", 1, 0, 2**32 - 1))
        self.pages = cell.count("pages", 32, 1, 65536)
        self.version = cell.count("version", 1, 0, 2**32)
        self.token = cell.count("token", 0, 0, 2**63)
        self.pool = cell.count("pool", -1, -1, 4096)
        keys = ("kept", "checked", "mismatches", "missing", "lost", "refused", "rounds")
        self.report |= dict.fromkeys(keys, 0)
        if self.pool < 0:
            self.join()
        self.report["pool"] = self.pool

    def join(self) -> None:
        reply = self.raw.new_pool(persist=self.persist, uuid=self.uuid)
        if reply.status != Status.DONE:
            raise BadParameters(f"witness: no pool: {why(reply)}")
        self.pool = reply.value

    def page(self, index: int) -> bytes:
        return page_of(self.owner, self.ino, self.version, index)

    def fill(self) -> Iterator[None]:
        for first in range(0, self.pages, _EXTENT):
            indexes = range(first, min(first + _EXTENT, self.pages))
            pages = [self.page(index) for index in indexes]
            reply = self.raw.put(self.pool, self.oid, first, pages, token=self.token)
            kept = reply.map.bit_count()
            self.report["kept"] += kept
            self.report["refused"] += len(pages) - kept
            if reply.status != Status.DONE:
                self.report["why"] = why(reply)
            yield

    def check(self) -> Iterator[None]:
        for index in range(self.pages):
            found = self.raw.get(self.pool, self.oid, index)
            if found is None:
                self.report["missing"] += 1
                self.report["lost"] += self.persist
            else:
                self.report["checked"] += 1
                self.report["mismatches"] += found != self.page(index)
            if index % _EXTENT == _EXTENT - 1:
                yield
        self.report["rounds"] += 1

    def drop(self) -> Iterator[None]:
        self.raw.call(Op.FLUSH_OBJECT, pool=self.pool, oid=self.oid, token=self.token)
        yield


def run(cell: Cell) -> Iterator[None]:
    """See the module."""
    task = cell.text("task")
    if task not in _TASKS:
        raise BadParameters(f"task must be one of {', '.join(_TASKS)}, not {task!r}")
    witness = _Witness(cell)
    rounds = cell.count("rounds", 1, 1, 10**9)
    until = time.monotonic() + cell.number("seconds", 600.0, 0.0, 3600.0)
    pause_seconds = cell.number("pause_seconds", 0.0, 0.0, 10.0)
    yield
    for _ in range(rounds):
        if task in ("fill", "work"):
            yield from witness.fill()
        if task in ("check", "work"):
            yield from witness.check()
        if task == "drop":
            yield from witness.drop()
        if task == "work":
            witness.version += 1
        if time.monotonic() >= until:
            break
        awake_at = time.monotonic() + pause_seconds
        while time.monotonic() < awake_at:
            time.sleep(min(0.005, pause_seconds))
            yield
