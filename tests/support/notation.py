"""How golden scripts write pages, handles and lists of them."""

from __future__ import annotations

import random
from collections.abc import Iterable

from ipc.abi import ANY_UUID, PAGE_BYTES


class ScriptError(Exception):
    """The script itself is wrong."""


def page_of(word: str) -> bytes:
    """The page that a word names."""
    kind, _, rest = word.partition(":")
    seed = random.Random(rest)
    if word == "zero":
        return bytes(PAGE_BYTES)
    if kind == "fill":
        return rest.encode().ljust(8, b"_")[:8] * (PAGE_BYTES // 8)
    if kind == "noise":
        return seed.randbytes(PAGE_BYTES)
    if kind == "lean":
        return seed.randbytes(700).ljust(PAGE_BYTES, b"\0")
    if kind == "prose":
        words = [seed.randbytes(seed.randrange(3, 9)) for _ in range(24)]
        return b"".join(seed.choice(words) for _ in range(PAGE_BYTES))[:PAGE_BYTES]
    return word.encode().ljust(PAGE_BYTES)


def spans(numbers: Iterable[int]) -> str:
    """`0..3 5 7..8`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def handles(pages: Iterable[tuple[int, int]]) -> str:
    """`1:0..3 2:5 2:7`, and `0..31:0` for page 0 of many objects."""
    objects: dict[int, list[int]] = {}
    for oid, index in pages:
        objects.setdefault(oid, []).append(index)
    alike: list[tuple[list[int], str]] = []
    for oid in sorted(objects):
        where = spans(objects[oid])
        if alike and alike[-1][1] == where and alike[-1][0][-1] == oid - 1:
            alike[-1][0].append(oid)
        else:
            alike.append(([oid], where))
    return " ".join(f"{spans(oids)}:{part}" for oids, where in alike for part in where.split())


def words_of(words: list[str]) -> str:
    """x0..x3 for x0 x1 x2 x3."""
    parts: list[tuple[str, str]] = []
    for word in words:
        if parts:
            first, last = parts[-1]
            stem = last.rstrip("0123456789")
            tail = last[len(stem) :]
            if tail and word == f"{stem}{int(tail) + 1}":
                parts[-1] = first, word
                continue
        parts.append((word, word))
    return " ".join(a if a == b else f"{a}..{b}" for a, b in parts)


def uuid_of(name: str) -> bytes:
    """A uuid has a name in a script."""
    return ANY_UUID if name == "none" else name.encode().ljust(16, b"\0")


def guest_of(label: str) -> str:
    """The guest of a pool's name."""
    return label.partition("/")[0]


def split(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Plain words, and key=value ones."""
    plain = [word for word in words if "=" not in word]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    return plain, options
