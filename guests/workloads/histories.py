"""Read and write pages of a few files together with other nodes, and write down what was seen.

Parameters: record (a file of the host, one JSON object a line), files (3), pages (4), operations
(1000), writes (0.3: share of writes), syncs (0.1: share of writes that are followed by fsync),
folder ("/histories"), prepare (0; 1: first make the files, full of zeros: the value 0.0).  A read
behind the end of a file that was prepared with fewer pages ends the work with an error.

Each page that is written holds one value, unique in the run, from its first to its last byte:

    node's seed (8 bytes) | number of the write (8 bytes) | the same again, 256 times in all

so a page that is torn, or mixed with another file's, is a mismatch here and now.  What only all
nodes together can tell is told by the record: value, page, and the host's monotonic clock (which
all processes of a host share) before and after each call.  A call's line is written in two halves,
so that what a killed node had begun is known too.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import time
from collections.abc import Iterator
from typing import IO, Final

from fs.block.device import BLOCK_BYTES
from fs.errors import error
from fs.vfs import Vfs
from guests.workloads.job import Job

_VALUE: Final = struct.Struct("<QQ")
_COPIES: Final = BLOCK_BYTES // _VALUE.size


def run(job: Job) -> Iterator[None]:
    """Operations in an order by the seed."""
    folder = job.text("folder", "/histories")
    files = job.count("files", 3, 1, 1000)
    pages = job.count("pages", 4, 1, 100_000)
    writes = job.number("writes", 0.3, 0.0, 1.0)
    syncs = job.number("syncs", 0.1, 0.0, 1.0)
    if job.count("prepare", 0, 0, 1):
        _prepare(job.vfs, folder, files, pages)
    job.total = job.count("operations", 1000, 0, 10_000_000)
    writer = job.random.getrandbits(63)
    paths = [f"{folder}/{number}" for number in range(files)]
    with job.open("record", "a") as record:
        yield
        while job.done < job.total:
            path = job.random.choice(paths)
            page = job.random.randrange(pages)
            if job.random.random() < writes:
                sync = job.random.random() < syncs
                _write(job.vfs, record, path, page, (writer, job.done), sync=sync)
            elif not _read(job.vfs, record, path, page):
                job.findings.mismatch(f"{path} page {page}")
            job.done += 1
            yield


def _prepare(vfs: Vfs, folder: str, files: int, pages: int) -> None:
    vfs.mkdir(folder)
    for number in range(files):
        handle = vfs.open(f"{folder}/{number}", os.O_CREAT | os.O_WRONLY)
        vfs.write(handle, bytes(pages * BLOCK_BYTES))
        vfs.close(handle)
    vfs.sync()


def _write(
    vfs: Vfs,
    record: IO[str],
    path: str,
    page: int,
    value: tuple[int, int],
    *,
    sync: bool,
) -> None:
    text = "{:x}.{:x}".format(*value)
    handle = vfs.open(path, os.O_WRONLY)
    try:
        _say(record, "begin", "write", path, page, text)
        vfs.pwrite(handle, _VALUE.pack(*value) * _COPIES, page * BLOCK_BYTES)
        _say(record, "end", "write", path, page, text)
        if sync:
            vfs.fsync(handle)
            _say(record, "end", "sync", path, page, text)
    finally:
        vfs.close(handle)


def _read(vfs: Vfs, record: IO[str], path: str, page: int) -> bool:
    """False if the page is no page that anybody wrote; EINVAL if the file has no such page."""
    handle = vfs.open(path, os.O_RDONLY)
    try:
        _say(record, "begin", "read", path, page, "")
        data = vfs.pread(handle, BLOCK_BYTES, page * BLOCK_BYTES)
        if len(data) < BLOCK_BYTES:
            raise error(errno.EINVAL, f"{path} was prepared without page {page}; pages is too many")
        value = data[: _VALUE.size]
        whole = data == value * _COPIES
        text = "{:x}.{:x}".format(*_VALUE.unpack(value)) if whole else "torn"
        _say(record, "end", "read", path, page, text)
        return whole
    finally:
        vfs.close(handle)


def _say(record: IO[str], moment: str, call: str, path: str, page: int, value: str) -> None:
    line = {
        "at": moment,
        "call": call,
        "path": path,
        "page": page,
        "value": value,
        "ns": time.monotonic_ns(),
    }
    record.write(json.dumps(line) + "\n")
