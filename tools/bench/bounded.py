"""Bounded calls: how long a guest waits for its page while another one gives up a million.

    python -m tools.bench.bounded [--pages N] [--repetitions N] [--seconds S]

Xen destroyed a pool, and flushed an object, in one go and under a lock; one guest with a huge pool
stalled all.  Here a guest in a process of its own fills the arena with pages of one shape and gives
them up in one call, or dies, or makes the hypervisor work in another way for as long as it can,
while a second guest gets its pages one by one.  Its calls are timed before and meanwhile, by turns,
so that whatever else disturbs the machine disturbs both; the worst of them is what counts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from guests.hypercall import Hypercalls
from ipc import attach
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES, oid_from_int
from ipc.codec import receive_record, send_record
from ipc.errors import ExitCode, OperatorError
from ipc.limits import POOLS_PER_GUEST
from ipc.segment import available_memory_bytes
from tools.bench.calls import OBJECT_PAGES
from tools.bench.cluster import SPARE_PAGES, STOP_SECONDS, Cluster
from tools.bench.timing import median, pin

PAGES: Final = 1 << 20
_VICTIM_PAGES: Final = 1024
_CROWD: Final = 12
"""Guests with 64 pools each, beside the one that is hostile."""
_ALL_FREED_SECONDS: Final = 300.0
_SLOW_US: Final = 1000.0
_NICE: Final = -20

RAW, FILLED, LEAN, TWINS = "raw", "same-filled", "compressed", "shared"


@dataclass(frozen=True)
class Scenario:
    """Pages of one `content`, so many to an object and with so many indexes between them, and what
    is done to them: `destroy` the pool, `flush` the object, `die`, or `churn`."""

    name: str
    content: str
    object_pages: int
    step: int
    act: str
    part: int = 1
    """One page of so many: for contents that take long to put."""


SCENARIOS: Final = (
    Scenario("destroy a pool, raw pages", RAW, OBJECT_PAGES, 1, "destroy"),
    Scenario("flush an object, raw pages", RAW, 1 << 30, 1, "flush"),
    Scenario("destroy a pool, an object a page", FILLED, 1, 1, "destroy"),
    Scenario("flush an object, a leaf a page", FILLED, 1 << 30, 64, "flush"),
    Scenario("flush an object, same-filled pages", FILLED, 1 << 30, 1, "flush"),
    Scenario("destroy a pool, compressed pages", LEAN, OBJECT_PAGES, 1, "destroy", part=8),
    Scenario("destroy a pool, shared pages", TWINS, OBJECT_PAGES, 1, "destroy", part=4),
    Scenario("a guest dies, an object a page", FILLED, 1, 1, "die", part=2),
    Scenario("evictions, 832 pools", RAW, 64, 1, "churn", part=1 << 30),
    Scenario("coming and going", RAW, 64, 1, "visit", part=1 << 30),
)


class Hostile:
    """The other guest's process; `call` is answered when it is done, `begin` only says so."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.name = f"hostile{number}"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, cluster.directory, self.name, cluster.enrol(self.name))
        self.process = context.Process(target=_hostile, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.hear()

    def begin(self, what: str, *arguments: Any) -> None:
        self._pipe.send((what, *arguments))

    def hear(self) -> None:
        try:
            if self._pipe.poll(_ALL_FREED_SECONDS):
                self._pipe.recv()
                return
        except EOFError:
            pass
        raise OperatorError("the hostile guest of the benchmark died", ExitCode.GUEST_DIED)

    def call(self, what: str, *arguments: Any) -> None:
        self.begin(what, *arguments)
        self.hear()

    def close(self) -> None:
        self._pipe.close()
        self.process.join(STOP_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _hostile(pipe: Connection, directory: Path, name: str, token: bytes) -> None:
    """The life of the hostile process; the end of the pipe is the end of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = attach.connect(directory, name, token, patience_seconds=STOP_SECONDS)
    guest = _Shapes(channel)
    try:
        pipe.send(None)
        while True:
            what, *arguments = pipe.recv()
            if what == "fill":
                guest.fill(*arguments)
            elif what == "destroy":
                guest.calls.destroy_pool(guest.pool)
            elif what == "flush":
                guest.calls.flush_object(guest.pool, oid_from_int(0))
            elif what == "churn":
                guest.churn(*arguments)
            elif what == "crowd":
                _crowd(directory, *arguments)
            elif what == "visit":
                channel = _visit(channel, directory, name, token, *arguments)
                guest = _Shapes(channel)
            pipe.send(None)
    except (EOFError, BrokenPipeError):
        os._exit(0)


class _Shapes:
    """A guest that fills a pool with pages of any content and shape."""

    def __init__(self, channel: Any) -> None:
        self.calls = Hypercalls(channel)
        self.pool = 0
        self._slots = channel.window.slots

    def fill(self, content: str, pages: int, object_pages: int, step: int) -> None:
        self.pool = self.calls.new_pool(persist=False).value
        for slot in range(EXTENT_PAGES_MAX):
            page = {
                RAW: os.urandom(PAGE_BYTES),
                FILLED: bytes([slot]) * PAGE_BYTES,
                LEAN: b"%08d, a line of text. " % slot * 200,
                TWINS: os.urandom(PAGE_BYTES),
            }[content]
            self._slots[slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES] = page[:PAGE_BYTES]
        for first in range(0, pages, EXTENT_PAGES_MAX):
            if content == LEAN:
                for slot in range(EXTENT_PAGES_MAX):
                    at = slot * PAGE_BYTES + PAGE_BYTES // 2
                    self._slots[at : at + 8] = b"%08d" % (first + slot)
            if object_pages >= EXTENT_PAGES_MAX and step == 1:
                oid = oid_from_int(first // object_pages)
                self.calls.put(self.pool, oid, first % object_pages, EXTENT_PAGES_MAX)
                continue
            self.calls.put_batch(
                [
                    (
                        self.pool,
                        page % object_pages * step,
                        page - first,
                        0,
                        oid_from_int(page // object_pages),
                        0,
                    )
                    for page in range(first, first + EXTENT_PAGES_MAX)
                ]
            )

    def churn(self, seconds: float, frames: int) -> None:
        """Put, far more than there is room for."""
        self.fill(RAW, 0, 1, 1)
        end = time.monotonic() + seconds
        first = 0
        while time.monotonic() < end:
            self.calls.put(self.pool, oid_from_int(first % frames), 0, EXTENT_PAGES_MAX)
            first += 1


def _crowd(directory: Path, members: list[tuple[str, bytes]]) -> None:
    """Guests with as many pools as they may have, and a page in each."""
    for name, token in members:
        calls = Hypercalls(attach.connect(directory, name, token))
        for _ in range(POOLS_PER_GUEST):
            pool = calls.new_pool(persist=False).value
            calls.put(pool, oid_from_int(1), 0, 1)


def _visit(channel: Any, directory: Path, name: str, token: bytes, seconds: float) -> Any:
    """Leave and come back, over and over, with a pool and some pages each time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        attach.detach(channel)
        channel = attach.connect(directory, name, token)
        calls = Hypercalls(channel)
        calls.put(calls.new_pool(persist=True).value, oid_from_int(1), 0, EXTENT_PAGES_MAX)
    return channel


class Bounded:
    """One hypervisor, the guest that is timed, and hostile ones."""

    def __init__(self, pages: int, seconds: float, stack: ExitStack) -> None:
        available = available_memory_bytes()
        if available is not None:
            # The arena is filled; half of the memory that is there is enough to ask for.
            pages = min(pages, available // 2 // PAGE_BYTES)
        self.pages = pages // OBJECT_PAGES * OBJECT_PAGES
        self._seconds = seconds
        self._stack = stack
        self._hostiles = 0
        self._crowded = False
        self._frames = self.pages + _VICTIM_PAGES + SPARE_PAGES
        self._cluster = Cluster(self._frames)
        stack.callback(self._cluster.close)
        self._victim = self._cluster.attach("victim", _VICTIM_PAGES, persist=True, seed=1)
        stack.callback(self._victim.close)
        self._victim.fill()
        self._hostile = self._new_hostile()

    def _new_hostile(self) -> Hostile:
        self._hostiles += 1
        hostile = Hostile(self._cluster, self._hostiles)
        self._stack.callback(hostile.close)
        return hostile

    def _ask(self, verb: str, **fields: Any) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(_ALL_FREED_SECONDS)
            control.connect(os.fspath(self._cluster.directory / attach.CONTROL_SOCKET))
            send_record(control, {"verb": verb, **fields})
            return receive_record(control) or {}

    def take_precedence(self) -> None:
        """Let this benchmark run before programs of other sessions, and in it the hypervisor and
        the guest that is timed before the others, on cores of their own: what delays a call then is
        mostly the hypervisor's doing.  Not a real-time class: who computes all the time in one is
        stopped by the kernel for 50 ms a second."""
        group = Path("/proc/self/autogroup")
        before = group.read_text().split()[-1]
        group.write_text(str(_NICE))
        self._stack.callback(group.write_text, before)
        cores = sorted(os.sched_getaffinity(0))
        for pid, core in ((self._cluster.pid, cores[0]), (os.getpid(), cores[-1])):
            pin([pid], {core})
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.setpriority(os.PRIO_PROCESS, int(task.name), _NICE)

    def _free_frames(self) -> int:
        return int(self._ask("stats")["arena"]["free_frames"])

    def measure(self, scenario: Scenario) -> tuple[list[int], list[int], float]:
        """Durations (ns) of the second guest's calls before and meanwhile, and how long it took."""
        pages = self.pages // scenario.part // OBJECT_PAGES * OBJECT_PAGES
        sharing = "guest" if scenario.content == TWINS else "off"
        settings = {"compress": scenario.content == LEAN, "sharing": sharing}
        self._ask("set", guest=self._hostile.name, **settings)
        if scenario.act == "churn" and not self._crowded:
            self._crowded = True
            names = [f"crowd{number}" for number in range(_CROWD)]
            self._hostile.call("crowd", [(name, self._cluster.enrol(name)) for name in names])
        free_before = self._free_frames()
        if pages:
            self._hostile.call(
                "fill", scenario.content, pages, scenario.object_pages, scenario.step
            )
        before = self._victim.time_gets(1, self._seconds)
        started = time.monotonic()
        if scenario.act in ("churn", "visit"):
            arguments = (self._frames,) if scenario.act == "churn" else ()
            self._hostile.begin(scenario.act, 3 * self._seconds, *arguments)
            meanwhile = self._victim.time_gets(1, 3 * self._seconds)
            self._hostile.hear()
            return before, meanwhile, time.monotonic() - started
        if scenario.act == "die":
            self._hostile.process.kill()
        else:
            self._hostile.begin(scenario.act)
        meanwhile = self._victim.time_gets(1, self._seconds)
        while self._free_frames() < free_before and time.monotonic() < started + _ALL_FREED_SECONDS:
            meanwhile += self._victim.time_gets(1, self._seconds)
        if scenario.act == "die":
            self._hostile = self._new_hostile()
        else:
            self._hostile.hear()
            if scenario.act == "flush":
                self._hostile.call("destroy")
        return before, meanwhile, time.monotonic() - started


def measure(
    pages: int,
    repetitions: int,
    seconds: float,
    say: Callable[[str], None],
    *,
    precedence: bool = False,
) -> list[dict[str, Any]]:
    """A record a scenario; the worst delays are medians over the repetitions."""
    rows = []
    with ExitStack() as stack:
        bounded = Bounded(pages, seconds, stack)
        if precedence:
            bounded.take_precedence()
        for scenario in SCENARIOS:
            say(f"bounded calls: {scenario.name}")
            found = [bounded.measure(scenario) for _ in range(repetitions)]
            rows.append(
                {
                    "name": scenario.name,
                    "pages": bounded.pages // scenario.part,
                    "before": _delays([before for before, _, _ in found]),
                    "meanwhile": _delays([meanwhile for _, meanwhile, _ in found]),
                    "seconds": round(median([seconds for _, _, seconds in found]), 2),
                    "unit": "us/call",
                    "repetitions": repetitions,
                }
            )
    return rows


def _delays(repetitions: list[list[int]]) -> dict[str, float]:
    ordered = [sorted(durations) for durations in repetitions]
    calls = sum(map(len, ordered))
    return {
        "median": round(median([one[len(one) // 2] for one in ordered]) / 1e3, 1),
        "p9999": round(median([one[len(one) * 9999 // 10000] for one in ordered]) / 1e3, 1),
        "worst": round(median([one[-1] for one in ordered]) / 1e3, 1),
        "slow_share": sum(d > _SLOW_US * 1e3 for one in ordered for d in one) / calls,
    }


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The rows as cells, the heading first."""
    heads = ["us/call", "p99.99", "worst", "over 1 ms"]
    cells = [["", "pages", *heads, *(f"{head} meanwhile" for head in heads), "seconds"]]
    for row in rows:
        line = [row["name"], f"{row['pages']:,}" if row["pages"] else "-"]
        for phase in ("before", "meanwhile"):
            delays = row[phase]
            line += [f"{delays[key]:,.1f}" for key in ("median", "p9999", "worst")]
            line.append(f"{delays['slow_share']:.4%}")
        cells.append([*line, f"{row['seconds']:.1f}"])
    return cells


def main(arguments: list[str]) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.bounded",
        description=__doc__.partition("\n")[0] if __doc__ else "",
    )
    parser.add_argument("--pages", type=int, default=PAGES)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a phase of calls")
    parser.add_argument(
        "--precedence", action="store_true", help="run before other programs (needs the right)"
    )
    options = parser.parse_args(arguments)
    try:
        rows = measure(
            options.pages,
            options.repetitions,
            options.seconds,
            lambda text: print(text, file=sys.stderr, flush=True),
            precedence=options.precedence,
        )
    except OperatorError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code
    cells = table(rows)
    widths = [max(len(line[at]) for line in cells) for at in range(len(cells[0]))]
    for first, *rest in cells:
        print(first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
