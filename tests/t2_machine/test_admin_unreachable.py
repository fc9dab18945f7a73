"""No way leads from a guest to an administrator's verb.

In Xen control operations came in by the guests' own hypercall (number 0) until 2015 and 101 and 102
until 2017 (XSA-15 and what followed).  Here they have a socket of their own; these tests try the
others: the calls, the attach socket, and the guest's own control socket.  A guest process of the
same user could open the control socket by its path: what it may open is for the jail to say.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.boot import GuestSpec
from ipc.abi import (
    ABI_REVISION,
    BYE_MAGIC,
    CONFIRM,
    CONFIRM_MAGIC,
    HELLO,
    HELLO_MAGIC,
    PAGE_BYTES,
    REQUEST,
    REQUEST_BYTES,
    WELCOME,
    WELCOME_BYTES,
    HelloFlag,
    Op,
    Reason,
    ReplyFlag,
    Status,
    oid_from_int,
)
from ipc.attach import ATTACH_SOCKET, CONTROL_SOCKET
from ipc.codec import Record, encode
from ipc.wire import decode_reply
from tests.support.clusters import wait_until
from tests.support.hypervisors import RawGuest, RunningHypervisor, running_hypervisor
from tests.support.tools import need_tool
from tests.t4_guest.processes import running_guest
from tests.t4_guest.worlds import make_image
from tools.control import ask

UUID = "00112233445566778899aabbccddeeff"
QUESTIONS: list[Record] = [
    {"verb": "list"},
    {"verb": "pools"},
    {"verb": "freeze"},
    {"verb": "freeze", "guest": "victim"},
    {"verb": "thaw"},
    {"verb": "set", "guest": "mallory", "weight": 1000},
    {"verb": "schedule", "mode": "static"},
    {"verb": "freeable"},
    {"verb": "flush", "size_bytes": 1 << 30},
    {"verb": "set", "guest": "victim", "cap_bytes": 4096},
    {"verb": "balloon", "guest": "victim", "size_bytes": 4096},
    {"verb": "auth", "action": "allow", "guest": "mallory", "uuid": UUID, "role": "writer"},
    {"verb": "auth", "action": "list"},
    {"verb": "destroy", "guest": "victim"},
    {"verb": "stats"},
    {"verb": "ping"},
    {"verb": "stop"},
]

XEN_CONTROL, XEN_AUTH, XEN_RESTORE_NEW = 0, 101, 102
XEN_SUBOPS = (*range(12), 19, 20, 21, 30, 32, 33)
"""XEN_SYSCTL_TMEM_OP_*: thaw, freeze, flush, destroy, list, ..., restore."""


@pytest.fixture
def hypervisor(cluster_name: str, tmp_path: Path) -> Iterator[RunningHypervisor]:
    """A hypervisor process of this test's own."""
    with running_hypervisor(cluster_name, tmp_path) as running:
        yield running


@pytest.fixture
def victim(hypervisor: RunningHypervisor) -> Iterator[RawGuest]:
    """A guest with pages to lose, of either kind."""
    guest = hypervisor.attach("victim")
    for persist in (False, True):
        pool = guest.new_pool(persist=persist)
        guest.channel.window.slot(0)[:] = bytes(range(256)) * (PAGE_BYTES // 256)
        assert guest.call(Op.PUT_PAGE, pool, 1, 0, 1).status == Status.DONE
    yield guest
    guest.detach()


@pytest.fixture
def mallory(hypervisor: RunningHypervisor, victim: RawGuest) -> Iterator[RawGuest]:
    """A guest that wants more than its own."""
    del victim
    guest = hypervisor.attach("mallory")
    yield guest
    guest.detach()


def state(hypervisor: RunningHypervisor) -> list[Any]:
    """All that an administrator can change; without counters, which any call may move."""
    path = hypervisor.run_directory / CONTROL_SOCKET
    listed = ask(path, {"verb": "list"})
    settings = (
        "attached",
        "frozen",
        "weight",
        "cap_bytes",
        "reserve_bytes",
        "compress",
        "priority",
        "sharing",
        "group",
        "balloon_bytes",
        "ephemeral_pages",
        "persistent_pages",
        "pools",
    )
    return [
        {name: [guest[key] for key in settings] for name, guest in listed["guests"].items()},
        listed["scheduling"],
        ask(path, {"verb": "auth", "action": "list"})["grants"],
        ask(path, {"verb": "freeable"}),
    ]


def raw_call(guest: RawGuest, op: int, pool: int = 0, oid: int = 0, index: int = 0) -> Any:
    """A call of any operation number."""
    guest.sequence += 1
    request = REQUEST.pack(guest.sequence, op, 0, 0, pool, index, oid_from_int(oid), 0, 0, 0)
    return decode_reply(guest.channel.call(request))


def assert_unknown(reply: Any) -> None:
    """Refused as an operation that does not exist, with nothing to read in it."""
    assert reply.status == Status.ENOSYS
    assert reply.reason == Reason.UNKNOWN_OP
    assert reply.flags == ReplyFlag.FAULT
    assert (reply.map, reply.value) == (0, 0)


@pytest.mark.usefixtures("mallory")
def test_the_control_socket_is_the_way(hypervisor: RunningHypervisor) -> None:
    """There each change of these is seen, so the other tests would see it, too."""
    changes = ("freeze", "thaw", "set", "schedule", "flush", "auth", "destroy")
    for question in QUESTIONS:
        before = state(hypervisor)
        assert "error" not in ask(hypervisor.run_directory / CONTROL_SOCKET, question)
        if question["verb"] == "stop":
            break
        first_freeze = question == {"verb": "freeze"}
        changed = question["verb"] in changes and question.get("action") != "list"
        if changed and (first_freeze or question["verb"] != "freeze"):
            assert state(hypervisor) != before, question


@pytest.mark.parametrize("op", [XEN_CONTROL, XEN_AUTH, XEN_RESTORE_NEW])
def test_xens_control_operations_are_unknown(
    hypervisor: RunningHypervisor, mallory: RawGuest, op: int
) -> None:
    """CONTROL with every sub-operation, AUTH and RESTORE_NEW: for any client, with any argument."""
    before = state(hypervisor)

    for subop in XEN_SUBOPS:
        for client in (0, 1, 2, 0xFFFF):
            # Xen's layout had the sub-operation and client where ours has pool, index and oid.
            assert_unknown(raw_call(mallory, op, pool=subop, index=client, oid=int(UUID, 16)))

    assert state(hypervisor) == before


def test_operations_that_do_not_exist_do_nothing(
    hypervisor: RunningHypervisor, mallory: RawGuest
) -> None:
    """All of them: no number was forgotten."""
    before = state(hypervisor)

    for op in sorted(set(range(256)) - {int(op) for op in Op}):
        assert_unknown(raw_call(mallory, op))

    assert state(hypervisor) == before


def test_a_record_in_a_request_queue_is_a_fault(
    hypervisor: RunningHypervisor, mallory: RawGuest
) -> None:
    """Questions of the control socket, as they are and as long as a request."""
    before = state(hypervisor)

    for question in QUESTIONS:
        frame = encode(question)
        for message in (frame[:REQUEST_BYTES], frame.ljust(REQUEST_BYTES, b"\0")[:REQUEST_BYTES]):
            reply = decode_reply(mallory.channel.call(message))
            assert reply.flags == ReplyFlag.FAULT

    assert state(hypervisor) == before


@pytest.mark.usefixtures("victim")
def test_the_attach_socket_answers_no_question(hypervisor: RunningHypervisor) -> None:
    """Neither at the door, nor instead of CONFIRM, nor once attached."""
    before = state(hypervisor)

    for question in QUESTIONS:
        with _door(hypervisor) as door:
            door.send(encode(question))
            _assert_refused(door)
        with _door(hypervisor) as door:
            door.send(_hello(hypervisor))
            _welcomed(door)
            door.send(encode(question))
            _assert_refused(door)
    guest = hypervisor.attach("mallory")
    for question in QUESTIONS:
        guest.channel._door.send(encode(question))
    assert guest.call(Op.VERSION).status == Status.DONE
    with pytest.raises(BlockingIOError):
        guest.channel._door.recv(1 << 16, socket.MSG_DONTWAIT)
    guest.detach()
    wait_until(lambda: "mallory" not in hypervisor.ask("stats")["guests"], "the guest departs")

    assert state(hypervisor) == before


HELLOS: list[dict[str, Any]] = [
    *({"magic": magic} for magic in (b"TMCT", b"CTRL", b"ROOT", CONFIRM_MAGIC, BYE_MAGIC)),
    *({"revision": revision} for revision in (0, ABI_REVISION + 1, 0xFFFF)),
    *({"flags": 1 << bit} for bit in range(16) if not 1 << bit & HelloFlag.RING),
    {"reserved": encode({"verb": "stop"})},
    *(
        {"name": name}
        for name in (
            b"",
            b"hypervisor",
            b"supervisor",
            b"administrator",
            b"control",
            b"victim",
            b"VICTIM",
            b"all",
            b"*",
            b"..",
            b"../control.sock",
            b"mallory/../victim",
            b"mallory\0victim",
            b"\xff\xff",
        )
    ),
    {"token": bytes(32)},
    {"token": b"\xff" * 32},
]


@pytest.mark.usefixtures("victim")
def test_no_hello_opens_another_door(hypervisor: RunningHypervisor) -> None:
    """With the right token of mallory but for one field, and refused."""
    before = state(hypervisor)

    for fields in HELLOS:
        with _door(hypervisor) as door:
            door.send(_hello(hypervisor, **fields))
            _assert_refused(door)
        assert state(hypervisor) == before, fields


def test_confirming_another_guests_number_is_refused(
    hypervisor: RunningHypervisor, victim: RawGuest
) -> None:
    """A handshake ends as who it began."""
    before = state(hypervisor)

    with _door(hypervisor) as door:
        door.send(_hello(hypervisor))
        own = _welcomed(door)
        door.send(CONFIRM.pack(CONFIRM_MAGIC, own ^ 1))
        _assert_refused(door)

    assert victim.call(Op.VERSION).status == Status.DONE
    assert state(hypervisor) == before


def test_the_guests_own_control_socket_has_no_such_verb(
    hypervisor: RunningHypervisor, tmp_path: Path
) -> None:
    """It is the supervisor's way to the guest, and leads no further."""
    need_tool("mke2fs")
    token = hypervisor.enrol("mallory")
    image = make_image(tmp_path / "image")
    spec = GuestSpec("mallory", image, 1 << 20, hypervisor.run_directory, token=token)
    with running_guest(spec) as guest:
        before = state(hypervisor)

        for question in QUESTIONS:
            if question["verb"] != "stop":  # a guest's own: it ends the guest
                answer = ask(guest.path, question)
                assert list(answer) == ["error"]
                assert "no verb" in answer["error"]
        for name in ("tmem", "tmem-list", "freeze"):
            assert guest.ask("exec", argv=[name, "--all"])["exit_code"] == 127
        assert guest.ask("exec", argv=["cat", str(hypervisor.run_directory)])["exit_code"] == 1

        assert state(hypervisor) == before
        guest.stop()
    assert "generation" in hypervisor.ask("ping")


def _door(hypervisor: RunningHypervisor) -> socket.socket:
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    door.settimeout(20)
    door.connect(os.fspath(hypervisor.run_directory / ATTACH_SOCKET))
    return door


def _hello(
    hypervisor: RunningHypervisor,
    magic: bytes = HELLO_MAGIC,
    revision: int = ABI_REVISION,
    flags: int = 0,
    name: bytes = b"mallory",
    token: bytes | None = None,
    reserved: bytes = b"",
) -> bytes:
    own = hypervisor.enrol("mallory")
    return HELLO.pack(magic, revision, flags, name, own if token is None else token, reserved)


def _welcomed(door: socket.socket) -> int:
    """Take the WELCOME that must be there; the guest's number in it."""
    message, descriptors, _, _ = socket.recv_fds(door, WELCOME_BYTES, 1)
    for descriptor in descriptors:
        os.close(descriptor)
    fields = WELCOME.unpack(message)
    assert fields[3] == Status.DONE
    return int(fields[4])


def _assert_refused(door: socket.socket) -> None:
    """A WELCOME that says no, and the end; never a record."""
    message, descriptors, _, _ = socket.recv_fds(door, 1 << 16, 1)
    assert descriptors == []
    assert len(message) == WELCOME_BYTES
    fields = WELCOME.unpack(message)
    assert fields[3] == Status.EPERM
    assert set(fields[4:12]) <= {0, bytes(64)}
    assert door.recv(64) == b""
