"""A node that poisons files of the volume that it has mounted with others.

Tries: it is a good member of the cluster, with locks, tokens and a writer's grant.  It opens files
as any node does, which gives it their locks and fencing tokens, and then puts wrong bytes into the
shared pool in place of what the disk holds.  The next node that reads the file and finds the page
there believes it.

Stopped by: verification of contents by the file system, which knows what the disk holds.  Rights,
tokens and checksums of the pages do not: this is a writer, on time, and it puts whole pages.
Afterwards the administrator sees who put a page (`tmem pools --page`) and drops all that the node
has put (`tmem quarantine`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from fs.hooks import FileKey
from guests.adversaries.raw import Raw, file_oid, why
from guests.adversary import Cell
from guests.kernel import Kernel
from ipc.abi import PAGE_BYTES

_MARK = b"poisoned by %s: "


def run(cell: Cell) -> Iterator[None]:
    """Parameters: folder, files (how many of it), pages (of each), rounds, pause_seconds (after
    each file), seconds (the most that it takes).  `paths` are files by inode number."""
    cell.check_node()
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}, "paths": {}}
    until = time.monotonic() + cell.number("seconds", 600.0, 0.0, 3600.0)
    folder = cell.text("folder", "/")
    names = sorted(name for name in cell.kernel.vfs.listdir(folder) if name != "lost+found")
    cell.random.shuffle(names)
    names = names[: cell.count("files", len(names), 1, 10**6)]
    rounds = cell.count("rounds", 1, 1, 10**6)
    pause_seconds = cell.number("pause_seconds", 0.0, 0.0, 10.0)
    pages = cell.count("pages", 1 << 20, 1, 1 << 20)
    mark = _MARK % cell.spec.name.encode()
    page = (mark * (PAGE_BYTES // len(mark) + 1))[:PAGE_BYTES]
    cell.job.total = rounds * len(names)
    yield
    for _ in range(rounds):
        for name in names:
            yield from _poison(cell, f"{folder.rstrip('/')}/{name}", page, pages)
            cell.job.done += 1
            if time.monotonic() >= until:
                return
            awake_at = time.monotonic() + pause_seconds
            while time.monotonic() < awake_at:
                time.sleep(0.002)
                yield


def _poison(cell: Cell, path: str, page: bytes, pages: int) -> Iterator[None]:
    report, vfs = cell.report, cell.kernel.vfs
    handle = vfs.open(path)
    try:
        # Reading it is what gets the lock, and its token.
        vfs.read(handle, 1)
        inode = vfs.inode_of(handle)
        key = FileKey(inode.ino, inode.generation)
        size_pages = -(-inode.size // PAGE_BYTES)
    finally:
        vfs.close(handle)
    report["paths"][str(key.ino)] = [path, key.generation]
    token, pool = standing(cell.kernel, key)
    raw = Raw(cell)
    oid = file_oid(*key)
    for index in range(min(size_pages, pages)):
        reply = raw.put(pool, oid, index, [page], token=token)
        report["attempts"] += 1
        if reply.map & 1:
            report["succeeded"] += 1
        else:
            report["caught"] += 1
            report["reasons"][why(reply)] = report["reasons"].get(why(reply), 0) + 1
        if index % 16 == 15:
            yield
    yield


def standing(kernel: Kernel, key: FileKey) -> tuple[int, int]:
    """The token of a file's lock and the pool of the volume: guest code has all of its kernel."""
    cleancache = kernel.cleancache
    token = kernel._token_of(key) or 0  # noqa: SLF001
    pool = cleancache._pool if cleancache is not None else None  # noqa: SLF001
    return token, 0 if pool is None else pool
