"""Race the other nodes of a volume for the same names and files, and write down what came of it.

Parameters: record (a file of the host, one JSON object a line), who (a name for this run that no
other has), kind (one of KINDS, or "all": the first six in turns), folder ("/races"), operations
(100), cutter (0; 1: this one of all cuts logs at any record), prepare (0; 1: first make what the
races are about).

Kinds, after the tests that OCFS2 itself is tested with:

    cross        files are removed by other nodes while their makers still write and read them
    create       all make the same names: files, directories, symbolic links, links
    directories  things move to and fro, also into each other; directories come and go
    files        all open, read, write and remove the same few files of one page
    append       all append to the same logs, read them, and cut some of them
    own          each has a folder that nobody else wants, and syncs now and then
    inodes       all make files until no slot has an inode left (the cutter ends there), remove
                 others', and go on
    look         write down the whole tree
    remove       remove the whole tree

What can be told by one node at once is checked here: a page or a record is one whole write of
somebody, a log that is never cut only grows, what was written to an open file is there until its
last close, and no call fails for another reason than the race gives it.  The rest is told by all
records together: each call has a line before and one after it, so that what a killed node had
begun is known too.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from fs.block.device import BLOCK_BYTES
from guests.workloads import racekinds
from guests.workloads.job import BadParameters, Job
from guests.workloads.racer import LOG_BYTES_MAX, Racer, pack, read_log, unpack

_TOKENS: Final = 5


def run(job: Job) -> Iterator[None]:
    """One kind of race, or all."""
    kind = job.text("kind")
    folder = job.text("folder", "/races")
    if kind != "all" and kind not in KINDS:
        raise BadParameters(f"{job.workload}: kind must be all or one of {', '.join(KINDS)}")
    kinds = list(RACES) if kind == "all" else [kind]
    places = {name: folder if name in WHOLE else f"{folder}/{name}" for name in kinds}
    with job.open("record", "a") as record:
        racer = Racer(job, record)
        job.total = racer.operations * len(places)
        if job.count("prepare", 0, 0, 1):
            _prepare(racer, folder)
        yield
        races = deque(KINDS[name](racer, where) for name, where in places.items())
        while races:
            race = races.popleft()
            with contextlib.suppress(StopIteration):
                next(race)
                races.append(race)
            yield


def _prepare(racer: Racer, folder: str) -> None:
    vfs = racer.vfs
    vfs.mkdir(folder)
    for name in (*RACES, *LONE):
        vfs.mkdir(f"{folder}/{name}")
    places = f"{folder}/directories"
    for name in ("a", "b", "a/box", "b/deep", "crowns"):
        vfs.mkdir(f"{places}/{name}")
    for number in range(_TOKENS):
        handle = vfs.open(f"{places}/a/token.{number}", os.O_CREAT | os.O_WRONLY)
        vfs.write(handle, pack("token", number, BLOCK_BYTES))
        vfs.close(handle)
    for name in ("grows", "cut", "emptied"):
        vfs.close(vfs.open(f"{folder}/append/{name}", os.O_CREAT | os.O_WRONLY))
    vfs.sync()


def _look(racer: Racer, folder: str) -> Iterator[None]:
    """The tree as this node sees it, while nobody changes it."""
    vfs = racer.vfs
    for top, directories, others in vfs.walk(folder):
        for name in (*directories, *others):
            path = f"{top}/{name}"
            stat = vfs.lstat(path)
            kind = {0o040000: "dir", 0o100000: "file", 0o120000: "symlink"}[stat.st_mode & 0o170000]
            text: object = None
            if kind == "symlink":
                text = vfs.readlink(path)
            elif kind == "file":
                handle = vfs.open(path)
                data = vfs.pread(handle, LOG_BYTES_MAX, 0)
                vfs.close(handle)
                text = read_log(data) if top.endswith("/append") else unpack(data)
                if data and text is None:
                    racer.wrong(f"{path}: holds no whole write")
            racer.say("seen", kind, path, size=stat.st_size, links=stat.st_nlink, value=text)
        yield


def _remove(racer: Racer, folder: str) -> Iterator[None]:
    """All of it."""
    vfs = racer.vfs
    for top, directories, others in reversed(list(vfs.walk(folder))):
        for name in others:
            vfs.unlink(f"{top}/{name}")
        for name in directories:
            vfs.rmdir(f"{top}/{name}")
        yield
    vfs.rmdir(folder)


_Kinds = dict[str, Callable[[Racer, str], Iterator[None]]]
RACES: Final[_Kinds] = {
    "cross": racekinds.cross,
    "create": racekinds.create,
    "directories": racekinds.directories,
    "files": racekinds.files,
    "append": racekinds.append,
    "own": racekinds.own,
}
"""What is run together by the kind "all"."""
LONE: Final[_Kinds] = {"inodes": racekinds.inodes}
WHOLE: Final[_Kinds] = {"look": _look, "remove": _remove}
KINDS: Final = {**RACES, **LONE, **WHOLE}
