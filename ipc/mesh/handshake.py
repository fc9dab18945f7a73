"""MESH WIRE, part 2: the handshake.

    connecter (the higher number)              listener (the lower number)
    HELLO greeting --------------------------->  version, cluster, numbers
          <--------------- ANSWER greeting, proof
    version, cluster, numbers, proof, parameters
    PROOF proof ------------------------------>  proof, parameters, is the number free?
          <------------ KEEPALIVE, sealed: you are in

Whoever finds something wrong sends REFUSE with a line for people instead, and closes.  The text
comes from somebody who has proved nothing: it is cut, cleaned and only logged.

A greeting, little endian:

    magic        8    "tmemmesh"
    version      u16  PROTOCOL_VERSION; the two fields so far never move
    node         u16  the sender's number
    peer         u16  the number that the sender thinks it talks to
    parameters   u16  bytes of parameters, at most PARAMETERS_BYTES_MAX
    cluster      32   name, padded with zeros
    incarnation  16   random, another one each time that a node's process starts
    nonce        32   random, another one for each handshake
    parameters        opaque here; both nodes must have the same (the timing of the cluster)

With T = both greetings, the connecter's first:

    proof        HMAC-SHA256(cluster key, "tmem mesh proof " + role + T)       32 bytes
    session key  HMAC-SHA256(cluster key, "tmem mesh session " + role + T)     role: of the sender

Both nonces are in T, so a recorded handshake proves nothing a second time, and the roles keep a
node's own proof from being sent back to it.  The whole cluster has one key: it proves membership,
not the number; that two members claim one number is found by the incarnation (`mesh`).

Nothing here reads a socket or a clock.  o2net's handshake compares protocol version and four
timing fields, and has no cluster name (its connector key), no key and no nonce.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable, Collection
from enum import Enum
from typing import Final, NamedTuple

from ipc.errors import OperatorError
from ipc.mesh.frames import BadFrame, Frame, Kind, Seal, encode_frame

PROTOCOL_VERSION: Final = 1
NODE_MAX: Final = 254
"""The highest number that OCFS2's heartbeat area and o2dlm's maps have room for."""
KEY_BYTES_MIN: Final = 16
CLUSTER_BYTES: Final = 32
INCARNATION_BYTES: Final = 16
NONCE_BYTES: Final = 32
PARAMETERS_BYTES_MAX: Final = 512
REFUSAL_BYTES_MAX: Final = 200

_MAGIC: Final = b"tmemmesh"
_PREFIX: Final = struct.Struct("<8sH")
_GREETING: Final = struct.Struct(f"<8sHHHH{CLUSTER_BYTES}s{INCARNATION_BYTES}s{NONCE_BYTES}s")
_PROOF_BYTES: Final = 32


class Reason(Enum):
    """Why a connection was refused; the names are those of the counters."""

    PROTOCOL = "protocol"  # garbage, a frame too long or out of turn, a broken seal
    VERSION = "version"
    CLUSTER = "cluster"
    NUMBER = "number"
    KEY = "key"
    PARAMETERS = "parameters"
    IN_USE = "in-use"  # another process has this node's number
    SLOW = "slow"
    CROWDED = "crowded"  # too many handshakes at once
    REFUSED = "refused"  # by the peer, which said why


class Refused(Exception):
    """This connection can't become a link; the text names the peer and what differs."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text


class Identity(NamedTuple):
    """What a node says of itself in each handshake."""

    node: int
    cluster: str
    parameters: bytes
    incarnation: bytes


class Greeting(NamedTuple):
    """A decoded greeting; true only when the proof has come."""

    node: int
    peer: int
    cluster: str
    incarnation: bytes
    nonce: bytes
    parameters: bytes


class Session(NamedTuple):
    """What two ends that have proved themselves go on with."""

    peer: Greeting
    outgoing: Seal
    incoming: Seal


Difference = Callable[[bytes, bytes], str]
"""(our parameters, theirs) in words."""


def show_difference(ours: bytes, theirs: bytes) -> str:
    """For parameters of which nothing is known."""
    return f"here they are {ours.hex() or 'empty'}, there {theirs.hex() or 'empty'}"


def encode_greeting(greeting: Greeting, version: int = PROTOCOL_VERSION) -> bytes:
    """The bytes of a greeting."""
    return (
        _GREETING.pack(
            _MAGIC,
            version,
            greeting.node,
            greeting.peer,
            len(greeting.parameters),
            greeting.cluster.encode(),
            greeting.incarnation,
            greeting.nonce,
        )
        + greeting.parameters
    )


def decode_greeting(untrusted_bytes: bytes, speaker: str) -> Greeting:
    """The greeting in exactly these bytes; raises Refused."""
    if len(untrusted_bytes) < _PREFIX.size or not untrusted_bytes.startswith(_MAGIC):
        raise Refused(Reason.PROTOCOL, f"{speaker} does not speak this protocol")
    _, version = _PREFIX.unpack_from(untrusted_bytes)
    if version != PROTOCOL_VERSION:
        raise Refused(
            Reason.VERSION,
            f"{speaker} speaks protocol version {version}, this node {PROTOCOL_VERSION}",
        )
    malformed = Refused(Reason.PROTOCOL, f"the greeting of {speaker} is malformed")
    if len(untrusted_bytes) < _GREETING.size:
        raise malformed
    fields = _GREETING.unpack_from(untrusted_bytes)
    _, _, node, peer, length, cluster, incarnation, nonce = fields
    parameters = untrusted_bytes[_GREETING.size :]
    if length != len(parameters) or length > PARAMETERS_BYTES_MAX or node > NODE_MAX:
        raise malformed
    name = cluster.rstrip(b"\0")
    if not is_cluster_name(name):
        raise malformed
    return Greeting(node, peer, name.decode("ascii"), incarnation, nonce, parameters)


def is_cluster_name(name: bytes) -> bool:
    """Printable ASCII without spaces, at most 32 bytes."""
    return 0 < len(name) <= CLUSTER_BYTES and all(0x20 < byte < 0x7F for byte in name)


def check_shared(key: bytes, cluster: str, parameters: bytes) -> None:
    """What all nodes of a cluster share; raises OperatorError."""
    if len(key) < KEY_BYTES_MIN or not is_cluster_name(cluster.encode()):
        raise OperatorError(
            f"a cluster needs a key of {KEY_BYTES_MIN} bytes or more and a name of up to "
            f"{CLUSTER_BYTES} ASCII characters"
        )
    if len(parameters) > PARAMETERS_BYTES_MAX:
        raise ValueError(f"parameters have at most {PARAMETERS_BYTES_MAX} bytes")


def encode_refusal(text: str) -> bytes:
    """The frame that tells the peer why."""
    return encode_frame(Kind.REFUSE, text.encode("ascii", "replace")[:REFUSAL_BYTES_MAX])


def decode_refusal(untrusted_body: bytes) -> str:
    """The text, fit for a log line."""
    text = untrusted_body[:REFUSAL_BYTES_MAX].decode("ascii", "replace")
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text)


def _digest(key: bytes, label: bytes, role: bytes, transcript: bytes) -> bytes:
    return hmac.digest(key, b"tmem mesh " + label + b" " + role + transcript, "sha256")


_CONNECTER: Final = b"connecter "
_LISTENER: Final = b"listener "


class Handshake:
    """One end of one handshake: frames in, frames out, and a session at the end.

    `receive` returns what is to be sent, and raises Refused; then the handshake is over.
    """

    def __init__(
        self,
        identity: Identity,
        key: bytes,
        nonce: bytes,
        nodes: Collection[int],
        *,
        peer: int | None = None,
        name: Callable[[int], str] = "node {}".format,
        difference: Difference = show_difference,
    ) -> None:
        """`peer` is the node to connect to, and None at the listener."""
        self._identity = identity
        self._key = key
        self._nonce = nonce
        self._nodes = nodes
        self._name = name
        self._difference = difference
        self._mine = b""
        self._theirs: tuple[bytes, Greeting] | None = None
        self.connecting = peer is not None
        self.peer = peer
        self.session: Session | None = None
        if peer is not None:
            self._mine = self._greeting(peer)

    @property
    def speaker(self) -> str:
        """Who is at the other end, as far as is known."""
        return "somebody" if self.peer is None else self._name(self.peer)

    def hello(self) -> bytes:
        """The connecter's first frame."""
        return encode_frame(Kind.HELLO, self._mine)

    def receive(self, frame: Frame) -> bytes:
        """What to send in return; raises Refused and BadFrame."""
        body = frame.untrusted_body
        if frame.kind is Kind.REFUSE:
            raise Refused(Reason.REFUSED, f"{self.speaker} refused: {decode_refusal(body)}")
        if self.connecting and frame.kind is Kind.ANSWER and self.session is None:
            return self._on_answer(body)
        if not self.connecting and self.session is None:
            if frame.kind is Kind.HELLO and self._theirs is None:
                return self._on_hello(body)
            if frame.kind is Kind.PROOF and self._theirs is not None:
                return self._on_proof(body)
        raise BadFrame(f"a {frame.kind.name} frame out of turn")

    def _on_hello(self, untrusted_body: bytes) -> bytes:
        self._meet(untrusted_body)
        assert self.peer is not None
        self._mine = self._greeting(self.peer)
        proof = _digest(self._key, b"proof", _LISTENER, self._transcript())
        return encode_frame(Kind.ANSWER, self._mine + proof)

    def _on_answer(self, untrusted_body: bytes) -> bytes:
        if len(untrusted_body) < _PROOF_BYTES:
            raise BadFrame("an ANSWER frame without a proof")
        self._meet(untrusted_body[:-_PROOF_BYTES])
        self._verify(untrusted_body[-_PROOF_BYTES:], _LISTENER)
        return encode_frame(
            Kind.PROOF, _digest(self._key, b"proof", _CONNECTER, self._transcript())
        )

    def _on_proof(self, untrusted_body: bytes) -> bytes:
        self._verify(untrusted_body, _CONNECTER)
        return b""

    def _greeting(self, peer: int) -> bytes:
        node, cluster, parameters, incarnation = self._identity
        return encode_greeting(Greeting(node, peer, cluster, incarnation, self._nonce, parameters))

    def _meet(self, untrusted_greeting: bytes) -> None:
        """Compare what can be compared without the key."""
        theirs = decode_greeting(untrusted_greeting, self.speaker)
        us = self._identity
        self._theirs = (untrusted_greeting, theirs)
        if theirs.cluster != us.cluster:
            raise Refused(
                Reason.CLUSTER,
                f"{self.speaker if self.connecting else self._name(theirs.node)} is in cluster "
                f"{theirs.cluster}, this node in {us.cluster}",
            )
        if theirs.node not in self._nodes:
            raise Refused(
                Reason.NUMBER, f"node number {theirs.node} is not configured in {us.cluster}"
            )
        if self.connecting and theirs.node != self.peer:
            raise Refused(
                Reason.NUMBER,
                f"{self._name(theirs.node)} answers at the address of {self.speaker}",
            )
        self.peer = theirs.node
        if theirs.peer != us.node:
            raise Refused(
                Reason.NUMBER,
                f"{self.speaker} wants {self._name(theirs.peer)}, this is {self._name(us.node)}",
            )
        if not self.connecting and theirs.node <= us.node:
            raise Refused(
                Reason.NUMBER,
                f"{self.speaker} connects to {self._name(us.node)}: the lower number listens",
            )

    def _transcript(self) -> bytes:
        assert self._theirs is not None
        mine, theirs = self._mine, self._theirs[0]
        return mine + theirs if self.connecting else theirs + mine

    def _verify(self, untrusted_proof: bytes, role: bytes) -> None:
        transcript = self._transcript()
        assert self._theirs is not None
        if not hmac.compare_digest(untrusted_proof, _digest(self._key, b"proof", role, transcript)):
            raise Refused(Reason.KEY, f"{self.speaker} and this node have different cluster keys")
        theirs = self._theirs[1]
        if theirs.parameters != self._identity.parameters:
            words = self._difference(self._identity.parameters, theirs.parameters)
            raise Refused(Reason.PARAMETERS, f"the parameters of {self.speaker} differ: {words}")
        seals = [
            Seal(_digest(self._key, b"session", role, transcript))
            for role in (_CONNECTER, _LISTENER)
        ]
        outgoing, incoming = seals if self.connecting else reversed(seals)
        self.session = Session(theirs, outgoing, incoming)
