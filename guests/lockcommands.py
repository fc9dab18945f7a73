"""Commands that wait: flock, lockf, sleep.  They yield whenever there is nothing to do yet.

The guest is one thread, so its workload, its other commands and its node go on meanwhile.  A
command that is given up (its connection ended) releases what it has locked.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from typing import Final

from guests.commands import Console, UsageError

RETRY_SECONDS: Final = 0.03
"""Between two attempts at a lock that somebody else has."""
CONFLICT_EXIT_CODE: Final = 1
"""As util-linux's flock: the lock was not to be had, and the command did not run."""

WaitingCommand = Callable[[Console, list[str]], Iterator[None]]


def flock(console: Console, arguments: list[str]) -> Iterator[None]:
    """flock [-s|-x] [-n | -w SECONDS] FILE COMMAND [ARGUMENT]..."""  # noqa: D403
    options, rest = _options(arguments, flags="sxn", valued="w")
    if {"s", "x"} <= options.keys():
        raise UsageError("options -s and -x exclude each other")
    if len(rest) < 2:
        raise UsageError("missing operand")
    operation = fcntl.LOCK_SH if "s" in options else fcntl.LOCK_EX
    handle = _open(console, rest[0])
    try:
        yield from _locked(console, options, rest[1:], lambda: console.vfs.flock(handle, operation))
    finally:
        console.vfs.close(handle)


def lockf(console: Console, arguments: list[str]) -> Iterator[None]:
    """lockf [-s|-x] [-n | -w SECONDS] FILE START LENGTH COMMAND [ARGUMENT]..."""  # noqa: D403
    options, rest = _options(arguments, flags="sxn", valued="w")
    if {"s", "x"} <= options.keys():
        raise UsageError("options -s and -x exclude each other")
    if len(rest) < 4:
        raise UsageError("missing operand")
    kind = fcntl.F_RDLCK if "s" in options else fcntl.F_WRLCK
    try:
        start, length = int(rest[1]), int(rest[2])
    except ValueError:
        raise UsageError(f"not a range of bytes: '{rest[1]}' '{rest[2]}'") from None
    handle = _open(console, rest[0], os.O_RDONLY if "s" in options else os.O_RDWR)
    try:
        yield from _locked(
            console,
            options,
            rest[3:],
            lambda: console.vfs.lock_range(handle, kind, start, length),
        )
    finally:
        console.vfs.close(handle)


def sleep(console: Console, arguments: list[str]) -> Iterator[None]:
    """sleep SECONDS"""  # noqa: D400, D403
    _, rest = _options(arguments, flags="", valued="")
    if len(rest) != 1:
        raise UsageError("missing operand" if not rest else f"extra operand '{rest[1]}'")
    yield from _pause(console, _seconds(rest[0]))


def _open(console: Console, path: str, mode: int = os.O_RDONLY) -> int:
    """A directory can be locked, too; a file that is missing is made."""
    try:
        return console.vfs.open(path, mode)
    except FileNotFoundError:
        return console.vfs.open(path, mode | os.O_CREAT)


def _locked(
    console: Console, options: dict[str, str], command: list[str], lock: Callable[[], None]
) -> Iterator[None]:
    """Run a command once `lock` has not raised EAGAIN."""
    seconds = 0.0 if "n" in options else _seconds(options["w"]) if "w" in options else None
    began = console.kernel.now_seconds()
    while True:
        try:
            lock()
            break
        except BlockingIOError:
            left = None if seconds is None else began + seconds - console.kernel.now_seconds()
            if left is not None and left <= 0:
                console.exit_code = CONFLICT_EXIT_CODE
                return
            yield from _pause(console, RETRY_SECONDS if left is None else min(left, RETRY_SECONDS))
    yield from console.run(command)


def _pause(console: Console, seconds: float) -> Iterator[None]:
    until = console.kernel.now_seconds() + seconds
    while console.kernel.now_seconds() < until:
        yield


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise UsageError(f"invalid time '{text}'")
    return seconds


def _options(arguments: list[str], *, flags: str, valued: str) -> tuple[dict[str, str], list[str]]:
    """Leading options, those in `valued` with the word that follows, and the rest."""
    options: dict[str, str] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        for position, letter in enumerate(word[1:], 1):
            if letter in valued:
                value = word[position + 1 :] or (rest.pop(0) if rest else "")
                if not value:
                    raise UsageError(f"option requires an argument -- '{letter}'")
                options[letter] = value
                break
            if letter not in flags:
                raise UsageError(f"invalid option -- '{letter}'")
            options[letter] = ""
    return options, rest


LOCK_COMMANDS: Final[dict[str, WaitingCommand]] = {
    "flock": flock,
    "lockf": lockf,
    "sleep": sleep,
}
