"""The files that our nodes write, for Linux to read: every shape that the format has.

All bytes come from a seed. What must be on the disk afterwards is told by `listing`, which reads
it back; so each function also leaves a few files whose bytes are known from their names alone.
"""

from __future__ import annotations

import os
import stat
from random import Random
from typing import Final

from fs.inode import Inode
from fs.vfs import Vfs
from tools.vm.tree import Entry, Tree, digest

PAGE: Final = 4096
_READ_BYTES: Final = 1 << 20


def fill(vfs: Vfs, random: Random, folder: str) -> None:
    """A tree below `/FOLDER`: all kinds of names, sizes, links and folders, some removed again."""
    top = f"/{folder}".encode()
    vfs.mkdir(top)
    _many_files(vfs, random, top + b"/many")
    _deep_folders(vfs, random, top + b"/deep")
    _strange_names(vfs, random, top + b"/names")
    _links(vfs, top + b"/links")
    _sizes(vfs, random, top + b"/sizes")
    vfs.mkdir(top + b"/trees")
    # 800 extents: four leaves of an extent tree.
    interleave(vfs, random, [top + b"/trees/a", top + b"/trees/b"], 800)


def fill_for_linux(vfs: Vfs, random: Random) -> None:
    """What work.sh changes: files with extent trees to append to, to cut and to remove."""
    vfs.mkdir("/for-linux")
    names = [b"/for-linux/" + name for name in (b"append", b"cut", b"overwrite", b"remove")]
    interleave(vfs, random, names, 300)
    write(vfs, b"/for-linux/move", random.randbytes(10_000))
    for folder in (b"/for-linux/folder", b"/for-linux/remove-folder"):
        vfs.mkdir(folder)
        for number in range(40):
            write(vfs, b"%s/%d" % (folder, number), random.randbytes(random.randrange(9000)))


def change(vfs: Vfs, random: Random, folder: str) -> None:
    """Work on what is there already below `/FOLDER`, whoever wrote it."""
    top = f"/{folder}".encode()
    files = [path for path, entry in listing(vfs, top).items() if stat.S_ISREG(entry.mode)]
    for number, name in enumerate(sorted(files)):
        path = top + b"/" + name
        act = number % 6
        if act == 0:
            write(vfs, path, random.randbytes(random.randrange(1, 3 * PAGE)), os.O_APPEND)
        elif act == 1:
            vfs.truncate(path, random.randrange(2 * PAGE))
        elif act == 2:
            vfs.rename(path, path.rpartition(b"/")[0] + b"/renamed-%d" % number)
        elif act == 3:
            vfs.unlink(path)


def remove(vfs: Vfs, top: bytes) -> None:
    """Remove a folder with all that is in it, or nothing where there is none."""
    try:
        inside = listing(vfs, top)
    except FileNotFoundError:
        return
    for name, entry in inside.items():
        if not stat.S_ISDIR(entry.mode):
            vfs.unlink(top + b"/" + name)
    folders = [name for name in inside if name and stat.S_ISDIR(inside[name].mode)]
    for name in sorted(folders, key=lambda name: -name.count(b"/")):
        vfs.rmdir(top + b"/" + name)
    vfs.rmdir(top)


def write(vfs: Vfs, path: bytes, data: bytes, flags: int = os.O_TRUNC) -> None:
    """Write a file, all of it; with O_APPEND at its end."""
    handle = vfs.open(path, os.O_WRONLY | os.O_CREAT | flags)
    try:
        done = vfs.write(handle, data)
        if done != len(data):
            raise OSError(f"only {done} of {len(data)} bytes of {path!r} were written")
    finally:
        vfs.close(handle)


def interleave(vfs: Vfs, random: Random, paths: list[bytes], pages: int) -> None:
    """Files that grow by a page in turns, so that no two pages of one lie together."""
    handles = [vfs.open(path, os.O_WRONLY | os.O_CREAT) for path in paths]
    for _ in range(pages):
        for handle in handles:
            vfs.write(handle, random.randbytes(16) * (PAGE // 16))
    for handle in handles:
        vfs.close(handle)


def _many_files(vfs: Vfs, random: Random, top: bytes) -> None:
    """A folder of several blocks with holes in it, more inodes than one group would hold."""
    vfs.mkdir(top)
    for number in range(300):
        write(vfs, b"%s/file-%04d-%s" % (top, number, b"n" * random.randrange(60)), b"%d" % number)
    for name in vfs.listdir(top)[::3]:
        vfs.unlink(top + b"/" + os.fsencode(name))
    for number in range(30):
        write(vfs, b"%s/later-%d" % (top, number), b"%d" % number)


def _deep_folders(vfs: Vfs, random: Random, top: bytes) -> None:
    vfs.mkdir(top)
    path = top
    for depth in range(30):
        path += b"/%d" % depth
        vfs.mkdir(path)
        write(vfs, path + b"/file", random.randbytes(depth * 100))
    for number in range(20):
        vfs.mkdir(b"%s/gone-%d" % (top, number))
    for number in range(20):
        vfs.rmdir(b"%s/gone-%d" % (top, number))


def _strange_names(vfs: Vfs, random: Random, top: bytes) -> None:
    vfs.mkdir(top)
    names = [b"x" * length for length in (1, 2, 3, 4, 5, 254, 255)]
    names += ["\N{SNOWMAN} \N{GREEK SMALL LETTER PI}".encode(), b"\xff\xfe", b" ", b"  two", b"..."]
    names += [
        b"a\nb",
        b"\n",
        b"a\n@ mount failed: no",
        b"tab\t",
        b"back\\slash",
        b"'quote\"",
        b"-n",
    ]
    for name in names:
        write(vfs, top + b"/" + name, random.randbytes(20))
    vfs.mkdir(top + b"/" + b"d" * 255)


def _links(vfs: Vfs, top: bytes) -> None:
    vfs.mkdir(top)
    # Up to 3903 bytes a target lies in the inode.
    for length in (1, 2, 59, 60, 3902, 3903, 3904, 3905, 4094):
        vfs.symlink(b"t" * length, b"%s/target-%d" % (top, length))
    vfs.symlink(b"../many", top + b"/folder")
    vfs.symlink(b"nothing\nhere", top + b"/dangling")
    write(vfs, top + b"/name-0", b"one file, many names")
    for number in range(1, 10):
        vfs.link(top + b"/name-0", b"%s/name-%d" % (top, number))
    vfs.unlink(top + b"/name-0")
    vfs.rename(top + b"/name-1", top + b"/renamed")
    vfs.rename(top + b"/renamed", top + b"/name-2")


def _sizes(vfs: Vfs, random: Random, top: bytes) -> None:
    vfs.mkdir(top)
    for size in (0, 1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE + 7, 300_000, 3 << 20):
        write(vfs, b"%s/%d" % (top, size), random.randbytes(size))
    # Grown without being written, and cut and grown again: what lies between reads as zeros.
    vfs.truncate(top + b"/1", 50_000)
    vfs.truncate(top + b"/300000", 100_001)
    vfs.truncate(top + b"/300000", 200_000)
    handle = vfs.open(top + b"/behind-the-end", os.O_WRONLY | os.O_CREAT)
    vfs.pwrite(handle, b"end", 123_456)
    vfs.close(handle)


def listing(vfs: Vfs, top: bytes = b"/") -> Tree:
    """Every entry below `top` as `Tree`, with paths relative to it; reads every byte."""
    tree: Tree = {}
    seen: set[int] = set()
    fs = vfs.fs
    pending: list[tuple[bytes, Inode]] = [(b"", fs.root if top == b"/" else _find(vfs, top))]
    while pending:
        path, inode = pending.pop()
        if inode.is_dir:
            if inode.ino in seen:
                raise OSError(f"directory {path!r} is met twice")
            seen.add(inode.ino)
            below = [
                (path + b"/" * bool(path) + entry.name, fs.iget(entry.ino))
                for entry in fs.readdir(inode)
            ]
            pending.extend(reversed(below))
        with fs.reading(inode):
            content = _content(vfs, inode)
            tree[path] = Entry(
                inode.mode,
                inode.nlink,
                0 if inode.is_dir else inode.size,
                content,
                inode.mtime_ns // 10**9,
            )
    return tree


def _find(vfs: Vfs, path: bytes) -> Inode:
    inode = vfs.fs.root
    for name in path.strip(b"/").split(b"/"):
        inode = vfs.fs.lookup(inode, name)
    return inode


def _content(vfs: Vfs, inode: Inode) -> str:
    if inode.is_dir:
        return ""
    if inode.is_symlink:
        return digest(vfs.fs.readlink(inode))
    offsets = range(0, inode.size, _READ_BYTES)
    return digest(b"".join(vfs.pages.read(inode, offset, _READ_BYTES) for offset in offsets))
