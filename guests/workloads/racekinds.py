"""The kinds of races: what each of the nodes that run one at once does (see `races`)."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from fs.block.device import BLOCK_BYTES
from guests.workloads.racer import LOG_BYTES_MAX, RECORD_BYTES, Racer, pack, read_log, unpack

_OPEN_MAX: Final = 6
_FILES: Final = 4
_ROOM_INODES: Final = 20


def cross(racer: Racer, folder: str) -> Iterator[None]:
    """Files of others are removed; what is open is as it was written."""
    vfs, chance = racer.vfs, racer.random
    held: deque[tuple[int, str, int]] = deque()
    others: deque[int] = deque()
    for number in range(racer.operations):
        if chance.random() < 0.5:
            path = f"{folder}/{racer.who}.{number}"
            handle = racer.make(path, number, 2 * BLOCK_BYTES)
            if handle is not None:
                held.append((handle, path, number))
        else:
            _remove_one(racer, folder, others)
        if held and (len(held) > _OPEN_MAX or chance.random() < 0.2):
            handle, path, first = held.popleft()
            _check_own(racer, handle, path, first)
            vfs.close(handle)
        if len(others) > _OPEN_MAX:
            vfs.close(others.popleft())
        racer.done()
        yield
    for handle, path, first in held:
        _check_own(racer, handle, path, first)
        vfs.close(handle)
    for handle in others:
        vfs.close(handle)


def _check_own(racer: Racer, handle: int, path: str, number: int) -> None:
    """Named or not, it is what this node alone wrote, and takes more."""
    size = 2 * BLOCK_BYTES
    if unpack(racer.vfs.pread(handle, 2 * size, 0)) != (racer.who, number):
        racer.wrong(f"{path}: an open file lost what was written to it")
    racer.put(handle, path, number + 1, size)
    if racer.random.random() < 0.3:
        racer.vfs.fsync(handle)
    if unpack(racer.vfs.pread(handle, 2 * size, 0)) != (racer.who, number + 1):
        racer.wrong(f"{path}: an open file lost what was written to it again")


def _remove_one(racer: Racer, folder: str, held: deque[int]) -> None:
    """A file of another node, if there is one; some are open here meanwhile, and stay so."""
    names = racer.names(folder)
    names = [name for name in names if not name.startswith(f"{racer.who}.")] or names
    if not names:
        return
    path = f"{folder}/{racer.random.choice(names)}"
    handle = None
    if racer.random.random() < 0.4:
        handle = racer.attempt("open", path, lambda: racer.vfs.open(path), errno.ENOENT)
    racer.attempt("unlink", path, lambda: racer.vfs.unlink(path), errno.ENOENT)
    if handle is not None:
        held.append(handle)
        data = racer.vfs.pread(handle, 4 * BLOCK_BYTES, 0)
        if data and unpack(data) is None:
            racer.wrong(f"{path}: no whole write was read")


def create(racer: Racer, folder: str) -> Iterator[None]:
    """The same names, in the same order; who is behind sees that and catches up."""
    vfs = racer.vfs
    source = f"{folder}/source.{racer.who}"
    handle = racer.make(source, 0, BLOCK_BYTES)
    if handle is None:
        return
    vfs.close(handle)

    def file(path: str) -> None:
        made = racer.make(path, 0, BLOCK_BYTES, errno.EEXIST)
        if made is not None:
            vfs.close(made)

    def plain(call: str, act: Callable[[str], None], path: str) -> None:
        racer.attempt(call, path, lambda: act(path), errno.EEXIST)

    ways: dict[str, Callable[[str], None]] = {
        "file": file,
        "dir": partial(plain, "mkdir", vfs.mkdir),
        "symlink": partial(plain, "symlink", partial(vfs.symlink, racer.who)),
        "link": partial(plain, "link", partial(vfs.link, source)),
    }
    order = [*ways, "any"]
    for number in range(-(-racer.operations // len(order))):
        racer.random.shuffle(order)
        for name in order:
            way = ways[racer.random.choice([*ways]) if name == "any" else name]
            way(f"{folder}/{name}.{number}")
            racer.done()
            yield


def directories(racer: Racer, folder: str) -> Iterator[None]:
    """Something of one directory goes to another; a throne is taken; a yard comes and goes."""
    ways = (_move, _move, _move, _crown, _throne, _yard)
    for number in range(racer.operations):
        racer.random.choice(ways)(racer, folder, number)
        racer.done()
        yield


def _move(racer: Racer, folder: str, _number: int) -> None:
    places = [
        f"{folder}/{root}{below}"
        for root in "ab"
        for below in ("", "", "/box", "/deep", "/box/deep", "/deep/box")
    ]
    start, end = racer.random.choice(places), racer.random.choice(places)
    names = racer.names(start)
    if not names:
        return
    name = racer.random.choice(names)
    old, new = f"{start}/{name}", f"{end}/{name}"
    # A directory into itself: both move while their paths are walked.
    allowed = (errno.ENOENT, errno.EINVAL) if name in ("box", "deep") else (errno.ENOENT,)
    racer.attempt("rename", old, lambda: racer.vfs.rename(old, new), *allowed, to=new)


def _crown(racer: Racer, folder: str, number: int) -> None:
    """A file over a file that all put there."""
    old, new = f"{folder}/crowns/{racer.who}.{number}", f"{folder}/crowns/crown"
    handle = racer.make(old, number, BLOCK_BYTES)
    if handle is None:
        return
    racer.attempt("rename", old, lambda: racer.vfs.rename(old, new), to=new)
    if unpack(racer.vfs.pread(handle, 2 * BLOCK_BYTES, 0)) != (racer.who, number):
        racer.wrong(f"{old}: not what was written")
    racer.vfs.close(handle)


def _throne(racer: Racer, folder: str, number: int) -> None:
    """An empty directory over one that somebody may just fill."""
    vfs = racer.vfs
    old, new = f"{folder}/crowns/dir.{racer.who}.{number}", f"{folder}/crowns/throne"
    guest = f"{new}/{racer.who}"
    racer.attempt("mkdir", old, lambda: vfs.mkdir(old))
    racer.attempt("rename", old, lambda: vfs.rename(old, new), errno.ENOTEMPTY, to=new)
    # Only there when the throne was not free.
    racer.attempt("rmdir", old, lambda: vfs.rmdir(old), errno.ENOENT)
    flags = os.O_CREAT | os.O_WRONLY
    handle = racer.attempt("create", guest, lambda: vfs.open(guest, flags), errno.ENOENT)
    if handle is not None:
        vfs.close(handle)
        racer.attempt("unlink", guest, lambda: vfs.unlink(guest))


def _yard(racer: Racer, folder: str, _number: int) -> None:
    """A directory is removed while others make something in it."""
    vfs = racer.vfs
    yard = f"{folder}/yard"
    tree = f"{yard}/tree"
    way = racer.random.randrange(4)
    if way == 0:
        racer.attempt("mkdir", yard, lambda: vfs.mkdir(yard), errno.EEXIST)
    elif way == 1:
        racer.attempt("rmdir", yard, lambda: vfs.rmdir(yard), errno.ENOENT, errno.ENOTEMPTY)
    elif way == 2:
        handle = racer.make(tree, 0, BLOCK_BYTES, errno.ENOENT, errno.EEXIST)
        if handle is not None:
            vfs.close(handle)
    else:
        racer.attempt("unlink", tree, lambda: vfs.unlink(tree), errno.ENOENT)


def files(racer: Racer, folder: str) -> Iterator[None]:
    """The same few files of one page."""
    vfs, chance = racer.vfs, racer.random
    for number in range(racer.operations):
        path = f"{folder}/{chance.randrange(_FILES)}"
        way = chance.random()
        if way < 0.4:
            _rewrite(racer, path, number)
        elif way < 0.75:
            handle = racer.attempt("open", path, partial(vfs.open, path), errno.ENOENT)
            if handle is not None:
                _read_page(racer, handle, path)
                vfs.close(handle)
        elif way < 0.9:
            found = racer.attempt("stat", path, partial(vfs.stat, path), errno.ENOENT)
            if found is not None and found.st_size not in (0, BLOCK_BYTES):
                racer.wrong(f"{path}: {found.st_size} bytes")
        else:
            racer.attempt("unlink", path, partial(vfs.unlink, path), errno.ENOENT)
        racer.done()
        yield


def _rewrite(racer: Racer, path: str, number: int) -> None:
    vfs = racer.vfs
    flags = os.O_RDWR | os.O_CREAT
    handle = racer.attempt("open", path, lambda: vfs.open(path, flags))
    if handle is None:
        return
    data = pack(racer.who, number, BLOCK_BYTES)
    racer.attempt("write", path, lambda: vfs.pwrite(handle, data, 0), number=number)
    if racer.random.random() < 0.1:
        racer.attempt("fsync", path, lambda: vfs.fsync(handle), number=number)
    if _read_page(racer, handle, path) is None:
        racer.wrong(f"{path}: empty after a write")
    vfs.close(handle)


def _read_page(racer: Racer, handle: int, path: str) -> tuple[str, int] | None:
    racer.say("begin", "read", path)
    data = racer.vfs.pread(handle, 2 * BLOCK_BYTES, 0)
    value = unpack(data)
    if data and (value is None or len(data) != BLOCK_BYTES):
        racer.wrong(f"{path}: no whole write was read")
    racer.say("end", "read", path, error=None, value=value)
    return value


def append(racer: Racer, folder: str) -> Iterator[None]:
    """Three logs: one only grows, one is cut at any record by one node, one is emptied by all."""
    vfs, chance = racer.vfs, racer.random
    logs = {
        name: vfs.open(f"{folder}/{name}", os.O_RDWR | os.O_APPEND)
        for name in ("grows", "cut", "emptied")
    }
    before: list[tuple[str, int]] = []
    for number in range(racer.operations):
        name = chance.choice([*logs])
        path, handle = f"{folder}/{name}", logs[name]
        way = chance.random()
        if way < 0.7:
            data = pack(racer.who, number, RECORD_BYTES)
            racer.attempt(
                "append", path, partial(vfs.write, handle, data),
                number=number,
            )  # fmt: skip
        elif way < 0.9 or name == "grows":
            records = _read_log(racer, handle, path)
            if name == "grows":
                if records[: len(before)] != before:
                    racer.wrong(f"{path}: not what it was, with something behind")
                before = records
        elif name == "emptied":
            racer.attempt("empty", path, partial(vfs.truncate, path, 0))
        elif racer.cutter:
            size = vfs.fstat(handle).st_size // RECORD_BYTES
            size = chance.randint(size // 2, size) * RECORD_BYTES
            racer.attempt(
                "cut", path, partial(vfs.ftruncate, handle, size)
            )  # fmt: skip
        if chance.random() < 0.03:
            racer.attempt("fsync", path, partial(vfs.fsync, handle))
        racer.done()
        yield
    for handle in logs.values():
        vfs.close(handle)


def _read_log(racer: Racer, handle: int, path: str) -> list[tuple[str, int]]:
    data = racer.vfs.pread(handle, LOG_BYTES_MAX, 0)
    records = read_log(data)
    if None in records:
        racer.wrong(f"{path}: record {records.index(None)} of {len(records)} is torn")
    whole = [record for record in records if record is not None]
    newest: dict[str, int] = {}
    for who, number in whole:
        if number <= newest.get(who, -1):
            racer.wrong(f"{path}: record {number} of {who} is out of order")
        newest[who] = number
    return whole


def inodes(racer: Racer, folder: str) -> Iterator[None]:
    """Until there is no inode left in anybody's slot; then others' files make room."""
    for number in range(racer.operations):
        path = f"{folder}/{racer.who}.{number}"
        handle = racer.make(path, number, BLOCK_BYTES if number % 8 == 0 else 0, errno.ENOSPC)
        if handle is not None:
            racer.vfs.close(handle)
        elif racer.cutter:
            return
        else:
            held: deque[int] = deque()
            for _ in range(_ROOM_INODES):
                _remove_one(racer, folder, held)
            for other in held:
                racer.vfs.close(other)
        racer.done()
        yield


def own(racer: Racer, folder: str) -> Iterator[None]:
    """A folder that nobody else wants: what happens there stays in the journal for long."""
    vfs = racer.vfs
    mine = f"{folder}/{racer.who}"
    racer.attempt("mkdir", mine, lambda: vfs.mkdir(mine))
    for number in range(racer.operations):
        path = f"{mine}/{racer.who}.{number}"
        handle = racer.make(path, number, BLOCK_BYTES)
        if handle is not None:
            if racer.random.random() < 0.3:
                racer.attempt("fsync", path, partial(vfs.fsync, handle))
            vfs.close(handle)
        if number > 3 and racer.random.random() < 0.3:
            old = f"{mine}/{racer.who}.{racer.random.randrange(number)}"
            racer.attempt("unlink", old, partial(vfs.unlink, old), errno.ENOENT)
        racer.done()
        yield
