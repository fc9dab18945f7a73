"""What guests are told in their windows, by a real hypervisor and between real processes; and that
the walker notices a wrong count of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hypervisor.invariants
from hypervisor.administration import Administration
from hypervisor.arena import layout, private_arena
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pools import Client
from hypervisor.pressure import WRITEBACK_PAGES_MAX
from ipc.abi import PAGE_BYTES, Op, Reason, Status, oid_from_int, pool_flag_word
from ipc.errors import InvariantError
from ipc.ring import memory_order_suffices
from ipc.window import BALLOON_PAGES_MAX, SHARED_INFO, SharedInfo
from tests.support.clusters import wait_until
from tests.support.hostile import Handshake, Siege
from tests.support.hypervisors import ROOT, RunningHypervisor, running_hypervisor
from tests.t2_machine.test_semantics import Guest

TRANSPORTS = ["mqueue", "ring"] if memory_order_suffices() else ["mqueue"]

PROGRAM = """
import random, sys
from pathlib import Path
from guests.api import Tmem

name = sys.argv[2]
tmem = Tmem.connect(Path(sys.argv[1]), name, bytes.fromhex(sys.argv[3]))
pool = tmem.pool(persist=True)
stored, disk = set(), set()


def page(number):
    return random.Random(f"{name} {number}").randbytes(4096)


def fill():
    while pool.put(1, number := max(stored | disk, default=-1) + 1, page(number)):
        stored.add(number)
    return len(stored)


def window():
    return " ".join(map(str, tmem.calls.channel.window.info()))


def write_back(count):
    for number in sorted(stored)[: int(count)]:
        assert pool.get(1, number) == page(number)
        disk.add(number)
        stored.remove(number)
        pool.flush_page(1, number)
    return len(stored)


def verify():
    return sum(pool.get(1, number) == page(number) for number in stored)


for line in sys.stdin:
    verb, *words = line.split()
    print(globals()[verb](*words), flush=True)
tmem.close()
"""


class Program:
    """An ordinary program with a persistent pool (`guests.api`), in a process of its own."""

    def __init__(self, running: RunningHypervisor, name: str) -> None:
        token = running.enrol(name)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", PROGRAM),
                *(os.fspath(running.run_directory), name, token.hex()),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def window(self) -> SharedInfo:
        return SharedInfo(*map(int, self.say("window").split()))

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(params=TRANSPORTS)
def running(
    cluster_name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[RunningHypervisor]:
    """A hypervisor process with an arena of 4 MiB."""
    with running_hypervisor(cluster_name, tmp_path, transport=request.param) as one:
        yield one


@pytest.fixture
def start(running: RunningHypervisor) -> Iterator[Callable[[str], Program]]:
    """Starts programs, and kills those that are still there."""
    programs: list[Program] = []

    def starting(name: str) -> Program:
        programs.append(Program(running, name))
        return programs[-1]

    yield starting
    for program in programs:
        program.kill()


def guest(running: RunningHypervisor, name: str) -> Any:
    """What the administrator's `list` says of a guest."""
    return running.ask("list")["guests"][name]


def test_whoever_holds_too_much_is_asked_by_anothers_refused_put(
    running: RunningHypervisor, start: Callable[[str], Program]
) -> None:
    """Alone alpha may fill the arena; from then on half of it is bravo's."""
    alpha = start("alpha")
    held = int(alpha.say("fill"))
    bravo = start("bravo")
    assert bravo.window() == alpha.window() == SharedInfo(1, 0, 0, 0)

    assert bravo.say("fill") == "0"

    asked = alpha.window()
    assert asked.notifications >= 1
    assert asked.writeback_pages == WRITEBACK_PAGES_MAX
    assert bravo.window().notifications == 0
    record = guest(running, "alpha")
    assert record["persistent_pages"] == held
    assert record["persistent_bytes"] - record["allotment_bytes"] == record["persistent_over_bytes"]
    assert record["persistent_over_bytes"] > WRITEBACK_PAGES_MAX * PAGE_BYTES
    assert record["writeback_asked_pages"] >= WRITEBACK_PAGES_MAX
    assert record["writeback_done_pages"] == 0

    # Alpha does nothing: it is asked again by a put after a second, and counts as asked twice.
    wait_until(
        lambda: bravo.say("fill") == "0" and alpha.window().notifications > asked.notifications,
        "an idle guest is asked again",
    )
    asked = alpha.window()
    assert guest(running, "alpha")["writeback_asked_pages"] >= 2 * WRITEBACK_PAGES_MAX

    # Bravo stores what alpha has made room for; the put behind it is refused, and asks again.
    taken_back = 0
    over = True
    while over:
        taken_back += asked.writeback_pages
        held -= asked.writeback_pages
        assert alpha.say(f"write_back {asked.writeback_pages}") == str(held)
        assert guest(running, "alpha")["writeback_done_pages"] == taken_back
        half_pages = guest(running, "bravo")["allotment_bytes"] // PAGE_BYTES
        assert bravo.say("fill") == str(min(taken_back, half_pages))
        before, asked = asked, alpha.window()
        over = guest(running, "alpha")["persistent_over_bytes"] > 0
        if over:
            assert asked.notifications > before.notifications
            assert 0 < asked.writeback_pages <= WRITEBACK_PAGES_MAX

    # Both have their half: now it is bravo that is told to make do, and nobody is asked.
    theirs = bravo.say("fill")
    assert alpha.window() == asked
    assert bravo.window().notifications == 0
    assert guest(running, "bravo")["persistent_over_bytes"] == 0
    assert alpha.say("verify") == str(held)
    assert bravo.say("verify") == theirs
    alpha.close()
    bravo.close()


def test_a_target_is_told_at_once_at_attach_and_after_a_crash(running: RunningHypervisor) -> None:
    """To a guest that is there, to one that comes, and again when it is said again."""
    first = running.attach("first")
    window = first.channel.window
    assert window.info() == SharedInfo(1, 0, 0, 0)

    for count in (1, 2):
        answer = running.ask("balloon", guest="first", size_bytes=8 << 20)
        assert answer == {"balloon_bytes": {"first": 8 << 20}}
        assert window.info() == SharedInfo(1, count, 2048, 0)
    running.ask("balloon", guest="second", size_bytes=PAGE_BYTES * BALLOON_PAGES_MAX)
    second = running.attach("second")
    assert second.channel.window.info() == SharedInfo(1, 0, BALLOON_PAGES_MAX, 0)
    assert window.info().notifications == 2

    running.kill()
    first.channel.close()
    second.channel.close()
    running.start()
    first, second = running.attach("first"), running.attach("second")
    assert first.channel.window.info() == SharedInfo(2, 0, 2048, 0)
    assert second.channel.window.info() == SharedInfo(2, 0, BALLOON_PAGES_MAX, 0)
    running.ask("balloon", guest="first", size_bytes=0)
    assert first.channel.window.info() == SharedInfo(2, 1, 0, 0)
    assert running.ask("balloon")["balloon_bytes"].keys() == {"second"}
    first.detach()
    second.detach()


def test_what_is_said_during_a_handshake_is_told_when_it_is_over(
    cluster_name: str, tmp_path: Path
) -> None:
    """The guest has the window from WELCOME on, the hypervisor writes there from CONFIRM on."""
    with running_hypervisor(cluster_name, tmp_path) as running:
        siege = Siege(running, "mqueue", witness=False)
        with Handshake(siege, "late") as shaking:
            running.ask("balloon", guest="late", size_bytes=PAGE_BYTES)

            shaking.confirm()

            running.ask("ping")
            fields = SHARED_INFO.unpack_from(shaking.window)
            assert fields == (b"TMWI", 1, 1, 0, 1, bytes(16))
        siege.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine with a small arena that is consistent at the end."""
    made = Machine(private_arena(layout(64).end))
    yield made
    check(made)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "size_bytes is a whole number"),
        ({"size_bytes": "8M"}, "size_bytes is a whole number"),
        ({"size_bytes": True}, "size_bytes is a whole number"),
        ({"size_bytes": -1}, "size_bytes is a whole number"),
        ({"size_bytes": 1 << 44}, "size_bytes is a whole number"),
        ({"size_bytes": 4095}, "less than a page"),
        ({"guest": "al pha", "size_bytes": 4096}, "no name of a guest"),
        ({"guest": 7, "size_bytes": 4096}, "no name of a guest"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(
    machine: Machine, fields: dict[str, Any], says: str
) -> None:
    """In words; nothing is kept, and nobody is told."""
    kept: list[None] = []
    administration = Administration(machine, changed=lambda: kept.append(None))
    administration.answer({"verb": "balloon", "guest": "alpha", "size_bytes": 1 << 20})
    alpha = Guest(machine, "alpha")

    answer = administration.answer({"verb": "balloon", "guest": "alpha", **fields})

    assert says in answer["error"]
    assert alpha.client.wishes.notifications == 0
    assert administration.answer({"verb": "balloon"}) == {"balloon_bytes": {"alpha": 1 << 20}}
    assert len(kept) == 1


def full(machine: Machine) -> tuple[Guest, Guest]:
    """A guest that holds all frames, and one that came later, both with a persistent pool 0."""
    guests = []
    for name in ("alpha", "bravo"):
        guests.append(Guest(machine, name))
        guests[-1].call(Op.NEW_POOL, pool_flag_word(persist=True))
        if name == "alpha":
            texts = [f"page {number}" for number in range(64)]
            assert guests[0].put(0, 1, 0, *texts).status == Status.DONE
    return guests[0], guests[1]


def test_a_call_looks_once_for_whom_to_ask(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of its pages were refused (W5)."""
    alpha, bravo = full(machine)
    looks: list[str] = []
    right = machine.pressure.refused

    def counted(client: Client) -> None:
        looks.append(client.name)
        right(client)

    monkeypatch.setattr(machine.pressure, "refused", counted)
    entries = [(0, number, 0, 0, oid_from_int(number), 0) for number in range(64)]
    bravo.window.write_table(entries)

    assert bravo.call(Op.PUT_BATCH, count=64).map == 0
    assert looks == ["bravo"]
    assert bravo.put(0, 1, 0, *["x"] * 64).map == 0
    assert looks == ["bravo"] * 2
    assert alpha.get(0, 1, 0) == ["page 0"]
    alpha.call(Op.FLUSH_PAGE, 0, 1, 0, 64)
    assert looks == ["bravo"] * 2


def test_nobody_is_asked_while_flushed_pages_wait(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a call that may reap no more: what room it lacks is on its way, and pages that wait are
    charged as if they were there."""
    alpha, bravo = full(machine)
    alpha.call(Op.FLUSH_OBJECT, 0, 1)
    monkeypatch.setattr("hypervisor.reclaim.SLICES_A_CALL", 0)

    assert bravo.put(0, 1, 0, "x").reason == Reason.NO_MEMORY
    assert alpha.client.over_bytes > 0
    assert alpha.client.wishes.notifications == 0

    monkeypatch.undo()
    assert bravo.put(0, 1, 0, "x").status == Status.DONE


def test_what_a_guest_did_stays_counted_when_it_has_gone(machine: Machine) -> None:
    """With the accounts of all that have left."""
    alpha, bravo = full(machine)
    bravo.put(0, 1, 0, "x")
    alpha.call(Op.FLUSH_PAGE, 0, 1, 0, 5)
    machine.depart(alpha.client)

    departed = machine.departed.record()

    assert departed["writeback_asked_pages"] == 32
    assert departed["writeback_done_pages"] == 5


def _never_asked(client: Client) -> None:
    client.wishes.writeback_pages = 1


def _asked_too_much(client: Client) -> None:
    client.account.writeback_asked_pages = client.wishes.writeback_pages = 257


def _done_unasked(client: Client) -> None:
    client.account.writeback_done_pages = 1


def _half_a_page(client: Client) -> None:
    client.settings.balloon_bytes = 2048


@pytest.mark.parametrize("tamper", [_never_asked, _asked_too_much, _done_unasked, _half_a_page])
def test_the_walker_notices_wishes_that_nobody_had(tamper: Callable[[Client], None]) -> None:
    """Each way in which the counts can contradict each other."""
    machine = Machine(private_arena(layout(64).end))
    alpha, _ = full(machine)
    tamper(alpha.client)

    with pytest.raises(InvariantError, match=r"alpha (was asked|should have)"):
        check(machine)


def test_the_walker_counts_persistent_pages_by_the_segment_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even where counts and leaves agree with each other."""
    machine = Machine(private_arena(layout(64).end))
    _, bravo = full(machine)
    # As if a restart would give them to somebody else.
    records = [
        record._replace(guest=bravo.client.number) for record in machine.store.arena.read_pools()
    ]
    monkeypatch.setattr(machine.store.arena, "read_pools", lambda: records)
    monkeypatch.setattr(hypervisor.invariants, "_check_records", lambda *_: None)

    with pytest.raises(InvariantError, match="alpha counts 64 of 0 persistent pages"):
        check(machine)
