"""The inputs that are kept: one file a target, one input a line, in base64.

libFuzzer writes down what reached something that nothing before it had reached; of that
`python -m tests.fuzz --keep` keeps the few that reach all of it, up to `BYTES_MAX` a target.
`make fuzz` begins with these, and `make test` replays them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

DIRECTORY: Final = Path(__file__).parent / "corpus"
BYTES_MAX: Final = 24 * 1024
"""Of one target's file."""


def kept(target: str) -> list[bytes]:
    """The inputs of a target, the shortest first."""
    path = DIRECTORY / f"{target}.txt"
    if not path.exists():
        return []
    return [base64.b64decode(line) for line in path.read_text().split()]


def keep(target: str, inputs: Iterable[bytes]) -> int:
    """Write the kept inputs anew; how many there are."""
    lines: list[str] = []
    size = 0
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        line = base64.b64encode(data).decode()
        size += len(line) + 1
        if size > BYTES_MAX:
            break
        if line:
            lines.append(line)
    DIRECTORY.mkdir(exist_ok=True)
    (DIRECTORY / f"{target}.txt").write_text("".join(f"{line}\n" for line in lines))
    return len(lines)


def identity(data: bytes) -> str:
    """What libFuzzer calls an input, and how a failing replay names it."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def unpack(target: str, directory: Path) -> None:
    """Put the kept inputs where libFuzzer looks for them."""
    directory.mkdir(parents=True, exist_ok=True)
    for data in kept(target):
        (directory / identity(data)).write_bytes(data)


def find(target: str, name: str) -> bytes:
    """The kept input of this identity, or of one that begins so."""
    found = [data for data in kept(target) if identity(data).startswith(name)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} kept inputs of {target} are called {name}")
    return found[0]
