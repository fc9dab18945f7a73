"""Handshakes of guests on the attach socket: whole, cut, wrong, out of order, given up, forgotten.

Four processes of two users knock, in turns or all at once; they die, are expelled, or try the names
of others; the hypervisor is restarted over its arena, and those that live may come back.

Findings are an exception, somebody in the machine who has not shown the token of an enrolled name
as its user, a guest that is served for a process that is dead, a handshake that is remembered too
long, and a descriptor that stays open.

Sockets and descriptors are real; queues are not, and the kernel's word for who knocks is the
bytes'.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import select
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from unittest import mock

from hypervisor import sessions
from hypervisor.arena import FRAMES_MIN, Arena, format_arena, layout
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pools import Client
from hypervisor.recovery import recover
from hypervisor.sessions import Sessions
from ipc import attach
from ipc.abi import (
    ABI_REVISION,
    BYE_MAGIC,
    CONFIRM,
    CONFIRM_MAGIC,
    HELLO,
    HELLO_MAGIC,
    TOKEN_BYTES,
)
from ipc.limits import HANDSHAKE_SECONDS, HANDSHAKES_MAX
from ipc.ring import RingPair, Rings
from tests.fuzz.reading import Reader, hold
from tests.fuzz.rings import DryPair

STEPS_MAX: Final = 60
GUESTS: Final = ("g0", "g1", "g2")
_TOKENS: Final = {name: bytes([number]) * TOKEN_BYTES for number, name in enumerate(GUESTS, 1)}
_OTHER_USER: Final = GUESTS[-1]


class Poll:
    """A `Doorman` that is asked by nobody."""

    def register(self, fd: int, events: int) -> None:
        """Nothing to note."""

    def unregister(self, fd: int) -> None:
        """Nothing to forget."""


def small_machine() -> Machine:
    """A machine with the smallest arena."""
    mapping = mmap.mmap(-1, layout(FRAMES_MIN).end)
    format_arena(mapping)
    return Machine(Arena(mapping))


@functools.cache
def run_directory() -> Path:
    """A run directory with an enrolled roster; the last guest is another user's."""
    made = tempfile.TemporaryDirectory(prefix="tmem-fuzz-")
    _KEPT.append(made)
    directory = Path(made.name)
    for name in GUESTS:
        attach.enrol(directory, name, _TOKENS[name], _user_of(name))
    return directory


def _user_of(name: str) -> int:
    return os.getuid() + (name == _OTHER_USER)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def serve_once(handlers: dict[int, Callable[[], None]]) -> bool:
    """Call the handlers of what is readable; whether there was anything."""
    poll = select.poll()
    for fd in handlers:
        poll.register(fd, select.POLLIN)
    ready = [fd for fd, _ in poll.poll(0)]
    for fd in ready:
        handler = handlers.get(fd)
        if handler is not None:
            handler()
    return bool(ready)


class _NumberedPair(DryPair):
    """A pair without kernel objects but for a descriptor that can be watched."""

    def __init__(self, *arguments: Any) -> None:
        RingPair.__init__(self, *arguments)
        self._fd = os.eventfd(0)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)
        super().close()


class _Process:
    """Somebody who knocks.  A pidfd of it is an eventfd, readable once it is dead."""

    def __init__(self, pid: int, uid: int) -> None:
        self.pid = pid
        self.uid = uid
        self.start = 1
        self.alive = True
        self.pidfds: list[int] = []

    def pidfd(self) -> int:
        """A new one; whoever has it closes it."""
        if not self.alive:
            raise ProcessLookupError
        fd = os.eventfd(0)
        self.pidfds.append(fd)
        return fd

    def die(self) -> None:
        """Those that watch it hear of it."""
        self.alive = False
        for fd in self.pidfds:
            # One that was closed may be another's number by now: that would be a lie.
            with contextlib.suppress(OSError):
                if str(Path(f"/proc/self/fd/{fd}").readlink()) == "anon_inode:[eventfd]":
                    os.eventfd_write(fd, 1)
        self.pidfds.clear()

    def be_another(self) -> None:
        """The number is given to a process that was started later."""
        self.start += 1
        self.alive = True


class _Doors:
    """Sessions over real sockets."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        choice = reader.byte()
        self._now_seconds = 0.0
        self._handlers: dict[int, Callable[[], None]] = {}
        self._processes = {
            pid: _Process(pid, os.getuid() + (pid == 103)) for pid in (100, 101, 102, 103)
        }
        self._knocking = self._processes[100]
        self._mapping = mmap.mmap(-1, layout(FRAMES_MIN).end)
        format_arena(self._mapping)
        self._rings: Rings[Any] | None = Rings(_never) if choice & 1 else None
        self._shown: set[str] = set()
        self._peers: list[tuple[socket.socket, _Process]] = []

    # What the kernel says

    def identify(self, _connection: socket.socket) -> attach.Peer:
        """Who knocks."""
        process = self._knocking
        try:
            return attach.Peer(process.pid, process.uid, process.pidfd())
        except ProcessLookupError:
            raise attach.HandshakeError("your process is gone") from None

    def process_start(self, pid: int) -> int | None:
        """When a process was started; None: it is dead."""
        process = self._processes.get(pid)
        return process.start if process is not None and process.alive else None

    def pidfd_open(self, pid: int) -> int:
        """A descriptor of a process."""
        process = self._processes.get(pid)
        if process is None:
            raise ProcessLookupError
        return process.pidfd()

    # The hypervisor

    def _start(self) -> None:
        self._machine = Machine(Arena(self._mapping))
        recover(self._machine)
        poll: Any = Poll()
        registry: Any = None
        self._sessions = Sessions(
            self._machine,
            run_directory(),
            "fuzz",
            registry,
            poll,
            self._handlers,
            self._rings,
            now_seconds=lambda: self._now_seconds,
            random_bytes=bytes,
            refused=lambda guest, why: hold(len(guest) < 32 and bool(why), "a refusal of nobody"),
        )

    def _stop(self) -> None:
        pending = [session.peer.pidfd for session in self._sessions._pending.values()]
        self._sessions.close()
        for pidfd in pending:
            os.close(pidfd)
        hold(not self._handlers, "somebody is still watched")

    def run(self) -> None:
        """All steps, and then the end of all connections."""
        self._start()
        try:
            for _ in range(STEPS_MAX):
                if self._reader.left <= 0:
                    break
                self._step()
                self._check()
        finally:
            while self._peers:
                self._peers.pop()[0].close()
            try:
                self._serve()
                pending = len(self._sessions._pending)
            finally:
                self._stop()
        hold(not pending, "a handshake without a peer")
        check(self._machine)

    def _step(self) -> None:
        reader = self._reader
        control = reader.byte()
        peer = self._peers[(control & 7) % len(self._peers)] if self._peers else None
        kind = control >> 4
        if kind < 3 or peer is None:
            self._connect(self._processes[100 + (control & 3)])
        elif kind == 3:
            self._peers.remove(peer)
            peer[0].close()
        elif kind == 4:
            self._now_seconds += reader.byte() / 32 * HANDSHAKE_SECONDS
            self._sessions.expire()
        elif kind == 5:
            self._send(peer, reader.take(reader.byte()))
        elif kind == 6:
            self._happen(reader.byte())
        elif kind < 12:
            self._send(peer, self._hello())
        elif kind < 15:
            self._send(peer, CONFIRM.pack(CONFIRM_MAGIC, self._number(reader.byte())))
        else:
            self._send(peer, CONFIRM.pack(BYE_MAGIC, reader.byte() & 1))
        if control & 8:
            self._serve()

    def _happen(self, choice: int) -> None:
        """What happens besides messages."""
        process = self._processes[100 + (choice >> 3 & 3)]
        match choice & 7:
            case 0 | 1:
                process.die()
            case 2:
                if not process.alive:
                    process.be_another()
            case 3:
                self._stop()
                self._handlers.clear()
                self._start()
            case 4:
                # One process that knocks as often as it can.
                for _ in range(choice >> 3):
                    self._connect(process)
            case 5:
                for client in self._machine.clients.values():
                    self._sessions.notify(client)
            case _:
                self._expel(choice >> 3)

    def _connect(self, process: _Process) -> None:
        if len(self._peers) < HANDSHAKES_MAX + 2:
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
            peer.setblocking(False)
            peer.connect(os.fspath(run_directory() / attach.ATTACH_SOCKET))
            self._peers.append((peer, process))
            self._knocking = process
            self._handlers[self._sessions._listener.fileno()]()

    def _number(self, choice: int) -> int:
        numbers = [client.number for client in self._machine.clients.values()]
        return numbers[choice % len(numbers)] if numbers and choice < 240 else choice

    def _hello(self) -> bytes:
        choice, spoilt = self._reader.take(2)
        name = GUESTS[choice % len(GUESTS)]
        token = _TOKENS[name if choice & 64 else GUESTS[choice >> 2 & 1]]
        hello = bytearray(
            HELLO.pack(HELLO_MAGIC, ABI_REVISION, choice >> 7, name.encode(), token, b"")
        )
        if spoilt > 200:
            hello[self._reader.byte() % len(hello)] ^= spoilt - 200
        return bytes(hello)

    def _send(self, peer: tuple[socket.socket, _Process], message: bytes) -> None:
        with contextlib.suppress(OSError):
            peer[0].send(message)
            with contextlib.suppress(attach.HandshakeError):
                hello = attach.decode_hello(message)
                knows = hello.token == _TOKENS.get(hello.name)
                if knows and peer[1].uid == _user_of(hello.name):
                    self._shown.add(hello.name)

    def _expel(self, choice: int) -> None:
        attached = [
            one for one in self._machine.clients.values() if self._sessions.is_attached(one)
        ]
        if attached:
            self._sessions.expel(attached[choice % len(attached)])

    def _serve(self) -> None:
        """Whatever can be read is read, as the server's loop does it."""
        for _ in range(STEPS_MAX):
            if not serve_once(self._handlers):
                break
        else:
            hold(False, "a connection that is never read")
        for session in self._sessions.serving.values():
            client = session.guest
            hold(self.process_start(client.pid) == client.start_ticks, "served after its death")

    def _check(self) -> None:
        clients: dict[str, Client] = self._machine.clients
        hold(clients.keys() <= self._shown, "a guest that has not shown its token")
        hold(len(self._sessions._pending) <= HANDSHAKES_MAX, "too many handshakes")
        for session in self._sessions.serving.values():
            hold(session.client in clients.values(), "a session without its guest")


def _never(_caller: object, _message: bytes, _moment_ns: int) -> int:
    raise AssertionError("nobody calls")


def fuzz_attach(data: bytes) -> None:
    """One hypervisor's door."""
    before = len(os.listdir("/proc/self/fd"))
    doors = _Doors(Reader(data))
    with (
        mock.patch.object(sessions, "QueuePair", _NumberedPair),
        mock.patch.object(sessions, "RingPair", _NumberedPair),
        mock.patch.object(sessions, "process_start", doors.process_start),
        mock.patch.object(attach, "identify", doors.identify),
        mock.patch.object(os, "pidfd_open", doors.pidfd_open),
    ):
        doors.run()
    hold(len(os.listdir("/proc/self/fd")) == before, "a descriptor is left open")
