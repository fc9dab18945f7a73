"""Malformed calls: every field of a request wrong, one at a time and all at once.

Tries: counts, slots, indexes, pool ids, object ids and flags outside their bounds, sums that wrap,
negative numbers, reserved bits, batch tables of rubbish, and random requests.  These are the rows
of XSA-15 (CVE-2012-6030 to 6036): early error paths, a get without a destination, overflows,
unchecked pool ids.

Stopped by: the one parser of guests' bytes (`ipc.wire`), and bounds in the machine.  Each ends in a
fault reply and nothing else; after so many of them a guest is thrown out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guests.adversaries.raw import Raw, until_out, why
from guests.adversary import Cell
from ipc.abi import (
    INVALID_OID,
    CallFlag,
    Op,
    PoolFlag,
    Reply,
    ReplyFlag,
    pool_flag_word,
)
from ipc.limits import BATCH_TABLE_BYTES, WINDOW_SLOTS

_EXTENTS = (Op.PUT_PAGE, Op.GET_PAGE, Op.FLUSH_PAGE)
_BATCHES = (Op.PUT_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH)
_LAST = (1 << 32) - 1
_WRONG: tuple[dict[str, Any], ...] = (
    {"count": 0},
    {"count": 65},
    {"count": 0xFFFF},
    {"index": -1, "count": 2},
    {"index": _LAST - 62, "count": 64},
    {"slot": WINDOW_SLOTS},
    {"slot": WINDOW_SLOTS - 1, "count": 2},
    {"slot": 1 << 32},
    {"slot": 1 << 52},
    {"slot": -1},
    {"slot": (1 << 64) - 64, "count": 64},
    {"oid": INVALID_OID},
    {"reserved": 1},
    {"reserved": 1 << 63},
    {"flags": 1 << 7},
)


def run(cell: Cell) -> Iterator[None]:
    """Parameters: random (how many requests of random bytes come after the chosen ones)."""
    return until_out(cell.report, _attempts(cell))


def _attempts(cell: Cell) -> Iterator[None]:
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}, "served": 0}
    messages = cell.count("random", 300, 0, 10**6)
    pool = raw.new_pool(persist=True).value
    for op, fields in _chosen(pool):
        reply = raw.call(op, **fields)
        report["attempts"] += 1
        if reply.flags & ReplyFlag.FAULT:
            _caught(report, reply)
        else:
            report["succeeded"] += 1
            report.setdefault("through", []).append(f"{op} {fields}")
        yield
    window = raw.channel.window
    for number in range(messages):
        # Pages of its own may come and go by these; that is no harm, so only faults are counted.
        window.table[:] = cell.random.randbytes(BATCH_TABLE_BYTES)
        body = cell.random.randbytes(60)
        message = raw.request(0)[:4] + bytes([cell.random.randrange(24)]) + body[1:]
        reply = raw.send(message[:64])
        report["attempts"] += 1
        if reply.flags & ReplyFlag.FAULT:
            _caught(report, reply)
        else:
            report["served"] += 1
        if number % 16 == 15:
            yield


def _chosen(pool: int) -> Iterator[tuple[int, dict[str, Any]]]:
    fit: dict[str, Any] = {"pool": pool, "oid": 1, "count": 1}
    for op in _EXTENTS:
        for wrong in _WRONG:
            yield op, fit | wrong
    yield Op.PUT_PAGE, fit | {"flags": CallFlag.LOW | CallFlag.HIGH}
    yield Op.PUT_PAGE, fit | {"flags": CallFlag.KEEP}
    yield Op.GET_PAGE, fit | {"flags": CallFlag.LOW}
    for op in _BATCHES:
        for field in ("pool", "index", "oid", "slot", "token", "flags"):
            yield op, {"count": 1, field: 1}
        yield op, {"count": 0}
        yield op, {"count": 65}
    for field in ("count", "index", "slot", "token", "flags"):
        yield Op.NEW_POOL, {"pool": pool_flag_word(), field: 1}
    for word in (0, pool_flag_word() | PoolFlag.PRECOMPRESSED, pool_flag_word() | 1 << 4, -1):
        yield Op.NEW_POOL, {"pool": word}
    yield Op.FLUSH_OBJECT, {"pool": pool, "oid": INVALID_OID}
    for field in ("count", "index", "oid", "slot", "token", "flags"):
        yield Op.DESTROY_POOL, {"pool": pool, field: 1}


def _caught(report: dict[str, Any], reply: Reply) -> None:
    report["caught"] += 1
    report["reasons"][why(reply)] = report["reasons"].get(why(reply), 0) + 1
