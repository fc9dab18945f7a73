"""One run of an experiment: a cluster, the same kind of work in every guest, what was counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ipc.codec import Record
from ipc.errors import Disconnected
from tools.cluster import Cluster
from tools.control import ask
from tools.experiment import handout
from tools.experiment.balancer import PERIOD_SECONDS, Figures, targets
from tools.experiment.merging import Merged
from tools.experiment.modes import Disks, Host, Mode
from tools.interrupts import Interrupts
from tools.rundir import ClusterDirectory
from tools.units import PAGE_BYTES

_POLL_SECONDS: Final = 0.2
_SETTLE_SECONDS: Final = 20.0
_PATHS_MAX: Final = 5


@dataclass(frozen=True)
class Work:
    """What a guest is asked to do."""

    seed: int
    parameters: dict[str, Any]
    workload: str = "make"


def run_once(
    mode: Mode,
    host: Host,
    disks: Mapping[str, Disks],
    work: Mapping[str, Work],
    directory: ClusterDirectory,
    interrupts: Interrupts,
    access_seconds: Mapping[str, float],
    news: Callable[[str], None],
) -> Record:
    """Start, work, count, stop."""
    with running(mode, host, disks, directory, interrupts, news) as run:
        return run.result(work, access_seconds)


@contextmanager
def running(
    mode: Mode,
    host: Host,
    disks: Mapping[str, Disks],
    directory: ClusterDirectory,
    interrupts: Interrupts,
    news: Callable[[str], None],
) -> Iterator[Run]:
    """A cluster of a mode, for as many pieces of work as are wanted of it."""
    interrupts.check()
    with Cluster(mode.plan(host, disks), directory, interrupts) as cluster:
        run = Run(mode, host, cluster, interrupts, news)
        run.settle()
        yield run


class Run:
    """A cluster that is up."""

    def __init__(
        self,
        mode: Mode,
        host: Host,
        cluster: Cluster,
        interrupts: Interrupts,
        news: Callable[[str], None],
    ) -> None:
        self._mode = mode
        self._host = host
        self._cluster = cluster
        self._interrupts = interrupts
        self._news = news
        self._last: dict[str, Record] = {}
        self._errors: list[str] = []
        self._told: dict[str, int] = {}
        self._stalled_seconds: dict[str, float] = {}
        self._wanted: dict[str, int] = {}
        self._looked_at = time.monotonic()
        self._migration_bytes: list[int] = []
        self._sizes_most = 0

    # --- before the work

    def settle(self) -> None:
        """Switch services on, and let the guests come to the sizes that they begin with."""
        self._mode.prepare(self._host, self._execute)
        self._poll_all()
        if not self._mode.balanced:
            return
        uncounted = self._mode.uncounted_bytes
        first = (self._host.share_bytes + uncounted) // PAGE_BYTES
        self._told = dict.fromkeys(self._host.guests, first)
        deadline = time.monotonic() + _SETTLE_SECONDS
        while any(_size(self._counters(name)) > first for name in self._host.guests):
            if time.monotonic() > deadline:
                self._complain("guests do not come to the size that they are to begin with")
                break
            self._poll_all()

    def _execute(self, name: str, argv: list[str]) -> None:
        answer = self._cluster.ask_guest(name, {"verb": "exec", "argv": argv})
        if answer.get("exit_code"):
            self._complain(f"{name}: {' '.join(argv)}: {answer['stderr'].decode().strip()}")

    # --- the work

    def result(self, work: Mapping[str, Work], access_seconds: Mapping[str, float]) -> Record:
        """Let all guests work until the last is done; what was counted meanwhile."""
        before = {name: self._counters(name) for name in self._host.guests}
        cpu_before = self._cpu_seconds()
        stats_before = self._stats()
        merged = Merged() if self._mode.ksm else None
        busy = [name for name, task in work.items() if self._start(name, task)]
        at_once = self._mode.page_states
        period_seconds = handout.PERIOD_SECONDS if at_once else PERIOD_SECONDS
        next_look = time.monotonic() + period_seconds
        while busy:
            self._interrupts.sleep(min(_POLL_SECONDS, period_seconds))
            for line in self._cluster.watch():
                self._complain(line)
            busy = [name for name in busy if name in self._cluster.alive and self._poll(name)]
            if merged is not None:
                merged.look(self._processes())
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + period_seconds
                self._look(busy)
        self._look(busy)
        cpu = {name: seconds - cpu_before[name] for name, seconds in self._cpu_seconds().items()}
        guests_cpu_seconds = sum(cpu.values())
        stats = self._stats()
        for name in self._host.guests:
            served_ns = _cpu_ns(stats, name) - _cpu_ns(stats_before, name)
            cpu[name] += served_ns / 1e9
        guests = {
            name: _worked(
                before[name], self._counters(name), cpu[name], access_seconds, self._host.direct
            )
            for name in self._host.guests
        }
        return {
            **_together(guests),
            "hypervisor_cpu_seconds": stats["cpu_seconds"] - stats_before["cpu_seconds"],
            "guests_cpu_seconds": guests_cpu_seconds,
            "migration_bytes": sum(self._migration_bytes) // max(1, len(self._migration_bytes)),
            "sizes_most_bytes": self._sizes_most * PAGE_BYTES,
            "tmem": {
                key: stats[key] - stats_before[key]
                for key in ("hypercalls", "pages_put", "pages_got", "evictions")
            },
            "errors": self._errors,
            **({"ksm": merged.record()} if merged is not None else {}),
        }

    def _start(self, name: str, task: Work) -> bool:
        question = {
            "verb": "run",
            "workload": task.workload,
            "seed": task.seed,
            "parameters": task.parameters,
        }
        try:
            answer = self._cluster.ask_guest(name, question)
        except Disconnected as error:
            answer = {"error": str(error)}
        if not answer.get("accepted"):
            self._complain(f"{name}: {answer.get('error')}")
        return bool(answer.get("accepted"))

    def _poll_all(self) -> None:
        for name in self._host.guests:
            self._poll(name)

    def _poll(self, name: str) -> bool:
        """Whether the guest is still at work, as far as it answers."""
        try:
            status = self._cluster.ask_guest(name, {"verb": "status"})
        except Disconnected:
            # Busy beyond patience, or dying: the next `watch` knows.
            return True
        self._last[name] = status
        if status["state"] == "failed":
            self._complain(f"{name}: {status['workload']}: {status['error']}")
        return bool(status["state"] == "running")

    def _counters(self, name: str) -> Record:
        counters: Record = self._last[name]["counters"]
        return counters

    def _complain(self, line: str) -> None:
        if line not in self._errors:
            self._errors.append(line)
            self._news(line)

    # --- the host's side, once a second or more often

    def _look(self, polled: Collection[str]) -> None:
        """See what is free for somebody else, and balance if that is the mode."""
        if self._mode.balanced or self._mode.page_states:
            for name in self._host.guests:
                if name not in polled:
                    self._poll(name)
        now = time.monotonic()
        seconds, self._looked_at = now - self._looked_at, now
        uncounted = self._mode.uncounted_bytes // PAGE_BYTES
        sizes = {name: _size(self._counters(name)) - uncounted for name in self._host.guests}
        size = sum(sizes.values())
        free_bytes = self._host.total_bytes - size * PAGE_BYTES
        if self._mode.tmem or self._mode.page_states:
            answer = ask(self._cluster.directory.hypervisor_socket, {"verb": "freeable"})
            free_bytes = answer["free_bytes"] + answer["ephemeral_bytes"]
        if self._mode.page_states:
            # What guests said at different moments does not add up; what they were lent does.
            size = (self._host.total_bytes - free_bytes) // PAGE_BYTES
        self._sizes_most = max(self._sizes_most, size)
        given_up = 0
        if self._mode.balanced or self._mode.page_states:
            given_up = sum(_given_up(self._counters(name)) for name in sizes) * PAGE_BYTES
        self._migration_bytes.append(free_bytes + given_up)
        if self._mode.page_states:
            self._hand_out(free_bytes // PAGE_BYTES)
        elif self._mode.balanced:
            self._balance(seconds)

    def _balance(self, seconds: float) -> None:
        guests = {name: self._figures(name, seconds) for name in self._host.guests}
        self._tell(targets(guests, self._told_pages))

    def _hand_out(self, free_pages: int) -> None:
        """Let guests drop what others need."""
        wanted = {name: handout.wanted_pages(self._counters(name)) for name in self._host.guests}
        before, self._wanted = self._wanted, wanted
        guests = {
            name: handout.figures(self._counters(name), pages - before.get(name, pages))
            for name, pages in wanted.items()
        }
        self._tell(handout.targets(guests, self._told_pages, free_pages))
        for name, guest in guests.items():
            if self._told[name] < guest.held:
                # Its answer wakes it, and then it drops what it must.
                self._poll(name)

    @property
    def _told_pages(self) -> int:
        """The sum of what all guests may be told to have."""
        uncounted_bytes = self._mode.uncounted_bytes * len(self._host.guests)
        return (self._host.total_bytes + uncounted_bytes) // PAGE_BYTES

    def _tell(self, sizes: Mapping[str, int]) -> None:
        for name, target in sizes.items():
            if target != self._told.get(name):
                question = {"verb": "balloon", "guest": name, "size_bytes": target * PAGE_BYTES}
                ask(self._cluster.directory.hypervisor_socket, question)
        self._told = dict(sizes)

    def _figures(self, name: str, seconds: float) -> Figures:
        counters = self._counters(name)
        waited = counters["pressure"]["some"]["total_seconds"]
        stalled = (waited - self._stalled_seconds.get(name, 0.0)) / max(seconds, 1e-3)
        self._stalled_seconds[name] = waited
        memory, balloon = counters["memory"], counters["balloon"]
        return Figures(
            size=balloon["size_pages"],
            told=self._told[name],
            floor=balloon["floor_pages"],
            maximum=balloon["maximum_pages"],
            committed=counters["anonymous"]["committed_pages"],
            reserved=memory["budget_pages"] - memory["frames"],
            free=_free(counters),
            stalled=stalled,
        )

    # --- figures

    def _stats(self) -> Record:
        if self._cluster.plan.arena_bytes is None:
            names = ("cpu_seconds", "hypercalls", "pages_put", "pages_got", "evictions")
            return {**dict.fromkeys(names, 0), "guests": {}}
        return self._cluster.stats()

    def _cpu_seconds(self) -> dict[str, float]:
        """CPU time of each guest's process so far."""
        return {name: _process_cpu_seconds(pid) for name, pid in self._processes().items()}

    def _processes(self) -> dict[str, int | None]:
        """Of each guest."""
        record = self._cluster.directory.read()
        assert record is not None
        return {guest.name: guest.pid for guest in record.guests}


def _process_cpu_seconds(pid: int | None) -> float:
    """Time on a processor, 0 for a process that is gone."""
    try:
        ran_ns = Path(f"/proc/{pid}/schedstat").read_text().split()[0]
    except OSError:
        return 0.0
    return int(ran_ns) / 1e9


def _cpu_ns(stats: Record, name: str) -> int:
    """CPU time that the hypervisor has spent on a guest."""
    cpu_ns: int = stats["guests"].get(name, {}).get("cpu_ns", 0)
    return cpu_ns


def _size(counters: Record) -> int:
    size: int = counters["balloon"]["size_pages"]
    return size


def _free(counters: Record) -> int:
    """Frames that a guest has and does not use."""
    memory, balloon = counters["memory"], counters["balloon"]
    given_back = balloon["maximum_pages"] - balloon["size_pages"]
    free: int = memory["frames"] - memory["used_pages"] - given_back
    return free


def _given_up(counters: Record) -> int:
    """Pages that the host can have of a guest without anything being written."""
    volatile: int = (counters["page_states"] or {}).get("volatile_pages", 0)
    most: int = counters["balloon"]["size_pages"] - counters["balloon"]["floor_pages"]
    return max(0, min(most, _free(counters) + volatile))


def _worked(
    before: Record,
    after: Record,
    cpu_seconds: float,
    access_seconds: Mapping[str, float],
    direct: bool,
) -> Record:
    """What a guest did between two looks; `cpu_seconds` is its own and the hypervisor's for it."""

    def grown(*path: str) -> Any:
        values = []
        for counters in (before, after):
            value: Any = counters
            for key in path:
                value = value[key]
            values.append(value)
        return values[1] - values[0]

    accesses = (
        grown("disk_read_calls")
        + grown("disk_write_calls")
        + grown("swap", "read_calls")
        + grown("swap", "write_calls")
    )
    return {
        "seconds": grown("seconds"),
        "disk_reads_pages": grown("disk_reads_pages"),
        "swap_in_pages": grown("swap", "in_pages"),
        "swap_out_pages": grown("swap", "out_pages"),
        "accesses": accesses,
        "oom_kills": grown("anonymous", "oom_kills"),
        "killed_programs": grown("killed_programs"),
        "mismatches": grown("mismatches"),
        "mismatch_paths": after["mismatch_paths"],
        "verified_bytes": grown("bytes_verified"),
        **{
            f"{disk}_seconds": cpu_seconds + accesses * each
            for disk, each in access_seconds.items()
        },
        **(_direct(accesses, after["disk_access_seconds"], cpu_seconds) if direct else {}),
    }


def _direct(accesses: int, access_seconds: float, cpu_seconds: float) -> Record:
    return {
        "disk_access_seconds": access_seconds,
        "direct_seconds": cpu_seconds + accesses * access_seconds,
    }


def _together(guests: Mapping[str, Record]) -> Record:
    """Times are those of the slowest guest, everything else is the sum."""
    together: Record = {}
    for key in next(iter(guests.values())):
        values = [guest[key] for guest in guests.values()]
        if key.endswith("seconds"):
            together[key] = max(values)
        elif key == "mismatch_paths":
            together[key] = [path for paths in values for path in paths][:_PATHS_MAX]
        else:
            together[key] = sum(values)
    return together
