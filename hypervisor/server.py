"""The loop that serves guests' calls, one call of one guest at a time.

epoll hands the ready queues out in turn, and a turn takes one call from each ready queue: a guest
that floods waits behind its own calls only.  A call moves at most 64 pages; freeing doomed pages is
done in slices between turns.  So the work between two looks at the queues is bounded.

A guest that calls through its ring rings the bell once, in its queue, and is then watched while it
goes on calling (`ipc.ring.Rings`): a round looks at each watched ring once and then yields the
processor.  Up to 16 rounds are made between two looks at epoll, one while anything else comes in.
Nobody is watched while nobody calls: an idle hypervisor sleeps in epoll.

While one guest alone is calling through queues, the server waits in its queue (`doorman`).

The hot path is `_serve`: execute, send, two readings of the clock.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns as now_ns
from typing import Final

from hypervisor.accounting import divide_cpu
from hypervisor.administration import Administration
from hypervisor.audit import ADMINISTERED, Audit
from hypervisor.control import Control
from hypervisor.doorman import Doorman
from hypervisor.machine import Machine
from hypervisor.pools import Client
from hypervisor.provenance import report_words
from hypervisor.residents import Report
from hypervisor.sessions import Session, Sessions
from hypervisor.snapshot import snapshot
from ipc.codec import Record
from ipc.names import Registry
from ipc.ring import Rings

log = logging.getLogger(__name__)

_IDLE_SECONDS: Final = 1.0
_EVENTS_MAX: Final = 64
_CALLS_PER_CPU_READING: Final = 256
_ROUNDS_MAX: Final = 16
"""Rounds over the rings between two looks at everything else when nothing came from there."""
_IDLE_CPU_NS: Final = 20_000_000
"""CPU time for compaction and recompression between two waits of a second: 2 % of a core."""
_IDLE_SLICE_PAGES: Final = 16
_IDLE_TRIES: Final = 4
"""Pages recompressed between two looks whether somebody calls: 0.4 ms."""
FAULTS_MAX: Final = 256
"""Broken rules after which a guest is detached, unless the cluster says otherwise."""
_ROUNDS_ALONE: Final = 8
"""Rounds in a row with the same single caller before the server waits in its queue."""


class Server:
    """Serves until `stop`, SIGTERM, SIGINT, a control client's "stop" or the supervisor's end."""

    def __init__(
        self,
        machine: Machine,
        run_directory: Path,
        cluster: str,
        registry: Registry,
        *,
        ring: bool = False,
        supervisor_pid: int | None = None,
        faults_max: int = FAULTS_MAX,
        changed: Callable[[], None] = lambda: None,
        guests_gid: int | None = None,
    ) -> None:
        self._machine = machine
        self._faults_max = faults_max
        self._audit = Audit(run_directory / "log", time.time)
        machine.witness = self._witness
        machine.hear = self._note_report
        machine.balance.in_pieces = True
        self._poll = Doorman()
        self._rings = Rings(self._serve)
        self._calls = 0
        self._offenders: list[Client] = []
        self._handlers: dict[int, Callable[[], None]] = {}
        self._stopping = False
        self._tidy_at = _CALLS_PER_CPU_READING
        self._cpu_read_ns = time.process_time_ns()
        self._cpu_overhead_ns = self._cpu_read_ns
        self._started = time.monotonic()
        machine.moments.note(machine.store.sequence, time.time_ns())
        # First the administrator's door: who has attached may be asked about at once.
        self._administration = Administration(
            machine, is_attached=self._is_attached, changed=changed
        )
        self._control = Control(
            run_directory, self._poll, self._handlers, self._administer, self._note_refusal
        )
        self.sessions = Sessions(
            machine,
            run_directory,
            cluster,
            registry,
            self._poll,
            self._handlers,
            self._rings if ring else None,
            now_seconds=time.monotonic,
            random_bytes=os.urandom,
            refused=self._note_refusal,
            guests_gid=guests_gid,
        )
        self._supervisor_pidfd = -1
        if supervisor_pid is not None:
            self._watch_supervisor(supervisor_pid)

    def _watch_supervisor(self, pid: int) -> None:
        try:
            self._supervisor_pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._stopping = True
            return
        self._handlers[self._supervisor_pidfd] = self.stop
        self._poll.register(self._supervisor_pidfd, select.EPOLLIN)

    def stop(self) -> None:
        self._stopping = True

    def run(self) -> None:
        """Serve.  The garbage collector is off: nothing here makes cycles, and a collection over
        a million objects would stop every guest for a second."""
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGURG, lambda *_: None)  # the doorman's: it ends a wait
        gc.collect()
        gc.freeze()
        gc.disable()
        while not self._stopping:
            session = self._serve_everybody()
            if session is not None:
                self._serve_favourite(session)

    def _serve_everybody(self) -> Session | None:
        """Rounds over all that is ready, until one guest alone has called in the last rounds."""
        poll = self._poll.poll
        rings = self._rings
        serving = self.sessions.serving
        store = self._machine.store
        balance = self._machine.balance
        last: Session | None = None
        rounds_alone = 0
        rounds = 1
        while not self._stopping:
            if rings.watched:
                rings.spin(rounds)
            busy = bool(rings.watched or store.doomed or balance.dividing)
            events = poll(0 if busy else _IDLE_SECONDS, _EVENTS_MAX)
            session = None
            for fd, _ in events:
                session = serving.get(fd)
                if session is not None:
                    self._attend(session)
                else:
                    handler = self._handlers.get(fd)
                    # None: an earlier event of this round closed it.
                    if handler is not None:
                        self._calls += 1
                        handler()
            if store.doomed:
                store.reap()
            if balance.dividing is not None:
                balance.divide()
            if self._calls >= self._tidy_at or not (events or busy) or self._offenders:
                self._tidy()
                if not (events or busy):
                    self._idle()
            # Whoever is not a ring's guest waits for the rest of the stretch.
            rounds = 1 if events or store.doomed else min(2 * rounds, _ROUNDS_MAX)
            if session is not None and session.port.fileno() not in serving:
                session = None  # it was detached meanwhile
            if session is None or session is not last or len(events) > 1 or rings.watched:
                rounds_alone = 0
                last = session
                continue
            rounds_alone += 1
            if rounds_alone >= _ROUNDS_ALONE and not store.doomed and balance.dividing is None:
                return session
        return None

    def _attend(self, session: Session) -> None:
        """One call from a guest whose queue is ready."""
        started_ns = now_ns()
        message = session.port.receive()
        if message is not None:
            rang = session.ring is not None and not session.ring.came_by_queue
            self._serve(session, message, started_ns)
            if rang and session.ring is not None:
                self._rings.watch(session.ring, session, started_ns)
        else:
            # A kick, or a request that its sender took back: it pays for the look.
            self._calls += 1
            session.guest.account.operations[0].served(now_ns() - started_ns)

    def _serve_favourite(self, session: Session) -> None:
        """Wait in one guest's queue until anybody else wants something."""
        doorman = self._poll
        store = self._machine.store
        wait = session.port.wait
        serve = self._serve
        ring = session.ring
        doorman.favour(session.port)
        while not (doorman.somebody_waits or store.doomed or self._stopping):
            message = wait()
            if message is None:
                break
            rang = ring is not None and not ring.came_by_queue
            serve(session, message, now_ns())
            if self._offenders or rang:
                # To be tidied up when nobody is the favourite any more.
                break
            if self._calls >= self._tidy_at:
                self._tidy()
                if self._machine.balance.dividing is not None:
                    break
        doorman.unfavour()

    def _serve(self, session: Session, message: bytes, started_ns: int) -> int:
        """Execute and answer; the time when that was done."""
        machine = self._machine
        port = session.port
        if not port.send(machine.execute(session.guest, message, port.window)):
            session.guest.account.unread_replies += 1
        self._calls += 1
        ended_ns = now_ns()
        machine.booked.served(ended_ns - started_ns)
        return ended_ns

    def _is_attached(self, client: Client) -> bool:
        return self.sessions.is_attached(client)

    def _witness(self, client: Client, event: str, reason: str, detail: str) -> None:
        """A guest broke a rule or was denied."""
        if event == "fault" and client.account.faults_total >= self._faults_max:
            self._offenders.append(client)
        self._audit.record(client.name, event, reason=reason, detail=detail)

    def _note_report(self, client: Client, report: Report) -> None:
        """A guest says that a page is wrong."""
        words = report_words(self._machine, report)
        self._audit.record(client.name, "reported", **words)

    def _note_refusal(self, name: str, why: str) -> None:
        """Somebody may not attach.  It goes where lines are limited: anybody can knock."""
        self._audit.record(name, "refused", why=why)

    def _detach_offenders(self) -> None:
        """Guests that broke too many rules go; no call of theirs is being served."""
        for client in self._offenders:
            if self.sessions.is_attached(client):
                faults = client.account.faults_total
                self._audit.record(client.name, "detached", faults=faults)
                log.warning("guest=%s event=detached-for-faults faults=%d", client.name, faults)
                self.sessions.expel(client)
        self._offenders.clear()

    def _idle(self) -> None:
        """Work that can wait, as long as nobody calls and a share of a second allows."""
        started_ns = time.process_time_ns()
        while (
            time.process_time_ns() - started_ns < _IDLE_CPU_NS
            and self._machine.idle(_IDLE_TRIES)
            and not self._poll.poll(0, 1)
        ):
            pass

    def _tidy(self) -> None:
        """What need not be done in every round."""
        if self._offenders:
            self._detach_offenders()
        self._machine.store.contents.compact(_IDLE_SLICE_PAGES)
        self._divide_cpu()
        self._machine.moments.note(self._machine.store.sequence, time.time_ns())
        self._audit.settle()
        self.sessions.expire()
        self._rings.part_with_idlers()

    def _divide_cpu(self) -> None:
        """Book the CPU time since the last reading to the guests served meanwhile."""
        self._tidy_at = self._calls + _CALLS_PER_CPU_READING
        cpu_ns = time.process_time_ns()
        spent_ns = cpu_ns - self._cpu_read_ns
        self._cpu_read_ns = cpu_ns
        self._cpu_overhead_ns += spent_ns - divide_cpu(self._machine.accounts(), spent_ns)

    def _administer(self, record: Record) -> Record:
        verb = record.get("verb")
        if verb == "ping":
            return {"generation": self._machine.generation, "pid": os.getpid()}
        if verb == "stats":
            self._divide_cpu()
            return {
                **snapshot(self._machine, self.sessions.is_attached),
                "pid": os.getpid(),
                "uptime_seconds": time.monotonic() - self._started,
                "cpu_seconds": self._cpu_read_ns / 1e9,
                "cpu_overhead_ns": self._cpu_overhead_ns,
                "audit": self._audit.record_counts(),
            }
        if verb == "stop":
            self.stop()
            return {"stopping": True}
        if verb not in self._administration.verbs:
            verbs = ", ".join(["ping", "stats", "stop", *self._administration.verbs])
            return {"error": f"no verb {verb!r}; there are {verbs}"}
        answer = self._administration.answer(record)
        if verb in ADMINISTERED:
            fields = {key: value for key, value in record.items() if key != "verb"}
            about = {"about": fields.pop("guest")} if fields.get("guest") else {}
            done = "error" if "error" in answer else "done"
            what = answer if verb == "quarantine" and "error" not in answer else {}
            self._audit.record(
                "administrator", str(verb), result=done, **about, **what, detail=fields
            )
        return answer

    def close(self) -> None:
        self.sessions.close()
        self._control.close()
        self._audit.close()
        if self._supervisor_pidfd >= 0:
            os.close(self._supervisor_pidfd)
        self._poll.close()
