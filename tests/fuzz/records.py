"""Records that come through control sockets: questions to hypervisor and guests, answers of guests.

The first byte chooses:

    bytes for the codec;
    frames in pieces for the hypervisor's socket, with the administration of a real machine behind;
    frames in pieces for a guest's;
    what a guest answers to a command, of the right shape but for what the bytes change, and what
    the command makes of it.

Findings are an exception, an answer that is no record, a key that is no text, an answer that was
believed and that JSON can't say, and a text in it that could drive a terminal.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import msgpack

from guests import control as guest_control
from guests.shell import Result
from guests.workloads.job import BadParameters
from hypervisor.administration import Administration
from hypervisor.control import Control
from hypervisor.invariants import check
from ipc import attach
from ipc.abi import TOKEN_BYTES
from ipc.codec import BadRecord, decode, encode, frame_length, split_frame
from ipc.errors import OperatorError
from ipc.limits import CONTROL_MESSAGE_BYTES_MAX
from tests.fuzz.doors import GUESTS, STEPS_MAX, Poll, run_directory, serve_once, small_machine
from tests.fuzz.machines import ASKED, SENSIBLE, VALUES
from tests.fuzz.reading import Reader, hold
from tools import answers, nodes, report, stats
from tools.demo import guest_result
from tools.progress import BarReporter, LineReporter


class _GuestKernel:
    """As much of a kernel as the verbs need that don't run anything."""

    node = None

    def status(self) -> dict[str, Any]:
        return {"counters": {}}

    def locks(self) -> dict[str, Any]:
        return {"locks": []}

    def volume(self) -> dict[str, Any]:
        raise OSError(5, "Input/output error")

    def start(self, workload: str, seed: int, parameters: object, files: dict[str, int]) -> None:
        raise BadParameters(f"no workload {workload!r}")


class _NoCommand:
    """A command that does nothing."""

    def __init__(self, _kernel: object, argv: list[str]) -> None:
        hold(all(isinstance(word, str) for word in argv), "a word that is no text")

    def step(self) -> Result:
        """Done."""
        return Result(0, b"", b"")

    def cancel(self) -> None:
        """Nothing to let go of."""


_GUEST_ASKED: Final[tuple[tuple[str, ...], ...]] = (
    ("status",),
    ("run", "workload", "seed", "parameters"),
    ("run", "workload", "seed", "parameters", "files"),
    ("exec", "argv"),
    ("locks",),
    ("volume",),
    ("nemesis", "cut", "heal"),
    ("nemesis", "faults", "seed"),
    ("rekey", "token"),
    ("rekey", "key"),
    ("stop",),
)
_GUEST_SENSIBLE: Final[dict[str, tuple[object, ...]]] = {
    "workload": ("read", "build", "", "x" * 300),
    "seed": (0, 1, 2**63),
    "parameters": ({}, {"size": 1}, {"manifest": "/nowhere", "size": -1}),
    "files": ([], ["manifest"], ["manifest", "record"]),
    "argv": (["ls"], ["cat", "/a"], [""], ["x" * 300]),
    "cut": ([], ["g1"], ["g1", "g2"]),
    "heal": ([], ["g1"]),
    "faults": ({}, {"drop": 0.5}, {"drop": 2}),
    "token": (bytes(TOKEN_BYTES), b""),
    "key": (bytes(32), b"short"),
}
_PIECES: Final = (1, 3, 4, 7, 64, 1 << 16)


def fuzz_control(data: bytes) -> None:
    """The first byte chooses what comes, and where."""
    kind, rest = (data[0] if data else 0), data[1:]
    match kind % 4:
        case 0:
            _check_record(rest)
        case 1:
            _ask_hypervisor(Reader(rest))
        case 2:
            _ask_guest(Reader(rest))
        case _:
            _believe(Reader(rest))


def _check_record(untrusted: bytes) -> None:
    with contextlib.suppress(BadRecord):
        length = frame_length(untrusted)
        hold(length is None or length <= CONTROL_MESSAGE_BYTES_MAX, "a frame that is too long")
    try:
        record = decode(untrusted)
    except BadRecord:
        return
    hold(all(isinstance(key, str) for key in record), "a key that is no text")
    # What is answered and logged names what was asked for.
    encode({"error": str(record)})


def _stream(
    reader: Reader, asked: tuple[tuple[str, ...], ...], sensible: dict[str, tuple[object, ...]]
) -> bytes:
    """Frames, or not quite: whole records, records with a byte changed, bytes."""
    parts = []
    for _ in range(1 + reader.byte() % 4):
        control = reader.byte()
        if control >> 5 == 0:
            parts.append(reader.take(control & 31))
            continue
        frame = bytearray(_packed(_record(reader, asked, sensible)))
        if control >> 5 == 1:
            frame[reader.byte() % len(frame)] = reader.byte()
        parts.append(bytes(frame))
    return b"".join(parts)


def _packed(record: dict[str, Any]) -> bytes:
    """A frame; what msgpack has no words for is left out."""
    while True:
        try:
            return encode(record)
        except (OverflowError, ValueError, TypeError):
            record = dict(list(record.items())[:-1])


def _record(
    reader: Reader, asked: tuple[tuple[str, ...], ...], sensible: dict[str, tuple[object, ...]]
) -> dict[str, Any]:
    """A question with one odd value, perhaps."""
    which, present, odd = reader.take(3)
    verb, *keys = asked[which % len(asked)]
    record: dict[str, Any] = {"verb": verb}
    for number, key in enumerate(keys):
        if not present >> number & 1:
            record[key] = sensible[key][reader.byte() % len(sensible[key])]
    if odd & 3 == 3:
        which, choice = reader.take(2)
        value: Any = VALUES[choice % len(VALUES)]
        for _ in range(choice >> 6):
            value = {"g0": value} if choice & 1 else [value]
        record[[*keys, "verb", "guest", "nonsense"][which % (len(keys) + 3)]] = value
    return record


def _converse(
    piece: int,
    stream: bytes,
    path: Path,
    serve: Callable[[], bool],
    connections: Callable[[], int],
) -> None:
    """Send the bytes in pieces, read the answers, hang up."""
    answers = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as peer:
        peer.connect(os.fspath(path))
        peer.setblocking(False)
        serve()
        for at in range(0, len(stream), piece):
            with contextlib.suppress(OSError):
                peer.send(stream[at : at + piece])
            serve()
            with contextlib.suppress(OSError):
                answers += peer.recv(1 << 20)
    while (frame := split_frame(answers)) is not None:
        body, answers = frame
        hold(bool(decode(body)), "an empty answer")
    hold(not answers, "half an answer")
    for _ in range(STEPS_MAX):
        if not serve():
            break
    hold(connections() == 0, "a connection that nobody has any more")


def _ask_hypervisor(reader: Reader) -> None:
    handlers: dict[int, Callable[[], None]] = {}
    poll: Any = Poll()
    machine = small_machine()
    for name in GUESTS[:2]:
        machine.attach(name, 1, 1, 0)
    administration = Administration(machine)
    control = Control(run_directory(), poll, handlers, administration.answer, lambda *_: None)
    try:
        path = run_directory() / attach.CONTROL_SOCKET
        piece = _PIECES[reader.byte() % len(_PIECES)]
        stream = _stream(reader, ASKED, SENSIBLE)
        _converse(piece, stream, path, lambda: serve_once(handlers), lambda: len(handlers) - 1)
    finally:
        control.close()
    check(machine)


def _ask_guest(reader: Reader) -> None:
    kernel: Any = _GuestKernel()
    answers = guest_control.Answers(kernel, guest_control.Credential(bytes(TOKEN_BYTES)))
    path = guest_control.socket_path(run_directory(), "g0")
    control = guest_control.Control(path, answers.answer)

    def serve() -> bool:
        before = len(control._handlers)
        control.wait(0)
        control.step()
        return len(control._handlers) != before

    # A command needs a whole kernel; what it is given is looked at before it starts.
    with mock.patch.object(guest_control, "Execution", _NoCommand):
        try:
            piece = _PIECES[reader.byte() % len(_PIECES)]
            stream = _stream(reader, _GUEST_ASKED, _GUEST_SENSIBLE)
            _converse(piece, stream, path, serve, lambda: len(control._connections))
        finally:
            control.close()


# --- answers

_NUMBERS: Final = (0, 1, 7, -1, 2**63, 2**64 - 1, -(2**63), True)
_FLOATS: Final = (0.0, 1.5, -1.0, 1e308, 5e-324, 3, 2**64 - 1)
_TEXTS: Final = ("a", "", "g0", "running", "failed", "x" * 300, "\x1b[31m", "\u202e", "a\nb")
_ODD: Final[tuple[object, ...]] = (
    *(
        None,
        0,
        -1,
        1.5,
        float("nan"),
        float("-inf"),
        "",
        "\x9b1m",
        b"",
        b"\x1b",
        [],
        {},
        [[]],
        {"a": {}},
    ),
    *(True, msgpack.Timestamp(1), msgpack.ExtType(5, b"x"), {"\x1b": 1}, [b""], ["x"], {"": "y"}),
)


class _Answer:
    """An answer of the shape that `tools.answers` asks for; one part in some is odd."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def of(self, shape: Any) -> Any:
        """A value of a shape, most often."""
        reader = self._reader
        choice = reader.byte()
        if choice >= 254:
            return _ODD[reader.byte() % len(_ODD)]
        if isinstance(shape, tuple):
            return None if choice & 8 else self.of(shape[0])
        if isinstance(shape, dict):
            return {key: self.of(part) for key, part in shape.items()}
        if isinstance(shape, list):
            return [self.of(shape[0]) for _ in range(choice % 3)]
        if shape == answers.COUNTS:
            names = ("succ_gets", "failed_gets", "puts", "mismatches", "hits", "attached")
            return {name: self.of(float if choice & 64 else int) for name in names[: choice % 7]}
        if shape is dict:
            return {_TEXTS[choice % len(_TEXTS)]: _ODD[reader.byte() % len(_ODD)]}
        values: Any = {int: _NUMBERS, float: _FLOATS, str: _TEXTS, bytes: (b"", b"\x1bout")}
        return values[shape][choice % len(values[shape])]


def _believe(reader: Reader) -> None:
    verbs = tuple(answers._SHAPES)
    verb = verbs[reader.byte() % len(verbs)]
    answer = _Answer(reader).of(answers._SHAPES[verb])
    if not isinstance(answer, dict):
        return
    if reader.byte() > 240:
        answer["error"] = _TEXTS[reader.byte() % len(_TEXTS)]
    if reader.byte() > 200:
        answer["more"] = _ODD[reader.byte() % len(_ODD)]
    if reader.byte() > 200 and isinstance(answer.get("counters"), dict):
        answer["counters"]["new"] = _ODD[reader.byte() % len(_ODD)]
    try:
        frame = encode(answer)
    except ValueError:
        # Deeper than msgpack goes; whoever sends such bytes all the same is `_check_record`'s.
        return
    try:
        believed = answers.believed(verb, decode(frame[4:]))
    except BadRecord as reason:
        hold(str(reason).isprintable(), "a refusal that drives a terminal")
        return
    if verb != "exec":
        for text in _texts(json.loads(json.dumps(believed, allow_nan=False))):
            hold(not any(answers._drives(letter) for letter in text), "it drives a terminal")
    _show(verb, believed)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return [text for part in parts for text in _texts(part)] if isinstance(parts, list) else []


def _show(verb: str, answer: dict[str, Any]) -> None:
    """What commands make of an answer that they believe."""
    directory: Any = SimpleNamespace(guest_socket=lambda name: Path(f"guest-{name}.sock"))
    cluster: Any = SimpleNamespace(guests=[SimpleNamespace(name="g0")])
    with mock.patch.object(nodes, "ask", return_value=answer):
        if verb == "locks":
            for inode in (None, 7):
                rows, _ = nodes.locks(directory, cluster, inode)
                hold(all(isinstance(c, str) for row in rows for c in nodes.lock_cells(row)), "")
        elif verb == "volume":
            with contextlib.suppress(OperatorError):
                found = nodes.volumes(directory, cluster, None)
                nodes.volume_cells("g0", found["g0"])
                nodes.slot_rows(found.values())
        elif verb == "exec" and "error" not in answer:
            hold(isinstance(answer["stdout"] + answer["stderr"], bytes), "output")
            int(answer["exit_code"])
        elif verb == "status":
            _show_status(answer)


def _show_status(status: dict[str, Any]) -> None:
    counters = status["counters"]
    seen = {"ephemeral_pages": 1, "persistent_pages": 2, "cpu_ns": 10}
    guest = {"state": status["state"], "memory_bytes": 1, "counters": counters, "hypervisor": seen}
    stats.table({"guests": {"g0": guest}})
    stats.node_cells({"node": status.get("node")})
    for reporter in (LineReporter(io.StringIO()), BarReporter(io.StringIO())):
        reporter.mode("on", 1)
        reporter.phase(0, "title", {"g0": "read"})
        reporter.status({"g0": status})
        reporter.close()
    run = {
        "guests": {"g0": guest_result(counters, 1 << 20, on=True)},
        "errors": [],
        "total_memory_bytes": 1,
        "hypervisor": dict.fromkeys(
            ("cpu_seconds", "hypercalls", "pages_put", "pages_got", "evictions"), 0
        ),
    }
    results = {"off": run, "on": run}
    report.table(results)
    report.summary(results)
    report.verdict(results)
