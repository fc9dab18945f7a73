"""How a guest comes to its queues and its window: the handshake on the hypervisor's socket.

The socket `attach.sock` in the run directory is of type SEQPACKET, so a message is a message.

  guest                                            hypervisor
  connect                                          SO_PEERCRED (pid, uid), pidfd of the peer
  HELLO name, token ---------------------------->  the roster knows the name, token and uid match
          <------------- WELCOME queue names, id, offsets + the window's descriptor (SCM_RIGHTS)
  open both queues, map the window
  CONFIRM guest id ----------------------------->  removes both names
          <----------------------------- CONFIRM   the guest may call

A peer that is refused gets a WELCOME without a descriptor, whose status is not DONE and whose
message says why, and the connection is closed.  A handshake that is not finished in
`HANDSHAKE_SECONDS` is refused; it holds up nobody else.

The connection stays open: its end tells the guest that the hypervisor is gone.  A guest that sends
BYE gives its pools back; one that only disappears keeps them until its process has ended (the
hypervisor holds a pidfd), so a guest can come back after a hypervisor restart by the same door:
it closes what it has, attaches with the same name and token, and gets new queues and a new window.
RESUMED in WELCOME says that this very process was known: its pools have their ids and, the
ephemeral ones as far as nothing was evicted, their pages.  Without RESUMED it has no pools.  To
attach again without a restart replaces the earlier attachment.

The roster is the folder `guests/` of the run directory, a file a guest: the user id that may use
the name and a digest of its token.  Whoever starts a guest enrols it first.  Tokens are 32 random
bytes, compared in constant time; only digests are stored.  How the starter hands the token to the
guest is its own business.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import hmac
import os
import re
import socket
import struct
import time
from pathlib import Path
from typing import Final, NamedTuple

import posix_ipc

from ipc.abi import (
    ABI_REVISION,
    BYE_MAGIC,
    CONFIRM,
    CONFIRM_MAGIC,
    HELLO,
    HELLO_BYTES,
    HELLO_MAGIC,
    NAME_BYTES,
    TOKEN_BYTES,
    WELCOME,
    WELCOME_BYTES,
    WELCOME_MAGIC,
    HelloFlag,
    Status,
    WelcomeFlag,
)
from ipc.errors import Disconnected, ExitCode, OperatorError
from ipc.limits import (
    GUEST_NAME_CHARACTERS_MAX,
    HANDSHAKE_SECONDS,
    WINDOW_BYTES,
    WINDOW_SLOTS,
    WINDOW_SLOTS_OFFSET,
    WINDOW_TABLE_OFFSET,
)
from ipc.mqueue import QueueChannel, QueuePair
from ipc.ring import RingChannel, RingPair, memory_order_suffices
from ipc.window import map_window

ATTACH_SOCKET: Final = "attach.sock"
CONTROL_SOCKET: Final = "control.sock"

_SO_PEERPIDFD: Final = 77  # Linux 6.5; include/uapi/asm-generic/socket.h
_UCRED: Final = struct.Struct("iII")
_GUEST_NAME = re.compile(rf"[a-z0-9][a-z0-9_.-]{{0,{GUEST_NAME_CHARACTERS_MAX - 1}}}\Z")


_HELLO_FLAGS: Final = int(HelloFlag.RING)


class HandshakeError(Exception):
    """The peer's half of the handshake is not acceptable; the text is told to the peer."""


class Peer(NamedTuple):
    """What the kernel says about who connected; `pidfd` is ours to close."""

    pid: int
    uid: int
    pidfd: int


class Hello(NamedTuple):
    """Who the guest says it is, its proof, and whether it would have a ring."""

    name: str
    token: bytes
    ring: bool = False


def is_guest_name(name: str) -> bool:
    """Lower-case letters, digits, dot, dash, underscore; at most 31 characters."""
    return _GUEST_NAME.match(name) is not None


# --- the roster ---------------------------------------------------------------------------------


def token_digest(token: bytes) -> bytes:
    """32 bytes that prove a token without holding it."""
    return hashlib.blake2b(token, digest_size=32, person=b"tmem token").digest()


def enrol(run_directory: Path, name: str, token: bytes, uid: int) -> None:
    """Allow a guest of this name, token and user id to attach."""
    if not is_guest_name(name):
        raise OperatorError(
            f"{name!r} is no guest name: use up to {GUEST_NAME_CHARACTERS_MAX} lower-case letters, "
            "digits, dots, dashes and underscores"
        )
    roster = run_directory / "guests"
    roster.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = roster / name
    temporary = roster / f".{name}"
    temporary.touch(mode=0o600)
    temporary.write_text(f"{uid} {token_digest(token).hex()}\n")
    temporary.rename(path)


def enrolled_uid(run_directory: Path, name: str) -> int | None:
    """The user id that may use this name; None if nobody may."""
    try:
        return int((run_directory / "guests" / name).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def is_enrolled(run_directory: Path, hello: Hello, uid: int) -> bool:
    """Whether the roster has this name with this token and user id."""
    if not is_guest_name(hello.name):
        return False
    try:
        entry = (run_directory / "guests" / hello.name).read_text()
        enrolled_uid, digest = entry.split()
        matches = hmac.compare_digest(bytes.fromhex(digest), token_digest(hello.token))
        return matches and int(enrolled_uid) == uid
    except (OSError, ValueError):
        # No entry, or a damaged one.
        return False


def strike_off(run_directory: Path, name: str, digest: bytes) -> None:
    """Nobody may use this name any more, unless it was enrolled with another token meanwhile."""
    path = run_directory / "guests" / name
    with contextlib.suppress(OSError, ValueError, IndexError):
        if bytes.fromhex(path.read_text().split()[1]) == digest:
            path.unlink()


# --- the hypervisor's half ----------------------------------------------------------------------


def listen(run_directory: Path, guests_gid: int | None = None) -> socket.socket:
    """The listening attach socket, non-blocking; a stale socket file is replaced.  Only this user
    may knock, and who is in the guests' group if they have one."""
    path = run_directory / ATTACH_SOCKET
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        if guests_gid is not None:
            os.chown(path, -1, guests_gid)
            path.chmod(0o660)
        listener.listen(64)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OperatorError(
            f"can't listen on {path}: {error.strerror}; choose a shorter or writable run directory",
            ExitCode.UNAVAILABLE,
        ) from None
    return listener


def identify(connection: socket.socket) -> Peer:
    """Who is at the other end, as the kernel recorded it at connect(2)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _gid = _UCRED.unpack(credentials)
    try:
        pidfd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        os.set_inheritable(pidfd, False)
    except OSError:
        # Before Linux 6.5 there is a moment in which the id could be used again.
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            raise HandshakeError("your process is gone") from None
    return Peer(pid, uid, pidfd)


def decode_hello(untrusted_message: bytes) -> Hello:
    """The HELLO in a message; raises HandshakeError."""
    if len(untrusted_message) != HELLO_BYTES:
        raise HandshakeError(f"HELLO has {HELLO_BYTES} bytes, not {len(untrusted_message)}")
    magic, revision, flags, name, token, reserved = HELLO.unpack(untrusted_message)
    if magic != HELLO_MAGIC:
        raise HandshakeError("this is no HELLO")
    if revision != ABI_REVISION:
        raise HandshakeError(f"ABI revision {revision} is not served; this is {ABI_REVISION}")
    if flags & ~_HELLO_FLAGS or any(reserved):
        raise HandshakeError("reserved bits of HELLO are set")
    try:
        text = name.rstrip(b"\0").decode("ascii")
    except UnicodeDecodeError:
        text = ""
    if not is_guest_name(text):
        raise HandshakeError("this is no guest name")
    return Hello(text, token, bool(flags & HelloFlag.RING))


def send_welcome(
    connection: socket.socket, guest_id: int, generation: int, pair: QueuePair, *, resumed: bool
) -> None:
    """Send WELCOME with the window's descriptor; raises OSError if the peer is gone or deaf.  A
    `RingPair` is a granted ring."""
    flags = WelcomeFlag.RESUMED if resumed else WelcomeFlag.NONE
    if isinstance(pair, RingPair):
        flags |= WelcomeFlag.RING
    message = WELCOME.pack(
        WELCOME_MAGIC,
        ABI_REVISION,
        flags,
        Status.DONE,
        guest_id,
        generation,
        WINDOW_SLOTS,
        WINDOW_TABLE_OFFSET,
        WINDOW_SLOTS_OFFSET,
        WINDOW_BYTES,
        pair.request_name.encode(),
        pair.reply_name.encode(),
        b"",
    )
    descriptors = array.array("i", [pair.window.fd])
    connection.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])


def send_refusal(connection: socket.socket, text: str) -> None:
    """Tell the peer why it may not attach; a peer that can't be told is not waited for."""
    message = WELCOME.pack(
        WELCOME_MAGIC, ABI_REVISION, 0, Status.EPERM, 0, 0, 0, 0, 0, 0, b"", b"", text.encode()[:96]
    )
    with contextlib.suppress(OSError):
        connection.send(message)


# --- the guest's half ---------------------------------------------------------------------------


def connect(
    run_directory: Path,
    name: str,
    token: bytes,
    *,
    patience_seconds: float = HANDSHAKE_SECONDS,
    ring: bool | None = None,
) -> QueueChannel:
    """Attach to the hypervisor of a run directory; `ring` says whether to ask for one, None that it
    depends on the machine.

    Raises OperatorError when refused and Disconnected when no hypervisor answers in time.
    """
    if len(name) > NAME_BYTES or len(token) != TOKEN_BYTES:
        raise OperatorError(f"a token has {TOKEN_BYTES} bytes and a name at most {NAME_BYTES}")
    flags = HelloFlag.NONE
    if memory_order_suffices() if ring is None else ring:
        flags = HelloFlag.RING
    deadline = time.monotonic() + patience_seconds
    while True:
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            door.settimeout(max(0.05, deadline - time.monotonic()))
            door.connect(os.fspath(run_directory / ATTACH_SOCKET))
            return _shake_hands(door, name, token, flags)
        except OperatorError:
            door.close()
            raise
        except (OSError, Disconnected, posix_ipc.ExistentialError) as error:
            # Not there yet, being restarted, or died between two messages.
            door.close()
            if time.monotonic() >= deadline:
                raise Disconnected(f"no hypervisor answers in {run_directory}: {error}") from None
            time.sleep(0.01)


def _shake_hands(
    door: socket.socket, name: str, token: bytes, hello_flags: HelloFlag
) -> QueueChannel:
    hello = HELLO.pack(HELLO_MAGIC, ABI_REVISION, hello_flags, name.encode(), token, b"")
    door.send(hello)
    message, descriptors, _, _ = socket.recv_fds(door, WELCOME_BYTES, 1)
    if len(message) != WELCOME_BYTES:
        raise Disconnected("the hypervisor closed the door")
    fields = WELCOME.unpack(message)
    magic, _revision, flags, status, guest_id, generation, *_offsets = fields[:9]
    request_name, reply_name, text = (field.rstrip(b"\0").decode() for field in fields[10:13])
    if magic != WELCOME_MAGIC or status != Status.DONE or len(descriptors) != 1:
        raise OperatorError(
            f"the hypervisor refused guest {name}: {text or 'no reason given'}",
            ExitCode.UNAVAILABLE,
        )
    window = map_window(descriptors[0])
    queues: list[posix_ipc.MessageQueue] = []
    try:
        queues.append(posix_ipc.MessageQueue(request_name, read=False))
        queues.append(posix_ipc.MessageQueue(reply_name, write=False))
        confirmation = CONFIRM.pack(CONFIRM_MAGIC, guest_id)
        door.send(confirmation)
        if door.recv(len(confirmation)) != confirmation:
            raise Disconnected("the hypervisor closed the door")
    except BaseException:
        for queue in queues:
            queue.close()
        window.close()
        raise
    door.settimeout(None)
    resumed = bool(flags & WelcomeFlag.RESUMED)
    make = RingChannel if flags & WelcomeFlag.RING else QueueChannel
    return make(queues[0], queues[1], window, door, generation, resumed)


def detach(channel: QueueChannel) -> None:
    """Give the pools back and close."""
    channel.detach(CONFIRM.pack(BYE_MAGIC, 0))
