"""A hypervisor under siege: a hostile guest, and a witness that must not notice.

The witness is a process of its own with two attachments.  As `witness` it has a private persistent
and a private ephemeral pool, and as a reader a shared one into which `friend`, its other name,
puts.  Round after round it changes its pages, fetches them and compares; a page that is wrong,
stale or foreign, a persistent one that is missing, a call that is refused or faulted, and an
attachment that ends are each the end of the test.

A hostile guest is whoever holds an `Attacker`, which sends what it likes, or a program that runs in
a process of its own (`Siege.rogue`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import posix_ipc

from guests.adversaries.raw import Calls, page_of
from ipc import attach
from ipc.abi import (
    ABI_REVISION,
    ANY_UUID,
    CONFIRM,
    CONFIRM_MAGIC,
    HELLO,
    HELLO_MAGIC,
    OID_BYTES,
    PAGE_BYTES,
    UUID_BYTES,
    WELCOME,
    WELCOME_BYTES,
    HelloFlag,
    Op,
    Reason,
    Reply,
    ReplyFlag,
    Status,
)
from ipc.attach import CONTROL_SOCKET
from ipc.errors import Disconnected
from ipc.mqueue import QueueChannel
from ipc.ring import memory_order_suffices
from tests.support.hypervisors import ROOT, RunningHypervisor, running_hypervisor
from tools.control import ask

TRANSPORTS: Final = ["mqueue", "ring"] if memory_order_suffices() else ["mqueue"]
SHARED_UUID: Final = bytes(range(16))
"""Of the pool that the witness reads and its friend writes."""
NO_UUID: Final = ANY_UUID.ljust(OID_BYTES, b"\0")
"""As an object id in NEW_POOL."""
FAULTS_FOR_EVER: Final = 1 << 40
AUDIT: Final = "audit.log"

_WITNESS_PAGES: Final = 12
_ROUND_SECONDS: Final = 0.02
"""Between two rounds of the witness, unless it is being asked."""
_PATIENCE_SECONDS: Final = 60.0
_SILENCE_SECONDS: Final = 30.0
"""A rogue that says nothing for so long is stuck: none of them is at one thing for a second."""


def until(condition: Callable[[], bool], what: str, seconds: float = _PATIENCE_SECONDS) -> None:
    """Wait for something that is bound to happen; generous, because nothing is timed here."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)


class Attacker(Calls):
    """A guest of a test, with calls of any kind."""

    def __init__(self, channel: QueueChannel, name: str) -> None:
        super().__init__(channel)
        self.channel: QueueChannel = channel
        self.name = name
        self.window = channel.window

    def pool(self, *, persist: bool = False, uuid: bytes | None = None) -> int:
        """A pool that must be had."""
        reply = self.new_pool(persist=persist, uuid=uuid)
        assert reply.status == Status.DONE, reply
        return reply.value

    def put(self, pool: int, oid: int, index: int, *pages: bytes) -> Reply:
        """Put pages from slot 0 on."""
        for slot, page in enumerate(pages):
            self.window.slot(slot)[:] = page
        return self.call(Op.PUT_PAGE, pool=pool, oid=oid, index=index, count=len(pages))

    def get(self, pool: int, oid: int, index: int) -> bytes | None:
        """One page, None if it is not there."""
        self.window.slot(0)[:] = bytes(PAGE_BYTES)
        reply = self.call(Op.GET_PAGE, pool=pool, oid=oid, index=index, count=1)
        assert reply.status in (Status.DONE, Status.MISS, Status.EEMPTY), reply
        return bytes(self.window.slot(0)) if reply.status == Status.DONE else None

    def detach(self) -> None:
        attach.detach(self.channel)


def assert_fault(reply: Reply, reason: Reason | None = None) -> None:
    """A fault reply says so and nothing else."""
    assert reply.flags == ReplyFlag.FAULT, reply
    assert reply.status in (Status.EINVAL, Status.ENOSYS)
    assert (reply.map, reply.value) == (0, 0)
    if reason is not None:
        assert reply.reason == reason, reply


class Siege:
    """A hypervisor, the witness, and ways in for hostile guests of one transport."""

    def __init__(
        self, hypervisor: RunningHypervisor, transport: str, *, witness: bool = True
    ) -> None:
        self.hypervisor = hypervisor
        self.directory = hypervisor.run_directory
        self.ring = transport == "ring"
        self._guests = 0
        self._rogues: list[subprocess.Popen[str]] = []
        until(self._answers, "the hypervisor answers")
        self._witness = self._call_witness(transport) if witness else None

    def _call_witness(self, transport: str) -> subprocess.Popen[str]:
        for name, role in (("witness", "reader"), ("friend", "writer")):
            self.allow(name, SHARED_UUID, role)
        tokens = [self.hypervisor.enrol(name).hex() for name in ("witness", "friend")]
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.support.hostile"),
                *(os.fspath(self.directory), *tokens, transport),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    # --- who is there

    def _answers(self) -> bool:
        try:
            self.ask("ping")
        except Disconnected:
            return False
        return True

    def ask(self, verb: str, **fields: Any) -> dict[str, Any]:
        """The administrator's question."""
        return ask(self.directory / CONTROL_SOCKET, {"verb": verb, **fields}, timeout_seconds=60)

    def allow(self, guest: str, uuid: bytes, role: str = "writer") -> None:
        answer = self.ask("auth", action="allow", guest=guest, uuid=uuid.hex(), role=role)
        assert "error" not in answer, answer

    def guest(self, name: str) -> dict[str, Any]:
        """What the hypervisor says of a guest."""
        record = self.ask("stats")["guests"][name]
        assert isinstance(record, dict)
        return record

    def faults(self, name: str) -> int:
        return sum(self.guest(name)["faults"].values())

    def new_name(self, what: str = "mallory") -> str:
        self._guests += 1
        return f"{what}{self._guests}"

    def attacker(self, name: str = "", *, ring: bool | None = None) -> Attacker:
        """A guest of this process."""
        name = name or self.new_name()
        token = self.hypervisor.enrol(name)
        wanted = self.ring if ring is None else ring
        return Attacker(attach.connect(self.directory, name, token, ring=wanted), name)

    def knock(self, name: str, token: bytes) -> None:
        """Attach with a token, and leave; raises what a guest is told."""
        attach.detach(attach.connect(self.directory, name, token, ring=self.ring))

    @contextmanager
    def attacking(self, name: str = "", *, ring: bool | None = None) -> Iterator[Attacker]:
        """A guest of this process that leaves in the end, and of which nothing stays."""
        attacker = self.attacker(name, ring=ring)
        try:
            yield attacker
        finally:
            attacker.detach()
        until(lambda: attacker.name not in self.ask("stats")["guests"], "the guest departs")

    def rogue(self, code: str, *arguments: str, name: str = "", ring: bool | None = None) -> Rogue:
        """A guest as a process: `attacker` is attached, `arguments` are there, and it says what
        `code` prints."""
        name = name or self.new_name("rogue")
        token = self.hypervisor.enrol(name)
        wanted = self.ring if ring is None else ring
        rogue = Rogue(self.directory, name, token, wanted, code, arguments)
        self._rogues.append(rogue.process)
        return rogue

    def restart(self) -> None:
        """Kill the hypervisor and start it again; the witness comes back by itself."""
        self.hypervisor.kill()
        self.hypervisor.start()
        until(self._answers, "the hypervisor answers again")

    # --- the witness

    def unharmed(self) -> None:
        """The witness has gone through two whole rounds since, and the hypervisor answers."""
        process = self._witness
        assert process is not None
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("?\n")
            process.stdin.flush()
        line = process.stdout.readline()
        assert line == "unharmed\n", f"the witness: {line or 'has died'}"
        assert self.hypervisor.process.poll() is None

    def audit(self) -> list[str]:
        """The lines of the audit log."""
        return (self.directory / "log" / AUDIT).read_text().splitlines()

    def close(self) -> None:
        for process in [*self._rogues, *([] if self._witness is None else [self._witness])]:
            if process.poll() is None:
                process.kill()
            process.communicate()


class Handshake:
    """The attach handshake by hand, up to WELCOME, with both queues open for both directions."""

    def __init__(self, siege: Siege, name: str = "") -> None:
        self.name = name = name or siege.new_name("handshake")
        token = siege.hypervisor.enrol(name)
        flags = HelloFlag.RING if siege.ring else 0
        self.door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.door.settimeout(60)
        self.door.connect(os.fspath(siege.directory / attach.ATTACH_SOCKET))
        self.door.send(HELLO.pack(HELLO_MAGIC, ABI_REVISION, flags, name.encode(), token, b""))
        message, descriptors, _, _ = socket.recv_fds(self.door, WELCOME_BYTES, 1)
        fields = WELCOME.unpack(message)
        assert fields[3] == Status.DONE
        self.number: int = fields[4]
        self.window = mmap.mmap(descriptors[0], fields[9])
        os.close(descriptors[0])
        self.names = [field.rstrip(b"\0").decode() for field in fields[10:12]]
        self.requests, self.replies = map(posix_ipc.MessageQueue, self.names)

    def confirm(self) -> None:
        message = CONFIRM.pack(CONFIRM_MAGIC, self.number)
        self.door.send(message)
        assert self.door.recv(len(message)) == message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.door.close()
        self.window.close()
        self.requests.close()
        self.replies.close()


class Rogue:
    """A hostile guest in a process of its own."""

    def __init__(
        self,
        directory: Path,
        name: str,
        token: bytes,
        ring: bool,
        code: str,
        arguments: tuple[str, ...],
    ) -> None:
        self.name = name
        self._heard = b""
        program = (
            "import os, random, sys, threading, time\n"
            "from pathlib import Path\n"
            "from ipc import attach\n"
            "from ipc.abi import *\n"
            "from ipc.mqueue import KICK\n"
            "from tests.support.hostile import *\n"
            "directory, name = Path(sys.argv[1]), sys.argv[2]\n"
            "token, ring = bytes.fromhex(sys.argv[3]), sys.argv[4] == 'ring'\n"
            "arguments = sys.argv[5:]\n"
            "def enter():\n"
            "    return Attacker(attach.connect(directory, name, token, ring=ring), name)\n"
            "def say(*words):\n"
            "    print(*words, flush=True)\n"
            "attacker = enter()\n"
            f"{code}\n"
        )
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", program, os.fspath(directory), name, token.hex()),
                *("ring" if ring else "mqueue", *arguments),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def says(self) -> str:
        """The next line that it prints; its complaint if it has died."""
        assert self.process.stdout is not None
        # Not by way of the stream's buffer, in which select sees nothing.
        while b"\n" not in self._heard:
            assert self._stirs(_SILENCE_SECONDS), (
                f"{self.name} says nothing for {_SILENCE_SECONDS:.0f} s"
            )
            some = os.read(self.process.stdout.fileno(), 4096)
            if not some:
                _, complaint = self.process.communicate()
                raise AssertionError(f"the rogue has died: {complaint}")
            self._heard += some
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def has_said(self) -> bool:
        """Whether it has printed something, or died."""
        return bool(self._heard) or self._stirs(0)

    def _stirs(self, seconds: float) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def besieged(
    cluster: str,
    directory: Path,
    transport: str,
    *,
    arena_bytes: int = 8 << 20,
    faults_max: int = FAULTS_FOR_EVER,
) -> Iterator[Siege]:
    """A hypervisor with its witness, who like all guests asks for this transport unless it is told
    otherwise; in the end the witness is asked once more."""
    with running_hypervisor(cluster, directory, arena_bytes, faults_max=faults_max) as running:
        siege = Siege(running, transport)
        try:
            siege.unharmed()
            yield siege
            siege.unharmed()
        finally:
            siege.close()


# --- the witness, as a process


class _Witness:
    def __init__(self, directory: Path, tokens: list[bytes], *, ring: bool) -> None:
        self._directory = directory
        self._tokens = tokens
        self._ring = ring
        self._attach()
        self.persistent = self.own.pool(persist=True)
        self.ephemeral = self.own.pool()
        self.written = self.friend.pool(uuid=SHARED_UUID)
        self.read = self.own.pool(uuid=SHARED_UUID)
        self.rounds = 0

    def _attach(self) -> bool:
        """Whether the pools are there."""
        self.own, self.friend = (
            Attacker(attach.connect(self._directory, name, token, ring=self._ring), name)
            for name, token in zip(("witness", "friend"), self._tokens, strict=True)
        )
        return self.own.channel.resumed and self.friend.channel.resumed

    def come_back(self) -> None:
        """The hypervisor has been started again: every persistent page is as it was put, or as it
        was to be replaced by the call that was cut short."""
        for guest in (self.own, self.friend):
            guest.channel.close()
        if not self._attach():
            raise AssertionError("the pools are gone")
        for number in range(_WITNESS_PAGES):
            pages = [page_of(self.persistent, number, self.rounds - ago) for ago in (0, 1)]
            if self.own.get(self.persistent, number % 5, number) not in pages:
                raise AssertionError("a page did not outlive the hypervisor")
            self._done(self.own.put(self.persistent, number % 5, number, pages[0]))

    def round(self) -> None:
        """Change every page, fetch it and compare."""
        self.rounds += 1
        for number in range(_WITNESS_PAGES):
            self._own_page(self.persistent, number, may_vanish=False)
            self._own_page(self.ephemeral, number, may_vanish=True)
            page = page_of("friend", number, self.rounds)
            self._done(self.friend.put(self.written, 3, number, page))
            self._compare(self.own.get(self.read, 3, number), page, may_vanish=True)
        refused = self.own.put(self.read, 3, 0, page_of("forged"))
        if refused.reason != Reason.NOT_WRITER:
            raise AssertionError(f"a reader's put: {refused}")

    def _own_page(self, pool: int, number: int, *, may_vanish: bool) -> None:
        last = page_of(pool, number, self.rounds - 1)
        if self.rounds > 1 and not may_vanish:
            self._compare(self.own.get(pool, number % 5, number), last, may_vanish=False)
        page = page_of(pool, number, self.rounds)
        self._done(self.own.put(pool, number % 5, number, page))
        self._compare(self.own.get(pool, number % 5, number), page, may_vanish=may_vanish)

    @staticmethod
    def _done(reply: Reply) -> None:
        if reply.status != Status.DONE:
            raise AssertionError(f"not served: {reply}")

    @staticmethod
    def _compare(found: bytes | None, expected: bytes, *, may_vanish: bool) -> None:
        if found != expected and not (found is None and may_vanish):
            raise AssertionError("lost" if found is None else "a wrong page")


def _bear_witness(directory: Path, tokens: list[bytes], *, ring: bool) -> None:
    witness = _Witness(directory, tokens, ring=ring)
    asked_at = -1
    while True:
        try:
            witness.round()
        except Disconnected:
            witness.come_back()
        pause = _ROUND_SECONDS if asked_at < 0 else 0
        ready, _, _ = select.select([sys.stdin], [], [], pause)
        if ready and asked_at < 0:
            if not sys.stdin.readline():
                return
            asked_at = witness.rounds
        elif asked_at >= 0 and witness.rounds >= asked_at + 2:
            asked_at = -1
            print("unharmed", flush=True)


def _main(arguments: list[str]) -> None:
    directory, witness, friend, transport = arguments
    tokens = [bytes.fromhex(witness), bytes.fromhex(friend)]
    try:
        _bear_witness(Path(directory), tokens, ring=transport == "ring")
    except Exception as error:  # noqa: BLE001  the test is to read it
        print(f"{type(error).__name__}: {error}", flush=True)


assert len(SHARED_UUID) == UUID_BYTES

if __name__ == "__main__":
    _main(sys.argv[1:])
