"""Where secrets may have come to lie: command lines, environments, files, modes."""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.support.jailprobe import outcome

_SOURCE = os.urandom


class Secrets:
    """All that this process draws from the kernel while `random_bytes` is its os.urandom."""

    def __init__(self) -> None:
        self.drawn: list[bytes] = []

    def random_bytes(self, count: int) -> bytes:
        """From the kernel, and remembered."""
        drawn = _SOURCE(count)
        self.drawn.append(drawn)
        return drawn

    def of(self, size: int) -> list[bytes]:
        """Those of so many bytes."""
        return [secret for secret in self.drawn if len(secret) == size]


def spellings(secret: bytes) -> list[bytes]:
    """How it may be written: as it is, in hex, in base 64, as Python shows it, as a number."""
    return [
        secret,
        secret.hex().encode(),
        secret.hex().upper().encode(),
        base64.b64encode(secret).rstrip(b"=")[:-1],
        repr(secret)[2:-1].encode(),
        *(str(int.from_bytes(secret, order)).encode() for order in ("little", "big")),
    ]


def places(directory: Path, pids: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    """What anybody may look at, or may be kept: what processes were started with, and all files
    of a run directory."""
    for pid in pids:
        for name in ("cmdline", "environ", "comm"):
            yield f"/proc/{pid}/{name}", Path(f"/proc/{pid}/{name}").read_bytes()
    for path in _files(directory, stat.S_ISREG):
        yield str(path), path.read_bytes()
        yield str(path), os.fsencode(path)


def found_at(secrets: Iterable[bytes], directory: Path, pids: Iterable[int]) -> set[str]:
    """The places where any of these secrets stands."""
    needles = [spelling for secret in secrets for spelling in spellings(secret)]
    return {
        place
        for place, text in places(directory, pids)
        if any(needle in text for needle in needles)
    }


def readable_by_others(directory: Path) -> set[str]:
    """Files of a run directory that another user could open if he came so far."""
    return {
        str(path.relative_to(directory))
        for path in _files(directory, stat.S_ISREG)
        if path.stat().st_mode & 0o077
    }


def _files(directory: Path, kind: Callable[[int], bool]) -> list[Path]:
    return [path for path in directory.rglob("*") if kind(path.lstat().st_mode)]


def write_hash(path: Path) -> None:
    """What a process has for a seed of Python's hash, as far as it can be seen."""
    path.write_text(str(hash("a name that a guest chose")))


def write_environment(path: Path) -> None:
    """The environment that a process was started with, as it lies in its memory."""
    path.write_bytes(Path("/proc/self/environ").read_bytes())


def kill_nothing(where: tuple[Path, int]) -> None:
    """How it goes to send a process the signal that is none."""
    path, pid = where
    path.write_text(outcome(lambda: os.kill(pid, 0)))
