"""The guest's control socket: how the supervisor gives it work and asks how it is.

`guest-NAME.sock` in the run directory: a Unix stream of msgpack frames (`ipc.codec`), mode 0600.
It is looked at between two steps of the workload, so everything in the guest is one thread.  A
command that waits is stepped by the main loop (`Control.step`), and its connection gets the answer
at the end; what else that connection asks waits for it, other connections do not.

    {"verb": "status"}                               -> Kernel.status
    {"verb": "run", "workload", "seed", "parameters", "files"} -> {"accepted": True}
    {"verb": "exec", "argv": [...]}                  -> {"exit_code", "stdout", "stderr"}
    {"verb": "locks"}                                -> Kernel.locks
    {"verb": "volume"}                               -> Kernel.volume
    {"verb": "nemesis", "cut", "heal", "faults", "seed"} -> {"spoilt": True}  (nodes made for it)
    {"verb": "rekey", "token"}                       -> {"rekeyed": True}: how it attaches
    {"verb": "rekey", "key"}                         -> {"rekeyed": True}: what nodes prove
    {"verb": "stop"}                                 -> {"stopping": True}, then the guest ends
    anything else, or what can't be done             -> {"error": text}

`files` are names of parameters of `run` that name files of the host.  Their descriptors come with
the frame (SCM_RIGHTS), in that order: the asker has a right to open them and the guest has not.

A connection that sends half a frame waits; one that does not read its answers is dropped when too
much is waiting for it.  Neither holds up the work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from fs.errors import ImageError
from guests.keptfiles import OWN_IO, read_text
from guests.kernel import Kernel
from guests.shell import Execution
from guests.workloads.job import BadParameters
from ipc.abi import TOKEN_BYTES
from ipc.codec import BadRecord, Record, decode, encode, split_frame
from ipc.errors import ExitCode, OperatorError

log = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 16
REQUEST_BYTES_MAX: Final = 256 * 1024
WAITING_BYTES_MAX: Final = 8 * 1024 * 1024
_READ_BYTES: Final = 64 * 1024
DESCRIPTORS_MAX: Final = 4
"""Of files that come with one frame."""


def socket_path(run_directory: Path, name: str) -> Path:
    """Where the control socket of a guest is."""
    return run_directory / f"guest-{name}.sock"


class Pending(Protocol):
    """An answer that takes time."""

    def step(self) -> Record | None:
        """Go on; the answer at the end."""
        ...

    def cancel(self) -> None:
        """Nobody will read it.  OSError."""
        ...


class _Connection:
    __slots__ = ("descriptors", "pending", "received", "socket", "waiting")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.received = b""
        self.waiting = b""
        self.pending: Pending | None = None
        self.descriptors: list[int] = []
        """That came with what was received, ours until an answer takes them."""

    def close_descriptors(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


Answer = Callable[[Record, list[int]], "Record | Pending"]


class Control:
    """`answer(record, descriptors)` does the work; this moves the frames.  It takes those of the
    descriptors out of the list that it wants to keep."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self._path = path
        self._answer = answer
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Under another name until it listens: who sees the path may connect at once.
            temporary = path.with_suffix("")
            temporary.unlink(missing_ok=True)
            self._listener.bind(os.fspath(temporary))
            temporary.chmod(0o600)
            self._listener.listen(CONNECTIONS_MAX)
            temporary.rename(path)
        except OSError as error:
            self._listener.close()
            raise OperatorError(
                f"can't listen on {path}: {error.strerror or error}; choose a shorter or writable "
                "run directory",
                ExitCode.UNAVAILABLE,
            ) from None
        self._listener.setblocking(False)
        self._connections: dict[int, _Connection] = {}
        self.watch(self._listener.fileno(), lambda _events: self._accept())

    def watch(self, fd: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` when `fd` is readable or ended."""
        self._handlers[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def wait(self, timeout_seconds: float) -> None:
        """Serve whatever is there; wait for something at most so long."""
        for fd, events in self._poll.poll(timeout_seconds * 1000):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(events)

    def step(self) -> bool:
        """Go on with the answers that take time; whether there are any left."""
        left = False
        for connection in list(self._connections.values()):
            if connection.pending is not None:
                try:
                    self._answer_all(connection)
                except (OSError, BadRecord):
                    self._drop(connection)
            left = left or connection.pending is not None
        return left

    def close(self) -> None:
        """Drop all connections and remove the socket; in a jail its starter does that."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._poll.unregister(self._listener.fileno())
        self._listener.close()
        with contextlib.suppress(PermissionError):
            self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return
        if len(self._connections) >= CONNECTIONS_MAX:
            accepted.close()
            return
        accepted.setblocking(False)
        connection = _Connection(accepted)
        self._connections[accepted.fileno()] = connection
        self.watch(accepted.fileno(), lambda events: self._serve(connection, events))

    def _serve(self, connection: _Connection, events: int) -> None:
        try:
            if events & select.POLLOUT:
                self._send(connection)
            if events & ~select.POLLOUT:
                self._receive(connection)
        except (OSError, BadRecord):
            self._drop(connection)

    def _receive(self, connection: _Connection) -> None:
        try:
            chunk, descriptors, _, _ = socket.recv_fds(
                connection.socket, _READ_BYTES, DESCRIPTORS_MAX
            )
        except BlockingIOError:
            return
        connection.descriptors += descriptors
        if not chunk:
            raise BadRecord("the end")
        connection.received += chunk
        self._answer_all(connection)

    def _answer_all(self, connection: _Connection) -> None:
        """Whatever was asked, in order, as far as no answer takes time."""
        while True:
            if connection.pending is None:
                frame = split_frame(connection.received)
                if frame is None:
                    break
                body, connection.received = frame
                answer = self._answer(decode(body), connection.descriptors)
                connection.close_descriptors()
                if isinstance(answer, dict):
                    connection.waiting += encode(answer)
                    continue
                connection.pending = answer
            done = connection.pending.step()
            if done is None:
                break
            connection.pending = None
            connection.waiting += encode(done)
        if (
            len(connection.received) > REQUEST_BYTES_MAX
            or len(connection.waiting) > WAITING_BYTES_MAX
            or len(connection.descriptors) > DESCRIPTORS_MAX
        ):
            raise BadRecord("too long")
        self._send(connection)

    def _send(self, connection: _Connection) -> None:
        try:
            while connection.waiting:
                sent = connection.socket.send(connection.waiting)
                connection.waiting = connection.waiting[sent:]
        except BlockingIOError:
            pass
        interest = select.POLLIN | (select.POLLOUT if connection.waiting else 0)
        self._poll.modify(connection.socket.fileno(), interest)

    def _drop(self, connection: _Connection) -> None:
        pending, connection.pending = connection.pending, None
        if pending is not None:
            try:
                pending.cancel()
            except OSError as error:
                log.warning("event=not-cancelled why=%s", error)
        connection.close_descriptors()
        fd = connection.socket.fileno()
        del self._connections[fd]
        del self._handlers[fd]
        self._poll.unregister(fd)
        connection.socket.close()


class Credential:
    """What a guest shows when it attaches."""

    def __init__(self, token: bytes) -> None:
        self.token = token


class Answers:
    """The verbs, over one kernel."""

    def __init__(self, kernel: Kernel, credential: Credential | None = None) -> None:
        self._kernel = kernel
        self._credential = credential
        self.stopping = False

    def answer(self, untrusted: Record, descriptors: list[int]) -> Record | Pending:
        """The answer to a request; never raises for anything that a request can hold."""
        verb = untrusted.get("verb")
        if verb == "status":
            status: dict[str, Any] = self._kernel.status()
            status["counters"]["rchar_bytes"] = read_characters()
            return status
        if verb == "run":
            return self._run(untrusted, descriptors)
        if verb == "exec":
            return self._exec(untrusted.get("argv"))
        if verb == "locks":
            return self._kernel.locks()
        if verb == "volume":
            return self._volume()
        if verb == "nemesis":
            return self._spoil(untrusted)
        if verb == "rekey":
            return self._rekey(untrusted.get("token"), untrusted.get("key"))
        if verb == "stop":
            self.stopping = True
            return {"stopping": True}
        return {
            "error": f"no verb {verb!r}; there are status, run, exec, locks, volume, nemesis, "
            "rekey, stop"
        }

    def _volume(self) -> Record:
        try:
            return self._kernel.volume()
        except OSError as error:
            return {"error": error.strerror or str(error)}
        except ImageError as error:
            # Of a slot that another system has used.
            return {"error": f"the volume {error}"}

    def _spoil(self, untrusted: Record) -> Record:
        names = [untrusted.get(key, []) for key in ("cut", "heal")]
        faults, seed = untrusted.get("faults", {}), untrusted.get("seed", 0)
        if not all(
            isinstance(one, list) and all(isinstance(name, str) for name in one) for one in names
        ):
            return {"error": "nemesis needs cut and heal, lists of guests"}
        if not isinstance(faults, dict) or not all(
            isinstance(value, float) and 0 <= value <= 1 for value in faults.values()
        ):
            return {"error": "nemesis needs faults, a map of probabilities"}
        if self._kernel.node is None or not isinstance(seed, int):
            return {"error": "nemesis is for nodes of a volume, with a seed"}
        try:
            self._kernel.node.spoil(cut=names[0], heal=names[1], faults=faults, seed=seed)
        except ValueError as error:
            return {"error": str(error)}
        return {"spoilt": True}

    def _rekey(self, untrusted_token: object, untrusted_key: object) -> Record:
        """Answers never repeat what was sent: it is a secret, and errors are shown and logged."""
        node = self._kernel.node
        if isinstance(untrusted_token, bytes) and self._credential is not None:
            if len(untrusted_token) != TOKEN_BYTES:
                return {"error": f"a token has {TOKEN_BYTES} bytes"}
            self._credential.token = untrusted_token
        elif isinstance(untrusted_key, bytes) and node is not None:
            try:
                node.mesh.rekey(untrusted_key)
            except OperatorError as error:
                return {"error": str(error)}
        else:
            return {"error": "rekey needs a token, or, of a node of a volume, a key"}
        log.info("event=rekeyed what=%s", "token" if untrusted_key is None else "key")
        return {"rekeyed": True}

    def _run(self, untrusted: Record, descriptors: list[int]) -> Record:
        workload = untrusted.get("workload")
        seed = untrusted.get("seed", 0)
        parameters = untrusted.get("parameters", {})
        if not isinstance(workload, str) or not isinstance(seed, int):
            return {"error": "run needs a workload (text) and a seed (whole number)"}
        if not isinstance(parameters, dict):
            return {"error": "the parameters of run must be a map"}
        names = untrusted.get("files", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return {"error": "the files of run must be a list of parameters"}
        if len(names) != len(descriptors) or len(set(names)) < len(names):
            return {"error": "run needs one descriptor for each of its files"}
        files = dict(zip(names, descriptors, strict=True))
        descriptors.clear()
        try:
            self._kernel.start(workload, seed, parameters, files)
        except BadParameters as error:
            while files:
                os.close(files.popitem()[1])
            return {"error": str(error)}
        return {"accepted": True}

    def _exec(self, untrusted_argv: object) -> Record | Pending:
        if (
            not isinstance(untrusted_argv, list)
            or not untrusted_argv
            or not all(isinstance(word, str) for word in untrusted_argv)
        ):
            return {"error": "exec needs argv, a list of texts that begins with a command"}
        return _Command(Execution(self._kernel, untrusted_argv))


class _Command:
    """A command that runs for a connection."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self.cancel = execution.cancel

    def step(self) -> Record | None:
        """The result, as the verb `exec` has it."""
        result = self._execution.step()
        return None if result is None else result._asdict()


def read_characters() -> int:
    """`rchar` of this process: bytes it has read by read(2) and its kin so far (proc(5)).

    This reading itself counts, the next time: about 100 bytes each.
    """
    for line in read_text(OWN_IO).splitlines():
        name, _, value = line.partition(":")
        if name == "rchar":
            return int(value)
    return 0
