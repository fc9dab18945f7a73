"""One look at a running cluster: what guests and hypervisor say of themselves, as one record.

    hypervisor   its own stats without the guests; null while it is being restarted
    guests.NAME  pid, state, memory_bytes, counters (the guest's own, null if it doesn't answer),
                 hypervisor (what the hypervisor counted for it, null if it is not attached)

Columns of the table: DISK AVOIDED are pages that came from tmem instead of the disk, HIT% their
share of all gets, CPU us/op the hypervisor's CPU time for this guest per page it moved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ipc.codec import Record
from ipc.errors import Disconnected
from tools.control import ask
from tools.rundir import ClusterDirectory, ClusterRecord
from tools.units import format_size

HEADER = (
    "NAME",
    "STATE",
    "MEM",
    "EPH pages",
    "PERS pages",
    "HIT%",
    "PUTS",
    "DISK reads",
    "DISK AVOIDED",
    "CPU us/op",
)


def snapshot(directory: ClusterDirectory, record: ClusterRecord) -> Record:
    """Everybody's figures now."""
    stats = _ask(directory.hypervisor_socket, "stats")
    known = {} if stats is None else stats.pop("guests")
    guests: Record = {}
    for guest in record.guests:
        status = _ask(directory.guest_socket(guest.name), "status")
        guests[guest.name] = {
            "state": "gone" if status is None else status["state"],
            "memory_bytes": guest.memory_bytes,
            "counters": None if status is None else status["counters"],
            "hypervisor": known.get(guest.name),
        }
    return {"cluster": record.name, "hypervisor": stats, "guests": guests}


def table(shot: Record) -> list[tuple[str, ...]]:
    """A row of texts for each guest."""
    return [_row(name, guest) for name, guest in shot["guests"].items()]


def _row(name: str, guest: Record) -> tuple[str, ...]:
    counters: Record = guest["counters"] or {}
    seen: Record = guest["hypervisor"] or {}
    cleancache: Record = counters.get("cleancache") or {}
    hits, misses = cleancache.get("succ_gets", 0), cleancache.get("failed_gets", 0)
    pages = hits + cleancache.get("puts", 0)
    return (
        name,
        guest["state"],
        format_size(guest["memory_bytes"]),
        _count(seen.get("ephemeral_pages")),
        _count(seen.get("persistent_pages")),
        f"{100 * hits / (hits + misses):.1f}" if hits + misses else "-",
        _count(cleancache.get("puts")),
        _count(counters.get("disk_reads_pages")),
        _count(cleancache.get("succ_gets")),
        f"{seen['cpu_ns'] / 1000 / pages:.2f}" if seen and pages else "-",
    )


def headline(shot: Record) -> str:
    """The hypervisor and its arena in one line."""
    stats = shot["hypervisor"]
    if stats is None:
        return "hypervisor: does not answer"
    arena = stats["arena"]
    used = arena["frames"] - arena["free_frames"]
    return (
        f"hypervisor: generation {stats['generation']}, {stats['hypercalls']:,} calls, "
        f"{stats['cpu_seconds']:.2f} s CPU, arena {format_size(arena['bytes'])}, "
        f"{used:,} of {arena['frames']:,} pages in use, {stats['evictions']:,} evicted"
    )


def processes(directory: ClusterDirectory, record: ClusterRecord) -> list[Record]:
    """The cluster's processes, as `tmem ps` lists them."""
    stats = _ask(directory.hypervisor_socket, "ping")
    rows: list[Record] = [_process("supervisor", "supervisor", record.supervisor_pid, "running", 0)]
    if record.arena_bytes:
        pid = None if stats is None else stats["pid"]
        state = "down" if stats is None else "running"
        rows.append(_process("hypervisor", "hypervisor", pid, state, record.arena_bytes))
    for guest in record.guests:
        status = _ask(directory.guest_socket(guest.name), "status")
        state = "gone" if status is None else status["state"]
        row = _process(guest.name, "guest", guest.pid, state, guest.memory_bytes)
        row["node"] = None if status is None else status.get("node")
        rows.append(row)
    return rows


NODE_HEADER = ("NODE", "SLOT", "VIEW", "BEAT AGE", "MASTERS")


def node_cells(row: Record) -> tuple[str, ...]:
    """What `tmem ps` adds for guests that mount a shared volume."""
    node = row.get("node")
    if not node:
        return ("-",) * len(NODE_HEADER)
    age = node["heartbeat_age_seconds"]
    return (
        f"{node['volume']}/{node['number']}",
        "-" if node["slot"] is None else str(node["slot"]),
        str(node["epoch"]),
        "-" if age is None else f"{age:.1f} s",
        f"{node['resources_mastered']:,}",
    )


def _process(name: str, kind: str, pid: int | None, state: str, memory_bytes: int) -> Record:
    return {"name": name, "kind": kind, "pid": pid, "state": state, "memory_bytes": memory_bytes}


def _ask(path: Path, verb: str) -> Record | None:
    try:
        return ask(path, {"verb": verb}, timeout_seconds=5.0)
    except Disconnected:
        return None


def _count(value: Any) -> str:
    return "-" if value is None else f"{value:,}"
