"""Cluster locks and volumes of a running cluster, as `tmem locks` and `tmem fs stat` show them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ipc.codec import Record
from ipc.errors import Disconnected, ExitCode, OperatorError
from tools.control import ask
from tools.rundir import ClusterDirectory, ClusterRecord
from tools.units import format_size

LOCKS_HEADER: Final = ("KIND", "INODE", "MASTER", "HOLDERS", "WAITERS", "TOKEN")
VOLUMES_HEADER: Final = ("TYPE", "SIZE", "FREE", "LABEL", "UUID", "FEATURES")
SLOTS_HEADER: Final = ("UUID", "SLOT", "NODE", "JOURNAL", "SEQUENCE", "RECOVERIES")


def locks(
    directory: ClusterDirectory, record: ClusterRecord, inode: int | None
) -> tuple[list[Record], list[str]]:
    """All resources, each told by its master, and what could not be had, as lines for a person."""
    rows: list[Record] = []
    complaints = []
    for guest in record.guests:
        try:
            answer = ask(directory.guest_socket(guest.name), {"verb": "locks"}, timeout_seconds=5.0)
        except Disconnected as error:
            complaints.append(f"{guest.name} does not answer: {error}")
            continue
        rows += answer.get("resources", [])
        if answer.get("left_out"):
            complaints.append(f"{guest.name} masters {answer['left_out']:,} more resources")
    if inode is not None:
        rows = [row for row in rows if row["inode"] == inode]
    return sorted(rows, key=lambda row: (row["inode"] or 0, row["name"])), complaints


def lock_cells(row: Record) -> tuple[str, ...]:
    """A row of the table."""
    holders = " ".join(f"{name}:{mode}" for name, mode in row["holders"].items())
    waiters = " ".join(f"{waiter['node']}:{waiter['mode']}" for waiter in row["waiters"])
    if row["held_back"]:
        waiters += f" (until {', '.join(row['held_back'])} is recovered)"
    return (
        row["kind"],
        "-" if row["inode"] is None else str(row["inode"]),
        row["master"],
        holders or "-",
        waiters.strip() or "-",
        f"{row['token'] >> 32}.{row['token'] & 0xFFFFFFFF}",
    )


def volumes(
    directory: ClusterDirectory, record: ClusterRecord, guest: str | None
) -> dict[str, Record]:
    """What each guest (or the one that is named) says of its file system."""
    names = [one.name for one in record.guests]
    if guest is not None and guest not in names:
        raise OperatorError(
            f"there is no guest {guest!r}; there are {', '.join(names)}", ExitCode.USAGE
        )
    found = {}
    for name in names if guest is None else [guest]:
        answer = ask(directory.guest_socket(name), {"verb": "volume"})
        if "error" in answer:
            raise OperatorError(f"{name}: {answer['error']}", ExitCode.UNAVAILABLE)
        found[name] = answer
    return found


def volume_cells(name: str, volume: Record) -> tuple[str, ...]:
    """A row of the table; `name` is whose file system it is."""
    return (
        name,
        volume["type"],
        format_size(volume["blocks"] * volume["block_bytes"]),
        format_size(volume["blocks_free"] * volume["block_bytes"]),
        volume["label"] or "-",
        volume["uuid"],
        ",".join(volume["features"]) or "-",
    )


def slot_rows(volumes: Iterable[Record]) -> list[tuple[str, ...]]:
    """The slots of all volumes, each volume once."""
    return [
        (
            uuid,
            str(slot["slot"]),
            slot["node"] or "free",
            slot["journal"],
            str(slot["sequence"]),
            str(slot["recoveries"]),
        )
        for uuid, volume in {volume["uuid"]: volume for volume in volumes}.items()
        for slot in volume["slots"]
    ]
