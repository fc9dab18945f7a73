"""A hypervisor that only answers: two guests, a shared pool, and words put in its mouth."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ipc.attach import CONTROL_SOCKET
from ipc.codec import Record, receive_record, send_record

UUID = "abcdef01-2345-6789-1234-567890abcdef"
DIGITS = UUID.replace("-", "")


def _pool(number: int, kind: str, pages: int, objects: int, uuid: str = "") -> Record:
    return {
        "id": number,
        "type": kind,
        "uuid": uuid,
        "pages": pages,
        "objects": objects,
        "cost_bytes": pages * 4096,
        "priority": "normal",
        "weight": 100,
        "writer": True,
    }


def _guest(number: int, **fields: Any) -> Record:
    return {
        "id": number,
        "pid": 100 + number,
        "attached": True,
        "frozen": False,
        "weight": 100,
        "cap_bytes": 0,
        "reserve_bytes": 0,
        "compress": False,
        "borrow": False,
        "priority": "normal",
        "sharing": "off",
        "group": "",
        "ephemeral_pages": 0,
        "persistent_pages": 0,
        "lent_pages": 0,
        "cost_bytes": 0,
        "target_bytes": 0,
        "pools": [],
        "operations": {},
        **fields,
    }


GUESTS: Record = {
    "alpha": _guest(
        1,
        frozen=True,
        weight=300,
        cap_bytes=8 << 20,
        compress=True,
        sharing="group",
        group="web",
        ephemeral_pages=1234,
        persistent_pages=5,
        lent_pages=512,
        cost_bytes=3 << 20,
        target_bytes=4 << 20,
        pools=[_pool(0, "EP", 1200, 7), _pool(1, "PP", 5, 1), _pool(2, "ES", 34, 2, DIGITS)],
        operations={"destroy_pool": {"calls": 2}},
    ),
    "bravo": _guest(2, attached=False, reserve_bytes=1 << 20),
}
ARENA: Record = {
    "bytes": 16 << 20,
    "frames": 4000,
    "free_frames": 2000,
    "lent_frames": 512,
    "ephemeral_pages": 1234,
    "persistent_pages": 5,
}
LISTED: Record = {
    "guests": GUESTS,
    "arena": ARENA,
    "scheduling": "greedy",
    "eviction": "clock",
    "savings": {
        "filled": {"pages": 10, "bytes_saved": 40960, "cpu_ns": 1},
        "compressed": {"pages": 0, "bytes_saved": 0, "cpu_ns": 0},
    },
    "slab": {},
}
POOLED: Record = {
    "pools": [
        {
            "number": 4,
            "type": "ES",
            "uuid": DIGITS,
            "priority": "normal",
            "pages": 34,
            "objects": 2,
            "cost_bytes": 139264,
            "members": [
                {
                    "guest": name,
                    "id": number,
                    "writer": name == "alpha",
                    "pages": 17,
                    "cost_bytes": 69632,
                    "target_bytes": 1 << 20,
                    "weight": 1,
                    "inherited": 0,
                }
                for name, number in (("alpha", 2), ("bravo", 0))
            ],
        }
    ]
}
STATS: Record = {
    "hypercalls": 99,
    "evictions": 3,
    "arena": ARENA,
    "guests": GUESTS,
    "departed": {"operations": {"destroy_pool": {"calls": 1}}},
}
FREEABLE: Record = {
    "free_bytes": (3 << 20) + 5,
    "ephemeral_bytes": 2 << 20,
    "freeable_bytes": (5 << 20) + 5,
}
GRANTED: Record = {"grants": [{"uuid": DIGITS, "guest": "alpha", "role": "writer"}]}


class Standin:
    """Every question is kept; `answers` by verb go before the usual ones."""

    def __init__(self, folder: Path) -> None:
        self.questions: list[Record] = []
        self.answers: dict[str, Callable[[Record], Record]] = {}
        self._path = folder / CONTROL_SOCKET
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(self._path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                question = receive_record(connection)
                if question is None:
                    return
                self.questions.append(question)
                answer = self.answers.get(question["verb"], usual_answer)
                send_record(connection, answer(question))

    def asked(self, verb: str) -> list[Record]:
        """Questions of one verb, without the verb."""
        return [
            {key: value for key, value in question.items() if key != "verb"}
            for question in self.questions
            if question["verb"] == verb
        ]

    def close(self) -> None:
        """End the thread; a connection that asks nothing is its sign."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(os.fspath(self._path))
        self._thread.join()
        self._listener.close()


def usual_answer(question: Record) -> Record:
    """What a hypervisor with these guests would say."""
    guest = question.get("guest")
    match question["verb"]:
        case "list":
            return LISTED | {"guests": GUESTS if guest is None else {guest: GUESTS[guest]}}
        case "pools":
            return POOLED
        case "stats":
            return STATS
        case "freeze":
            return {"frozen": list(GUESTS) if guest is None else ["alpha", guest]}
        case "thaw":
            return {"frozen": [] if guest is None else ["bravo"]}
        case "balloon":
            targets = {"bravo": 8 << 20}
            if guest is not None:
                targets[guest] = question["size_bytes"]
            return {"balloon_bytes": {name: size for name, size in targets.items() if size}}
        case "set":
            return {"guest": GUESTS[guest]} if guest in GUESTS else {"guest": _guest(0)}
        case "schedule":
            return {"scheduling": question["mode"]}
        case "freeable":
            return FREEABLE
        case "auth":
            return GRANTED
        case "destroy":
            return {"destroyed_pools": 1 if "pool" in question else 3}
    return {"error": f"no verb {question['verb']!r}"}
