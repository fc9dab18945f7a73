"""The message-queue transport: one request queue and one reply queue per guest.

Identity is the queue that a message came from, so no guest can speak for another, and a guest that
floods fills its own queue only.  Queues have random names that are removed once both sides hold
them, and belong to the guest's user.  A queue tells nobody that the other side died; the attach
socket does (`attach`), and the guest looks at it whenever a reply takes longer than
`PATIENCE_SECONDS`.

WELCOME tells both names.  The guest opens the request queue for writing and the reply queue for
reading (mode 0600, the guest's user) before it sends CONFIRM, which removes the names.
Messages have priority 0.  A call: write the window, send REQUEST, wait for a REPLY of the same
sequence, drop others (answers to calls that the guest gave up).  The hypervisor never waits for a
guest: a reply that finds the reply queue full is dropped.  Its descriptor of that queue does not
block, because a time-out of 0 would cost each reply 0.1 us.

posix_ipc does not retry after a signal (no PEP 475), so both waits loop on SignalError.  It also
drops what a signal handler raises during a wait, KeyboardInterrupt excepted (posix_ipc 1.3.2), so a
guest's handlers set a flag and raise nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable
from typing import Final

import posix_ipc

from ipc.abi import REPLY_BYTES, REQUEST_BYTES
from ipc.errors import Disconnected, ExitCode, OperatorError
from ipc.limits import (
    PATIENCE_SECONDS,
    REPLY_QUEUE_MESSAGES,
    REQUEST_QUEUE_MESSAGES,
    read_queue_limits,
)
from ipc.names import Registry, object_name, unlink_queue
from ipc.window import Window

KICK: Final = b"K"
"""Not a request: it wakes the hypervisor's end.  From a guest it does the same and no more."""

_GONE: Final = select.POLLHUP | select.POLLRDHUP | select.POLLERR


class QueuePair:
    """The hypervisor's end (a `Port`).  Creating one registers and makes both queues;
    `forget_names` removes their names when the guest has opened them."""

    def __init__(
        self,
        cluster: str,
        registry: Registry,
        window: Window,
        random_bytes: Callable[[int], bytes],
        uid: int | None = None,
    ) -> None:
        """`uid` is the guest's user, None for our own."""
        self.window = window
        self._uid = uid
        self._registry = registry
        self._named: list[str] = []
        self.request_name = object_name(cluster, "q", random_bytes)
        self.reply_name = object_name(cluster, "r", random_bytes)
        self._requests = self._create(self.request_name, REQUEST_QUEUE_MESSAGES, REQUEST_BYTES)
        try:
            self._replies = self._create(self.reply_name, REPLY_QUEUE_MESSAGES, REPLY_BYTES)
        except BaseException:
            self._requests.close()
            self.forget_names()
            raise
        self._replies.block = False
        self._receive = self._requests.receive
        self._send = self._replies.send

    def _create(self, name: str, messages: int, message_bytes: int) -> posix_ipc.MessageQueue:
        self._registry.add("queue", name)
        self._named.append(name)
        try:
            queue = posix_ipc.MessageQueue(
                name,
                posix_ipc.O_CREX,
                mode=0o600,
                max_messages=messages,
                max_message_size=message_bytes,
            )
        except (OSError, ValueError) as error:
            # EMFILE and ENOSPC from mq_open(3) speak of open files; they mean the queue limits.
            self.forget_names()
            fit = read_queue_limits().guests_max
            raise OperatorError(
                f"no message queue for another guest: the limits of this user allow {fit} guests "
                f"in all clusters together (ulimit -q, fs.mqueue.queues_max); kernel said: {error}",
                ExitCode.UNAVAILABLE,
            ) from None
        if self._uid not in (None, os.geteuid()):
            os.fchown(queue.mqd, self._uid, -1)
        return queue

    def forget_names(self) -> None:
        for name in self._named:
            unlink_queue(name)
            self._registry.remove("queue", name)
        self._named.clear()

    def fileno(self) -> int:
        return int(self._requests.mqd)

    def receive(self) -> bytes | None:
        try:
            message: bytes = self._receive(0)[0]
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return None
        return message if message != KICK else None

    def wait(self, patience_seconds: float | None = None) -> bytes | None:
        """Sleep until a request comes; None after `patience_seconds`, a signal or a KICK."""
        try:
            message: bytes = self._receive(patience_seconds)[0]
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return None
        return message if message != KICK else None

    def kick(self) -> None:
        """Wake whoever sleeps in `wait`; of no effect on a queue that is full."""
        with contextlib.suppress(posix_ipc.BusyError):
            self._requests.send(KICK, 0)

    def send(self, reply: bytes) -> bool:
        try:
            self._send(reply)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            # A full queue: even who does not wait is told of a signal first, if one is pending.
            return False
        return True

    def close(self) -> None:
        self.forget_names()
        self._requests.close()
        self._replies.close()
        self.window.close()


class QueueChannel:
    """The guest's end (a `Channel`)."""

    def __init__(
        self,
        request_queue: posix_ipc.MessageQueue,
        reply_queue: posix_ipc.MessageQueue,
        window: Window,
        door: socket.socket,
        generation: int,
        resumed: bool,
    ) -> None:
        self.window = window
        self.generation = generation
        self.resumed = resumed
        self._requests = request_queue
        self._replies = reply_queue
        self._send = request_queue.send
        self._receive = reply_queue.receive
        self._door = door
        self._door_poll = select.poll()
        self._door_poll.register(door, select.POLLRDHUP)
        self._closed = False

    def call(self, request: bytes) -> bytes:
        if self._closed:
            raise Disconnected("the channel is closed")
        sent = False
        while True:
            try:
                if not sent:
                    # With a time-out: calls that were cut short may have filled the queue of a
                    # hypervisor that has died since.
                    self._send(request, PATIENCE_SECONDS)
                    sent = True
                reply: bytes = self._receive(PATIENCE_SECONDS)[0]
            except posix_ipc.BusyError:
                if self.hypervisor_is_gone():
                    raise Disconnected("the hypervisor is gone") from None
            except posix_ipc.SignalError:
                continue
            else:
                # A reply to an earlier call that a signal handler's exception cut short.
                if reply[:4] == request[:4]:
                    return reply

    def hypervisor_is_gone(self) -> bool:
        """Whether the attach connection has ended."""
        return any(event & _GONE for _, event in self._door_poll.poll(0))

    def close(self) -> None:
        """Close both queues, the window and the door; the pools stay until the process ends."""
        if self._closed:
            return
        self._closed = True
        self._requests.close()
        self._replies.close()
        self.window.close()
        with contextlib.suppress(OSError):
            self._door.close()

    def detach(self, farewell: bytes) -> None:
        """Say good-bye (the hypervisor frees this guest's pools) and close."""
        if not self._closed:
            with contextlib.suppress(OSError):
                self._door.send(farewell)
        self.close()
