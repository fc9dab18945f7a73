"""What a guest may answer: the tools that ask guests believe nothing else.

A guest is hostile from its first instruction, and its answers end up on a person's terminal and in
the arithmetic of commands.  So an answer has the shapes below or it counts as none (BadRecord), and
no text in it can drive a terminal.  Keys that are not listed are looked at only for that, and for
being what JSON can say.

    a type              a value of it; `int` takes no bool
    None in a tuple     may be missing or None
    {...}, [...]        a map with these keys, a list of these
    COUNTS              a map of numbers
"""

from __future__ import annotations

import math
import unicodedata
from typing import Any, Final

from ipc.codec import BadRecord, Record

COUNTS: Final = "counts"
_DEPTH_MAX: Final = 12

_NODE: Final = {
    "volume": str,
    "number": int,
    "slot": (int, None),
    "epoch": int,
    "heartbeat_age_seconds": (float, None),
    "resources_mastered": int,
    "messages_malformed": int,
    "messages_refused": int,
}
_COUNTERS: Final = {
    **dict.fromkeys(
        (
            "disk_reads_pages",
            "disk_read_calls",
            "disk_writes_pages",
            "disk_write_calls",
            "files_verified",
            "bytes_verified",
            "mismatches",
        ),
        int,
    ),
    "seconds": float,
    "mismatch_paths": [str],
    "cleancache": COUNTS,
    "page_cache": COUNTS,
    "anonymous": {"oom_kills": int},
    "swap": {"in_pages": int, "out_pages": int},
    "balloon": {
        "size_pages": int,
        "target_pages": int,
        "floor_pages": int,
        "maximum_pages": int,
    },
    "verification": (COUNTS, None),
}
_LOCK: Final = {
    "kind": str,
    "name": str,
    "inode": (int, None),
    "master": str,
    "holders": dict,
    "waiters": [{"node": str, "mode": str}],
    "held_back": [str],
    "token": int,
}
_SLOT: Final = {
    "slot": int,
    "node": (str, None),
    "journal": str,
    "sequence": int,
    "recoveries": int,
}
_SHAPES: Final[dict[str, dict[str, Any]]] = {
    "status": {
        "state": str,
        "workload": str,
        "done": int,
        "total": int,
        "error": (str, None),
        "report": (dict, None),
        "counters": _COUNTERS,
        "node": (_NODE, None),
    },
    "exec": {"exit_code": int, "stdout": bytes, "stderr": bytes},
    "locks": {"resources": [_LOCK], "left_out": (int, None)},
    "volume": {
        "type": str,
        "blocks": int,
        "blocks_free": int,
        "block_bytes": int,
        "label": (str, None),
        "uuid": str,
        "features": [str],
        "slots": [_SLOT],
    },
}


def believed(verb: object, untrusted: Record) -> Record:
    """The answer of a guest to `verb`, with plain texts; BadRecord if it makes no sense."""
    plain = _plain(untrusted, 0, with_bytes=verb == "exec")
    assert isinstance(plain, dict)
    if verb != "status" and isinstance(plain.get("error"), str):
        # Whatever else it has was not looked at.
        return {"error": plain["error"]}
    shape = _SHAPES.get(verb) if isinstance(verb, str) else None
    if shape is not None:
        _check(plain, shape, "")
    return plain


def plain_text(untrusted: str) -> str:
    """What can be shown on a terminal."""
    if untrusted.isprintable():  # which is quicker
        return untrusted
    return "".join("?" if _drives(letter) else letter for letter in untrusted)


def _plain(value: Any, depth: int, *, with_bytes: bool) -> Any:
    if depth > _DEPTH_MAX:
        raise BadRecord("an answer that is nested too deep")
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, dict):
        return {
            _plain(key, depth, with_bytes=False): _plain(item, depth + 1, with_bytes=with_bytes)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_plain(item, depth + 1, with_bytes=with_bytes) for item in value]
    if value is None or isinstance(value, int) or (with_bytes and isinstance(value, bytes)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise BadRecord("an answer with what is no text, number, list or map")


def _drives(letter: str) -> bool:
    """Control characters, and those that turn the direction of what follows."""
    return letter not in "\n\t" and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _check(value: Any, shape: Any, place: str) -> None:
    if isinstance(shape, tuple):
        if value is None:
            return
        shape = shape[0]
    if shape == COUNTS:
        fits = isinstance(value, dict) and all(
            isinstance(item, int | float) for item in value.values()
        )
    elif isinstance(shape, dict):
        fits = isinstance(value, dict)
        if fits:
            for key, part in shape.items():
                _check(value.get(key), part, f"{place}.{key}" if place else key)
    elif isinstance(shape, list):
        fits = isinstance(value, list)
        for item in value if fits else ():
            _check(item, shape[0], f"{place}[]")
    elif shape is float:
        fits = isinstance(value, int | float)
    else:
        fits = isinstance(value, shape) and not (shape is int and isinstance(value, bool))
    if not fits:
        raise BadRecord(f"an answer that makes no sense ({place})")
