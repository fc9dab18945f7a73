"""Ask a running process over its control socket: one connection, one question, one answer."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from ipc.codec import BadRecord, Record, receive_record, send_record
from ipc.errors import Disconnected


def ask(path: Path, question: Record, *, timeout_seconds: float = 10.0) -> Record:
    """The answer to a question; raises Disconnected when nobody gives one in time."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_seconds)
            connection.connect(os.fspath(path))
            send_record(connection, question)
            answer = receive_record(connection)
    except TimeoutError:
        raise Disconnected(f"{path.name}: no answer in {timeout_seconds:g} s") from None
    except (OSError, BadRecord) as error:
        raise Disconnected(f"{path.name}: {error}") from None
    if answer is None:
        raise Disconnected(f"{path.name}: closed without an answer")
    return answer
