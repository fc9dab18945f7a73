"""The loop that serves guests' queues, one call of one guest at a time.

epoll hands the ready queues out in turn, and a turn takes one call from each ready queue: a guest
that floods waits behind its own calls only.  A call moves at most 64 pages; freeing doomed pages is
done in slices between turns.  So the work between two looks at the queues is bounded.

The hot path is `_serve`: receive, execute, send, two readings of the clock.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from hypervisor.accounting import Account
from hypervisor.control import Control
from hypervisor.machine import Machine
from hypervisor.sessions import Session, Sessions
from hypervisor.snapshot import snapshot
from ipc.codec import Record
from ipc.names import Registry

_IDLE_SECONDS: Final = 1.0
_EVENTS_MAX: Final = 64
_CALLS_PER_CPU_READING: Final = 256


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
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._stopping = False
        self._calls_since_reading = 0
        self._cpu_read_ns = time.thread_time_ns()
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
        poll = self._poll.poll
        serving = self.sessions.serving
        serve = self._serve
        store = self._machine.store
        while not self._stopping:
            events = poll(0 if store.doomed else _IDLE_SECONDS, _EVENTS_MAX)
            for fd, _ in events:
                session = serving.get(fd)
                if session is not None:
                    serve(session)
                else:
                    handler = self._handlers.get(fd)
                    # None: an earlier event of this round closed it.
                    if handler is not None:
                        handler()
            if store.doomed:
                store.reap()
            if self._calls_since_reading >= _CALLS_PER_CPU_READING or not events:
                self._divide_cpu()
            if self.sessions.shaking_hands:
                self.sessions.expire()

    def _serve(self, session: Session) -> None:
        client, pair = session.client, session.pair
        assert client is not None and pair is not None
        started_ns = time.perf_counter_ns()
        message = pair.receive()
        if message is None:
            return
        reply = self._machine.execute(client, message, pair.window)
        sent = pair.send(reply)
        # A faulted call (flags, byte 10 of a reply) is booked under 0 as `Machine` does.
        count = client.account.operations[0 if reply[10] else message[4]]
        duration_ns = time.perf_counter_ns() - started_ns
        count.latency.add(duration_ns)
        count.service_ns += duration_ns
        self._calls_since_reading += 1
        if not sent:
            client.account.unread_replies += 1

    def _divide_cpu(self) -> None:
        """Book the CPU time since the last reading to the guests served meanwhile."""
        self._calls_since_reading = 0
        now_ns = time.thread_time_ns()
        spent_ns = now_ns - self._cpu_read_ns
        self._cpu_read_ns = now_ns
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
