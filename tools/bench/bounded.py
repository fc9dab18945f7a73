"""How long one guest's million pages hold up another guest: `python -m tools.bench.bounded`.

One guest has a million pages (same-filled, so that they fit anywhere; or raw, `--raw-mib`), in
one object or in objects of a thousand. It flushes the object, destroys the pool, or ends, and at
once a second guest makes one call after the other for its own page. Printed are the worst and the
99.9th percentile of its calls while the pages are freed, beside the same guest undisturbed:
measured in the same run just before, with the pages there. In Xen all of it happened under locks,
in one go.

A worst case is the worst that happened; on a busy machine that is mostly the machine's, which is
what the undisturbed column is for.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Final, NamedTuple

from guests.hypercall import Hypercalls
from ipc import attach
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES, Status, oid_from_int
from ipc.attach import CONTROL_SOCKET
from ipc.errors import ExitCode, InvariantError
from ipc.mqueue import QueueChannel
from tools.bench.cluster import Cluster
from tools.control import ask

PAGES: Final = 1 << 20
SMALL_OBJECT_PAGES: Final = 1024
ACTIONS: Final = ("flush object", "destroy pool", "guest ends")
_now = time.perf_counter_ns


class Delays(NamedTuple):
    """Of the second guest's calls, in us."""

    calls: int
    median_us: float
    p999_us: float
    worst_us: float


class _Victim:
    """A guest that asks for one page of its own again and again, and verifies it."""

    def __init__(self, channel: QueueChannel) -> None:
        self.channel = channel
        self._calls = Hypercalls(channel)
        self._pool = self._calls.new_pool(persist=True).value
        self._page = bytes(range(256)) * (PAGE_BYTES // 256)
        channel.window.slot(0)[:] = self._page
        if self._calls.put(self._pool, oid_from_int(1), 0, 1).status != Status.DONE:
            raise InvariantError("the second guest's page was refused")

    def measure(self, seconds: float) -> Delays:
        durations: list[int] = []
        get, pool, oid = self._calls.get, self._pool, oid_from_int(1)
        end = deadline = _now() + int(seconds * 1e9)
        while end <= deadline:
            begin = _now()
            reply = get(pool, oid, 0, 1)
            end = _now()
            durations.append(end - begin)
            if reply.status != Status.DONE:
                raise InvariantError(f"the second guest's page is gone: {reply}")
        if self.channel.window.slot(0) != self._page:
            raise InvariantError("the second guest's page is wrong")
        durations.sort()
        count = len(durations)
        return Delays(
            count,
            durations[count // 2] / 1e3,
            durations[count * 999 // 1000] / 1e3,
            durations[-1] / 1e3,
        )


def _fill(calls: Hypercalls, pool: int, pages: int, object_pages: int, *, raw: bool) -> None:
    """Put so many pages: raw ones are all different in their first and last bytes."""
    slots = calls.channel.window.slots
    slots[:] = bytes(len(slots))
    if raw:
        for slot in range(EXTENT_PAGES_MAX):
            slots[slot * PAGE_BYTES] = 1
    for first in range(0, pages, EXTENT_PAGES_MAX):
        oid = oid_from_int(first // object_pages)
        reply = calls.put(pool, oid, first % object_pages, EXTENT_PAGES_MAX)
        if reply.status != Status.DONE:
            raise InvariantError(f"a page of a million was refused: {reply}")


def measure(action: str, pages: int, object_pages: int, *, raw: bool) -> tuple[Delays, Delays]:
    """(undisturbed, while the pages are freed)."""
    frames = pages + pages // 16 if raw else pages // 16
    cluster = Cluster(frames + 65536)
    try:
        victim = _Victim(
            attach.connect(
                cluster.directory, "victim", cluster.enrol("victim"), patience_seconds=20
            )
        )
        channel = attach.connect(
            cluster.directory, "giant", cluster.enrol("giant"), patience_seconds=20
        )
        calls = Hypercalls(channel)
        pool = calls.new_pool().value
        _fill(calls, pool, pages, object_pages, raw=raw)
        held = _held(cluster)
        undisturbed = victim.measure(2.0)
        if action == "flush object":
            for number in range(-(-pages // object_pages)):
                calls.flush_object(pool, oid_from_int(number))
        elif action == "destroy pool":
            calls.destroy_pool(pool)
        else:
            attach.detach(channel)
        disturbed = victim.measure(2.0)
        if _held(cluster) >= held // 2:
            raise InvariantError("the pages were not freed while the second guest was watched")
        channel.close()
        victim.channel.close()
        return undisturbed, disturbed
    finally:
        cluster.close()


def _held(cluster: Cluster) -> int:
    arena = ask(cluster.directory / CONTROL_SOCKET, {"verb": "stats"})["arena"]
    return int(arena["frames"] - arena["free_frames"])


def main(arguments: list[str]) -> int:
    """Print one line an action and shape."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.bounded", description=__doc__)
    parser.add_argument("--pages", type=int, default=PAGES, help="same-filled pages")
    parser.add_argument("--raw-mib", type=int, default=1024, help="and so many MiB of raw ones")
    options = parser.parse_args(arguments)
    print(f"{'second guest, us a call':46} {'undisturbed':>27} {'meanwhile':>27}")
    print(f"{'':46} {'median':>9}{'99.9 %':>9}{'worst':>9} {'median':>9}{'99.9 %':>9}{'worst':>9}")
    for raw in (False, True):
        pages = options.raw_mib * 256 if raw else options.pages
        for object_pages in (pages, SMALL_OBJECT_PAGES):
            for action in ACTIONS:
                before, meanwhile = measure(action, pages, object_pages, raw=raw)
                shape = "one object" if object_pages == pages else f"of {object_pages}"
                kind = "raw" if raw else "same-filled"
                cells = " ".join(
                    f"{one.median_us:9.1f}{one.p999_us:9.1f}{one.worst_us:9.1f}"
                    for one in (before, meanwhile)
                )
                print(f"{f'{action}, {pages} {kind}, {shape}':46} {cells}", flush=True)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
