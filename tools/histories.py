"""Histories of a run with several nodes, and whether they are coherent.

A history is what the workload `histories` of each guest wrote down: calls that read or write one
page, with the host's monotonic clock before and after.  Each page is one register.  As every value
is written once, whether a register is linearizable can be told from *zones* (Gibbons and Korach,
"Testing shared memories", 1997): all calls with one value form a cluster; its zone reaches from
the first end of a call in it to the last begin of one.  If the first end comes before the last
begin the value must have stood all the time between them (a forward zone), else it stood at some
moment between the last begin and the first end (a backward zone).  The register is linearizable
unless a read ends before the write of its value begins, two forward zones overlap, or a backward
zone lies within a forward one.  That a read returns the last write that ended before it, or one
that overlaps, follows from it; it is looked at first, because a person understands it at once.

What a node loses when it is killed or fenced is no violation: a write that it did not sync, and
that no other node has seen, may have happened or not.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

INITIAL: Final = "0.0"
"""The value of a page before anybody wrote it."""
_FOREVER: Final = 1 << 62


class Register(NamedTuple):
    """A page of a file."""

    path: str
    page: int


@dataclass(frozen=True)
class Call:
    """A call of a node; one that never returned ends at `_FOREVER`."""

    node: str
    kind: str
    register: Register
    value: str
    begin_ns: int
    end_ns: int

    @property
    def returned(self) -> bool:
        """Whether its end is known."""
        return self.end_ns < _FOREVER


@dataclass(frozen=True)
class Violation:
    """Something that no order of the calls explains."""

    register: Register
    text: str


def read_history(node: str, path: Path) -> list[Call]:
    """The calls of one node; a last line that is cut off is what a killed writer leaves."""
    calls: list[Call] = []
    pending: dict[str, int] = {}
    write: Call | None = None
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        register = Register(record["path"], record["page"])
        kind, value, now = record["call"], record["value"], record["ns"]
        if record["at"] == "begin":
            if write is not None:
                calls.append(write)
            pending = {kind: now}
            write = None
            if kind == "write":
                write = Call(node, kind, register, value, now, _FOREVER)
            continue
        begin = pending.get(kind, now)
        calls.append(Call(node, kind, register, value, begin, now))
        write = None
    if write is not None:
        calls.append(write)
    return calls


def check(histories: Iterable[Call], lost: frozenset[str] = frozenset()) -> list[Violation]:
    """All violations; `lost` names nodes that died or were fenced."""
    by_register: dict[Register, list[Call]] = defaultdict(list)
    for call in histories:
        by_register[call.register].append(call)
    violations = []
    for register, calls in sorted(by_register.items()):
        violations += _check_register(register, calls, lost)
    return violations


class _Cluster:
    """All calls with one value."""

    def __init__(self) -> None:
        self.write: Call | None = None
        self.reads: list[Call] = []
        self.synced = False

    def is_forgivable(self, lost: frozenset[str]) -> bool:
        """Whether it may be as if the value had never been: its writer was lost before anybody
        else could know."""
        write = self.write
        if write is None:
            return False
        if not self.reads and not write.returned:
            return True
        seen = any(read.node != write.node for read in self.reads)
        return write.node in lost and not self.synced and not seen


def _check_register(register: Register, calls: list[Call], lost: frozenset[str]) -> list[Violation]:
    clusters: dict[str, _Cluster] = defaultdict(_Cluster)
    initial = Call("", "write", register, INITIAL, -_FOREVER, -_FOREVER)
    clusters[INITIAL].write = initial
    for call in calls:
        cluster = clusters[call.value]
        if call.kind == "write":
            cluster.write = call
        elif call.kind == "sync":
            cluster.synced = True
        else:
            cluster.reads.append(call)
    violations = []
    for value, cluster in clusters.items():
        write = cluster.write
        if write is None:
            violations.append(
                Violation(register, f"{cluster.reads[0].node} read {value}, which nobody wrote")
            )
            continue
        violations += [
            Violation(register, f"{read.node} read {value} before it was written")
            for read in cluster.reads
            if read.end_ns < write.begin_ns
        ]
    if violations:
        return violations
    kept = {value: one for value, one in clusters.items() if not one.is_forgivable(lost)}
    return _stale(register, kept) or _overlaps(register, kept)


def _stale(register: Register, clusters: dict[str, _Cluster]) -> list[Violation]:
    """Reads whose value another write had replaced before they began."""
    writes = [one.write for one in clusters.values() if one.write is not None]
    found = []
    for value, cluster in clusters.items():
        write = cluster.write
        assert write is not None
        later = [one for one in writes if one.begin_ns > write.end_ns]
        for read in cluster.reads:
            newer = next((one for one in later if one.end_ns < read.begin_ns), None)
            if newer is not None:
                found.append(
                    Violation(
                        register,
                        f"{read.node} read {value} of {write.node or 'the beginning'} "
                        f"{(read.begin_ns - newer.end_ns) / 1e6:.1f} ms after {newer.node} had "
                        f"written {newer.value}",
                    )
                )
    return found


def _overlaps(register: Register, clusters: dict[str, _Cluster]) -> list[Violation]:
    """Pairs of zones that can't both be."""
    forward: list[tuple[int, int, str]] = []
    backward: list[tuple[int, int, str]] = []
    for value, cluster in clusters.items():
        assert cluster.write is not None
        calls = [cluster.write, *cluster.reads]
        first_end = min(call.end_ns for call in calls)
        last_begin = max(call.begin_ns for call in calls)
        if first_end < last_begin:
            forward.append((first_end, last_begin, value))
        else:
            backward.append((last_begin, first_end, value))
    forward.sort()
    found = [
        Violation(register, f"{one[2]} and {other[2]} stood at the same time")
        for one, other in pairwise(forward)
        if other[0] < one[1]
    ]
    for begin, end, value in backward:
        inside = next((zone for zone in forward if zone[0] < begin and end < zone[1]), None)
        if inside is not None:
            found.append(Violation(register, f"{value} came while {inside[2]} stood"))
    return found
