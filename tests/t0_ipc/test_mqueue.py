"""The message-queue transport: conformance, and what only real queues and processes can do."""

from __future__ import annotations

import array
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import posix_ipc
import pytest

from ipc import attach
from ipc.abi import (
    ABI_REVISION,
    CONFIRM,
    CONFIRM_MAGIC,
    HELLO,
    HELLO_MAGIC,
    REPLY_BYTES,
    REQUEST_BYTES,
    WELCOME,
    WELCOME_BYTES,
    Op,
)
from ipc.errors import Disconnected
from ipc.limits import REPLY_QUEUE_MESSAGES, REQUEST_QUEUE_MESSAGES
from ipc.mqueue import QueuePair
from ipc.names import Registry
from ipc.window import create_window
from tests.t0_ipc.conformance import ask, request
from tests.t0_ipc.processes import EchoProcess, ProcessTransport


class TestQueues(ProcessTransport):
    """Two processes and real queues."""


@pytest.fixture(scope="module")
def echo(
    tmp_path_factory: pytest.TempPathFactory, new_cluster_name: Callable[[], str]
) -> Iterator[EchoProcess]:
    """The other end, in its own process."""
    server = EchoProcess(tmp_path_factory.mktemp("echo"), new_cluster_name())
    yield server
    server.close()


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_message_without_a_whole_sequence_is_answered(echo: EchoProcess, length: int) -> None:
    """The empty one too: the server must not take it for the end of anything."""
    with echo.opened() as channel:
        channel._requests.send(b"\x07\x08\x09"[:length])
        reply, _ = channel._replies.receive(10)

        assert b"\x07\x08\x09"[:length].ljust(4, b"\0") == reply[:4]
        assert ask(channel, request(2, Op.FLUSH_PAGE)).sequence == 2


def test_a_peer_that_dies_with_the_request_queue_full_is_noticed(
    tmp_path: Path, cluster_name: str
) -> None:
    """A guest whose calls were cut short does not wait for ever to send the next one."""
    echo = EchoProcess(tmp_path, cluster_name)
    try:
        with echo.opened() as channel:
            echo.process.send_signal(signal.SIGSTOP)
            for sequence in range(REQUEST_QUEUE_MESSAGES):
                channel._requests.send(request(sequence, Op.FLUSH_PAGE))
            echo.kill()

            with pytest.raises(Disconnected):
                channel.call(request(99, Op.FLUSH_PAGE))
    finally:
        echo.close()


def test_names_are_gone_after_the_handshake(echo: EchoProcess) -> None:
    """They exist from WELCOME until CONFIRM is answered, for nobody else to open later."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.connect(os.fspath(echo.run_directory / attach.ATTACH_SOCKET))
        door.send(HELLO.pack(HELLO_MAGIC, ABI_REVISION, 0, b"guest", bytes(32), b""))
        message, descriptors, _, _ = socket.recv_fds(door, WELCOME_BYTES, 1)
        for fd in descriptors:
            os.close(fd)
        names = [field.rstrip(b"\0").decode() for field in WELCOME.unpack(message)[10:12]]
        for name in names:
            posix_ipc.MessageQueue(name).close()
        registered = [entry.name for entry in Registry(echo.run_directory).entries()]
        confirmation = CONFIRM.pack(CONFIRM_MAGIC, 0)
        door.send(confirmation)
        assert door.recv(len(confirmation)) == confirmation

        assert sorted(name.lstrip("/") for name in names) == sorted(registered)
        assert list(Registry(echo.run_directory).entries()) == []
        for name in names:
            with pytest.raises(posix_ipc.ExistentialError):
                posix_ipc.MessageQueue(name)


def test_a_guest_can_not_resize_its_window(echo: EchoProcess) -> None:
    """A truncated mapping would kill the hypervisor by SIGBUS; the seals forbid it for ever."""
    with echo.opened() as channel:
        for size in (0, 4096, 1 << 30):
            with pytest.raises(PermissionError):
                os.ftruncate(channel.window.fd, size)
        assert ask(channel, request(1, Op.PUT_PAGE, count=64)).sequence == 1


@pytest.fixture
def pair(tmp_path: Path, cluster_name: str) -> Iterator[QueuePair]:
    """The hypervisor's end alone."""
    made = QueuePair(cluster_name, Registry(tmp_path), create_window(), os.urandom)
    yield made
    made.close()


def test_a_deaf_guest_never_blocks_the_port(pair: QueuePair) -> None:
    """As many replies as the queue holds are kept; one more is dropped and said so."""
    sent = [pair.send(bytes(REPLY_BYTES)) for _ in range(REPLY_QUEUE_MESSAGES + 2)]
    assert sent == [True] * REPLY_QUEUE_MESSAGES + [False] * 2


def test_a_port_without_a_request_says_so_at_once(pair: QueuePair) -> None:
    """And hands out what comes in order, whatever its length."""
    assert pair.receive() is None
    queue = posix_ipc.MessageQueue(pair.request_name, read=False)
    for message in (b"", b"1", bytes(REQUEST_BYTES)):
        queue.send(message)
    queue.close()

    assert [pair.receive() for _ in range(4)] == [b"", b"1", bytes(REQUEST_BYTES), None]


def test_queue_names_can_not_be_guessed(tmp_path: Path, cluster_name: str) -> None:
    """64 random bits each, so no guest finds another's."""
    asked = []

    def random_bytes(count: int) -> bytes:
        asked.append(count)
        return os.urandom(count)

    pair = QueuePair(cluster_name, Registry(tmp_path), create_window(), random_bytes)
    pair.close()

    assert asked == [8, 8]
    assert pair.request_name != pair.reply_name


def test_nobody_answers_is_said_in_time(tmp_path: Path) -> None:
    """Without a hypervisor a guest is told, not left waiting."""
    started = time.monotonic()
    with pytest.raises(Disconnected, match="no hypervisor answers"):
        attach.connect(tmp_path, "guest", bytes(32), patience_seconds=0.2)
    assert time.monotonic() - started >= 0.2


def test_a_window_is_handed_over_as_a_descriptor(echo: EchoProcess) -> None:
    """SCM_RIGHTS, exactly one, with no name in any file system."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.connect(os.fspath(echo.run_directory / attach.ATTACH_SOCKET))
        door.send(HELLO.pack(HELLO_MAGIC, ABI_REVISION, 0, b"guest", bytes(32), b""))
        space = socket.CMSG_SPACE(4 * array.array("i").itemsize)
        _, ancillary, _, _ = door.recvmsg(WELCOME_BYTES, space)
        ((level, kind, data),) = ancillary
        fds = array.array("i", data)

        assert (level, kind, len(fds)) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, 1)
        assert Path(f"/proc/self/fd/{fds[0]}").readlink().name == "memfd:tmem-window (deleted)"
        os.close(fds[0])
