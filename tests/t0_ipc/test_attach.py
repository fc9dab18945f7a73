"""The attach handshake against a real hypervisor: who is let in, who is not, who waits for whom."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from ipc import attach
from ipc.abi import (
    ABI_REVISION,
    BYE_MAGIC,
    CONFIRM,
    CONFIRM_MAGIC,
    HELLO,
    HELLO_BYTES,
    HELLO_MAGIC,
    PAGE_BYTES,
    WELCOME,
    WELCOME_BYTES,
    WELCOME_MAGIC,
    HelloFlag,
    Op,
    Status,
)
from ipc.attach import ATTACH_SOCKET, HandshakeError, Hello, decode_hello, is_guest_name
from ipc.errors import Disconnected, OperatorError
from ipc.limits import HANDSHAKE_SECONDS, HANDSHAKES_MAX
from ipc.names import Registry
from tests.support.hypervisors import RunningHypervisor, running_hypervisor


@pytest.fixture
def hypervisor(cluster_name: str, tmp_path: Path) -> Iterator[RunningHypervisor]:
    """One on the test's own run directory."""
    with running_hypervisor(cluster_name, tmp_path) as running:
        until((tmp_path / ATTACH_SOCKET).exists, "the attach socket")
        yield running


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that is bound to happen; generous, because nothing is timed here."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def hello(name: bytes, token: bytes, *, revision: int = ABI_REVISION, flags: int = 0) -> bytes:
    """A HELLO, right unless told otherwise."""
    return HELLO.pack(HELLO_MAGIC, revision, flags, name, token, b"")


class Door:
    """A connection to the attach socket, driven by hand."""

    def __init__(self, hypervisor: RunningHypervisor) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(30)
        path = hypervisor.run_directory / ATTACH_SOCKET
        # A socket file exists from bind(2) on, a moment before listen(2).
        deadline = time.monotonic() + 30
        while True:
            try:
                self.socket.connect(os.fspath(path))
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            else:
                break

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, message: bytes) -> None:
        self.socket.send(message)

    def welcome(self) -> tuple[int, int, str]:
        """Guest number, status and message of the WELCOME; the window is not kept."""
        message, descriptors, _, _ = socket.recv_fds(self.socket, WELCOME_BYTES, 1)
        for fd in descriptors:
            os.close(fd)
        fields = WELCOME.unpack(message)
        assert fields[0] == WELCOME_MAGIC
        assert len(descriptors) == (fields[3] == Status.DONE)
        return fields[4], fields[3], fields[12].rstrip(b"\0").decode()

    def refusal(self) -> str:
        """Why; and that the connection ends after it."""
        _, status, text = self.welcome()
        assert status == Status.EPERM
        assert self.socket.recv(1) == b""
        return text

    def confirm(self, number: int) -> None:
        message = CONFIRM.pack(CONFIRM_MAGIC, number)
        self.send(message)
        assert self.socket.recv(len(message)) == message


def still_serves(hypervisor: RunningHypervisor) -> bool:
    """Another guest attaches, stores a page, gets it back and leaves."""
    guest = hypervisor.attach("witness")
    pool = guest.new_pool(persist=True)
    guest.channel.window.slot(0)[:] = b"w" * PAGE_BYTES
    stored = guest.call(Op.PUT_PAGE, pool, 1, 0, 1)
    got = guest.call(Op.GET_PAGE, pool, 1, 0, 1)
    guest.detach()
    return stored.status == got.status == Status.DONE


BROKEN_HELLOS = {
    "empty revision": (hello(b"web", bytes(32), revision=0), "revision 0 is not served"),
    "next revision": (hello(b"web", bytes(32), revision=ABI_REVISION + 1), "is not served"),
    "flags": (hello(b"web", bytes(32), flags=2), "reserved bits"),
    "reserved": (hello(b"web", bytes(32))[:-1] + b"\1", "reserved bits"),
    "magic": (b"HTTP" + hello(b"web", bytes(32))[4:], "no HELLO"),
    "one byte": (b"T", f"{HELLO_BYTES} bytes, not 1"),
    "cut short": (hello(b"web", bytes(32))[:-1], f"not {HELLO_BYTES - 1}"),
    "too long": (hello(b"web", bytes(32)) + b"\0", f"not {HELLO_BYTES + 1}"),
    "much too long": (bytes(100_000), "HELLO has"),
    "zeros": (bytes(HELLO_BYTES), "no HELLO"),
    "no name": (hello(b"", bytes(32)), "no guest name"),
    "a path": (hello(b"../web", bytes(32)), "no guest name"),
    "a hidden file": (hello(b".web", bytes(32)), "no guest name"),
    "a zero inside": (hello(b"we\0b", bytes(32)), "no guest name"),
    "not ascii": (hello("wéb".encode(), bytes(32)), "no guest name"),
    "32 letters": (hello(b"w" * 32, bytes(32)), "no guest name"),
    "nobody": (hello(b"nobody", bytes(32)), "not enrolled"),
    "wrong token": (hello(b"web", bytes(32)), "not enrolled with this token"),
}


def test_a_broken_hello_is_refused_with_the_reason(hypervisor: RunningHypervisor) -> None:
    """Each way to get it wrong; the hypervisor keeps no descriptor and goes on serving."""
    hypervisor.enrol("web")
    descriptors = Path(f"/proc/{hypervisor.process.pid}/fd")
    assert still_serves(hypervisor)
    before = len(list(descriptors.iterdir()))

    for message, words in BROKEN_HELLOS.values():
        with Door(hypervisor) as door:
            door.send(message)
            assert words in door.refusal()

    assert still_serves(hypervisor)
    # The witness's own may still have been open when they were counted.
    until(lambda: len(list(descriptors.iterdir())) <= before, "descriptors are closed again")
    assert not [name for name in hypervisor.ask("stats")["guests"] if name != "witness"]


def test_another_user_is_refused_though_it_has_the_token(hypervisor: RunningHypervisor) -> None:
    """The user id is the kernel's word (SO_PEERCRED), not the guest's."""
    token = os.urandom(32)
    attach.enrol(hypervisor.run_directory, "web", token, os.getuid() + 1)

    with pytest.raises(OperatorError, match="not enrolled"):
        attach.connect(hypervisor.run_directory, "web", token)


@pytest.mark.parametrize(
    "confirmation",
    [
        b"T",
        CONFIRM.pack(CONFIRM_MAGIC, 200),
        CONFIRM.pack(BYE_MAGIC, 0),
        CONFIRM.pack(CONFIRM_MAGIC, 0) + b"\0",
        bytes(HELLO_BYTES),
    ],
    ids=["one byte", "another guest's number", "a BYE", "too long", "a HELLO"],
)
def test_a_broken_confirm_ends_the_handshake(
    hypervisor: RunningHypervisor, confirmation: bytes
) -> None:
    """Nothing of it stays: no client, no queue, and the name is free."""
    with Door(hypervisor) as door:
        door.send(hello(b"web", hypervisor.enrol("web")))
        assert door.welcome()[1] == Status.DONE
        door.send(confirmation)
        assert "no CONFIRM" in door.refusal()

    assert "web" not in hypervisor.ask("stats")["guests"]
    assert not [e for e in Registry(hypervisor.run_directory).entries() if e.kind == "queue"]
    guest = hypervisor.attach("web")
    assert guest.new_pool(persist=False) == 0
    guest.detach()


def test_unfinished_handshakes_are_dropped_and_hold_nobody_up(
    hypervisor: RunningHypervisor,
) -> None:
    """Silent ones and one that stopped after WELCOME; others attach meanwhile."""
    with Door(hypervisor) as silent, Door(hypervisor) as halfway:
        halfway.send(hello(b"halfway", hypervisor.enrol("halfway")))
        assert halfway.welcome()[1] == Status.DONE
        started = time.monotonic()
        assert still_serves(hypervisor)

        assert "took too long" in silent.refusal()
        assert "took too long" in halfway.refusal()
        assert time.monotonic() - started >= HANDSHAKE_SECONDS - 1
    assert "halfway" not in hypervisor.ask("stats")["guests"]


def test_handshakes_have_a_bound(hypervisor: RunningHypervisor) -> None:
    """One too many is told to try again, and can as soon as another has gone."""
    with ExitStack() as stack:
        doors = [stack.enter_context(Door(hypervisor)) for _ in range(HANDSHAKES_MAX)]
        with Door(hypervisor) as one_too_many:
            assert "try again" in one_too_many.refusal()
        doors[0].socket.close()

        def attaches() -> bool:
            try:
                return still_serves(hypervisor)
            except OperatorError:
                return False

        until(attaches, "a place is free again")


def test_a_guest_that_attaches_again_replaces_its_attachment(
    hypervisor: RunningHypervisor,
) -> None:
    """Same process, no restart: new queues, new window, the same pools; the old end is told."""
    first = hypervisor.attach("web")
    pool = first.new_pool(persist=True)
    first.channel.window.slot(0)[:] = b"a" * PAGE_BYTES
    first.call(Op.PUT_PAGE, pool, 1, 0, 1)

    second = hypervisor.attach("web")

    assert second.channel.resumed
    assert second.call(Op.GET_PAGE, pool, 1, 0, 1).status == Status.DONE
    assert bytes(second.channel.window.slot(0)) == b"a" * PAGE_BYTES
    with pytest.raises(Disconnected):
        first.call(Op.VERSION)
    first.channel.close()
    second.detach()


def test_of_two_handshakes_of_one_name_the_second_survives_the_end_of_the_first(
    hypervisor: RunningHypervisor,
) -> None:
    """A guest may give one up and finish the other; its name is then served like any other."""
    token = hypervisor.enrol("twice")
    with Door(hypervisor) as second:
        with Door(hypervisor) as first:
            first.send(hello(b"twice", token))
            assert first.welcome()[1] == Status.DONE
            second.send(hello(b"twice", token))
            number, status, _ = second.welcome()
            assert status == Status.DONE
        assert still_serves(hypervisor)

        second.confirm(number)

        assert hypervisor.ask("stats")["guests"]["twice"]["attached"]
        second.send(CONFIRM.pack(BYE_MAGIC, 0))
        assert second.socket.recv(1) == b""
    assert "twice" not in hypervisor.ask("stats")["guests"]
    assert still_serves(hypervisor)


def test_a_handshake_whose_client_has_left_meanwhile_harms_nobody(
    hypervisor: RunningHypervisor,
) -> None:
    """The guest finishes one of two handshakes, says BYE, and then finishes the other."""
    token = hypervisor.enrol("twice")
    numbers = []
    with Door(hypervisor) as first, Door(hypervisor) as second:
        for door in (first, second):
            door.send(hello(b"twice", token))
            number, status, _ = door.welcome()
            assert status == Status.DONE
            numbers.append(number)
        first.confirm(numbers[0])
        first.send(CONFIRM.pack(BYE_MAGIC, 0))
        assert first.socket.recv(1) == b""

        confirmation = CONFIRM.pack(CONFIRM_MAGIC, numbers[1])
        second.send(confirmation)
        served = second.socket.recv(WELCOME_BYTES) == confirmation

        assert served == ("twice" in hypervisor.ask("stats")["guests"])
    guest = hypervisor.attach("twice")
    assert guest.new_pool(persist=False) == 0
    guest.detach()
    assert still_serves(hypervisor)


def test_anything_but_bye_on_the_door_is_ignored(hypervisor: RunningHypervisor) -> None:
    """Half a BYE, a second HELLO, a flood: the attachment goes on as it was."""
    guest = hypervisor.attach("web")
    pool = guest.new_pool(persist=True)
    bye = CONFIRM.pack(BYE_MAGIC, 0)
    for message in (bye[:-1], bye + b"\0", hello(b"web", bytes(32)), *[b"what?"] * 100):
        guest.channel._door.send(message)

    assert guest.call(Op.FLUSH_OBJECT, pool, 1).status == Status.DONE
    assert still_serves(hypervisor)
    guest.detach()


@pytest.mark.parametrize("name", ["a", "0", "web.1", "db-2_x", "w" * 31])
def test_good_guest_names(name: str) -> None:
    """They are file names in the roster and words in logs."""
    assert is_guest_name(name)
    assert Hello(name, bytes(32)) == decode_hello(hello(name.encode(), bytes(32)))
    asked = decode_hello(hello(name.encode(), bytes(32), flags=HelloFlag.RING))
    assert Hello(name, bytes(32), ring=True) == asked


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "A", "a/b", "a b", "a\n", "w" * 32])
def test_bad_guest_names(name: str, tmp_path: Path) -> None:
    """Refused by the roster, and by the door before it looks at the roster."""
    assert not is_guest_name(name)
    with pytest.raises(OperatorError, match="is no guest name"):
        attach.enrol(tmp_path, name, bytes(32), 0)
    with pytest.raises(HandshakeError):
        decode_hello(hello(name.encode(), bytes(32)))


@pytest.mark.parametrize("entry", ["", "1", "x y", "0 zz", "0 " + "00" * 31, "0 00 00"])
def test_a_damaged_roster_entry_lets_nobody_in(tmp_path: Path, entry: str) -> None:
    """It is a refusal like any other, and no trouble for the hypervisor."""
    (tmp_path / "guests").mkdir()
    (tmp_path / "guests" / "web").write_text(entry)

    assert not attach.is_enrolled(tmp_path, Hello("web", bytes(32)), 0)


def test_the_roster_keeps_no_token(tmp_path: Path) -> None:
    """Only a digest, readable by its owner alone."""
    token = os.urandom(32)
    attach.enrol(tmp_path, "web", token, 1234)
    path = tmp_path / "guests" / "web"

    assert attach.is_enrolled(tmp_path, Hello("web", token), 1234)
    assert not attach.is_enrolled(tmp_path, Hello("web", token), 1235)
    assert not attach.is_enrolled(tmp_path, Hello("web", bytes(32)), 1234)
    assert token.hex() not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
