"""A sleeper: a node that has lost its place in the cluster and goes on as if it had not.

Tries: read a file as a good node does, which gives it the file's lock and token, then do nothing
that a node has to do: no heartbeat, no answer to who wants the lock.  The others declare it dead
and change the file.  All the while it puts the pages that it has read, which were right, under the
token that it had.

Stopped by: fencing tokens that come from the real lock manager (`fs.dlm`, `hypervisor.tokens`): who
gets the exclusive lock after it has a higher number, and flushes the page under that before it
becomes dirty.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from fs.hooks import FileKey
from guests.adversaries.filepoison import standing
from guests.adversaries.raw import Raw, file_oid, why
from guests.adversary import Cell
from ipc.abi import PAGE_BYTES
from ipc.errors import Disconnected

_PAUSE_SECONDS = 0.1


def run(cell: Cell) -> Iterator[None]:
    """Parameters: path, seconds (how long it is deaf)."""
    cell.check_node()
    report, vfs = cell.report, cell.kernel.vfs
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    seconds = cell.number("seconds", 8.0, 0.1, 600.0)
    handle = vfs.open(cell.text("path"))
    data = vfs.read(handle, 64 * PAGE_BYTES)
    inode = vfs.inode_of(handle)
    key = FileKey(inode.ino, inode.generation)
    pages = [
        data[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
        for at in range(0, len(data), PAGE_BYTES)
    ]
    token, pool = standing(cell.kernel, key)
    raw = Raw(cell)
    cell.job.total = 1
    yield
    until = time.monotonic() + seconds
    # No yield in here: the node's own work is not done.
    while time.monotonic() < until:
        for index, page in enumerate(pages):
            try:
                reply = raw.put(pool, file_oid(*key), index, [page], token=token)
            except Disconnected:
                return
            if reply.map & 1:
                # Right until the file is changed; who reads it then says whether it was believed.
                report["kept"] = report.get("kept", 0) + 1
            else:
                report["attempts"] += 1
                report["caught"] += 1
                report["reasons"][why(reply)] = report["reasons"].get(why(reply), 0) + 1
        time.sleep(_PAUSE_SECONDS)
    cell.job.done = 1
