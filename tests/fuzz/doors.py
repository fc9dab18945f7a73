"""What comes through the hypervisor's and the guests' sockets.

`attach`   handshakes of guests on the attach socket, whole, cut, wrong, out of order, given up and
           forgotten.  Findings are an exception, somebody in the machine who has not shown the
           token of an enrolled name, a handshake that is remembered too long, and a descriptor that
           stays open.
`control`  records: any bytes for the codec, and frames in pieces for both control sockets, that of
           the hypervisor (with the administration of a real machine behind it) and that of a guest.
           Findings are an exception, an answer that is no record, and a key that is no text.

Sockets and descriptors are real, queues are not.
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

from guests import control as guest_control
from guests.shell import Result
from guests.workloads.job import BadParameters
from hypervisor import sessions
from hypervisor.administration import Administration
from hypervisor.arena import FRAMES_MIN, Arena, format_arena, layout
from hypervisor.control import Control
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pools import Client
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
from ipc.codec import BadRecord, decode, encode, frame_length, split_frame
from ipc.limits import CONTROL_MESSAGE_BYTES_MAX, HANDSHAKE_SECONDS, HANDSHAKES_MAX
from ipc.ring import RingPair
from tests.fuzz.reading import Reader, hold
from tests.fuzz.rings import DryPair

STEPS_MAX: Final = 60
GUESTS: Final = ("g0", "g1", "g2")
_TOKENS: Final = {name: bytes([number]) * TOKEN_BYTES for number, name in enumerate(GUESTS, 1)}


class _Poll:
    """A `Doorman` that is asked by nobody."""

    def register(self, fd: int, events: int) -> None:
        pass

    def unregister(self, fd: int) -> None:
        pass


def _machine() -> Machine:
    mapping = mmap.mmap(-1, layout(FRAMES_MIN).end)
    format_arena(mapping)
    return Machine(Arena(mapping))


@functools.cache
def _directory() -> Path:
    """A run directory with an enrolled roster; the last guest is another user's."""
    made = tempfile.TemporaryDirectory(prefix="tmem-fuzz-")
    _KEPT.append(made)
    directory = Path(made.name)
    for name in GUESTS:
        uid = os.getuid() + (name == GUESTS[-1])
        attach.enrol(directory, name, _TOKENS[name], uid)
    return directory


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


# --- attach


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


class _Doors:
    """Sessions over real sockets, with guests that are all this very process."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._now_seconds = 0.0
        self._handlers: dict[int, Callable[[], None]] = {}
        self._machine = _machine()
        self._shown: set[str] = set()
        self._peers: list[socket.socket] = []
        poll: Any = _Poll()
        registry: Any = None
        self._sessions = Sessions(
            self._machine,
            _directory(),
            "fuzz",
            registry,
            poll,
            self._handlers,
            None,
            now_seconds=lambda: self._now_seconds,
            random_bytes=bytes,
            refused=lambda guest, why: hold(len(guest) < 32 and bool(why), "a refusal of nobody"),
        )

    def run(self) -> None:
        """All steps, and then the end of all connections."""
        try:
            for _ in range(STEPS_MAX):
                if self._reader.left <= 0:
                    break
                self._step()
                self._check()
        finally:
            while self._peers:
                self._peers.pop().close()
            self._serve()
            pending = len(self._sessions._pending)
            self._sessions.close()
        hold(not pending, "a handshake without a peer")
        hold(not self._handlers, "somebody is still watched")

    def _step(self) -> None:
        reader = self._reader
        control = reader.byte()
        peer = self._peers[control % len(self._peers)] if self._peers else None
        kind = control >> 4
        if kind < 3 or peer is None:
            self._connect()
        elif kind == 3:
            self._peers.remove(peer)
            peer.close()
        elif kind == 4:
            self._now_seconds += reader.byte() / 32 * HANDSHAKE_SECONDS
            self._sessions.expire()
        elif kind == 5:
            self._send(peer, reader.take(reader.byte()))
        elif kind == 6:
            self._expel(reader.byte())
        elif kind < 12:
            self._send(peer, self._hello())
        elif kind < 15:
            self._send(peer, CONFIRM.pack(CONFIRM_MAGIC, self._number(reader.byte())))
        else:
            self._send(peer, CONFIRM.pack(BYE_MAGIC, reader.byte() & 1))
        if control & 8:
            self._serve()

    def _connect(self) -> None:
        if len(self._peers) < HANDSHAKES_MAX + 2:
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
            peer.setblocking(False)
            peer.connect(os.fspath(_directory() / attach.ATTACH_SOCKET))
            self._peers.append(peer)
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

    def _send(self, peer: socket.socket, message: bytes) -> None:
        with contextlib.suppress(OSError):
            peer.send(message)
            with contextlib.suppress(attach.HandshakeError):
                hello = attach.decode_hello(message)
                if hello.name != GUESTS[-1] and hello.token == _TOKENS.get(hello.name):
                    self._shown.add(hello.name)

    def _expel(self, choice: int) -> None:
        attached = [
            one for one in self._machine.clients.values() if self._sessions.is_attached(one)
        ]
        if attached and choice > 128:
            self._sessions.expel(attached[choice % len(attached)])

    def _serve(self) -> None:
        """Whatever can be read is read, as the server's loop does it."""
        for _ in range(STEPS_MAX):
            if not _serve_once(self._handlers):
                return
        hold(False, "a connection that is never read")

    def _check(self) -> None:
        clients: dict[str, Client] = self._machine.clients
        hold(clients.keys() <= self._shown, "a guest that has not shown its token")
        hold(len(self._sessions._pending) <= HANDSHAKES_MAX, "too many handshakes")
        for session in self._sessions.serving.values():
            hold(session.client in clients.values(), "a session without its guest")


def fuzz_attach(data: bytes) -> None:
    """One hypervisor's door."""
    before = len(os.listdir("/proc/self/fd"))
    with mock.patch.object(sessions, "QueuePair", _NumberedPair):
        _Doors(Reader(data)).run()
    hold(len(os.listdir("/proc/self/fd")) == before, "a descriptor is left open")


# --- control


class _GuestKernel:
    """As much of a kernel as the verbs need that don't run anything."""

    node = None

    def status(self) -> dict[str, Any]:
        return {"counters": {}}

    def locks(self) -> dict[str, Any]:
        return {"locks": []}

    def volume(self) -> dict[str, Any]:
        raise OSError(5, "Input/output error")

    def start(self, workload: str, seed: int, parameters: object, files: dict[str, int]) -> None:
        raise BadParameters(f"no workload {workload!r}")


class _NoCommand:
    """A command that does nothing."""

    def __init__(self, _kernel: object, argv: list[str]) -> None:
        hold(all(isinstance(word, str) for word in argv), "a word that is no text")

    def step(self) -> Result:
        """Done."""
        return Result(0, b"", b"")

    def cancel(self) -> None:
        """Nothing to let go of."""


_VERBS: Final = (
    *Administration(_machine()).verbs,
    *("status", "run", "exec", "locks", "volume", "nemesis", "rekey", "stop", "nonsense", 7, [7]),
)
_PIECES: Final = (1, 3, 4, 7, 64, 1 << 16)
_SCALARS: Final = (0, 1, -1, 1 << 63, 0.5, True, None, "", "off", "g0", b"\0" * TOKEN_BYTES, b"key")
_KEYS: Final = (
    *("verb", "guest", "weight", "cap_bytes", "uuid", "role", "action", "workload", "seed", "oid"),
    *("parameters", "files", "argv", "token", "key", "cut", "heal", "faults", "index", "pool"),
)


def fuzz_control(data: bytes) -> None:
    """The first byte chooses: bytes for the codec, or one of the two sockets."""
    kind, rest = (data[0] if data else 0), data[1:]
    if kind % 4 == 0:
        _check_record(rest)
    elif kind % 4 == 1:
        _ask_hypervisor(Reader(rest))
    else:
        _ask_guest(Reader(rest))


def _check_record(untrusted: bytes) -> None:
    with contextlib.suppress(BadRecord):
        length = frame_length(untrusted)
        hold(length is None or length <= CONTROL_MESSAGE_BYTES_MAX, "a frame that is too long")
    try:
        record = decode(untrusted)
    except BadRecord:
        return
    hold(all(isinstance(key, str) for key in record), "a key that is no text")
    # What is answered and logged names what was asked for.
    encode({"error": str(record)})


def _stream(reader: Reader) -> bytes:
    """Frames, or not quite: whole records, records with a byte changed, bytes."""
    parts = []
    for _ in range(1 + reader.byte() % 4):
        control = reader.byte()
        if control >> 6 == 0:
            parts.append(reader.take(control & 63))
            continue
        frame = bytearray(encode(_record(reader)))
        if control >> 6 == 1:
            frame[reader.byte() % len(frame)] = reader.byte()
        parts.append(bytes(frame))
    return b"".join(parts)


def _record(reader: Reader) -> dict[str, Any]:
    record: dict[str, Any] = {"verb": _VERBS[reader.byte() % len(_VERBS)]}
    for _ in range(reader.byte() % 5):
        key, choice = reader.take(2)
        value: Any = _SCALARS[choice % len(_SCALARS)]
        for _ in range(choice >> 6):
            value = {"g0": value} if choice & 1 else [value]
        record[_KEYS[key % len(_KEYS)]] = value
    return record


def _converse(
    reader: Reader, path: Path, serve: Callable[[], bool], connections: Callable[[], int]
) -> None:
    """Send the bytes in pieces, read the answers, hang up."""
    answers = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as peer:
        peer.connect(os.fspath(path))
        peer.setblocking(False)
        serve()
        piece = _PIECES[reader.byte() % len(_PIECES)]
        stream = _stream(reader)
        for at in range(0, len(stream), piece):
            with contextlib.suppress(OSError):
                peer.send(stream[at : at + piece])
            serve()
            with contextlib.suppress(OSError):
                answers += peer.recv(1 << 20)
    while (frame := split_frame(answers)) is not None:
        body, answers = frame
        hold(bool(decode(body)), "an empty answer")
    hold(not answers, "half an answer")
    for _ in range(STEPS_MAX):
        if not serve():
            break
    hold(connections() == 0, "a connection that nobody has any more")


def _serve_once(handlers: dict[int, Callable[[], None]]) -> bool:
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


def _ask_hypervisor(reader: Reader) -> None:
    handlers: dict[int, Callable[[], None]] = {}
    poll: Any = _Poll()
    machine = _machine()
    for name in GUESTS[:2]:
        machine.attach(name, 1, 1, 0)
    administration = Administration(machine)
    control = Control(_directory(), poll, handlers, administration.answer, lambda *_: None)
    try:
        path = _directory() / attach.CONTROL_SOCKET
        _converse(reader, path, lambda: _serve_once(handlers), lambda: len(handlers) - 1)
    finally:
        control.close()
    check(machine)


def _ask_guest(reader: Reader) -> None:
    kernel: Any = _GuestKernel()
    answers = guest_control.Answers(kernel, guest_control.Credential(bytes(TOKEN_BYTES)))
    path = guest_control.socket_path(_directory(), "g0")
    control = guest_control.Control(path, answers.answer)

    def serve() -> bool:
        before = len(control._handlers)
        control.wait(0)
        control.step()
        return len(control._handlers) != before

    # A command needs a whole kernel; what it is given is looked at before it starts.
    with mock.patch.object(guest_control, "Execution", _NoCommand):
        try:
            _converse(reader, path, serve, lambda: len(control._connections))
        finally:
            control.close()
