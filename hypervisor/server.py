"""The loop that serves guests' queues, one call of one guest at a time.

epoll hands the ready queues out in turn, and a turn takes one call from each ready queue: a guest
that floods waits behind its own calls only.  A call moves at most 64 pages; freeing doomed pages is
done in slices between turns.  So the work between two looks at the queues is bounded.

While one guest alone is calling, the server waits in its queue (`doorman`).

The hot path is `_serve`: execute, send, two readings of the clock.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns as now_ns
from typing import Final

from hypervisor.accounting import Account
from hypervisor.control import Control
from hypervisor.doorman import Doorman
from hypervisor.machine import Machine
from hypervisor.sessions import Session, Sessions
from hypervisor.snapshot import snapshot
from ipc.codec import Record
from ipc.mqueue import KICK
from ipc.names import Registry

_IDLE_SECONDS: Final = 1.0
_EVENTS_MAX: Final = 64
_CALLS_PER_CPU_READING: Final = 256
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
        supervisor_pid: int | None = None,
    ) -> None:
        self._machine = machine
        self._poll = Doorman()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._stopping = False
        self._calls_since_reading = 0
        self._cpu_read_ns = time.process_time_ns()
        self._cpu_overhead_ns = self._cpu_read_ns
        self._started = time.monotonic()
        self.sessions = Sessions(
            machine,
            run_directory,
            cluster,
            registry,
            self._poll,
            self._handlers,
            now_seconds=time.monotonic,
            random_bytes=os.urandom,
        )
        self._control = Control(run_directory, self._poll, self._handlers, self._administer)
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
        serving = self.sessions.serving
        store = self._machine.store
        last: Session | None = None
        rounds_alone = 0
        while not self._stopping:
            events = poll(0 if store.doomed else _IDLE_SECONDS, _EVENTS_MAX)
            session = None
            for fd, _ in events:
                session = serving.get(fd)
                if session is not None:
                    started_ns = now_ns()
                    message = session.port.receive()
                    if message is not None:
                        self._serve(session, message, started_ns)
                else:
                    handler = self._handlers.get(fd)
                    # None: an earlier event of this round closed it.
                    if handler is not None:
                        handler()
            if store.doomed:
                store.reap()
            if self._calls_since_reading >= _CALLS_PER_CPU_READING or not events:
                self._tidy()
            if session is None or session is not last or len(events) > 1:
                rounds_alone = 0
                last = session
                continue
            rounds_alone += 1
            if rounds_alone >= _ROUNDS_ALONE and not store.doomed:
                return session
        return None

    def _serve_favourite(self, session: Session) -> None:
        """Wait in one guest's queue until anybody else wants something."""
        doorman = self._poll
        store = self._machine.store
        wait = session.port.wait
        serve = self._serve
        doorman.favour(session.port)
        while not (doorman.somebody_waits or store.doomed or self._stopping):
            message = wait(_IDLE_SECONDS)
            if message is None:
                break
            serve(session, message, now_ns())
            if self._calls_since_reading >= _CALLS_PER_CPU_READING:
                self._tidy()
        doorman.unfavour()

    def _serve(self, session: Session, message: bytes, started_ns: int) -> None:
        if message == KICK:
            return
        client = session.guest
        reply = self._machine.execute(client, message, session.port.window)
        if not session.port.send(reply):
            client.account.unread_replies += 1
        # A faulted call (flags, byte 10 of a reply) is booked under 0 as `Machine` does.
        count = client.account.operations[0 if reply[10] else message[4]]
        count.served(now_ns() - started_ns)
        self._calls_since_reading += 1

    def _tidy(self) -> None:
        """What need not be done in every round."""
        self._divide_cpu()
        self.sessions.expire()

    def _divide_cpu(self) -> None:
        """Book the CPU time since the last reading to the guests served meanwhile."""
        self._calls_since_reading = 0
        cpu_ns = time.process_time_ns()
        spent_ns = cpu_ns - self._cpu_read_ns
        self._cpu_read_ns = cpu_ns
        accounts = self._machine.accounts()
        service_ns = sum(map(_service_ns, accounts))
        booked = sum(account.divide_cpu(spent_ns, service_ns) for account in accounts)
        self._cpu_overhead_ns += spent_ns - booked

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
            }
        if verb == "stop":
            self.stop()
            return {"stopping": True}
        return {"error": f"no verb {verb!r}; there are ping, stats and stop"}

    def close(self) -> None:
        self.sessions.close()
        self._control.close()
        if self._supervisor_pidfd >= 0:
            os.close(self._supervisor_pidfd)
        self._poll.close()


def _service_ns(account: Account) -> int:
    return sum(count.service_ns for count in account.operations.values())
