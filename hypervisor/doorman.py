"""Waiting for all descriptors, or for one guest's queue with somebody listening for the rest.

A server that sleeps in epoll pays for it twice a call: the system call, and the way from the queue
through epoll to the sleeper.  Sleeping in mq_receive itself, a round trip on one core takes 7.1 us
instead of 8.6 (Python on both sides, C 5.9).  So while one guest alone is calling, it is the
*favourite* and the server waits in its queue; a second thread, the doorman, waits in an epoll of
everything else.  When anything stirs there, or a second has gone by, it sets `somebody_waits` and
puts a KICK into the favourite's request queue, which wakes the server like a request would.

  server                                  doorman
  favour(port)  ------- arm ----------->  epoll of all but the favourite
  port.wait()                             ... something is ready, or it is time to look around
  KICK (or sees somebody_waits)  <------  somebody_waits, KICK
  unfavour(); epoll of everything

Nothing is lost between the two: the kick stays in the queue until it is read, and a queue too full
for it is not one that the server sleeps in.  A guest that sends a KICK itself costs one look
around.  One that takes kicks out of its own queue gains nothing: the doorman looks whether the
server has come, and else sends it a signal until it does.  The doorman runs no other code and
touches no state of the machine.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from typing import Final

from ipc.channel import Port

_ROUND_SECONDS: Final = 1.0
"""The server does not stay with its favourite for longer: it has other things to do as well."""
_INSIST_SECONDS: Final = 0.002
"""After that a kick that nobody came for is thought to be lost."""


class Doorman:
    """`register` and `unregister` as an epoll; `poll` waits for everything."""

    def __init__(self) -> None:
        self._all = select.epoll()
        self._others = select.epoll()
        self.poll = self._all.poll
        self.somebody_waits = False
        self._favourite: Port | None = None
        self._server = threading.get_ident()
        self._lock = threading.Lock()
        self._watching = False
        self._closing = False
        self._armed = threading.Semaphore(0)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._others.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._stand, name="doorman", daemon=True)
        self._thread.start()

    def register(self, fd: int, events: int) -> None:
        self._all.register(fd, events)
        self._others.register(fd, events)

    def unregister(self, fd: int) -> None:
        self._all.unregister(fd)
        self._others.unregister(fd)

    def favour(self, port: Port) -> None:
        """From now on the server waits in this queue."""
        with self._lock:
            self._others.unregister(port.fileno())
            self._favourite = port
            self.somebody_waits = False
            if not self._watching:
                self._watching = True
                self._armed.release()

    def unfavour(self) -> None:
        """The server is back in `poll`."""
        with self._lock:
            if self._favourite is not None:
                self._others.register(self._favourite.fileno(), select.EPOLLIN)
                self._favourite = None

    def _stand(self) -> None:
        # Signals are the main thread's: they must interrupt its wait, not this one.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            while not self._armed.acquire(timeout=_INSIST_SECONDS):
                if not self._insist():
                    self._armed.acquire()
                    break
            self._others.poll(_ROUND_SECONDS)
            with self._lock:
                self._watching = False
                if self._closing:
                    return
                if self._favourite is not None:
                    self.somebody_waits = True
                    self._favourite.kick()

    def _insist(self) -> bool:
        """Whether the server still waits though it was kicked."""
        with self._lock:
            if self._favourite is None or not self.somebody_waits:
                return False
            signal.pthread_kill(self._server, signal.SIGURG)
            return True

    def close(self) -> None:
        with self._lock:
            self._closing = True
        os.eventfd_write(self._wake, 1)
        self._armed.release()
        self._thread.join()
        self._all.close()
        self._others.close()
        os.close(self._wake)
