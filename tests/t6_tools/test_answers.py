"""What guests answer is looked at before a command believes it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest

from ipc.codec import BadRecord, encode
from ipc.errors import Disconnected, OperatorError
from tools.answers import believed
from tools.control import ask

COUNTERS: dict[str, Any] = {
    "disk_reads_pages": 3,
    "disk_read_calls": 2,
    "disk_writes_pages": 0,
    "disk_write_calls": 0,
    "files_verified": 1,
    "bytes_verified": 9,
    "mismatches": 1,
    "mismatch_paths": ["/a"],
    "seconds": 0.5,
    "cleancache": {"puts": 1, "attached": True},
    "page_cache": {"hits": 5},
    "anonymous": {"oom_kills": 0, "pages": 1},
    "swap": {"in_pages": 0, "out_pages": 0},
    "balloon": {"size_pages": 1, "target_pages": 1, "floor_pages": 1, "maximum_pages": 1},
    "verification": None,
    "something new": {"of": ["any", "kind"]},
}
STATUS: dict[str, Any] = {
    "state": "idle",
    "workload": "",
    "done": 0,
    "total": 0,
    "error": None,
    "report": {},
    "counters": COUNTERS,
    "node": None,
}
ESCAPE = "\x1b]0;owned\x07\u202e"


def nested(depth: int) -> dict[str, Any]:
    """A map in a map, so often."""
    record: dict[str, Any] = {}
    for _ in range(depth):
        record = {"a": record}
    return record


def test_a_good_answer_is_as_it_was() -> None:
    """Nothing is lost of what real guests say."""
    assert believed("status", STATUS) == STATUS
    assert believed("locks", {"error": "not a node"}) == {"error": "not a node"}
    assert believed("locks", {"error": "no", "left_out": [1]}) == {"error": "no"}
    assert believed("unheard-of", {"anything": 1}) == {"anything": 1}


@pytest.mark.parametrize(
    ("verb", "answer"),
    [
        ("status", {}),
        ("status", {"error": "what a status never is"}),
        ("status", STATUS | {"state": 7}),
        ("status", STATUS | {"done": True}),
        ("status", STATUS | {"total": "all"}),
        ("status", STATUS | {"counters": "many"}),
        ("status", STATUS | {"counters": {}}),
        ("status", STATUS | {"counters": COUNTERS | {"cleancache": {"puts": b"x"}}}),
        ("status", STATUS | {"counters": COUNTERS | {"balloon": {}}}),
        ("status", STATUS | {"counters": COUNTERS | {"swap": 5}}),
        ("status", STATUS | {"counters": COUNTERS | {"anonymous": {}}}),
        ("status", STATUS | {"counters": COUNTERS | {"new": b"no JSON"}}),
        ("status", STATUS | {"counters": COUNTERS | {"new": [float("nan")]}}),
        ("status", STATUS | {"report": {"at": msgpack.Timestamp(1)}}),
        ("locks", {"resources": [], "new": msgpack.ExtType(1, b"")}),
        ("status", STATUS | {"counters": COUNTERS | {"mismatch_paths": [7]}}),
        ("status", STATUS | {"node": 3}),
        ("status", STATUS | {"node": {"volume": "data"}}),
        ("status", STATUS | {"more": nested(40)}),
        ("exec", {"exit_code": 0, "stdout": "text", "stderr": b""}),
        ("exec", {"stdout": b"", "stderr": b""}),
        ("locks", {"resources": 5}),
        ("locks", {"resources": [{"name": "N"}]}),
        ("volume", {"type": "ext2"}),
    ],
)
def test_an_answer_of_another_shape_is_none(verb: str, answer: dict[str, Any]) -> None:
    """Each would have ended a command in a traceback."""
    with pytest.raises(BadRecord):
        believed(verb, answer)


def test_texts_drive_no_terminal() -> None:
    """Wherever they stand, and also as keys."""
    status = believed("status", STATUS | {"state": ESCAPE, "error": f"a\n{ESCAPE}b"})
    assert status["state"] == "?]0;owned??"
    assert status["error"] == "a\n?]0;owned??b"
    assert believed("exec", {"error": ESCAPE})["error"].isprintable()
    inside = believed("locks", {"resources": [], "x": {ESCAPE: [ESCAPE]}})
    assert ESCAPE not in str(inside)
    assert "\x1b" not in repr(inside).encode().decode("unicode_escape")


def test_an_answer_that_comes_in_drops_is_not_waited_for(tmp_path: Path) -> None:
    """A byte a time, each well before the time is up; it would be whole in the end."""
    path = tmp_path / "guest-red.sock"
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen(1)

        def drip() -> None:
            connection, _ = door.accept()
            with connection, contextlib.suppress(BrokenPipeError):
                connection.recv(4096)
                for byte in encode({"error": "x" * 40}):
                    connection.sendall(bytes([byte]))
                    time.sleep(0.02)

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(Disconnected, match=r"no answer in 0\.3 s"):
                ask(path, {"verb": "stop"}, timeout_seconds=0.3)
        finally:
            thread.join()


@pytest.mark.parametrize(
    ("name", "is_believed"), [("guest-red.sock", False), ("control.sock", True)]
)
def test_only_guests_are_not_believed(tmp_path: Path, name: str, is_believed: bool) -> None:
    """The hypervisor is ours."""
    path = tmp_path / name
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen(1)

        def answer() -> None:
            connection, _ = door.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(encode({"state": 7}))

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            if is_believed:
                assert ask(path, {"verb": "status"}) == {"state": 7}
            else:
                with pytest.raises(Disconnected, match="makes no sense"):
                    ask(path, {"verb": "status"})
        finally:
            thread.join()


def test_a_question_that_has_no_words_is_not_asked(tmp_path: Path) -> None:
    """An argument of a command line may be any bytes, and a size have any number of digits."""
    path = tmp_path / "guest-red.sock"
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen(1)
        with pytest.raises(OperatorError, match="not UTF-8"):
            ask(path, {"verb": "exec", "argv": ["cat", "\udcff"]})
        with pytest.raises(OperatorError, match="above 2\\^64"):
            ask(path, {"verb": "set", "guest": "red", "cap_bytes": 1 << 70})
