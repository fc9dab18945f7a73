"""Hostile guests: too much of everything that costs nothing to send.

Requests without end, replies that are never read, kicks, words at the door, handshakes, comings and
goings.  Who floods waits behind its own; against a real hypervisor over either transport, while a
second guest goes on verifying its pages (`tests.support.hostile`).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from guests.adversaries.raw import page_of
from ipc import attach
from ipc.abi import Op, Status
from ipc.limits import HANDSHAKES_MAX, REPLY_QUEUE_MESSAGES
from ipc.logfile import LOG_BYTES_MAX
from tests.support.hostile import TRANSPORTS, Attacker, Siege, besieged, until
from tests.support.hypervisors import running_hypervisor


@pytest.fixture(scope="module", params=TRANSPORTS)
def siege(
    request: pytest.FixtureRequest,
    new_cluster_name: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Siege]:
    """One hypervisor for all tests of a transport; each has guests of its own."""
    with besieged(new_cluster_name(), tmp_path_factory.mktemp("floods"), request.param) as siege:
        yield siege


def verify(siege: Siege, calls: int = 50) -> None:
    """A guest that comes now is served, call after call, and finds its pages."""
    with siege.attacking(siege.new_name("calm")) as calm:
        pool = calm.pool(persist=True)
        for number in range(calls):
            assert calm.put(pool, 1, number % 8, page_of(number)).status == Status.DONE
            assert calm.get(pool, 1, number % 8) == page_of(number)
    siege.unharmed()


DEAF = """
request = attacker.request(Op.VERSION)
say("deaf")
while True:
    attacker.channel._requests.send(request)
"""


def test_replies_that_are_never_read(siege: Siege) -> None:
    """The hypervisor waits for no guest: a reply that finds the queue full is dropped, and
    counted."""
    deaf = siege.rogue(DEAF, ring=False)
    assert deaf.says() == "deaf"
    verify(siege)
    until(lambda: siege.guest(deaf.name)["unread_replies"] > 1000, "its replies are dropped")
    calls = siege.guest(deaf.name)["operations"]["version"]["calls"]
    assert calls > 1000 + REPLY_QUEUE_MESSAGES
    deaf.kill()


FULL = """
from ipc.mqueue import KICK
pool = attacker.pool(persist=True)
attacker.put(pool, 1, 0, page_of("full"))
messages = [
    attacker.request(Op.GET_PAGE, pool=pool, oid=1, count=64),
    attacker.request(Op.PUT_PAGE, pool=pool, oid=1, count=64),
    attacker.request(Op.GET_PAGE, pool=pool, oid=1, count=65),
    b"",
    KICK,
    bytes(64),
]
def send(number):
    while True:
        attacker.channel._requests.send(messages[number % len(messages)], number * 1000)
        number += 1
def read():
    while True:
        attacker.channel._replies.receive()
for number in range(3):
    threading.Thread(target=send, args=(number,), daemon=True).start()
threading.Thread(target=read, daemon=True).start()
say("full")
time.sleep(600)
"""


def test_queues_kept_full(siege: Siege) -> None:
    """By several guests at once, with dear calls and broken ones, at every priority; each round of
    the server takes one call of each."""
    rogues = [siege.rogue(FULL, ring=False) for _ in range(2)]
    for rogue in rogues:
        assert rogue.says() == "full"
    verify(siege)
    for rogue in rogues:
        assert siege.guest(rogue.name)["operations"]["get_page"]["calls"] > 10
        rogue.kill()


KICKS = """
from ipc.mqueue import KICK
say("kicking")
while True:
    attacker.channel._requests.send(KICK)
"""


@pytest.mark.parametrize("siege", TRANSPORTS[:1], indirect=True)
def test_a_flood_of_kicks_costs_who_kicks(siege: Siege) -> None:
    """A kick is no call: it makes the hypervisor look, and that is booked to the guest.  What has
    to be done now and then is done all the same: a handshake that nobody finishes is dropped."""
    kicker = siege.rogue(KICKS)
    assert kicker.says() == "kicking"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.settimeout(60)
        silent.connect(os.fspath(siege.directory / attach.ATTACH_SOCKET))
        assert b"took too long" in silent.recv(512)
    verify(siege)
    siege.ask("stats")
    until(lambda: siege.guest(kicker.name)["cpu_ns"] > 1_000_000, "it pays for them")
    kicker.kill()


THIEF = """
import ctypes
libc = ctypes.CDLL(None)
mine = os.open(f"/proc/self/fd/{attacker.channel._requests.mqd}", os.O_RDWR)
buffer = ctypes.create_string_buffer(64)
class Moment(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]
stolen = 0
def steal():
    global stolen
    until = Moment(int(time.time()) + 2, 0)
    if libc.mq_timedreceive(mine, buffer, 64, None, ctypes.byref(until)) == 1:
        stolen += 1
say("stealing")
while True:
    before = stolen
    for _ in range(20):
        attacker.call(Op.VERSION)
    thread = threading.Thread(target=steal)
    thread.start()
    time.sleep(0.002)
    # The hypervisor stands in line before the thief; what it is sent makes it queue up behind.
    attacker.channel._requests.send(attacker.request(Op.VERSION))
    thread.join()
    if stolen > before:
        # Silent now, or the hypervisor would come back for this guest's own calls.
        say("stolen")
        time.sleep(1)
"""


def test_a_guest_that_takes_the_kicks_out_of_its_queue(cluster_name: str, tmp_path: Path) -> None:
    """While one guest alone is calling, the server sleeps in its queue, and a kick there tells it
    that somebody else waits.  This guest opens its own queue for reading and takes the kick away,
    and then is silent: the other one is heard all the same.  There is no witness, which would not
    leave it alone for long enough."""
    with (
        running_hypervisor(cluster_name, tmp_path) as running,
        closing(Siege(running, TRANSPORTS[0], witness=False)) as siege,
    ):
        thief = siege.rogue(THIEF, ring=False)
        assert thief.says() == "stealing"
        with siege.attacking(siege.new_name("calm")) as calm:
            for _ in range(2):
                while not thief.has_said():
                    time.sleep(0.007)
                    assert calm.call(Op.VERSION).status == Status.DONE
                assert thief.says() == "stolen"
                assert calm.call(Op.VERSION).status == Status.DONE


DOOR = """
door = attacker.channel._door
say("talking")
words = [b"x", bytes(512), b"TMOK" + bytes(4), b"TMBY", b"TMBY" + bytes(5)]
number = 0
while True:
    door.send(words[number % len(words)])
    number += 1
"""


def test_a_flood_of_words_at_the_door(siege: Siege) -> None:
    """An attached guest has nothing to say there but BYE; the rest is read and dropped, one message
    a round."""
    talker = siege.rogue(DOOR)
    assert talker.says() == "talking"
    verify(siege)
    assert siege.guest(talker.name)["attached"]
    talker.kill()


KNOCKS = """
import socket
from ipc.attach import ATTACH_SOCKET
say("knocking")
doors = []
while True:
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    door.connect(str(directory / ATTACH_SOCKET))
    doors.append(door)
    if len(doors) > 40:
        doors.pop(0).close()
    if len(doors) == 40:
        time.sleep(0.001)
"""


def test_handshakes_that_nobody_finishes_keep_nobody_out(siege: Siege) -> None:
    """One process opens doors and says nothing, more of them than there may be: another one still
    gets in, as often as it likes, because the one that holds most has to make way."""
    knocker = siege.rogue(KNOCKS)
    assert knocker.says() == "knocking"
    assert HANDSHAKES_MAX < 40
    for _ in range(10):
        verify(siege, calls=1)
    knocker.kill()


COMING = """
say("coming and going")
while True:
    attacker.pool(persist=True)
    attacker.put(0, 1, 0, page_of("mayfly"))
    attacker.detach()
    attacker = enter()
"""


def test_coming_and_going_without_end(siege: Siege) -> None:
    """Each time a client, a pool and a page come and go; nothing of it stays, and the log does not
    grow beyond its bound."""
    before = descriptors(siege)
    mayfly = siege.rogue(COMING)
    assert mayfly.says() == "coming and going"
    verify(siege)
    mayfly.kill()
    until(lambda: mayfly.name not in siege.ask("stats")["guests"], "it has gone")
    until(lambda: descriptors(siege) <= before, "its descriptors are closed")
    logs = sum(path.stat().st_size for path in (siege.directory / "log").iterdir())
    assert logs < 2 * LOG_BYTES_MAX


def descriptors(siege: Siege) -> int:
    """Open files of the hypervisor."""
    return len(list(Path(f"/proc/{siege.hypervisor.process.pid}/fd").iterdir()))


STRANGER = """
from ipc.errors import OperatorError
attacker.detach()
say("knocking")
number = 0
while True:
    try:
        attach.connect(directory, name, bytes([number % 256]) * 32, ring=ring)
    except OperatorError:
        number += 1
        if number == 300:
            say("refused")
"""


def test_wrong_tokens_without_end_are_limited_in_the_logs(siege: Siege) -> None:
    """Each refusal is told to whoever knocked; the audit log has as many lines of it as of any
    other guest's faults, the hypervisor's own log none."""
    log = siege.directory / "log" / "hypervisor.log"
    stranger = siege.rogue(STRANGER)
    assert stranger.says() == "knocking"
    assert stranger.says() == "refused"
    # What others of this hypervisor were refused for may have used up the lines of this second.
    until(lambda: any("not enrolled" in line for line in siege.audit()), "a line of the audit log")
    refusals = [line for line in siege.audit() if "event=refused" in line]
    assert 1 <= len(refusals) < 250
    assert "refused" not in log.read_text()
    verify(siege)
    stranger.kill()


HOARD = """
pools = [attacker.pool(persist=number % 2 == 0) for number in range(8)]
say("hoarding")
choose = random.Random(3)
number = 0
while True:
    pool = pools[number % 8]
    for slot in range(64):
        attacker.window.slot(slot)[:8] = number.to_bytes(8, "little")
        attacker.window.slot(slot)[4088:] = os.urandom(8)
    attacker.call(Op.PUT_PAGE, pool=pool, oid=choose.randrange(1 << 20), count=64)
    number += 1
"""


def test_memory_kept_full(siege: Siege) -> None:
    """Guests that put all the time, ephemeral and persistent pages: each keeps to its part, and
    what another guest puts within its own is never refused."""
    rogues = [siege.rogue(HOARD) for _ in range(2)]
    for rogue in rogues:
        assert rogue.says() == "hoarding"
    until(lambda: siege.ask("stats")["evictions"] > 2000, "the arena is full")
    verify(siege, calls=60)
    frames = siege.ask("stats")["arena"]["frames"]
    for rogue in rogues:
        # An allotment is smaller with each guest that comes, but what it allowed stays.
        assert siege.guest(rogue.name)["persistent_pages"] <= frames // 3
        rogue.kill()


def test_many_guests_that_do_nothing(siege: Siege) -> None:
    """Attached and silent: they cost a place in a table."""
    with ExitStack() as stack:
        idlers: list[Attacker] = [stack.enter_context(siege.attacking()) for _ in range(24)]
        verify(siege)
        assert all(idler.call(Op.VERSION).status == Status.DONE for idler in idlers)
