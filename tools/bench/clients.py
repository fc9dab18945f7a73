"""What a page costs that goes through tmem, to the guest and to the hypervisor: `python -m
tools.bench.clients`.

The guest's own clients (`guests.frontswap`, `guests.cleancache`) over the machine, both in one
process: what is measured is the work that each side does, without waking anybody and without the
message.  Swap slots are stored, loaded and freed, file pages are put and got, in extents of one
length.  Every page is compared.  The pages are text of
Python's library.

A figure is the median over calls of the time that one side spends in a call, a page; all cases take
turns, `--repetitions` times, and the least of their medians is printed, because what disturbs this
only ever adds.
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Final, NamedTuple

from fs.hooks import FileKey
from guests.attachment import Attachment
from guests.cleancache import Cleancache
from guests.frontswap import Frontswap
from hypervisor.arena import Arena, format_arena, layout
from hypervisor.machine import Machine
from hypervisor.pools import Settings
from ipc.abi import PAGE_BYTES
from ipc.errors import ExitCode, InvariantError, OperatorError
from ipc.local import LocalChannel
from ipc.window import Window
from tools.bench.pages import corpora

BATCHES: Final = (1, 2, 8, 32)
_KEY: Final = FileKey(12, 1)
_now_ns: Final = time.perf_counter_ns


class Case(NamedTuple):
    """One kind of call."""

    operation: str
    compressed: bool
    batch: int


class Bench:
    """One guest and its hypervisor, and the time that both spend."""

    def __init__(self, pages: list[bytes], *, compress: bool) -> None:
        self._pages = pages
        frames = 2 * len(pages)
        mapping = mmap.mmap(-1, -(-layout(frames).end // mmap.PAGESIZE) * mmap.PAGESIZE)
        settings = {"guest": Settings(compress=compress)}
        # The kernel gives memory when it is touched first, which is not what is to be measured.
        mapping[:] = bytes(len(mapping))
        format_arena(mapping)
        self.machine = Machine(Arena(mapping), settings=settings, now_ns=time.thread_time_ns)
        # What is put off while there is room costs what a plain page does.
        self.machine.store.may_defer = False
        client = self.machine.attach("guest", 1, 1, 0)
        assert client is not None
        self._spent_ns = 0

        def execute(request: bytes, window: Window) -> bytes:
            begin = _now_ns()
            reply = self.machine.execute(client, request, window)
            self._spent_ns += _now_ns() - begin
            return reply

        attachment = Attachment(lambda: LocalChannel(execute), time.monotonic)
        self._frontswap = Frontswap(attachment, time.monotonic, lambda: None)
        self._cleancache = Cleancache(attachment)
        attachment.attach(refusal_is_fatal=True)
        self._transfer = memoryview(bytearray(64 * PAGE_BYTES))
        self._compress = compress

    def measure(self, batch: int) -> Iterator[tuple[Case, float, float]]:
        """Microseconds a page of guest and hypervisor, of each operation with this batch."""
        starts = range(0, len(self._pages) - batch + 1, batch)
        frontswap, cleancache = self._frontswap, self._cleancache
        transfer = self._transfer[: batch * PAGE_BYTES]

        def slots(start: int) -> list[int]:
            return list(range(start + 1, start + 1 + batch))

        def free(start: int) -> None:
            for slot in slots(start):
                frontswap.invalidate(slot)
            if start == starts[-1]:
                frontswap.flush()

        operations: list[tuple[str, Callable[[int], Any], bool, bool]] = [
            ("frontswap store", lambda start: frontswap.store(slots(start), transfer), True, False),
            ("frontswap load", lambda start: frontswap.load(slots(start), transfer), False, True),
            ("frontswap free", free, False, False),
            (
                "cleancache put",
                lambda start: cleancache.put_pages(_KEY, start, batch, transfer),
                True,
                False,
            ),
            (
                "cleancache get",
                lambda start: cleancache.get_pages(_KEY, start, batch, transfer),
                False,
                True,
            ),
        ]
        for name, call, brings, fetches in operations:
            both: list[int] = []
            served: list[int] = []
            for start in starts:
                expected = b"".join(self._pages[start : start + batch])
                transfer[:] = expected if brings else bytes(len(expected))
                self._spent_ns = 0
                begin = _now_ns()
                call(start)
                both.append(_now_ns() - begin)
                served.append(self._spent_ns)
                if fetches and transfer != expected:
                    raise InvariantError(f"{name}: a page from {start} on came back wrong")
            # Freed slots are told of in batches, so a median of calls would miss them.
            mean = statistics.mean if name == "frontswap free" else statistics.median
            whole, hypervisor = (mean(times) / 1e3 / batch for times in (both, served))
            yield Case(name, self._compress, batch), whole - hypervisor, hypervisor


def measure(pages: int, repetitions: int, seed: int) -> list[dict[str, Any]]:
    """A record of each case."""
    rng = random.Random(seed)
    text = corpora(pages, rng)["text"]
    best: dict[Case, tuple[float, float]] = {}
    for _ in range(repetitions):
        cases = list(product((False, True), BATCHES))
        for compress, batch in rng.sample(cases, len(cases)):
            for case, guest_us, hypervisor_us in Bench(text, compress=compress).measure(batch):
                least = best.get(case, (guest_us, hypervisor_us))
                best[case] = min(least[0], guest_us), min(least[1], hypervisor_us)
    return [
        {
            **case._asdict(),
            "guest_us": round(guest_us, 3),
            "hypervisor_us": round(hypervisor_us, 3),
        }
        for case, (guest_us, hypervisor_us) in sorted(best.items())
    ]


def table(records: list[dict[str, Any]]) -> list[str]:
    """A line for each operation, a column for each batch: guest + hypervisor."""
    cells = {
        (record["operation"], record["compressed"], record["batch"]): (
            f"{record['guest_us']:.2f} + {record['hypervisor_us']:.2f}"
        )
        for record in records
    }
    title = "us a page, guest + hypervisor, by pages a call"
    lines = [title.ljust(48) + "".join(f"{batch:>16}" for batch in BATCHES)]
    for operation, compressed in dict.fromkeys(key[:2] for key in cells):
        name = f"  {operation}, {'compressed' if compressed else 'plain'}"
        row = "".join(f"{cells[operation, compressed, batch]:>16}" for batch in BATCHES)
        lines.append(name.ljust(48) + row)
    return lines


def main(arguments: list[str]) -> int:
    """Print the table, or the records as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.clients", description=__doc__)
    parser.add_argument("--pages", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        records = measure(options.pages, options.repetitions, options.seed)
    except OperatorError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(records, indent=1) if options.json else "\n".join(table(records)))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
