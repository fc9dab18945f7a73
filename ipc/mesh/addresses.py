"""Where a node listens: `unix:PATH` on one host, `tcp:ADDRESS:PORT` between hosts.

A Unix socket is of type SEQPACKET and used as a stream: a send of ours is one packet, and a read
takes a whole one (`link`).  A process in a jail may then be refused the type of stream sockets, by
which all else on a host is reached: a fork server, a session's bus, an administrator's door.

TCP addresses are numbers: to look a host's name up could block for longer than a node may be
silent.

A Unix address is owned by whoever holds a lock on `PATH.lock`.  So a socket file that a killed
process left is replaced, that of a living one never, and two processes of one host that were given
the same node number are told apart before anyone connects.  The lock file stays; a lock file that
is removed could be locked twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

from ipc.errors import ExitCode, OperatorError

_BACKLOG = 64
_UCRED = struct.Struct("iII")


class UnixAddress(NamedTuple):
    """A socket in the file system."""

    path: str
    mode: int = 0o600
    """Who may connect."""

    def __str__(self) -> str:
        return f"unix:{self.path}"


class TcpAddress(NamedTuple):
    """An IPv4 or IPv6 address and a port; port 0 is chosen by the kernel."""

    host: str
    port: int

    def __str__(self) -> str:
        return (
            f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
        )


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """The address that a person wrote; raises OperatorError."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest:
        return UnixAddress(rest)
    host, _, port = rest.rpartition(":")
    with contextlib.suppress(ValueError):
        numeric = str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
        if scheme == "tcp" and port.isdecimal() and int(port) < 1 << 16:
            return TcpAddress(numeric, int(port))
    raise OperatorError(f"{text!r} is no node address: write unix:PATH or tcp:192.0.2.1:PORT")


def _socket(address: Address) -> socket.socket:
    if isinstance(address, UnixAddress):
        family, kind = socket.AF_UNIX, socket.SOCK_SEQPACKET
    else:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        kind = socket.SOCK_STREAM
    made = socket.socket(family, kind | socket.SOCK_CLOEXEC)
    made.setblocking(False)
    return made


def _where(address: Address) -> str | tuple[str, int]:
    return address.path if isinstance(address, UnixAddress) else (address.host, address.port)


def without_delay(connection: socket.socket) -> None:
    """Send small messages at once; a lock message that waits for an acknowledgement is a stall."""
    if connection.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Listener:
    """A listening socket, and the lock that goes with a path."""

    def __init__(self, address: Address) -> None:
        self._lock_fd: int | None = None
        self._socket = _socket(address)
        self.address = address
        try:
            if isinstance(address, UnixAddress):
                self._own(address.path)
            else:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(_where(address))
            self._socket.listen(_BACKLOG)
            if isinstance(address, TcpAddress):
                self.address = TcpAddress(address.host, self._socket.getsockname()[1])
            else:
                Path(address.path).chmod(address.mode)
        except OSError as error:
            self.close()
            in_use = error.errno in (errno.EADDRINUSE, errno.EAGAIN)
            what = "another process has it" if in_use else error.strerror or error
            raise OperatorError(
                f"can't listen on {address}: {what}; give each node an address and a number of "
                "its own",
                ExitCode.UNAVAILABLE,
            ) from None

    def _own(self, path: str) -> None:
        lock_fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock_fd)
            raise
        self._lock_fd = lock_fd
        Path(path).unlink(missing_ok=True)

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> socket.socket | None:
        """The next connection, None if nobody waits; raises OSError if the process has no room."""
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        connection.setblocking(False)
        without_delay(connection)
        return connection

    def close(self) -> None:
        self._socket.close()
        if self._lock_fd is not None and isinstance(self.address, UnixAddress):
            with contextlib.suppress(OSError):
                Path(self.address.path).unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = None


def origin(connection: socket.socket) -> object:
    """Whom an accepted connection is from, as the kernel says: a process of this host or an
    address; None if it is gone again."""
    try:
        if connection.family == socket.AF_UNIX:
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            return _UCRED.unpack(peer)[0]
        return connection.getpeername()[0]
    except OSError:
        return None


def begin_connect(address: Address) -> socket.socket:
    """A socket that connects or has connected; raises OSError if that failed at once."""
    connection = _socket(address)
    try:
        error = connection.connect_ex(_where(address))
        if error not in (0, errno.EINPROGRESS):
            raise OSError(error, os.strerror(error))
    except BaseException:
        connection.close()
        raise
    without_delay(connection)
    return connection
