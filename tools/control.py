"""Ask a running process over its control socket: one connection, one question, one answer.

A workload may need files of the host, which a guest in its jail can't open: those go along with the
question, opened with the rights of whoever asks.  What a guest answers is looked at before anybody
believes it (`tools.answers`).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ipc.codec import BadRecord, Record, encode, receive_record
from ipc.errors import Disconnected, ExitCode, OperatorError
from tools.answers import believed

_FILES: Final = {
    "manifest": os.O_RDONLY,
    "record": os.O_WRONLY | os.O_APPEND | os.O_CREAT,
}
"""Parameters of a workload that name files, and how they are opened."""
_GUEST: Final = "guest-"
"""So begin the names of sockets at which somebody answers whom nobody trusts."""


def ask(path: Path, question: Record, *, timeout_seconds: float = 10.0) -> Record:
    """The answer to a question; raises Disconnected when nobody gives one in time, OperatorError
    for a question that can't be asked."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_seconds)
            connection.connect(os.fspath(path))
            with _files(question) as files:
                frame = encode({**question, "files": list(files)} if files else question)
                # A frame may be longer than the socket takes at once.
                sent = socket.send_fds(connection, [frame], list(files.values()))
                if sent < len(frame):  # even of nothing, sending fails when it is answered already
                    connection.sendall(frame[sent:])
            answer = receive_record(connection, timeout_seconds)
    except TimeoutError:
        raise Disconnected(f"{path.name}: no answer in {timeout_seconds:g} s") from None
    except UnicodeEncodeError:
        raise OperatorError(
            "what is asked for has bytes that are not UTF-8", ExitCode.USAGE
        ) from None
    except OverflowError:
        raise OperatorError(
            "what is asked for has a number above 2^64; take a smaller one", ExitCode.USAGE
        ) from None
    except (OSError, BadRecord) as error:
        raise Disconnected(f"{path.name}: {error}") from None
    if answer is None:
        raise Disconnected(f"{path.name}: closed without an answer")
    if not path.name.startswith(_GUEST):
        return answer
    try:
        return believed(question.get("verb"), answer)
    except BadRecord as error:
        raise Disconnected(f"{path.name}: {error}") from None


@contextlib.contextmanager
def _files(question: Record) -> Iterator[dict[str, int]]:
    """Descriptors of the files that the work needs; one that can't be opened is left to the guest,
    which says why not."""
    files: dict[str, int] = {}
    try:
        parameters = question.get("parameters") if question.get("verb") == "run" else None
        if isinstance(parameters, dict):
            for name, flags in _FILES.items():
                with contextlib.suppress(OSError, TypeError, KeyError):
                    files[name] = os.open(parameters[name], flags | os.O_CLOEXEC, 0o600)
        yield files
    finally:
        for fd in files.values():
            os.close(fd)
