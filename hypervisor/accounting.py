"""What each guest did and what it cost: counts, outcomes, reasons, CPU time, latency.

Pages are counted where they move (in `Machine`), calls and time where they are served (in
`Server`).  Linux's four cleancache counters are views of these counts, in pages.

Latency is the time from a request's arrival in the server to its reply having been sent, in a
log-linear histogram: four buckets to each power of two, so a bucket is at most 25 % wide.

CPU time: reading the process's CPU clock costs 0.6 us, as much as a tenth of a call, so it is read
once in many calls and what it went up by is divided among the calls in proportion to their service
time.  The sum over all guests is therefore exactly the CPU time that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from ipc.abi import Op, Reason

_SUB_BITS: Final = 2
_BUCKETS: Final = 64 << _SUB_BITS


class Histogram:
    """Counts of durations in ns."""

    __slots__ = ("counts", "max_ns")

    def __init__(self) -> None:
        self.counts = [0] * _BUCKETS
        self.max_ns = 0

    def add(self, durations_ns: list[int]) -> None:
        """Count them; there is at least one."""
        counts = self.counts
        for duration_ns in durations_ns:
            bits = duration_ns.bit_length()
            if bits > _SUB_BITS + 1:
                # The top three bits name the bucket; the first of them is always set.
                counts[(bits << _SUB_BITS) + (duration_ns >> bits - 3 & 3)] += 1
            else:
                counts[duration_ns] += 1
        self.max_ns = max(self.max_ns, *durations_ns)

    @property
    def total(self) -> int:
        return sum(self.counts)

    def quantile_ns(self, share: float) -> int:
        """The upper edge of the bucket that holds this share of all durations; 0 if empty."""
        wanted = share * self.total
        seen = 0
        for bucket, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return min(_upper_edge_ns(bucket), self.max_ns)
        return 0


def _upper_edge_ns(bucket: int) -> int:
    bits, rest = bucket >> _SUB_BITS, bucket & 3
    if bits <= _SUB_BITS + 1:
        return bucket
    return ((4 + rest + 1) << (bits - 3)) - 1


class OpCount:
    """One operation of one guest.  `pages` were asked for, `done` moved or flushed, `missed` not
    there; the rest is in `refused`, by reason."""

    __slots__ = (
        "_latency",
        "_served_ns",
        "_settled_ns",
        "calls",
        "cpu_ns",
        "done",
        "missed",
        "pages",
        "refused",
        "served",
    )

    def __init__(self) -> None:
        self.calls = 0
        self.pages = 0
        self.done = 0
        self.missed = 0
        self.refused: dict[int, int] = {}
        self.cpu_ns = 0
        self._latency = Histogram()
        self._served_ns: list[int] = []
        self.served: Callable[[int], None] = self._served_ns.append
        """One call took so many ns.  They are only collected: to book each by itself would cost a
        twentieth of a call."""
        self._settled_ns = 0

    @property
    def service_ns(self) -> int:
        """Of the calls whose CPU time is not booked yet."""
        return self._settled_ns + sum(self._served_ns)

    @property
    def latency(self) -> Histogram:
        """Of all calls."""
        self._settle()
        return self._latency

    def book(self, cpu_ns: int) -> None:
        """The calls since the last booking took this much CPU time."""
        self.cpu_ns += cpu_ns
        self._settle()
        self._settled_ns = 0

    def _settle(self) -> None:
        if self._served_ns:
            self._latency.add(self._served_ns)
            self._settled_ns += sum(self._served_ns)
            self._served_ns.clear()

    def refuse(self, reason: int, pages: int) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + pages

    def add(self, other: OpCount) -> None:
        """Take over the counts of a guest that has left."""
        self.calls += other.calls
        self.pages += other.pages
        self.done += other.done
        self.missed += other.missed
        self.cpu_ns += other.cpu_ns
        for reason, pages in other.refused.items():
            self.refuse(reason, pages)

    def record(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "pages": self.pages,
            "done": self.done,
            "missed": self.missed,
            "refused": {Reason(reason).name.lower(): n for reason, n in self.refused.items()},
            "cpu_ns": self.cpu_ns,
            "latency_ns": {
                "p50": self.latency.quantile_ns(0.5),
                "p90": self.latency.quantile_ns(0.9),
                "p99": self.latency.quantile_ns(0.99),
                "max": self.latency.max_ns,
            },
        }


def divide_cpu(accounts: Iterable[Account], cpu_ns: int) -> int:
    """Book `cpu_ns` to the operations of all these guests, in proportion to their service time
    since it was done last; what was booked."""
    served = [
        (count, service_ns)
        for account in accounts
        for count in account.operations.values()
        if (service_ns := count.service_ns)
    ]
    whole_ns = sum(service_ns for _, service_ns in served)
    booked = 0
    for count, service_ns in served:
        share = cpu_ns * service_ns // whole_ns
        count.book(share)
        booked += share
    return booked


class Account:
    """All operations of one guest; an operation number that does not exist counts under 0."""

    __slots__ = (
        "faults",
        "faults_total",
        "get",
        "operations",
        "put",
        "unread_replies",
        "writeback_asked_pages",
        "writeback_done_pages",
    )

    def __init__(self) -> None:
        self.operations: dict[int, OpCount] = {int(op): OpCount() for op in Op}
        self.operations[0] = OpCount()
        self.put = self.operations[Op.PUT_PAGE]
        self.get = self.operations[Op.GET_PAGE]
        self.faults: dict[int, int] = {}
        self.faults_total = 0
        self.unread_replies = 0
        self.writeback_asked_pages = 0
        self.writeback_done_pages = 0
        """Persistent pages that it was asked to take back, and those that it took back then."""

    def fault(self, reason: Reason) -> None:
        self.faults[reason] = self.faults.get(reason, 0) + 1
        self.faults_total += 1

    @property
    def calls(self) -> int:
        return sum(count.calls for count in self.operations.values())

    @property
    def cpu_ns(self) -> int:
        return sum(count.cpu_ns for count in self.operations.values())

    @property
    def pages_put(self) -> int:
        return self.put.done + self.operations[Op.PUT_BATCH].done

    @property
    def pages_got(self) -> int:
        return self.get.done + self.operations[Op.GET_BATCH].done

    def add(self, other: Account) -> None:
        for op, count in other.operations.items():
            self.operations[op].add(count)
        for reason, faults in other.faults.items():
            self.faults[reason] = self.faults.get(reason, 0) + faults
        self.faults_total += other.faults_total
        self.writeback_asked_pages += other.writeback_asked_pages
        self.writeback_done_pages += other.writeback_done_pages

    def cleancache(self) -> dict[str, int]:
        """Linux's counters (mm/cleancache.c), in pages and for all of the guest's pools."""
        gets = (self.get, self.operations[Op.GET_BATCH])
        flushes = (Op.FLUSH_PAGE, Op.FLUSH_BATCH)
        puts = (self.put, self.operations[Op.PUT_BATCH])
        return {
            "succ_gets": sum(count.done for count in gets),
            "failed_gets": sum(count.missed for count in gets),
            "puts": sum(count.pages for count in puts),
            "invalidates": sum(self.operations[op].pages for op in flushes)
            + self.operations[Op.FLUSH_OBJECT].calls,
        }

    def record(self) -> dict[str, Any]:
        return {
            "faults": {Reason(reason).name.lower(): n for reason, n in self.faults.items()},
            "unread_replies": self.unread_replies,
            "writeback_asked_pages": self.writeback_asked_pages,
            "writeback_done_pages": self.writeback_done_pages,
            "cpu_ns": self.cpu_ns,
            "cleancache": self.cleancache(),
            "operations": {
                Op(op).name.lower() if op else "unknown": count.record()
                for op, count in self.operations.items()
                if count.calls
            },
        }
