"""What a mesh refuses: wrong keys and numbers, strangers, floods, and peers that don't behave."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain, repeat
from pathlib import Path

import pytest

from ipc.mesh.addresses import TcpAddress, UnixAddress
from ipc.mesh.frames import (
    HEADER,
    PAYLOAD_BYTES_MAX,
    BadFrame,
    Frame,
    FrameBuffer,
    Kind,
    Seal,
    encode_frame,
)
from ipc.mesh.handshake import (
    Handshake,
    Identity,
    Reason,
    Refused,
    decode_refusal,
    encode_greeting,
    encode_refusal,
)
from ipc.mesh.mesh import HANDSHAKES_MAX
from tests.support.mesh import CLUSTER, KEY, MeshBed, RawPeer, eventually, greeting

Expect = Callable[[str], None]
NODES = (0, 1, 2)


def hello(node: int = 1, peer: int = 0, version: int = 1, **changes: object) -> bytes:
    """A HELLO frame, good but for the changes."""
    return encode_frame(Kind.HELLO, encode_greeting(greeting(node, peer, **changes), version))


def serve(bed: MeshBed, peer: RawPeer) -> None:
    """Until the connection is closed."""

    def step() -> None:
        bed.poll()
        peer.read()

    eventually(lambda: peer.closed, step)


# --- two nodes that don't agree -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"key": b"another key of 32 bytes........."}, Reason.KEY, "different cluster keys"),
        ({"cluster": "other"}, Reason.CLUSTER, "(is in cluster|refused: .*)"),
        (
            {"parameters": b"\x01"},
            Reason.PARAMETERS,
            "parameters of .*differ: here they are|parameters of node alpha .0. differ",
        ),
    ],
    ids=["key", "cluster", "parameters"],
)
def test_both_nodes_say_what_differs_and_whose(
    tmp_path: Path,
    expect_warning: Expect,
    changes: dict[str, object],
    reason: Reason,
    words: str,
) -> None:
    """One refuses, the other is told; the node that agrees afterwards is let in at once."""
    expect_warning(rf"node alpha \(0\): a connection was refused: .*bravo.*({words})")
    expect_warning(rf"node bravo \(1\): a connection was refused: .*({words})")
    with MeshBed(3, tmp_path) as bed:
        bed.stop(1)
        stranger = bed.start(1, **changes)  # type: ignore[arg-type]
        stranger.mesh.cut(2)
        bed.nodes[2].mesh.cut(1)
        bed.nodes[1] = stranger
        bed.settle(lambda: bool(stranger.mesh.refused and bed.nodes[0].mesh.refused))
        counts = stranger.mesh.refused + bed.nodes[0].mesh.refused
        assert set(counts) == {reason, Reason.REFUSED}
        assert bed.connected(0, 2)
        bed.advance(60, step=1)
        assert stranger.events == []

        bed.stop(1)
        bed.nodes[1] = bed.start(1)
        bed.nodes[2].mesh.heal(1)
        bed.connect()


@pytest.mark.parametrize(
    ("frame", "reason", "text"),
    [
        (hello(version=2), Reason.VERSION, "somebody speaks protocol version 2, this node 1"),
        (
            hello(cluster="o"),
            Reason.CLUSTER,
            "node bravo (1) is in cluster o, this node in testing",
        ),
        (hello(node=9), Reason.NUMBER, "node number 9 is not configured in testing"),
        (
            hello(peer=2),
            Reason.NUMBER,
            "node bravo (1) wants node carol (2), this is node alpha (0)",
        ),
        (hello(node=0), Reason.NUMBER, "node number 0 is not configured in testing"),
        (hello(node=255), Reason.PROTOCOL, "the greeting of somebody is malformed"),
        (hello(cluster=""), Reason.PROTOCOL, "the greeting of somebody is malformed"),
        (hello(parameters=bytes(513)), Reason.PROTOCOL, "the greeting of somebody is malformed"),
    ],
)
def test_a_greeting_that_does_not_fit_is_answered_with_the_reason(
    tmp_path: Path, expect_warning: Expect, frame: bytes, reason: Reason, text: str
) -> None:
    """In words that name the node."""
    expect_warning("a connection was refused")
    with MeshBed(2, tmp_path) as bed:
        with RawPeer(bed.addresses[0]) as peer:
            peer.send(frame)
            serve(bed, peer)
            assert peer.refusal() == text
        assert bed.nodes[0].mesh.refused == {reason: 1}
        assert bed.connected()


def test_a_lower_number_that_connects_is_refused(tmp_path: Path, expect_warning: Expect) -> None:
    """So two nodes that start together never make two connections."""
    expect_warning("the lower number listens")
    with MeshBed(2, tmp_path) as bed, RawPeer(bed.addresses[1]) as peer:
        peer.send(hello(0, 1))
        serve(bed, peer)
        assert bed.nodes[1].mesh.refused == {Reason.NUMBER: 1}


def test_another_node_at_an_address_is_noticed(tmp_path: Path, expect_warning: Expect) -> None:
    """Two lines of a configuration were swapped."""
    expect_warning(
        r"node alpha .* refused: node carol \(2\) wants node bravo .1., this is node alpha \(0\)"
    )
    expect_warning(
        r"node bravo .* refused: node carol \(2\) wants node alpha .0., this is node bravo \(1\)"
    )
    expect_warning(
        r"node carol .* refused: node alpha \(0\) refused: node carol \(2\) wants node alpha"
    )
    expect_warning(
        r"node carol .* refused: node bravo \(1\) refused: node carol \(2\) wants node bravo"
    )
    with MeshBed(2, tmp_path) as bed:
        at = {0: bed.addresses[1], 1: bed.addresses[0], 2: UnixAddress(f"{tmp_path}/two")}
        for node in (0, 1):
            bed.stop(node)
            bed.nodes[node] = bed.start(node, at=bed.addresses | {2: at[2]})
        bed.nodes[2] = bed.start(2, at=at)
        bed.advance(30, step=1)

        assert bed.connected(0, 1)
        assert bed.nodes[2].mesh.up_nodes() == set()


# --- strangers ------------------------------------------------------------------------------------


GARBAGE = {
    "noise": random.Random(1).randbytes(500),
    "zeros": bytes(100),
    "web": b"GET / HTTP/1.1\r\nHost: node\r\n\r\n",
    "four gigabytes": HEADER.pack(2**32 - 1, Kind.HELLO, bytes(3)),
    "a data frame's length": HEADER.pack(PAYLOAD_BYTES_MAX, Kind.HELLO, bytes(3)),
    "reserved bytes": HEADER.pack(0, Kind.HELLO, b"\0\0\1"),
    "a proof first": encode_frame(Kind.PROOF, bytes(32)),
    "an answer": encode_frame(Kind.ANSWER, bytes(200)),
    "data first": encode_frame(Kind.DATA, b"x" * 64),
    "two greetings": hello() + hello(),
    "half a greeting": encode_frame(Kind.HELLO, encode_greeting(greeting(1, 0))[:60]),
    "a short proof": hello() + encode_frame(Kind.PROOF, b""),
    "a wrong proof": hello() + encode_frame(Kind.PROOF, bytes(32)),
    "a refusal": encode_refusal("\x1b[2J\n" * 100),
}


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused_and_harms_nobody(
    tmp_path: Path, expect_warning: Expect, data: bytes, tcp: bool
) -> None:
    """In one piece, and byte by byte."""
    expect_warning("a connection was refused")
    with MeshBed(2, tmp_path, tcp=tcp) as bed:
        for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
            with RawPeer(bed.nodes[0].mesh.address) as peer:
                for piece in pieces:
                    peer.send(piece)
                    bed.nodes[0].mesh.poll()
                serve(bed, peer)
        assert bed.nodes[0].mesh.refused.total() == 2
        assert bed.connected()
        assert bed.nodes[0].events == [("up", 1)]


def test_a_flood_of_strangers_is_one_line_and_leaves_room(
    tmp_path: Path, expect_warning: Expect, caplog: pytest.LogCaptureFixture
) -> None:
    """Those who say nothing, too: the oldest has to go, and a real node gets in."""
    expect_warning("too many handshakes at once")
    expect_warning("somebody sent no frame has kind 255")
    with MeshBed(3, tmp_path) as bed:
        mesh = bed.nodes[0].mesh
        for _ in range(50):
            with RawPeer(bed.addresses[0]) as peer:
                peer.send(b"\xff" * 8)
                serve(bed, peer)
        silent = []
        for _ in range(HANDSHAKES_MAX + 20):
            silent.append(RawPeer(bed.addresses[0]))
            bed.poll()
        bed.rounds()
        bed.stop(2)
        bed.nodes[2] = bed.start(2)
        bed.connect()

        assert mesh.refused[Reason.PROTOCOL] == 50
        assert mesh.refused[Reason.CROWDED] >= 20
        assert len(mesh._strangers) <= HANDSHAKES_MAX
        assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 2
        for peer in silent:
            peer.socket.close()


def test_a_crowd_of_one_process_keeps_nobody_else_out(
    tmp_path: Path, expect_warning: Expect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though that one has been there longest, and is slow."""
    expect_warning("too many handshakes at once")
    processes = chain(["slow"], repeat("crowd"))
    monkeypatch.setattr("ipc.mesh.mesh.origin", lambda _connection: next(processes))
    with MeshBed(1, tmp_path) as bed, ExitStack() as crowd:
        slow = crowd.enter_context(RawPeer(bed.addresses[0]))
        bed.poll()
        for _ in range(2 * HANDSHAKES_MAX):
            crowd.enter_context(RawPeer(bed.addresses[0]))
            bed.poll()
        slow.read()

        assert not slow.closed
        assert not slow.frames, "it was refused"
        assert bed.nodes[0].mesh.refused[Reason.CROWDED] == HANDSHAKES_MAX + 1


def test_a_slow_handshake_has_one_deadline_for_all_its_bytes(tmp_path: Path) -> None:
    """A byte now and then buys no time; a stopped member looks the same, so it is no warning."""
    with MeshBed(2, tmp_path) as bed, RawPeer(bed.addresses[0]) as peer:
        for byte in hello()[:20]:
            peer.send(bytes([byte]))
            bed.advance(0.4)
        peer.read()
        assert peer.refusal() == "somebody did not finish the handshake in time"
        assert bed.nodes[0].mesh.refused == {Reason.SLOW: 1}


def test_a_recorded_handshake_lets_nobody_in(tmp_path: Path, expect_warning: Expect) -> None:
    """All that a real node said, once more."""
    expect_warning("different cluster keys")
    with MeshBed(1, tmp_path) as bed:
        bed.addresses |= {1: UnixAddress(f"{tmp_path}/one")}
        bed.stop(0)
        bed.nodes[0] = bed.start(0)
        with RawPeer(bed.addresses[0]) as peer:
            peer.introduce(bed, 1, 0)
            bed.settle(lambda: bed.nodes[0].mesh.is_up(1))
            recorded = bytes(peer.sent)
        bed.settle(lambda: not bed.nodes[0].mesh.is_up(1))
        with RawPeer(bed.addresses[0]) as peer:
            peer.send(recorded)
            serve(bed, peer)

        assert bed.nodes[0].mesh.refused == {Reason.KEY: 1}
        assert bed.nodes[0].events == [("up", 1), ("down", 1)]


def handshakes(nonces: bytes) -> tuple[Handshake, Handshake]:
    """Node 1 and node 0, about to meet."""
    one, zero = (Identity(node, CLUSTER, b"", bytes(16)) for node in (1, 0))
    return (
        Handshake(one, KEY, nonces[:1] * 32, NODES, peer=0),
        Handshake(zero, KEY, nonces[1:] * 32, NODES),
    )


def take(data: bytes) -> Frame:
    """The one frame in these bytes."""
    buffer = FrameBuffer()
    buffer.feed(data)
    frame = buffer.take(2000)
    assert frame is not None and not len(buffer)
    return frame


def test_a_recorded_answer_convinces_no_connecter() -> None:
    """Nor the connecter's own words sent back to it."""
    connecter, listener = handshakes(b"ab")
    answer = take(listener.receive(take(connecter.hello())))
    again, _ = handshakes(b"cd")
    with pytest.raises(Refused, match="different cluster keys"):
        again.receive(answer)

    proof = take(connecter.receive(answer))
    mirror = Frame(Kind.ANSWER, again.hello()[HEADER.size :] + proof.untrusted_body)
    with pytest.raises(Refused, match="answers at the address of"):
        again.receive(mirror)


def test_a_listener_of_another_version_is_named() -> None:
    """The connecter knows whom it called."""
    connecter, listener = handshakes(b"ab")
    answer = take(listener.receive(take(connecter.hello())))
    body = answer.untrusted_body[:8] + b"\x07\0" + answer.untrusted_body[10:]
    with pytest.raises(Refused, match="node 0 speaks protocol version 7, this node 1"):
        connecter.receive(Frame(Kind.ANSWER, body))


def test_a_refusal_is_fit_for_a_log_line() -> None:
    """No line feeds, no escape sequences, no novels."""
    text = decode_refusal(b"\x1b[31mno\n\xff" * 1000)
    assert text.startswith("?[31mno?") and text.isprintable() and len(text) == 200


# --- members that don't behave --------------------------------------------------------------------


def lonely(bed: MeshBed, tmp_path: Path) -> None:
    """Node 0 with a node 1 that a raw peer plays."""
    bed.addresses |= {1: UnixAddress(f"{tmp_path}/one")}
    bed.stop(0)
    bed.nodes[0] = bed.start(0)


def outgoing(handshake: Handshake) -> Seal:
    """What a raw peer seals its frames with."""
    assert handshake.session is not None
    return handshake.session.outgoing


def left_out(seal: Seal) -> bytes:
    """The second frame without the first."""
    seal.close(Kind.DATA, b"x")
    return seal.close(Kind.DATA, b"y")


def relabelled(seal: Seal) -> bytes:
    """An empty message that says it is a keepalive."""
    frame = bytearray(seal.close(Kind.DATA, b""))
    frame[4] = Kind.KEEPALIVE
    return bytes(frame)


BROKEN: dict[str, Callable[[Seal], bytes]] = {
    "a changed byte": lambda seal: seal.close(Kind.DATA, b"x" * 9).replace(b"xx", b"xy", 1),
    "no seal": lambda _: encode_frame(Kind.DATA, b"x"),
    "a frame twice": lambda seal: seal.close(Kind.DATA, b"x") * 2,
    "a frame left out": left_out,
    "another kind": relabelled,
    "a loaded keepalive": lambda seal: seal.close(Kind.KEEPALIVE, b"x"),
    "a proof": lambda seal: seal.close(Kind.PROOF, b""),
    "too long": lambda _: HEADER.pack(PAYLOAD_BYTES_MAX + 17, Kind.DATA, bytes(3)),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_seal_breaks_the_link(
    tmp_path: Path, expect_warning: Expect, broken: Callable[[Seal], bytes]
) -> None:
    """And what was whole before it is delivered before `down`."""
    expect_warning("node bravo .1. sent")
    with MeshBed(1, tmp_path) as bed:
        lonely(bed, tmp_path)
        with RawPeer(bed.addresses[0]) as peer:
            seal = outgoing(peer.introduce(bed, 1, 0))
            peer.send(seal.close(Kind.KEEPALIVE, b"") + seal.close(Kind.DATA, b"whole"))
            peer.send(broken(seal))
            serve(bed, peer)
        assert bed.nodes[0].events == [("up", 1), ("down", 1)]
        assert [payload for _, payload in bed.nodes[0].messages] in ([b"whole"], [b"whole", b"x"])
        assert bed.nodes[0].mesh.refused == {Reason.PROTOCOL: 1}


def test_a_peer_that_never_reads_costs_a_bounded_queue(tmp_path: Path) -> None:
    """It is lively otherwise; after the idle timeout it is down all the same."""
    with MeshBed(1, tmp_path, queue_bytes_max=200_000) as bed:
        lonely(bed, tmp_path)
        mesh = bed.nodes[0].mesh
        with RawPeer(bed.addresses[0]) as peer:
            seal = outgoing(peer.introduce(bed, 1, 0))
            bed.settle(lambda: mesh.is_up(1))
            taken = 0
            while mesh.send(1, bytes(10_000)):
                taken += 1
                assert taken < 10_000
            assert 190_000 <= mesh.queued_bytes(1) <= 201_000
            seconds = 0
            while mesh.is_up(1):
                assert not mesh.send(1, bytes(10_000))
                peer.send(seal.close(Kind.KEEPALIVE, b""))
                bed.advance(1)
                seconds += 1
                assert seconds < 40
            assert seconds == 30
            assert bed.nodes[0].events == [("up", 1), ("down", 1)]


def test_half_frames_keep_no_link_alive(tmp_path: Path) -> None:
    """Only a whole frame with a seal is a sign of life."""
    with MeshBed(1, tmp_path) as bed:
        lonely(bed, tmp_path)
        with RawPeer(bed.addresses[0]) as peer:
            frame = outgoing(peer.introduce(bed, 1, 0)).close(Kind.DATA, bytes(100))
            bed.settle(lambda: bed.nodes[0].mesh.is_up(1))
            for byte in frame[:32]:
                peer.send(bytes([byte]))
                bed.advance(1)
        assert bed.nodes[0].events == [("up", 1), ("down", 1)]


def test_a_number_that_is_claimed_twice_stays_with_the_first(
    tmp_path: Path, expect_warning: Expect
) -> None:
    """Until the first falls silent; when it wakes up, it is the second."""
    expect_warning(r"node alpha .* node bravo \(1\) is connected already: two processes")
    expect_warning(r"node bravo .* node alpha \(0\) refused: node bravo \(1\) is connected already")
    with MeshBed(2, tmp_path) as bed:
        first = bed.nodes[1]
        second = bed.start(1, at=bed.addresses | {1: UnixAddress(f"{tmp_path}/second")})
        bed.nodes[9] = second
        bed.advance(60, step=1)
        assert second.events == []
        assert bed.nodes[0].events == [("up", 1)]
        assert bed.nodes[0].mesh.refused[Reason.IN_USE] >= 5

        del bed.nodes[1]
        bed.advance(15, step=1)
        assert second.events == [("up", 0)]
        assert bed.nodes[0].events == [("up", 1), ("down", 1), ("up", 1)]

        bed.nodes[1] = first
        bed.advance(15, step=1)
        assert first.events == [("up", 0), ("down", 0)]
        assert second.mesh.is_up(0)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_of_connections_of_one_process_the_latest_counts(tmp_path: Path, tcp: bool) -> None:
    """They shake hands at the same time; the peer has given the earlier one up."""
    with MeshBed(1, tmp_path, tcp=tcp) as bed:
        bed.addresses |= {1: TcpAddress("127.0.0.1", 0)}
        bed.stop(0)
        bed.nodes[0] = bed.start(0)
        node = bed.nodes[0]
        with RawPeer(node.mesh.address) as one, RawPeer(node.mesh.address) as two:
            shaking = [peer.introduce(bed, 1, 0, until=Kind.ANSWER) for peer in (one, two)]
            for peer, handshake in zip((one, two), shaking, strict=True):
                peer.send(handshake.receive(peer.frames.pop()))
                bed.rounds()
            serve(bed, one)
            two.send(outgoing(shaking[1]).close(Kind.DATA, b"latest"))
            bed.settle(lambda: bool(node.messages))

            assert node.messages == [(1, b"latest")]
            assert node.events == [("up", 1), ("down", 1), ("up", 1)]
            assert not node.mesh.refused


def test_a_node_without_descriptors_is_deaf_for_a_while(
    tmp_path: Path, expect_warning: Expect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not spin, keeps its links, and listens again."""
    expect_warning(r"node alpha \(0\) can't accept: Too many open files")
    with MeshBed(3, tmp_path) as bed:
        mesh = bed.nodes[0].mesh

        def accept() -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(mesh._listener, "accept", accept)
            bed.stop(2)
            bed.nodes[2] = bed.start(2)
            bed.rounds()
            assert mesh.up_nodes() == {1}
        bed.connect()


def test_frames_need_their_turn() -> None:
    """A handshake that is over takes nothing but a refusal."""
    connecter, listener = handshakes(b"ab")
    greeting_frame = take(connecter.hello())
    answer = take(listener.receive(greeting_frame))
    proof = take(connecter.receive(answer))
    assert listener.receive(proof) == b""
    for end, frame in ((connecter, answer), (listener, proof), (listener, greeting_frame)):
        with pytest.raises(BadFrame, match="out of turn"):
            end.receive(frame)
