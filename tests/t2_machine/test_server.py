"""The hypervisor as a process, over either transport: life, death, floods, figures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import posix_ipc
import pytest

from ipc import attach
from ipc.abi import PAGE_BYTES, REQUEST, Op, Reason, Status, oid_from_int
from ipc.errors import Disconnected, ExitCode, OperatorError
from ipc.limits import REPLY_QUEUE_MESSAGES
from ipc.mqueue import KICK
from ipc.ring import memory_order_suffices
from tests.support.hypervisors import ROOT, RunningHypervisor, running_hypervisor

TRANSPORTS = ["mqueue", "ring"] if memory_order_suffices() else ["mqueue"]


@pytest.fixture(params=TRANSPORTS)
def hypervisor(
    cluster_name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[RunningHypervisor]:
    """A hypervisor process of this test's own, whose guests all have the same transport."""
    with running_hypervisor(cluster_name, tmp_path, transport=request.param) as running:
        yield running


@pytest.fixture
def mixed(cluster_name: str, tmp_path: Path) -> Iterator[RunningHypervisor]:
    """One that gives guests what they ask for."""
    with running_hypervisor(cluster_name, tmp_path) as running:
        yield running


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that is bound to happen; generous, because nothing is timed here."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def start_guest(hypervisor: RunningHypervisor, name: str, code: str) -> subprocess.Popen[str]:
    """A guest as a process of its own: `guest` is a RawGuest; it says "ready" when `code` is done
    and then sleeps."""
    token = hypervisor.enrol(name)
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from ipc import attach\n"
        "from ipc.abi import Op\n"
        "from tests.support.hypervisors import RawGuest\n"
        "channel = attach.connect(Path(sys.argv[1]), sys.argv[2], bytes.fromhex(sys.argv[3]))\n"
        "guest = RawGuest(channel)\n"
        f"{code}\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, os.fspath(hypervisor.run_directory), name, token.hex()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    """SIGKILL and reap."""
    process.kill()
    process.communicate()


def test_a_killed_guest_is_noticed_and_its_pages_come_back(hypervisor: RunningHypervisor) -> None:
    """By its pidfd; the other guest keeps what it has."""
    survivor = hypervisor.attach("survivor")
    pool = survivor.new_pool(persist=True)
    survivor.channel.window.slot(0)[:] = b"s" * PAGE_BYTES
    survivor.call(Op.PUT_PAGE, pool, 1, 0, 1)
    code = (
        "pool = guest.new_pool(persist=True)\n"
        "for oid in range(4): guest.call(Op.PUT_PAGE, pool, oid, 0, 64)"
    )
    victim = start_guest(hypervisor, "victim", code)
    assert hypervisor.ask("stats")["guests"]["victim"]["persistent_pages"] == 256

    end(victim)

    until(lambda: "victim" not in hypervisor.ask("stats")["guests"], "the guest departs")
    until(lambda: hypervisor.ask("stats")["arena"]["persistent_pages"] == 1, "its frames are freed")
    survivor.channel.window.slot(0)[:] = bytes(PAGE_BYTES)
    assert survivor.call(Op.GET_PAGE, pool, 1, 0, 1).status == Status.DONE
    assert bytes(survivor.channel.window.slot(0)) == b"s" * PAGE_BYTES
    survivor.detach()


def test_a_guest_comes_back_to_its_pages_after_sigkill(hypervisor: RunningHypervisor) -> None:
    """Same segment, next generation, by the same door."""
    guest = hypervisor.attach("guest")
    pool = guest.new_pool(persist=True)
    guest.channel.window.slot(0)[:] = b"p" * PAGE_BYTES
    guest.call(Op.PUT_PAGE, pool, 1, 0, 1)

    hypervisor.kill()
    with pytest.raises(Disconnected):
        guest.call(Op.GET_PAGE, pool, 1, 0, 1)
    guest.channel.close()
    hypervisor.start()
    again = hypervisor.attach("guest")

    assert again.channel.resumed
    assert again.channel.generation == guest.channel.generation + 1
    assert again.call(Op.GET_PAGE, pool, 1, 0, 1).status == Status.DONE
    assert bytes(again.channel.window.slot(0)) == b"p" * PAGE_BYTES
    again.detach()


def test_a_guest_that_died_while_the_hypervisor_was_down_is_departed(
    hypervisor: RunningHypervisor,
) -> None:
    """Nobody will ever come back for its pages."""
    code = "guest.call(Op.PUT_PAGE, guest.new_pool(persist=True), 1, 0, 64)"
    victim = start_guest(hypervisor, "victim", code)
    hypervisor.kill()
    end(victim)

    hypervisor.start()
    hypervisor.attach("other").detach()

    until(lambda: hypervisor.ask("stats")["arena"]["persistent_pages"] == 0, "frames are freed")
    assert hypervisor.ask("stats")["guests"] == {}


def test_bye_gives_the_pools_back(hypervisor: RunningHypervisor) -> None:
    """A program that detaches is gone at once, though its process lives on."""
    guest = hypervisor.attach("guest")
    guest.call(Op.PUT_PAGE, guest.new_pool(persist=True), 1, 0, 64)
    guest.detach()

    until(lambda: hypervisor.ask("stats")["guests"] == {}, "the guest departs")
    again = hypervisor.attach("guest")
    assert not again.channel.resumed
    again.detach()


def test_a_name_is_one_living_process_at_a_time(hypervisor: RunningHypervisor) -> None:
    """A second process with the right token is refused while the first lives."""
    first = start_guest(hypervisor, "guest", "")

    with pytest.raises(OperatorError, match=f"attached by process {first.pid}"):
        hypervisor.attach("guest")

    end(first)
    until(lambda: hypervisor.ask("stats")["guests"] == {}, "the first departs")
    hypervisor.attach("guest").detach()


def test_a_deaf_guest_is_counted_and_holds_nobody_up(mixed: RunningHypervisor) -> None:
    """It sends without ever reading; its replies are dropped, another guest is served."""
    hypervisor = mixed
    deaf = hypervisor.attach("deaf", ring=False)
    other = hypervisor.attach("other")
    request = REQUEST.pack(0, Op.VERSION, 0, 0, 0, 0, oid_from_int(0), 0, 0, 0)
    sent = 0
    while sent < 50:
        try:
            deaf.channel._requests.send(request, 1)  # a client of its own making
            sent += 1
        except posix_ipc.BusyError:
            pytest.fail("the hypervisor stopped taking requests")

    for _ in range(20):
        assert other.call(Op.VERSION).status == Status.DONE
    until(
        lambda: (
            hypervisor.ask("stats")["guests"]["deaf"]["unread_replies"] == 50 - REPLY_QUEUE_MESSAGES
        ),
        "its replies are dropped",
    )
    other.detach()
    deaf.detach()


RING_FLOOD = (
    "import threading\n"
    "from ipc.abi import REQUEST, oid_from_int\n"
    "window = guest.channel.window\n"
    "window.request[:] = REQUEST.pack(0, Op.VERSION, 0, 0, 0, 0, oid_from_int(0), 0, 0, 0)\n"
    "def flood():\n"
    "    number = 1\n"
    "    while True:\n"
    "        number += 1\n"
    "        window.call_words[0] = number\n"
    "        if number % 100 == 0:\n"
    "            guest.channel._ring()\n"
    "threading.Thread(target=flood, daemon=True).start()"
)
"""A guest of a ring that never waits for an answer."""


@pytest.mark.parametrize("flooders", [1, 3])
@pytest.mark.parametrize("ring", [False, True])
def test_a_flood_through_rings_costs_only_the_flooding_guests(
    mixed: RunningHypervisor, flooders: int, ring: bool
) -> None:
    """Guests that post all the time, without reading; others are served, whatever they use."""
    processes = [start_guest(mixed, f"flooder{number}", RING_FLOOD) for number in range(flooders)]
    other = mixed.attach("other", ring=ring)

    for _ in range(300):
        assert other.call(Op.VERSION).status == Status.DONE

    until(
        lambda: all(
            mixed.ask("stats")["guests"][f"flooder{number}"]["operations"]["version"]["calls"] > 100
            for number in range(flooders)
        ),
        "the floods are served too",
    )
    for process in processes:
        end(process)
    other.detach()


HOSTILE_RING = (
    "import random, threading\n"
    "from ipc.abi import CALL_BLOCK, COMPLETION_BLOCK\n"
    "from ipc.limits import WINDOW_CALL_OFFSET, WINDOW_COMPLETION_OFFSET\n"
    "view = guest.channel.window._view\n"
    "choose = random.Random(int(sys.argv[2][-1]))\n"
    "def scribble():\n"
    "    while True:\n"
    "        start, size = choose.choice((\n"
    "            (WINDOW_CALL_OFFSET, CALL_BLOCK.size),\n"
    "            (WINDOW_COMPLETION_OFFSET, COMPLETION_BLOCK.size),\n"
    "            (WINDOW_CALL_OFFSET, 16),\n"
    "            (0, 4 * 4096),\n"
    "        ))\n"
    "        at = start + choose.randrange(size)\n"
    "        size = min(size + start - at, choose.choice((1, 2, 7, 8, 64)))\n"
    "        view[at : at + size] = choose.choice((bytes(size), choose.randbytes(size)))\n"
    "        if choose.random() < 0.02:\n"
    "            guest.channel._ring()\n"
    "for _ in range(2): threading.Thread(target=scribble, daemon=True).start()"
)
"""A guest that writes anything anywhere in the blocks of its window, from two threads."""


@pytest.mark.parametrize("ring", [False, True])
def test_a_guest_that_scribbles_over_its_ring_harms_nobody(
    mixed: RunningHypervisor, ring: bool
) -> None:
    """Wild numbers, torn requests, false flags: another guest's pages are as they were."""
    vandals = [start_guest(mixed, f"vandal{number}", HOSTILE_RING) for number in range(2)]
    other = mixed.attach("other", ring=ring)
    pool = other.new_pool(persist=True)
    for number in range(300):
        other.channel.window.slot(0)[:] = number.to_bytes(2, "little") * (PAGE_BYTES // 2)
        assert other.call(Op.PUT_PAGE, pool, 1, number % 40, 1).status == Status.DONE
        other.channel.window.slot(0)[:] = bytes(PAGE_BYTES)
        assert other.call(Op.GET_PAGE, pool, 1, number % 40, 1).status == Status.DONE
        assert other.channel.window.slot(0)[:2] == number.to_bytes(2, "little")
    for vandal in vandals:
        end(vandal)
    until(lambda: list(mixed.ask("stats")["guests"]) == ["other"], "the vandals depart")
    other.detach()


def test_a_guest_that_left_its_ring_in_disorder_keeps_nobody_awake(
    mixed: RunningHypervisor,
) -> None:
    """A call posted, flags set, the request garbled, and then silence: the hypervisor sleeps."""
    guest = mixed.attach("guest")
    guest.channel.window.call_words[1] = 1
    for number in range(5):
        guest.channel.window.request[:] = os.urandom(64)
        guest.channel.window.call_words[0] = number * 2**60 + 1
        guest.channel._requests.send(KICK, 0)
    tasks = Path(f"/proc/{mixed.process.pid}/task/{mixed.process.pid}")

    def sleeps() -> bool:
        return (tasks / "stat").read_text().rpartition(")")[2].split()[0] == "S"

    for _ in range(3):
        until(lambda: all(sleeps() for _ in range(20)), "the hypervisor sleeps")
    guest.detach()


def test_guests_of_both_transports_are_served_together(mixed: RunningHypervisor) -> None:
    """Each asks for what it wants, their calls alternate, and each finds its own pages."""
    guests = [mixed.attach(f"guest{number}", ring=number % 2 == 0) for number in range(6)]
    pools = [guest.new_pool(persist=True) for guest in guests]
    for index in range(50):
        for number, (guest, pool) in enumerate(zip(guests, pools, strict=True)):
            guest.channel.window.slot(0)[:] = bytes([number, index]) * (PAGE_BYTES // 2)
            assert guest.call(Op.PUT_PAGE, pool, 1, index, 1).status == Status.DONE
    for index in range(50):
        for number, (guest, pool) in enumerate(zip(guests, pools, strict=True)):
            assert guest.call(Op.GET_PAGE, pool, 1, index, 1).status == Status.DONE
            assert guest.channel.window.slot(0)[:2] == bytes([number, index])
    for guest in guests:
        guest.detach()
    log = (mixed.run_directory / "log" / "hypervisor.log").read_text()
    assert log.count("event=transport ") == 1
    if memory_order_suffices():
        assert log.count("transport=ring") == 1 + 3
    assert log.count("event=attached") == 6


def test_a_ring_that_is_not_granted_is_done_without(cluster_name: str, tmp_path: Path) -> None:
    """The cluster's operator may want queues."""
    with running_hypervisor(cluster_name, tmp_path, transport="mqueue") as running:
        guest = running.attach("guest", ring=True)
        assert guest.call(Op.VERSION).status == Status.DONE
        guest.detach()


def test_a_flood_costs_only_the_flooding_guest(mixed: RunningHypervisor) -> None:
    """With one guest's queue kept full, every round of the server still serves the other."""
    hypervisor = mixed
    code = (
        "guest.channel.close()\n"
        "channel = attach.connect(\n"
        "    Path(sys.argv[1]), sys.argv[2], bytes.fromhex(sys.argv[3]), ring=False)\n"
        "guest = RawGuest(channel)\n"
        "import threading\n"
        "from ipc.abi import REQUEST, oid_from_int\n"
        "request = REQUEST.pack(0, Op.VERSION, 0, 0, 0, 0, oid_from_int(0), 0, 0, 0)\n"
        "def flood():\n"
        "    while True: guest.channel._requests.send(request)\n"
        "def drain():\n"
        "    while True: guest.channel._replies.receive()\n"
        "for work in (flood, drain): threading.Thread(target=work, daemon=True).start()"
    )
    flooder = start_guest(hypervisor, "flooder", code)
    other = hypervisor.attach("other")
    start = hypervisor.ask("stats")["guests"]["flooder"]["operations"].get("version", {"calls": 0})

    for _ in range(300):
        assert other.call(Op.VERSION).status == Status.DONE

    flooded = hypervisor.ask("stats")["guests"]["flooder"]["operations"]["version"]["calls"]
    assert flooded > start["calls"], "the flood was served too"
    end(flooder)
    other.detach()


def test_the_figures_agree_with_each_other_and_with_the_kernel(
    hypervisor: RunningHypervisor,
) -> None:
    """CPU time of all guests and the rest is the process's own; calls and latencies match."""
    guests = [hypervisor.attach(f"guest{n}") for n in range(3)]
    for guest in guests:
        pool = guest.new_pool(persist=False)
        for index in range(200):
            guest.call(Op.PUT_PAGE, pool, 1, index * 32, 32)
            guest.call(Op.GET_PAGE, pool, 1, index * 32, 16)

    stats = hypervisor.ask("stats")

    booked = sum(record["cpu_ns"] for record in stats["guests"].values())
    assert booked + stats["cpu_overhead_ns"] == round(stats["cpu_seconds"] * 1e9)
    assert booked > 0
    assert stats["hypercalls"] == 3 * 401
    assert stats["pages_put"] == 3 * 200 * 32
    assert stats["pages_got"] == sum(r["cleancache"]["succ_gets"] for r in stats["guests"].values())
    for record in stats["guests"].values():
        for operation in record["operations"].values():
            assert operation["latency_ns"]["max"] >= operation["latency_ns"]["p50"] > 0
    ticks = Path(f"/proc/{hypervisor.process.pid}/stat").read_text().rpartition(")")[2].split()
    used_seconds = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
    assert stats["cpu_seconds"] <= used_seconds + 2 / os.sysconf("SC_CLK_TCK")
    for guest in guests:
        guest.detach()


def test_faults_are_answered_and_counted(hypervisor: RunningHypervisor) -> None:
    """A malformed message over a real queue costs its sender a count and nothing else."""
    guest = hypervisor.attach("guest")

    reply = guest.call(Op.PUT_PAGE, 0, 1, 0, 65)

    assert reply.reason == Reason.BAD_COUNT
    assert hypervisor.ask("stats")["guests"]["guest"]["faults"] == {"bad_count": 1}
    guest.detach()


def test_stop_and_sigterm_leave_nothing(cluster_name: str, tmp_path: Path) -> None:
    """No segment, no queue, no registry entry, no socket."""
    for number, verb in enumerate(("stop", "")):
        directory = tmp_path / str(number)
        directory.mkdir()
        with running_hypervisor(cluster_name, directory) as running:
            running.attach("guest").detach()
            if verb:
                running.ask(verb)
                running.process.communicate(timeout=20)
            else:
                running.stop()
            assert running.process.returncode == 0
            assert list((directory / "registry").iterdir()) == []
            left = {path.name for path in directory.iterdir()}
            assert left == {"registry", "guests", "log"}


def test_the_hypervisor_ends_with_its_supervisor(cluster_name: str, tmp_path: Path) -> None:
    """Whoever started it and was killed leaves no hypervisor behind."""
    supervisor = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with running_hypervisor(cluster_name, tmp_path) as running:
        running.stop()
        running.supervisor_pid = supervisor.pid
        running.start()
        guest = running.attach("guest")
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait()

        running.process.communicate(timeout=20)
        guest.channel.close()

        assert running.process.returncode == 0
        assert list((tmp_path / "registry").iterdir()) == []


def test_an_arena_that_does_not_fit_is_one_line_and_an_exit_code(
    cluster_name: str, tmp_path: Path
) -> None:
    """Not a SIGBUS an hour later."""
    with running_hypervisor(cluster_name, tmp_path, arena_bytes=1 << 50) as running:
        _, errors = running.process.communicate(timeout=20)

        assert running.process.returncode == ExitCode.UNAVAILABLE
        assert errors.count("\n") == 1
        assert "choose a smaller arena" in errors


def test_a_stranger_is_turned_away_with_the_reason(hypervisor: RunningHypervisor) -> None:
    """Wrong token, unknown name."""
    hypervisor.enrol("guest")
    for name in ("guest", "nobody"):
        with pytest.raises(OperatorError, match="not enrolled"):
            attach.connect(hypervisor.run_directory, name, bytes(32))
