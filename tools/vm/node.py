"""A node of ours as a process of its own: it works on an image, tells what is on it, and may die.

    python -m tools.vm.node mkfs IMAGE --slots N [--cluster NAME]
    python -m tools.vm.node COMMAND IMAGE --node N [--slot S] [--seed S] [--folder NAME]

    mkfs      put an empty volume on the image, as long as it is
    fill      write a tree below /FOLDER and what Linux is to change, unmount
    read      read everything, unmount
    change    work on /FOLDER, which another wrote, read everything, unmount
    clear     remove /by-linux and /for-linux, and write the second anew
    recover   take over the slot of a dead node after the mount, read everything, unmount
    die       write a tree below /FOLDER, sync, go on without a sync, and wait to be killed

All but `recover` recover the slots of dead nodes as they mount. Standard output gets one line of
JSON: every entry of the volume as this node sees it (of `die`: at the sync). Any error is ours: it
ends with a traceback and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Collection
from pathlib import Path
from random import Random
from typing import Final

from fs.block.file import FileDevice
from fs.hooks import NoHooks
from fs.ocfs2 import mkfs
from fs.ocfs2.checksums import Capacity
from fs.ocfs2.filesystem import Ocfs2
from fs.vfs import Vfs
from guests.memory import Memory, divide
from guests.pagecache import PageCache
from guests.verification import Verification
from tools.vm import contents
from tools.vm.judge import NODES_MAX
from tools.vm.tree import to_json

MEMORY_BYTES: Final = 4 << 20
"""Small, so that pages are evicted and written back while the node works."""


_CAPACITY: Final = Capacity(inside_pages=1, block_pages=16)


def mount(image: Path, node: int, live_nodes: Collection[int] = ()) -> Vfs:
    """The volume as a guest has it: with a page cache, and alone in its cluster. It keeps checksums
    of pages, which Linux does not know of and must not mind: those of small files in their inodes'
    blocks, of others in attributes."""
    fs = Ocfs2(
        FileDevice(image),
        clock_ns=time.time_ns,
        node=node,
        live_nodes=lambda: live_nodes,
        keep_checksums=True,
        checksums_capacity=_CAPACITY,
    )
    assert fs.checksums is not None
    hooks = NoHooks()
    verification = Verification(fs.checksums, hooks.flush_page, time.monotonic)
    memory = Memory(divide(MEMORY_BYTES, attach=False))
    return Vfs(fs, PageCache(fs, memory, hooks, verification=verification))


def _mkfs(image: Path, slots: int, cluster: bytes, random: Random) -> None:
    device = FileDevice(image)
    parameters = mkfs.Parameters(
        slots=slots,
        uuid=random.randbytes(16),
        generation=random.randrange(1, 1 << 32),
        now_s=int(time.time()),
        label=b"judged by Linux",
        cluster=cluster,
        attributes=True,
    )
    mkfs.make_volume(device, parameters)
    device.close()


def _die(vfs: Vfs, random: Random, folder: str) -> None:
    """Everything at `tell` is synced. What follows may be on the disk, or half of it."""
    contents.fill(vfs, random, folder)
    path = f"/{folder}/open-without-a-name".encode()
    contents.interleave(vfs, random, [path, path + b"-too"], 270)
    handles = [vfs.open(path, os.O_RDWR), vfs.open(path + b"-too", os.O_RDWR)]
    vfs.unlink(path)
    vfs.unlink(path + b"-too")
    vfs.sync()
    _tell(vfs)
    contents.fill(vfs, random, f"{folder}-unsynced")
    vfs.pwrite(handles[0], b"nobody will read this", 0)
    sys.stdin.read()


def _tell(vfs: Vfs) -> None:
    print(json.dumps(to_json(contents.listing(vfs))), flush=True)


def main() -> int:
    """Command line; returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.vm.node", description=__doc__)
    commands = ("mkfs", "fill", "read", "change", "clear", "recover", "die")
    parser.add_argument("command", choices=commands)
    parser.add_argument("image", type=Path)
    parser.add_argument("--node", type=int, default=0)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--slot", type=int)
    parser.add_argument("--cluster", default="")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", default="ours")
    options = parser.parse_args()
    random = Random(options.seed)
    if options.command == "mkfs":
        _mkfs(options.image, options.slots, options.cluster.encode(), random)
        return 0
    taken_for_live = range(NODES_MAX) if options.command == "recover" else ()
    vfs = mount(options.image, options.node, taken_for_live)
    fs = vfs.fs
    assert isinstance(fs, Ocfs2)
    assert fs.checksums is not None
    if options.command == "die":
        _die(vfs, random, options.folder)
        return 0
    if options.command == "fill":
        contents.fill(vfs, random, options.folder)
        contents.fill_for_linux(vfs, random)
    elif options.command == "change":
        contents.change(vfs, random, options.folder)
    elif options.command == "clear":
        for name in ("by-linux", "for-linux"):
            contents.remove(vfs, f"/{name}".encode())
        contents.fill_for_linux(vfs, random)
    elif options.command == "recover":
        print(f"{fs.recover_slot(options.slot)} blocks replayed", file=sys.stderr)
    _tell(vfs)
    vfs.unmount()
    # What Linux has changed has no checksum any more; what it has not still has the right one.
    return 1 if fs.checksums.contradicted else 0


if __name__ == "__main__":
    sys.exit(main())
