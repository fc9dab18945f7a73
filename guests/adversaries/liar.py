"""A guest that lies to its supervisor.

Tries: whoever runs the cluster asks guests how they are, over their control sockets, and shows what
they answer.  This one answers with frames that are cut short, too long, no msgpack, no map, nested
without end; with texts that would drive a terminal, with numbers where texts are expected.

Stopped by: one reader of records (`ipc.codec`), which bounds what it takes, and one look at what a
guest answers before anybody believes it (`tools.answers`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import guests.control
from guests.adversary import Cell
from ipc.codec import encode

QUESTIONS = 6
_ESCAPE = "\x1b]0;owned\x07\x1b[31m"


def lies() -> list[bytes]:
    """What it answers, in this order, to whatever is asked; then it is silent."""
    nested = b"\x81\xa1a" * 60_000 + b"\xc0"
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"a": deep}
    strange: dict[str, Any] = {"state": 7, "workload": [1], "counters": "many", "report": None}
    hollow: dict[str, Any] = {
        "state": "idle",
        "workload": "",
        "done": 0,
        "total": 0,
        "error": None,
        "report": {},
        "counters": {},
        "node": None,
    }
    records: list[dict[str, Any]] = [
        {},
        deep,
        strange,
        {"error": _ESCAPE},
        {"state": _ESCAPE, "workload": _ESCAPE, "done": 1, "total": 1, "node": 3},
        {"resources": [{"name": _ESCAPE, "locks": 9}], "exit_code": "no", "stdout": 5},
        hollow,
        {**hollow, "counters": {"balloon": {}, "cleancache": {}, "disk_reads_pages": -1}},
        {**hollow, "counters": {"balloon": 5, "cleancache": [], "disk_reads_pages": "x"}},
    ]
    frames = [
        b"\0",
        struct.pack("<I", 0xFFFF_FFFF) + b"x" * 64,
        struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1",
        struct.pack("<I", 1) + b"\x07",
        struct.pack("<I", len(nested)) + nested,
    ]
    # A record for each of the questions that are asked in turn.
    return [*frames, *(encode(record) for record in records for _ in range(QUESTIONS))]


def run(cell: Cell) -> Iterator[None]:
    """From the end of this on every answer is a lie."""
    cell.report["lies"] = len(lies())
    yield
    left = lies()

    def lie(_record: dict[str, Any]) -> bytes:
        return left.pop(0) if left else b""

    # The first answer to whoever asks whether it has begun is still true.
    told = [False]
    true = encode

    def answer(record: dict[str, Any]) -> bytes:
        if not told[0] and record.get("state") == "idle":
            told[0] = True
            return true(record)
        return lie(record) if told[0] else true(record)

    # Where the control socket finds it.
    vars(guests.control)["encode"] = answer
