"""The mesh of one cluster: links that come up, carry messages, break and come back."""

from __future__ import annotations

import collections
import itertools
import random
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.errors import OperatorError
from ipc.mesh.addresses import TcpAddress, UnixAddress, parse_address
from ipc.mesh.faults import Copy, Post, RandomFaults
from ipc.mesh.frames import PAYLOAD_BYTES_MAX
from ipc.mesh.link import Timing
from tests.support.mesh import KEY, Clock, MeshBed, MeshNode, MeshProcess, addresses, eventually


@pytest.fixture(params=[False, True], ids=["unix", "tcp"])
def tcp(request: pytest.FixtureRequest) -> bool:
    """Both kinds of socket."""
    return bool(request.param)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_node_sees_every_other(tmp_path: Path, tcp: bool, count: int) -> None:
    """One `up` for each peer, and one connection for each pair."""
    with MeshBed(count, tmp_path, tcp=tcp) as bed:
        bed.rounds()
        for number, node in bed.nodes.items():
            others = set(range(count)) - {number}
            assert node.mesh.up_nodes() == others
            assert sorted(node.events) == [("up", other) for other in sorted(others)]
            assert not node.mesh.refused


def test_messages_arrive_in_order_and_once(tmp_path: Path, tcp: bool) -> None:
    """Of all sizes, in both directions, many in one go."""
    with MeshBed(2, tmp_path, tcp=tcp) as bed:
        sizes = [0, 1, 100, PAYLOAD_BYTES_MAX, 3, 4096] * 10
        payloads = [bed.random.randbytes(size) for size in sizes]
        for payload in payloads:
            while not bed.nodes[0].mesh.send(1, payload):
                bed.poll()
            while not bed.nodes[1].mesh.send(0, payload):
                bed.poll()
        bed.settle(lambda: all(len(node.messages) == len(sizes) for node in bed.nodes.values()))

        assert bed.nodes[1].messages == [(0, payload) for payload in payloads]
        assert bed.nodes[0].messages == [(1, payload) for payload in payloads]


def test_a_message_that_is_too_long_is_the_callers_bug(tmp_path: Path) -> None:
    """And one to a node that is not configured."""
    with MeshBed(2, tmp_path) as bed:
        with pytest.raises(ValueError, match="at most"):
            bed.nodes[0].mesh.send(1, bytes(PAYLOAD_BYTES_MAX + 1))
        with pytest.raises(KeyError):
            bed.nodes[0].mesh.send(7, b"")


def test_a_node_that_ends_is_down_and_one_that_comes_back_is_up(tmp_path: Path, tcp: bool) -> None:
    """Whichever of the two listens; the new process has another incarnation."""
    with MeshBed(2, tmp_path, tcp=tcp) as bed:
        for gone, left in ((0, 1), (1, 0)):
            first = bed.nodes[left].mesh.incarnation(gone)
            bed.nodes[left].events.clear()
            bed.nodes[gone].mesh.send(left, b"last words")
            bed.stop(gone)
            bed.settle(lambda left=left: not bed.nodes[left].mesh.up_nodes())  # type: ignore[misc]
            assert bed.nodes[left].messages.pop() == (gone, b"last words")
            assert not bed.nodes[left].mesh.send(gone, b"too late")

            bed.nodes[gone] = bed.start(gone)
            bed.connect()

            assert bed.nodes[left].events == [("down", gone), ("up", gone)]
            assert bed.nodes[left].mesh.incarnation(gone) != first
            assert bed.nodes[gone].messages == []


def test_quiet_links_live_by_keepalives(tmp_path: Path) -> None:
    """Four idle timeouts without a message."""
    with MeshBed(3, tmp_path) as bed:
        bed.advance(120, step=1)

        assert bed.connected()
        assert all("down" not in dict(node.events) for node in bed.nodes.values())


def test_a_silent_node_is_down_after_the_idle_timeout(tmp_path: Path) -> None:
    """It is not polled, as if it were stopped; its sockets stay open."""
    with MeshBed(3, tmp_path) as bed:
        sleeper = bed.nodes.pop(2)
        bed.advance(29, step=1)
        assert bed.nodes[0].mesh.is_up(2)
        bed.advance(2, step=1)
        assert bed.connected(0, 1)
        assert bed.nodes[0].events[-1] == bed.nodes[1].events[-1] == ("down", 2)

        bed.nodes[2] = sleeper
        bed.connect()

        assert ("down", 0) in sleeper.events


def test_a_node_that_was_stopped_itself_reads_before_it_judges(tmp_path: Path) -> None:
    """What arrived meanwhile shows that the peer was alive all the time."""
    with MeshBed(2, tmp_path) as bed:
        sleeper = bed.nodes.pop(0)
        bed.advance(29, step=1)
        bed.nodes[0] = sleeper
        sleeper.mesh.poll()
        bed.clock.ns += 25_000_000_000
        bed.nodes[1].mesh.send(0, b"alive")
        bed.clock.ns += 10_000_000_000

        sleeper.mesh.poll()

        assert sleeper.messages == [(1, b"alive")]
        assert sleeper.events == [("up", 1)]


def test_attempts_come_ever_more_slowly_up_to_a_bound(tmp_path: Path) -> None:
    """At most every four intervals; at least that often, too."""
    with MeshBed(2, tmp_path, timing=Timing()) as bed:
        bed.stop(0)
        bed.settle(lambda: not bed.nodes[1].mesh.up_nodes())
        waits = []
        for _ in range(6):
            deadline = bed.nodes[1].mesh.deadline_ns()
            assert deadline is not None
            waits.append((deadline - bed.clock.ns) // 1_000_000_000)
            bed.clock.ns = deadline
            bed.rounds()

        assert waits == [2, 4, 8, 8, 8, 8]


def test_a_cut_is_noticed_by_both_and_healed(tmp_path: Path) -> None:
    """The third node sees both all the time."""
    with MeshBed(3, tmp_path) as bed:
        bed.nodes[0].mesh.cut(1)
        bed.nodes[0].mesh.send(1, b"lost")
        bed.advance(70, step=1)
        assert not bed.nodes[0].mesh.is_up(1)
        assert not bed.nodes[1].mesh.is_up(0)
        assert bed.connected(0, 2) and bed.connected(1, 2)

        bed.nodes[0].mesh.heal(1)
        bed.connect()

        assert bed.nodes[1].messages == []
        assert all(not node.mesh.refused for node in bed.nodes.values())


def test_a_short_cut_delays_and_loses_nothing(tmp_path: Path) -> None:
    """Shorter than the idle timeout; TCP would have sent it again."""
    with MeshBed(2, tmp_path) as bed:
        bed.nodes[1].mesh.cut(0)
        assert bed.nodes[0].mesh.send(1, b"one")
        assert bed.nodes[1].mesh.send(0, b"two")
        bed.advance(20, step=1)
        assert bed.nodes[0].messages == bed.nodes[1].messages == []

        bed.nodes[1].mesh.heal(0)
        bed.settle(lambda: bool(bed.nodes[0].messages and bed.nodes[1].messages))

        assert (bed.nodes[0].messages, bed.nodes[1].messages) == ([(1, b"two")], [(0, b"one")])
        assert bed.nodes[0].events == [("up", 1)]


def test_callbacks_may_send_and_poll(tmp_path: Path) -> None:
    """A lock manager waits inside a callback; later messages come meanwhile, in order."""
    with MeshBed(2, tmp_path) as bed:
        node = bed.nodes[1]
        order: list[bytes] = []

        def received(peer: int, payload: bytes) -> None:
            order.append(payload)
            if payload == b"0":
                node.mesh.send(peer, b"please")
                eventually(lambda: order[-1] == b"thanks", bed.poll)

        def answer(peer: int, _payload: bytes) -> None:
            bed.nodes[0].mesh.send(peer, b"thanks")

        node.mesh.received = received
        bed.nodes[0].mesh.received = answer
        for text in (b"0", b"1", b"2"):
            bed.nodes[0].mesh.send(1, text)

        bed.settle(lambda: len(order) == 4)
        assert order == [b"0", b"1", b"2", b"thanks"]


def test_a_callback_that_raises_loses_no_later_message(tmp_path: Path) -> None:
    """The caller of `poll` sees the error, and goes on."""
    with MeshBed(2, tmp_path) as bed:
        node = bed.nodes[1]

        def received(_peer: int, payload: bytes) -> None:
            if payload == b"bad":
                raise RuntimeError
            node.messages.append((0, payload))

        node.mesh.received = received
        for text in (b"bad", b"good"):
            bed.nodes[0].mesh.send(1, text)

        with pytest.raises(RuntimeError):
            bed.rounds()
        assert node.mesh.deadline_ns() == bed.clock.ns
        bed.poll()
        assert node.messages == [(0, b"good")]


def test_the_descriptor_is_ready_when_something_is(tmp_path: Path) -> None:
    """In somebody else's poll loop."""
    with MeshBed(2, tmp_path) as bed:
        bed.rounds()
        poll = select.poll()
        poll.register(bed.nodes[1].mesh, select.POLLIN)
        assert poll.poll(0) == []
        bed.nodes[0].mesh.send(1, b"x")
        assert poll.poll(5000)
        bed.nodes[1].mesh.poll()
        assert poll.poll(0) == []


def test_a_mesh_with_nothing_to_do_sleeps(tmp_path: Path) -> None:
    """Linked, cut off, with a full queue, alone: neither its descriptor nor its clock calls."""
    with MeshBed(4, tmp_path, queue_bytes_max=100_000) as bed:
        deaf = bed.nodes.pop(3)
        while bed.nodes[0].mesh.send(3, bytes(50_000)):
            pass
        bed.nodes[1].mesh.cut(0)
        bed.stop(2)
        bed.rounds()
        for node in bed.nodes.values():
            assert select.select([node.mesh], [], [], 0)[0] == []
            deadline = node.mesh.deadline_ns()
            assert deadline is not None and deadline > bed.clock.ns
        bed.nodes[3] = deaf


def test_a_callback_may_close_the_mesh(tmp_path: Path) -> None:
    """Nothing is delivered afterwards."""
    with MeshBed(2, tmp_path) as bed:
        node = bed.nodes[1]

        def received(_peer: int, payload: bytes) -> None:
            node.messages.append((0, payload))
            node.mesh.close()

        node.mesh.received = received
        for text in (b"1", b"2"):
            bed.nodes[0].mesh.send(1, text)
        while not node.messages:
            node.mesh.poll()
        del bed.nodes[1]
        assert node.messages == [(0, b"1")]


def test_a_mesh_that_is_closed_leaves_no_socket_file(tmp_path: Path) -> None:
    """The lock file stays: removed, it could be locked twice."""
    with MeshBed(2, tmp_path):
        assert (tmp_path / "node0").is_socket()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node0.lock", "node1.lock"]


def test_two_processes_cannot_listen_at_one_address(tmp_path: Path, tcp: bool) -> None:
    """Neither a living process's socket nor its port is taken away."""
    with MeshBed(2, tmp_path, tcp=tcp) as bed:
        with pytest.raises(OperatorError, match="another process has it"):
            bed.start(0)
        assert bed.connected()


@pytest.mark.parametrize(
    ("node", "key", "cluster", "complaint"),
    [(5, KEY, "c", "node numbers"), (0, b"short", "c", "a key"), (0, KEY, "a b", "a name")],
)
def test_a_bad_configuration_is_one_line(
    tmp_path: Path, node: int, key: bytes, cluster: str, complaint: str
) -> None:
    """Before anything is opened."""
    with MeshBed(1, tmp_path) as bed:
        with pytest.raises(OperatorError, match=complaint):
            bed.start(node, key=key, cluster=cluster, at=addresses(1, tmp_path))


def test_addresses_are_written_and_read() -> None:
    """Numbers only; a name would have to be looked up."""
    for text, address in {
        "unix:/run/x": UnixAddress("/run/x"),
        "tcp:127.0.0.1:80": TcpAddress("127.0.0.1", 80),
        "tcp:[::1]:80": TcpAddress("::1", 80),
    }.items():
        assert (parse_address(text), str(address)) == (address, text)
    for text in ("unix:", "tcp:localhost:80", "tcp:127.0.0.1", "tcp:1.2.3.4:99999", "x", ""):
        with pytest.raises(OperatorError, match="no node address"):
            parse_address(text)


@pytest.mark.parametrize("seed", range(6))
def test_the_promises_hold_in_a_random_history(tmp_path: Path, seed: int) -> None:
    """Four nodes; messages, cuts, ends, restarts, sleeps.  On failure the test's name has the seed.

    Between `up` and `down` the messages of one process of the peer are a run without gaps, and
    they were sent in that time.
    """
    rng = random.Random(seed)
    with MeshBed(4, tmp_path, seed=seed, tcp=bool(seed % 2)) as bed:
        sent = itertools.count()
        asleep: dict[int, MeshNode] = {}
        told = {node: _Witness(bed.nodes[node]) for node in bed.nodes}
        accepted: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        for _ in range(600):
            node = rng.choice(sorted(bed.nodes))
            mesh = bed.nodes[node].mesh
            other = rng.choice([peer for peer in range(4) if peer != node])
            match rng.randrange(40):
                case 0:
                    mesh.cut(other)
                case 1 | 2:
                    mesh.heal(other)
                case 3 if len(bed.nodes) > 2:
                    bed.stop(node)
                    bed.nodes[node] = bed.start(node)
                    told[node] = _Witness(bed.nodes[node])
                case 4 if len(bed.nodes) > 2:
                    asleep[node] = bed.nodes.pop(node)
                case 5 | 6 if asleep:
                    bed.nodes |= dict([asleep.popitem()])
                case 7 | 8:
                    bed.advance(rng.choice([1, 3, 35]), step=1)
                case 9 | 10 | 11 | 12:
                    bed.poll()
                case _:
                    number = next(sent)
                    if mesh.send(other, b"%d" % number):
                        accepted[node, other].append(number)
        bed.nodes |= asleep
        for node, peer in itertools.permutations(range(4), 2):
            bed.nodes[node].mesh.heal(peer)
        bed.connect()
        for node, peer in itertools.permutations(range(4), 2):
            assert bed.nodes[node].mesh.send(peer, b"%d" % next(sent))
        bed.settle(lambda: all(len(node.messages) >= 3 for node in bed.nodes.values()))

        for node, witness in told.items():
            witness.check(node, accepted)


class _Witness:
    """What one process of a node was told by each peer, link after link."""

    def __init__(self, node: MeshNode) -> None:
        self.links: dict[int, list[list[int]]] = collections.defaultdict(list)
        self._up: set[int] = set()
        before = node.mesh.received

        def up(peer: int) -> None:
            assert peer not in self._up
            self._up.add(peer)
            self.links[peer].append([])

        def down(peer: int) -> None:
            assert peer in self._up
            self._up.remove(peer)

        def received(peer: int, payload: bytes) -> None:
            assert peer in self._up
            self.links[peer][-1].append(int(payload))
            before(peer, payload)

        for peer in sorted(node.mesh.up_nodes()):
            up(peer)
        node.mesh.up, node.mesh.down, node.mesh.received = up, down, received

    def check(self, node: int, accepted: dict[tuple[int, int], list[int]]) -> None:
        for peer, links in self.links.items():
            everything = [number for link in links for number in link]
            assert everything == sorted(set(everything)), "doubled or out of order"
            known = accepted[peer, node]
            for link in links:
                run = [number for number in link if number in known]
                start = known.index(run[0]) if run else 0
                assert run == known[start : start + len(run)], "a gap inside one link"


# --- faults ---------------------------------------------------------------------------------------


def _exchange(directory: Path, seed: int) -> list[tuple[int, bytes]]:
    with MeshBed(2, directory, seed=seed) as bed:
        policy = RandomFaults(random.Random(seed), lose=0.2, duplicate=0.2, delay=0.3, reorder=0.3)
        bed.nodes[0].mesh.faults = policy
        for number in range(200):
            bed.nodes[0].mesh.send(1, b"%d" % number)
            bed.advance(0.005)
        bed.advance(1, step=0.1)
        return bed.nodes[1].messages


def test_faults_lose_double_and_reorder_as_the_seed_says(tmp_path: Path) -> None:
    """The same seed gives the same history, another one another."""
    first = [int(payload) for _, payload in _exchange(tmp_path, 7)]

    assert set(range(200)) - set(first), "nothing was lost"
    assert len(first) > len(set(first)), "nothing was doubled"
    assert first != sorted(first), "nothing was overtaken"
    assert first == [int(payload) for _, payload in _exchange(tmp_path, 7)]
    assert first != [int(payload) for _, payload in _exchange(tmp_path, 8)]


def test_late_messages_that_are_not_overtaken_stay_in_order(tmp_path: Path) -> None:
    """Delay alone is a slow network; without a policy the rest still comes in turn."""
    with MeshBed(2, tmp_path) as bed:
        mesh = bed.nodes[0].mesh
        mesh.faults = RandomFaults(random.Random(3), delay=0.5)
        for number in range(100):
            mesh.send(1, b"%d" % number)
        mesh.faults = None
        mesh.send(1, b"100")
        bed.rounds()
        assert len(bed.nodes[1].messages) < 101
        bed.advance(1, step=0.01)

        assert [int(payload) for _, payload in bed.nodes[1].messages] == list(range(101))


def test_held_messages_are_bounded() -> None:
    """A nemesis must not be the one who eats the memory."""
    clock, post = Clock(), Post(1000)
    assert post.put(1, bytes(400), (Copy(5), Copy(9)), clock())
    assert not post.put(1, bytes(300), (Copy(5),), clock())
    assert post.put(2, bytes(300), (Copy(5),), clock())
    assert len(post.take_due(clock() + 9)) == 3
    assert post.put(1, bytes(1000), (Copy(5),), clock())


# --- processes ------------------------------------------------------------------------------------


@pytest.fixture
def processes(tmp_path: Path, tcp: bool) -> Iterator[list[MeshProcess]]:
    """Three nodes, all connected."""
    at = [str(address) for address in addresses(3, tmp_path, tcp=tcp).values()]
    made = [MeshProcess(node, at) for node in range(3)]
    try:
        for one in made:
            eventually(lambda one=one: len(one.lines) >= 2, one.read)  # type: ignore[misc]
            one.lines.clear()
        yield made
    finally:
        for one in made:
            one.resume()
            one.kill()


def test_processes_that_are_killed_stopped_and_cut_off_come_back(
    processes: list[MeshProcess],
) -> None:
    """A listener and a connecter each."""
    low, middle, high = processes
    low.tell("send 2 hello there")
    high.expect("got 0 hello there")
    for victim in (low, high):
        victim.kill()
        middle.expect(f"down {victim.node}")
        middle.tell(f"send {victim.node} are you there")
        middle.expect("not sent")
        victim.start()
        middle.expect(f"up {victim.node}")
    for victim in (low, high):
        victim.pause()
        middle.expect(f"down {victim.node}")
        victim.resume()
        victim.expect("down 1")
        middle.expect(f"up {victim.node}")
    middle.tell("cut 0")
    low.expect("down 1")
    middle.expect("down 0")
    middle.tell("heal 0")
    low.expect("up 1")
    low.tell("send 1 back again")
    middle.expect("got 0 back again")
