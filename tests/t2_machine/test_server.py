"""The hypervisor as a process, over real queues: life, death, floods, figures."""

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
from tests.support.hypervisors import ROOT, RunningHypervisor, running_hypervisor


@pytest.fixture
def hypervisor(cluster_name: str, tmp_path: Path) -> Iterator[RunningHypervisor]:
    """A hypervisor process of this test's own."""
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


def test_a_deaf_guest_is_counted_and_holds_nobody_up(hypervisor: RunningHypervisor) -> None:
    """It sends without ever reading; its replies are dropped, another guest is served."""
    deaf = hypervisor.attach("deaf")
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


def test_a_flood_costs_only_the_flooding_guest(hypervisor: RunningHypervisor) -> None:
    """With one guest's queue kept full, every round of the server still serves the other."""
    code = (
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
