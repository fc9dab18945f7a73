"""The same random operations on one or two nodes and in a directory of the host: same answers."""

from __future__ import annotations

import os
import random
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fs.hooks import NoHooks
from fs.vfs import Vfs
from guests.memory import Memory, divide
from guests.pagecache import PageCache
from tests.support.ocfs2 import Tree, vfs_tree
from tests.t3_fs.ocfs2.conftest import MakeVolume
from tests.t3_fs.ocfs2.nodes import Cluster
from tests.t3_fs.test_vfs_against_host import (
    HANDLES,
    Call,
    Host,
    a_call_by_handle,
    a_call_by_name,
    answer,
)

STEPS = 1200


class Turns:
    """Several nodes as if they were one: each call is made by one of them at random."""

    def __init__(self, nodes: list[Vfs], rng: random.Random) -> None:
        self.nodes = nodes
        self._rng = rng
        self._files: dict[int, tuple[Vfs, int]] = {}

    def open(self, path: str, flags: int) -> int:
        """Open at any node."""
        vfs = self._rng.choice(self.nodes)
        inner = vfs.open(path, flags)
        number = next(n for n in range(3, 2000) if n not in self._files)
        self._files[number] = (vfs, inner)
        return number

    def close(self, number: int) -> None:
        """Close where it was opened."""
        vfs, inner = self._files.pop(number)
        vfs.close(inner)

    def __getattr__(self, method: str) -> Any:
        """Any other operation: at the node of the handle, or at any."""

        def call(*arguments: Any) -> Any:
            if isinstance(arguments[0], int):
                vfs, inner = self._files[arguments[0]]
                return getattr(vfs, method)(inner, *arguments[1:])
            return getattr(self._rng.choice(self.nodes), method)(*arguments)

        return call


def small_cache(fs: Any) -> PageCache:
    """A page cache that has to evict all the time."""
    return PageCache(fs, Memory(divide(1 << 20, attach=False, buffer_blocks=32)), NoHooks())


def host_tree(root: Path) -> Tree:
    """The host's side, in the form of `vfs_tree`."""
    tree: Tree = {}
    for top, directories, files in os.walk(root):
        inside = "/" + os.path.relpath(top, root)
        inside = os.path.normpath(inside)
        tree[inside] = ("dir", sorted(directories + files))
        for name in directories + files:
            full = Path(top, name)
            path = f"{inside.rstrip('/')}/{name}"
            if full.is_symlink():
                tree[path] = ("link", str(full.readlink()))
            elif full.is_file():
                tree[path] = ("file", full.read_bytes())
    return tree


@pytest.mark.parametrize(("nodes", "seed"), [(1, 0), (1, 1), (2, 2), (2, 3), (3, 4)])
def test_the_host_answers_the_same(
    make_image: MakeVolume, tmp_path: Path, nodes: int, seed: int
) -> None:
    """Same results, same errno, same tree at the end; judged afterwards as every image is."""
    rng = random.Random(seed)
    root = tmp_path / "up/host"
    root.mkdir(parents=True)
    cluster = Cluster(make_image(24 if nodes < 3 else 32, max(nodes, 2)).path)
    pages: Any = small_cache if seed % 2 else None
    members = [cluster.join(number + 1, pages=pages) for number in range(nodes)]
    ours = Turns([member.vfs for member in members], rng)
    (root / "lost+found").mkdir(0o755)  # fsck.ocfs2 wants it, so it is left alone
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
                call = a_call_by_name(rng, [path for path in host.paths() if path != "/lost+found"])
            method, arguments = call
            if method == "seek" and stat.S_ISDIR(host.fstat(int(str(arguments[0]))).st_mode):
                continue  # where a directory ends is up to each file system
            mine, theirs = answer(ours, method, arguments), answer(host, method, arguments)  # type: ignore[arg-type]
            log.append(f"{method}{arguments!r:.150} -> {mine!r:.60}")
            assert mine == theirs, "\n".join(
                [f"seed {seed}", *log[-40:], f"the host says {theirs!r:.200}"]
            )
            succeeded[method] += not (isinstance(mine, str) and mine.startswith("E"))
        for member in members:
            assert vfs_tree(member.vfs) == host_tree(root), f"seed {seed}"
    finally:
        os.umask(previous_umask)
        for number in list(host.files):
            host.close(number)
    assert min(succeeded[name] for name in ("rename", "unlink", "mkdir", "pwrite", "read")) > 3
    for member in members:
        cluster.leave(member)
