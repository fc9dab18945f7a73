"""The built-in commands: functions (console, arguments) whose docstring is their usage."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import stat
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from typing import Final

from fs.errors import error
from fs.inode import Stat
from guests.kernel import Kernel
from guests.proc import virtual_file

CHUNK_BYTES: Final = 64 * 1024
_DIGITS_MAX: Final = 18
"""Of a number: Python refuses to make one of thousands."""


class UsageError(Exception):
    """A command was called with arguments that it does not take."""


class Console(ABC):
    """What a command writes to, and the kernel it runs in."""

    def __init__(self, kernel: Kernel, command: str) -> None:
        self.kernel = kernel
        self.vfs = kernel.vfs
        self.command = command
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.exit_code = 0

    def write(self, data: bytes) -> None:
        """To standard output."""
        self.stdout += data

    def line(self, text: str) -> None:
        """A line to standard output."""
        self.write(text.encode("utf-8", "surrogateescape") + b"\n")

    def say(self, text: str) -> None:
        """A line to standard error, after the command's name."""
        self.stderr += f"{self.command}: {text}\n".encode("utf-8", "surrogateescape")

    @abstractmethod
    def run(self, argv: list[str]) -> Generator[None, None, None]:
        """Another command, with the same output; its exit code is this one's."""

    def fail(self, reason: OSError, path: str | None = None) -> None:
        """Tell of an error as Unix does, and go on."""
        text = os.strerror(reason.errno) if reason.errno else str(reason)
        self.say(f"{path}: {text}" if path is not None else str(reason.strerror or text))
        self.exit_code = 1


Command = Callable[[Console, list[str]], None]


def _options(arguments: list[str], known: str) -> tuple[set[str], list[str]]:
    """Leading single-letter options, and the rest."""
    options: set[str] = set()
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        for letter in word[1:]:
            if letter not in known:
                raise UsageError(f"invalid option -- '{letter}'")
            options.add(letter)
    return options, rest


def _operands(arguments: list[str], least: int, most: int | None = None) -> list[str]:
    if len(arguments) < least:
        raise UsageError("missing operand")
    if most is not None and len(arguments) > most:
        raise UsageError(f"extra operand '{arguments[most]}'")
    return arguments


def _each(console: Console, paths: list[str], work: Callable[[str], None]) -> None:
    """Work on every path; one that fails does not keep the others from being done."""
    for path in paths:
        try:
            work(path)
        except OSError as reason:
            console.fail(reason, path)


def _chunks(console: Console, path: str) -> Iterator[bytes]:
    """The content of a file, virtual or real."""
    content = virtual_file(console.kernel, path)
    if content is not None:
        yield content
        return
    handle = console.vfs.open(path)
    try:
        while chunk := console.vfs.read(handle, CHUNK_BYTES):
            yield chunk
    finally:
        console.vfs.close(handle)


def _join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"


# --- reading


def cat(console: Console, arguments: list[str]) -> None:
    """cat FILE..."""  # noqa: D403
    _, paths = _options(arguments, "")

    def show(path: str) -> None:
        for chunk in _chunks(console, path):
            console.write(chunk)

    _each(console, _operands(paths, 1), show)


def sha256sum(console: Console, arguments: list[str]) -> None:
    """sha256sum FILE..."""
    _, paths = _options(arguments, "")

    def show(path: str) -> None:
        digest = hashlib.sha256()
        for chunk in _chunks(console, path):
            digest.update(chunk)
        console.line(f"{digest.hexdigest()}  {path}")

    _each(console, _operands(paths, 1), show)


def ls(console: Console, arguments: list[str]) -> None:
    """ls [-la] [PATH]..."""  # noqa: D403
    options, paths = _options(arguments, "la")
    several = len(paths) > 1

    def show(path: str) -> None:
        found = console.vfs.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            console.line(_row(console, path, path) if "l" in options else path)
            return
        if several:
            console.line(f"{path}:")
        for name in sorted(console.vfs.listdir(path)):
            if name.startswith(".") and "a" not in options:
                continue
            console.line(_row(console, _join(path, name), name) if "l" in options else name)

    _each(console, paths or ["/"], show)


def _row(console: Console, path: str, name: str) -> str:
    found = console.vfs.lstat(path)
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(found.st_mtime_ns // 10**9))
    target = f" -> {console.vfs.readlink(path)}" if stat.S_ISLNK(found.st_mode) else ""
    return (
        f"{stat.filemode(found.st_mode)} {found.st_nlink:>3} {found.st_uid:>5} {found.st_gid:>5} "
        f"{found.st_size:>9} {when} {name}{target}"
    )


def stat_(console: Console, arguments: list[str]) -> None:
    """stat FILE..."""  # noqa: D403
    _, paths = _options(arguments, "")

    def show(path: str) -> None:
        found: Stat = console.vfs.lstat(path)
        console.line(f"  File: {path}")
        console.line(
            f"  Size: {found.st_size:<10} Blocks: {found.st_blocks:<8} {_kind(found.st_mode)}"
        )
        console.line(
            f" Inode: {found.st_ino:<10} Links: {found.st_nlink:<9} Generation: {found.generation}"
        )
        console.line(
            f"Access: ({stat.S_IMODE(found.st_mode):04o}/{stat.filemode(found.st_mode)})  "
            f"Uid: {found.st_uid}  Gid: {found.st_gid}"
        )
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(found.st_mtime_ns // 10**9))
        console.line(f"Modify: {when}.{found.st_mtime_ns % 10**9:09d} +0000")

    _each(console, _operands(paths, 1), show)


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "directory"
    if stat.S_ISLNK(mode):
        return "symbolic link"
    return "regular file" if stat.S_ISREG(mode) else "special file"


def find(console: Console, arguments: list[str]) -> None:
    """find [PATH] [-name GLOB] [-type f|d|l]"""  # noqa: D400, D403
    words = list(arguments)
    top = words.pop(0) if words and not words[0].startswith("-") else "/"
    tests: dict[str, str] = {}
    while words:
        test = words.pop(0)
        if test not in ("-name", "-type") or not words:
            raise UsageError(f"unknown predicate or missing argument: '{test}'")
        tests[test] = words.pop(0)
    if tests.get("-type", "f") not in ("f", "d", "l"):
        raise UsageError(f"unknown type '{tests['-type']}'")
    kinds = {"f": stat.S_ISREG, "d": stat.S_ISDIR, "l": stat.S_ISLNK}

    def show(path: str) -> None:
        if "-name" in tests and not fnmatch.fnmatchcase(path.rpartition("/")[2], tests["-name"]):
            return
        if "-type" in tests and not kinds[tests["-type"]](console.vfs.lstat(path).st_mode):
            return
        console.line(path)

    def descend(path: str) -> None:
        show(path)
        if stat.S_ISDIR(console.vfs.lstat(path).st_mode):
            for directory, directories, others in console.vfs.walk(path):
                for name in sorted(directories + others):
                    show(_join(directory, name))

    _each(console, [top], descend)


def df(console: Console, arguments: list[str]) -> None:
    """df [-i]"""  # noqa: D400, D403
    options, rest = _options(arguments, "ik")
    _operands(rest, 0, 0)
    space = console.vfs.statfs()
    if "i" in options:
        used = space.inodes - space.inodes_free
        row = (space.inodes, used, space.inodes_free, 100 * used // max(1, space.inodes))
        console.line("Filesystem        Inodes      IUsed      IFree IUse% Mounted on")
    else:
        kib = space.block_bytes // 1024
        used = space.blocks - space.blocks_free
        row = (
            space.blocks * kib,
            used * kib,
            space.blocks_free * kib,
            100 * used // max(1, space.blocks),
        )
        console.line("Filesystem     1K-blocks       Used  Available  Use% Mounted on")
    console.line("/dev/vda      {:>10} {:>10} {:>10} {:>4}% /".format(*row))


# --- changing


def mkdir(console: Console, arguments: list[str]) -> None:
    """mkdir [-p] DIRECTORY..."""  # noqa: D403
    options, paths = _options(arguments, "p")

    def make(path: str) -> None:
        if "p" not in options:
            console.vfs.mkdir(path)
            return
        made = ""
        for name in path.strip("/").split("/"):
            made += f"/{name}"
            try:
                console.vfs.mkdir(made)
            except FileExistsError:
                if not stat.S_ISDIR(console.vfs.stat(made).st_mode):
                    raise

    _each(console, _operands(paths, 1), make)


def rm(console: Console, arguments: list[str]) -> None:
    """rm [-rf] PATH..."""  # noqa: D403
    options, paths = _options(arguments, "rRf")
    recursive = bool(options & {"r", "R"})

    def remove(path: str) -> None:
        try:
            is_directory = stat.S_ISDIR(console.vfs.lstat(path).st_mode)
        except FileNotFoundError:
            if "f" in options:
                return
            raise
        if is_directory and recursive:
            _remove_tree(console, path)
        else:
            console.vfs.unlink(path)

    _each(console, paths if "f" in options else _operands(paths, 1), remove)


def _remove_tree(console: Console, top: str) -> None:
    directories = []
    for path, _, others in console.vfs.walk(top):
        directories.append(path)
        for name in others:
            console.vfs.unlink(_join(path, name))
    for path in reversed(directories):
        console.vfs.rmdir(path)


def rmdir(console: Console, arguments: list[str]) -> None:
    """rmdir DIRECTORY..."""  # noqa: D403
    _, paths = _options(arguments, "")
    _each(console, _operands(paths, 1), console.vfs.rmdir)


def _target(console: Console, source: str, destination: str) -> str:
    """`destination`, or the source's name inside it if it is a directory."""
    try:
        inside = stat.S_ISDIR(console.vfs.stat(destination).st_mode)
    except FileNotFoundError:
        return destination
    return _join(destination, source.rstrip("/").rpartition("/")[2]) if inside else destination


def cp(console: Console, arguments: list[str]) -> None:
    """cp SOURCE DESTINATION"""  # noqa: D400, D403
    _, paths = _options(arguments, "")
    source, destination = _operands(paths, 2, 2)
    target = _target(console, source, destination)
    if virtual_file(console.kernel, source) is None:
        found = console.vfs.stat(source)
        if stat.S_ISDIR(found.st_mode):
            raise UsageError(f"'{source}' is a directory")
        try:
            same = console.vfs.stat(target).st_ino == found.st_ino
        except FileNotFoundError:
            same = False
        if same:
            raise UsageError(f"'{source}' and '{target}' are the same file")
    handle = console.vfs.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for chunk in _chunks(console, source):
            if console.vfs.write(handle, chunk) < len(chunk):
                raise error(errno.ENOSPC, target)
    finally:
        console.vfs.close(handle)


def mv(console: Console, arguments: list[str]) -> None:
    """mv SOURCE DESTINATION"""  # noqa: D400, D403
    _, paths = _options(arguments, "")
    source, destination = _operands(paths, 2, 2)
    console.vfs.rename(source, _target(console, source, destination))


def ln(console: Console, arguments: list[str]) -> None:
    """ln [-s] TARGET NAME"""  # noqa: D400, D403
    options, paths = _options(arguments, "s")
    target, name = _operands(paths, 2, 2)
    if "s" in options:
        console.vfs.symlink(target, name)
    else:
        console.vfs.link(target, name)


def sync(console: Console, arguments: list[str]) -> None:
    """sync"""  # noqa: D400, D403
    _operands(arguments, 0, 0)
    console.vfs.sync()


# --- looking at the guest itself


def modules(console: Console, arguments: list[str]) -> None:
    """modules"""  # noqa: D400, D403
    _operands(arguments, 0, 0)
    for name in sorted(sys.modules):
        console.line(name)


def selfballoon(console: Console, arguments: list[str]) -> None:
    """selfballoon [KNOB VALUE]"""  # noqa: D400, D403
    userland = console.kernel.userland
    if arguments:
        if len(arguments) != 2 or not arguments[1].isdigit():
            raise UsageError("a knob and its new value, a whole number")
        try:
            userland.switch_selfballooning(arguments[0], int(arguments[1]))
        except ValueError as reason:
            raise UsageError(str(reason)) from None
    for name, value in vars(userland.selfballoon.knobs).items():
        console.line(f"{name} {value}")


def frontswap(console: Console, arguments: list[str]) -> None:
    """frontswap [writethrough 0|1] [exclusive_gets 0|1] [shrink PAGES]"""  # noqa: D400, D403
    userland = console.kernel.userland
    swap, front = userland.swap, userland.frontswap
    if swap is None or front is None:
        raise UsageError("this guest has none: it needs a swap disk and a hypervisor")
    words = list(arguments)
    while words:
        name, value = words.pop(0), words.pop(0) if words else ""
        if name == "writethrough" and value in ("0", "1"):
            front.writethrough = value == "1"
        elif name == "exclusive_gets" and value in ("0", "1"):
            swap.exclusive = value == "1"
        elif name == "shrink" and value.isdecimal() and len(value) <= _DIGITS_MAX:
            userland.shrink_frontswap(int(value))
        else:
            raise UsageError(f"not a mode and its value: '{name} {value}'")
    console.line(f"writethrough {front.writethrough:d}")
    console.line(f"exclusive_gets {swap.exclusive:d}")
    console.line(f"curr_pages {front.pages}")


def verify(console: Console, arguments: list[str]) -> None:
    """verify [on|off|learn]"""  # noqa: D400, D403
    verification = console.kernel.verification
    if verification is None:
        raise UsageError("this guest keeps no checksums: its volume needs verify = true")
    if arguments:
        if len(arguments) != 1 or arguments[0] not in ("on", "off", "learn"):
            raise UsageError("on, off or learn")
        if arguments[0] == "learn":
            console.line(f"learnt {verification.learn(console.vfs)}")
        else:
            verification.checking = arguments[0] == "on"
    for name, value in verification.counters().items():
        console.line(f"{name} {value:d}")


COMMANDS: Final[dict[str, Command]] = {
    "cat": cat,
    "cp": cp,
    "df": df,
    "find": find,
    "frontswap": frontswap,
    "ln": ln,
    "ls": ls,
    "mkdir": mkdir,
    "modules": modules,
    "mv": mv,
    "rm": rm,
    "rmdir": rmdir,
    "selfballoon": selfballoon,
    "sha256sum": sha256sum,
    "stat": stat_,
    "sync": sync,
    "verify": verify,
}
