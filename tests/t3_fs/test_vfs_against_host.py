"""The same random operations on our file system and in a directory of the host: same answers.

An answer is what a call returns or its errno. Everything comes from a seed in the test's name.
"""

# The host is asked through the plain system calls that `Vfs` stands for, method by method.
# ruff: noqa: PTH102, PTH104, PTH106, PTH108, PTH115, PTH116, PTH118, PTH211
from __future__ import annotations

import errno
import os
import random
import stat
from collections import Counter
from pathlib import Path

import pytest

from fs.inode import Stat
from fs.vfs import Vfs
from tests.t3_fs.images import MakeImage, host_tree, vfs_tree

STEPS = 3000
NAMES = ("a", "b", "c", "d", "e", "f", "g", "long" * 20)
TARGETS = (*NAMES, "a/b", "c/a", "missing", "t" * 80, "a/", ".")
HANDLES = 12
Call = tuple[str, tuple[object, ...]]


class Host:
    """The operations of `Vfs` under the same names, done by the kernel below one directory."""

    def __init__(self, root: Path) -> None:
        """Work below `root`."""
        self.root = str(root)
        self.files: dict[int, int] = {}

    def paths(self) -> list[str]:
        """All paths that are there now, sorted."""
        found = []
        for top, directories, files in os.walk(self.root):
            found += [os.path.join(top, name)[len(self.root) :] for name in directories + files]
        return sorted(found)

    def mkdir(self, path: str) -> None:
        """As in `Vfs`, and so are all others."""
        os.mkdir(self.root + path, 0o755)

    def rmdir(self, path: str) -> None:
        os.rmdir(self.root + path)

    def unlink(self, path: str) -> None:
        os.unlink(self.root + path)

    def rename(self, old: str, new: str) -> None:
        os.rename(self.root + old, self.root + new)

    def link(self, old: str, new: str) -> None:
        os.link(self.root + old, self.root + new, follow_symlinks=False)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self.root + path)

    def readlink(self, path: str) -> str:
        return os.readlink(self.root + path)

    def listdir(self, path: str) -> list[str]:
        return os.listdir(self.root + path)

    def stat(self, path: str) -> os.stat_result:
        return os.stat(self.root + path)

    def lstat(self, path: str) -> os.stat_result:
        return os.lstat(self.root + path)

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self.root + path, size)

    def open(self, path: str, flags: int) -> int:
        file = os.open(self.root + path, flags, 0o644)
        number = next(n for n in range(3, 1000) if n not in self.files)
        self.files[number] = file
        return number

    def close(self, number: int) -> None:
        os.close(self.files.pop(number))

    def read(self, number: int, size: int) -> bytes:
        return os.read(self.files[number], size)

    def pread(self, number: int, size: int, offset: int) -> bytes:
        return os.pread(self.files[number], size, offset)

    def write(self, number: int, data: bytes) -> int:
        return os.write(self.files[number], data)

    def pwrite(self, number: int, data: bytes, offset: int) -> int:
        return os.pwrite(self.files[number], data, offset)

    def seek(self, number: int, offset: int, whence: int) -> int:
        return os.lseek(self.files[number], offset, whence)

    def ftruncate(self, number: int, size: int) -> None:
        os.ftruncate(self.files[number], size)

    def fstat(self, number: int) -> os.stat_result:
        return os.fstat(self.files[number])


def answer(side: Vfs | Host, method: str, arguments: tuple[object, ...]) -> object:
    """What a call gives, in a form that must be equal on both sides."""
    try:
        result = getattr(side, method)(*arguments)
    except OSError as reason:
        return errno.errorcode[reason.errno or 0]
    if isinstance(result, Stat | os.stat_result):
        # The host's file system may count links of directories in its own way (overlays do).
        is_dir = stat.S_ISDIR(result.st_mode)
        return (result.st_mode, 0, 0) if is_dir else (
            result.st_mode, result.st_size, result.st_nlink,
        )  # fmt: skip
    return sorted(result) if isinstance(result, list) else result


def a_path(rng: random.Random, known: list[str]) -> str:
    """Often one that is there, sometimes with a slash at the end or a name that is too long."""
    dice = rng.random()
    if dice < 0.4 and known:
        return rng.choice(known)
    if dice < 0.8:
        return f"{rng.choice(['', *known])}/{rng.choice(NAMES)}"
    parts = [rng.choice(NAMES) for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))]
    dice = rng.random()
    if dice < 0.02:
        parts[-1] = "x" * 256
    elif dice < 0.05:
        parts.append(".")
    return "/" + "/".join(parts) + ("/" if rng.random() < 0.05 else "")


def some_flags(rng: random.Random) -> int:
    """Flags of an open that mostly succeeds."""
    flags = rng.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR))
    flags |= os.O_CREAT if rng.random() < 0.7 else 0
    for flag in (os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_NOFOLLOW):
        if rng.random() < 0.15 and (flag != os.O_EXCL or flags & os.O_CREAT):
            flags |= flag
    return flags


def a_call_by_name(rng: random.Random, known: list[str]) -> Call:
    """A random operation on paths."""
    path, other = a_path(rng, known), a_path(rng, known)
    dots = path.rstrip("/") + "/.."
    size = rng.choice((0, 4096, rng.randrange(90_000)))
    return rng.choice(
        (
            ("mkdir", (path,)),
            ("mkdir", (path,)),
            ("mkdir", (other,)),
            ("rmdir", (path,)),
            ("rmdir", (other,)),
            ("unlink", (path,)),
            ("rename", (path, other)),
            ("rename", (path, other)),
            ("rename", (path, other)),
            ("link", (path, other)),
            ("link", (path, other)),
            ("link", (other, path)),
            ("symlink", (rng.choice(TARGETS), path)),
            ("readlink", (path,)),
            ("truncate", (path, size)),
            ("stat", (path,)),
            ("lstat", (path,)),
            ("listdir", (path,)),
            ("open", (path, some_flags(rng))),
            ("open", (other, some_flags(rng))),
            ("open", (path, os.O_CREAT | os.O_RDWR)),
            ("open", (path, some_flags(rng))),
            ("open", (other, some_flags(rng))),
            ("open", (path, os.O_CREAT | os.O_RDWR)),
            # `..` only where nothing is found behind it: a link could lead above the host's root.
            ("rmdir", (dots,)),
            ("mkdir", (dots,)),
            ("rename", (dots, other)),
            ("open", (dots, os.O_CREAT | os.O_WRONLY)),
        )
    )


def a_call_by_handle(rng: random.Random, number: int) -> Call:
    """A random operation on an open file."""
    size = rng.choice((0, 1, 4096, rng.randrange(20_000)))
    offset = rng.choice((0, 4096, rng.randrange(90_000)))
    return rng.choice(
        (
            ("read", (number, size)),
            ("pread", (number, size, offset)),
            ("write", (number, rng.randbytes(size))),
            ("write", (number, rng.randbytes(size))),
            ("pwrite", (number, rng.randbytes(size), offset)),
            ("pwrite", (number, rng.randbytes(size), offset)),
            ("seek", (number, rng.randrange(-10, 90_000), rng.randrange(3))),
            ("ftruncate", (number, offset)),
            ("fstat", (number,)),
        )
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_host_answers_the_same(make_image: MakeImage, tmp_path: Path, seed: int) -> None:
    """Same results, same errno, same tree at the end, and a clean image."""
    rng = random.Random(seed)
    root = tmp_path / "up/host"
    root.mkdir(parents=True)
    image = make_image(blocks=4096)
    vfs = image.mount(buffer_blocks=rng.choice((8, 64)))
    vfs.rmdir("/lost+found")
    host = Host(root)
    log: list[str] = []
    succeeded: Counter[str] = Counter()
    previous_umask = os.umask(0)
    try:
        for _ in range(STEPS):
            numbers = list(host.files)
            if len(numbers) > HANDLES:
                call: Call = ("close", (rng.choice(numbers),))
            elif numbers and rng.random() < 0.5:
                call = a_call_by_handle(rng, rng.choice(numbers))
            else:
                call = a_call_by_name(rng, host.paths())
            method, arguments = call
            if method == "seek" and stat.S_ISDIR(host.fstat(int(str(arguments[0]))).st_mode):
                continue  # where a directory ends is up to each file system
            ours, theirs = answer(vfs, method, arguments), answer(host, method, arguments)
            log.append(f"{method}{arguments!r:.150} -> {ours!r:.60}")
            assert ours == theirs, "\n".join([*log[-40:], f"the host says {theirs!r:.200}"])
            succeeded[method] += not (isinstance(ours, str) and ours.startswith("E"))
        assert vfs_tree(vfs) == host_tree(root)
    finally:
        os.umask(previous_umask)
        for number in list(host.files):
            host.close(number)
    assert min(succeeded[name] for name in ("rename", "unlink", "mkdir", "pwrite", "read")) > 5
    image.unmount()
    assert vfs_tree(image.mount()) == host_tree(root)
