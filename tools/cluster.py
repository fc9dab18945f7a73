"""A running cluster and its supervisor: start, watch, restart, tear down.

Life of a cluster, always in this order:

    check_limits, the directory's check  by the caller, before anything is made or started
    cluster.json, registry               from here on `tmem clean` finds everything
    fork server, hypervisor              written down as they start
    settings and grants                  asked of the hypervisor before there is a guest to obey;
                                         it keeps them itself when it is started again
    guests                               each is written down as it starts
    watch                                a dead hypervisor is started again on its arena, later and
                                         later; a dead guest stays dead and is reported
    stop                                 guests first (they sync and unmount), then the hypervisor,
                                         then whatever the registry still names

If the supervisor is killed, hypervisor and guests notice (they hold a pidfd of it) and end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from guests.boot import GuestSpec
from guests.boot import run as run_guest
from guests.jail import overhead_bytes
from guests.node import JOIN_DEAD_TIMES, NodeSpec
from hypervisor.boot import HypervisorSpec
from hypervisor.boot import run as run_hypervisor
from ipc.abi import TOKEN_BYTES
from ipc.attach import enrol
from ipc.codec import Record
from ipc.errors import Disconnected, ExitCode, OperatorError
from ipc.jail import Mode
from ipc.limits import explain_queue_limit, read_queue_limits
from ipc.names import Registry, process_start
from ipc.segment import available_memory_bytes, explain_segment_limit
from tools.administer import ask_politely
from tools.control import ask
from tools.interrupts import Interrupts
from tools.jails import Jails, without
from tools.logs import LogReader
from tools.processes import ProcessFactory
from tools.rotate import with_present_key
from tools.rundir import ClusterDirectory, ClusterRecord, GuestRecord
from tools.units import format_size

log = logging.getLogger(__name__)

HYPERVISOR: Final = "hypervisor"
_READY_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 15.0
_BACKOFF_SECONDS: Final = 0.1
_BACKOFF_SECONDS_MAX: Final = 5.0
_STEADY_SECONDS: Final = 30.0
"""A hypervisor that lived this long is restarted at once again."""


@dataclass(frozen=True)
class GuestPlan:
    """A guest to start: its RAM, the image that is its disk, its place among the nodes that mount
    the same one, its swap file with the uuid that it must have, what it uses tmem for, and how the
    host treats its RAM (`ksm`) and its disks (`direct`)."""

    name: str
    memory_bytes: int
    image: Path
    node: NodeSpec | None = None
    swap: Path | None = None
    swap_uuid: bytes | None = None
    cleancache: bool = True
    frontswap: bool = True
    ksm: bool = False
    page_states: bool = False
    direct: bool = False
    adversary: str | None = None
    """The module that its workload `adversary` runs (`guests.adversary`)."""


@dataclass(frozen=True)
class ClusterPlan:
    """A cluster to start; without an arena (None) there is no hypervisor and guests are alone."""

    name: str
    guests: list[GuestPlan]
    arena_bytes: int | None
    hypervisor: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `HypervisorSpec` that shall not have their defaults."""
    questions: Sequence[Record] = ()
    """What the hypervisor is told before guests start (`tools.administer.questions`)."""
    jail: Mode = "auto"
    """Of all guests and of the hypervisor."""


class Cluster:
    """A cluster that this process supervises; use it as a context."""

    def __init__(
        self, plan: ClusterPlan, directory: ClusterDirectory, interrupts: Interrupts
    ) -> None:
        self.plan = plan
        self.directory = directory
        self.restarts = 0
        self.deaths: dict[str, int] = {}
        """Exit codes of guests that ended by themselves."""
        self._interrupts = interrupts
        self._guests: dict[str, Any] = {}
        self._hypervisor: Any = None
        self._started_at = 0.0
        self._backoff_seconds = _BACKOFF_SECONDS
        self._restart_at: float | None = None
        self._stopping = False
        self._log_file: logging.Handler | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    # --- start

    def _start(self) -> None:
        self._jails = Jails(
            self.plan.jail,
            {
                guest.name: None if guest.node is None else guest.node.volume
                for guest in self.plan.guests
            },
        )
        self.directory.make()
        self._jails.prepare(self.directory.path)
        self._registry = Registry(self.directory.path)
        self._registry.add_process(os.getpid())
        self.directory.write(self._record())
        self._open_log()
        self._log_jails()
        self._factory = ProcessFactory(
            self.directory.door,
            self.directory.log("console"),
            enclosed=self.plan.jail != "off",
        )
        for pid in self._factory.start():
            self._registry.add_process(pid)
        if self.plan.arena_bytes is not None:
            self._start_hypervisor()
            self._await_ready(HYPERVISOR, self.directory.hypervisor_socket, "ping")
            self._tell_hypervisor()
        for guest in self.plan.guests:
            self._interrupts.check()
            self._start_guest(guest)
        self.directory.write(self._record())
        for guest in self.plan.guests:
            self._await_ready(guest.name, self.directory.guest_socket(guest.name), "status")
        log.info("event=up guests=%d", len(self.plan.guests))

    def _record(self) -> ClusterRecord:
        pid = os.getpid()
        start = process_start(pid)
        assert start is not None
        guests = [
            GuestRecord(
                guest.name,
                guest.memory_bytes,
                os.fspath(guest.image),
                self._guests[guest.name].pid if guest.name in self._guests else None,
            )
            for guest in self.plan.guests
        ]
        return ClusterRecord(self.plan.name, self.plan.arena_bytes or 0, guests, pid, start)

    def _open_log(self) -> None:
        self.directory.log("supervisor").touch(mode=0o600)
        self._log_file = logging.FileHandler(self.directory.log("supervisor"))
        form = "%(asctime)s.%(msecs)03d %(levelname)s %(message)s"
        self._log_file.setFormatter(logging.Formatter(form, "%H:%M:%S"))
        log.addHandler(self._log_file)
        log.setLevel(logging.INFO)

    def _log_jails(self) -> None:
        """What this machine can't give is named once, at the start."""
        jails = self._jails
        if jails.mode != "off":
            log.info(
                "event=jail mode=%s missing=%s without=%s",
                jails.mode,
                "; ".join(jails.missing) or "nothing",
                "; ".join(without()) or "nothing",
            )

    def _start_hypervisor(self) -> None:
        assert self.plan.arena_bytes is not None
        spec = HypervisorSpec(
            cluster=self.plan.name,
            run_directory=self.directory.door,
            arena_bytes=self.plan.arena_bytes,
            supervisor_pid=os.getpid(),
            jail=self._jails.of_hypervisor(),
            **self.plan.hypervisor,
        )
        self._hypervisor = self._factory.spawn(run_hypervisor, spec, HYPERVISOR, apart=True)
        self._registry.add_process(self._hypervisor.pid)
        self._started_at = time.monotonic()
        self._restart_at = None

    def _tell_hypervisor(self) -> None:
        for question in self.plan.questions:
            try:
                ask_politely(self.directory, question, ExitCode.BAD_CONFIG)
            except Disconnected as error:
                raise OperatorError(
                    f"{HYPERVISOR}: it ended while it was being told its settings ({error}); see "
                    f"{self.directory.log(HYPERVISOR)}",
                    ExitCode.HYPERVISOR_BUG,
                ) from None

    def _start_guest(self, guest: GuestPlan) -> None:
        token = os.urandom(TOKEN_BYTES)
        enrol(self.directory.path, guest.name, token, self._jails.uid(guest.name))
        spec = GuestSpec(
            name=guest.name,
            image=guest.image,
            memory_bytes=guest.memory_bytes,
            run_directory=self.directory.door,
            token=token,
            attach=self.plan.arena_bytes is not None,
            supervisor_pid=os.getpid(),
            node=guest.node and with_present_key(self.directory, guest.node),
            swap=guest.swap,
            swap_uuid=guest.swap_uuid,
            ksm=guest.ksm,
            page_states=guest.page_states,
            direct=guest.direct,
            cleancache=guest.cleancache,
            frontswap=guest.frontswap,
            adversary=guest.adversary,
        )
        group = self._jails.make_group(
            self.plan.name,
            guest.name,
            guest.memory_bytes + overhead_bytes(spec),
            self._registry,
        )
        spec = replace(spec, jail=self._jails.of_guest(guest.name, group))
        process = self._factory.spawn(run_guest, spec, guest.name)
        self._guests[guest.name] = process
        self._registry.add_process(process.pid)

    def _await_ready(self, name: str, socket_path: Path, verb: str) -> None:
        process = self._hypervisor if name == HYPERVISOR else self._guests[name]
        patience = _READY_SECONDS + self._dead_seconds(name)
        deadline = time.monotonic() + patience
        while True:
            self._interrupts.check()
            if process.exitcode is not None:
                raise self._failed_to_start(name, process.exitcode)
            try:
                ask(socket_path, {"verb": verb}, timeout_seconds=1.0)
                return
            except Disconnected as error:
                if time.monotonic() > deadline:
                    raise OperatorError(
                        f"{name} is not ready after {patience:.0f} s ({error}); see "
                        f"{self.directory.log(name)}",
                        ExitCode.GUEST_DIED,
                    ) from None
            time.sleep(0.01)

    def _dead_seconds(self, name: str) -> float:
        """A node may have to wait for the heartbeats of dead ones to be seen as such."""
        nodes = [guest.node for guest in self.plan.guests if guest.name == name and guest.node]
        return sum(JOIN_DEAD_TIMES * node.timing.dead_ns / 1e9 for node in nodes)

    def _failed_to_start(self, name: str, exit_code: int) -> OperatorError:
        """The reason is the guest's start-up report, or the last error in the process' log."""
        reason = f"it ended with exit code {exit_code}; see {self.directory.log(name)}"
        with contextlib.suppress(OSError, OperatorError):
            # An earlier process of that guest may have written what it liked.
            for line in LogReader(self.directory, name).lines(follow=False):
                if " ERROR " in line:
                    reason = line.partition(" ERROR ")[2]
        with contextlib.suppress(OSError):
            reason = self.directory.start_report(name).read_text().strip()
        known = {int(code) for code in ExitCode}
        code = ExitCode(exit_code) if exit_code in known else ExitCode.GUEST_DIED
        return OperatorError(f"{name}: {reason}", code)

    # --- watch

    def watch(self) -> list[str]:
        """Look after everybody once; what happened, as lines for a person."""
        self._interrupts.check()
        news = []
        for name, process in list(self._guests.items()):
            if process.exitcode is not None:
                del self._guests[name]
                self.deaths[name] = process.exitcode
                self._registry.remove_process(process.pid)
                log.error("event=guest-died guest=%s exit_code=%d", name, process.exitcode)
                news.append(f"guest {name} died (exit code {process.exitcode})")
                process.close()
        if self._hypervisor is not None and self._hypervisor.exitcode is not None:
            news.append(self._note_hypervisor_death())
        if self._restart_at is not None and time.monotonic() >= self._restart_at:
            self._start_hypervisor()
            self.restarts += 1
            log.info("event=hypervisor-restart pid=%d", self._hypervisor.pid)
            news.append(f"hypervisor restarted (process {self._hypervisor.pid})")
        return news

    def _note_hypervisor_death(self) -> str:
        now = time.monotonic()
        if now - self._started_at >= _STEADY_SECONDS:
            self._backoff_seconds = _BACKOFF_SECONDS
        exit_code = self._hypervisor.exitcode
        self._registry.remove_process(self._hypervisor.pid)
        self._hypervisor.close()
        self._hypervisor = None
        self._restart_at = now + self._backoff_seconds
        log.warning(
            "event=hypervisor-died exit_code=%d restart_in_seconds=%.1f",
            exit_code,
            self._backoff_seconds,
        )
        self._backoff_seconds = min(2 * self._backoff_seconds, _BACKOFF_SECONDS_MAX)
        return f"hypervisor died (exit code {exit_code}); it is started again"

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a guest that lives, or to the hypervisor: what a nemesis does."""
        process = self._hypervisor if name == HYPERVISOR else self._guests[name]
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def revive(self, name: str) -> None:
        """Start a guest that died once more; raises OperatorError if it does not come up."""
        self.deaths.pop(name, None)
        self._start_guest(next(guest for guest in self.plan.guests if guest.name == name))
        self.directory.write(self._record())
        self._await_ready(name, self.directory.guest_socket(name), "status")
        log.info("event=revived guest=%s", name)

    @property
    def alive(self) -> list[str]:
        """Names of the guests that live, as far as `watch` knows."""
        return list(self._guests)

    # --- talk

    def ask_guest(self, name: str, question: Record, *, timeout_seconds: float = 10.0) -> Record:
        """The answer of a guest; raises Disconnected."""
        return ask(self.directory.guest_socket(name), question, timeout_seconds=timeout_seconds)

    def stats(self) -> Record:
        """The hypervisor's figures; raises Disconnected."""
        return ask(self.directory.hypervisor_socket, {"verb": "stats"})

    # --- stop

    def stop(self) -> None:
        """End everything in order; safe to call again and after a start that failed."""
        if self._stopping or not hasattr(self, "_registry"):
            return
        self._stopping = True
        for name, process in self._guests.items():
            self._ask_to_end(process, self.directory.guest_socket(name))
        self._end(list(self._guests.values()))
        if self._hypervisor is not None:
            self._ask_to_end(self._hypervisor, self.directory.hypervisor_socket)
            self._end([self._hypervisor])
        if hasattr(self, "_factory"):
            self._factory.close()
        self._jails.remove_groups(self._registry)
        self._registry.remove_process(os.getpid())
        for leftover in self.directory.sweep():
            log.info("event=leftover %s", leftover)
        if self._log_file is not None:
            log.info("event=down")
            log.removeHandler(self._log_file)
            self._log_file.close()

    def _ask_to_end(self, process: Any, socket_path: Path) -> None:
        try:
            ask(socket_path, {"verb": "stop"})
        except Disconnected:
            # One that is just starting does not listen yet, and would not know until it is killed.
            process.terminate()

    def _end(self, processes: list[Any]) -> None:
        deadline = time.monotonic() + _STOP_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                log.error("event=kill process=%s", process.name)
                process.kill()
                process.join()
            self._registry.remove_process(process.pid)
            process.close()


def check_limits(guests: int, memory_bytes: int, arena_bytes: int) -> None:
    """Raise OperatorError if this machine can't hold so many guests with so much RAM and arena."""
    reason = explain_queue_limit(guests, read_queue_limits()) or explain_segment_limit(arena_bytes)
    if reason is not None:
        raise OperatorError(reason, ExitCode.UNAVAILABLE)
    available = available_memory_bytes()
    wanted_bytes = memory_bytes + arena_bytes
    if available is not None and wanted_bytes > available:
        raise OperatorError(
            f"guests and arena want {format_size(wanted_bytes)} and {format_size(available)} of "
            "memory are available; choose smaller guests or a smaller arena",
            ExitCode.UNAVAILABLE,
        )
