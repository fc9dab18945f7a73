"""OCFS2 images made by mkfs.ocfs2, and its checker and debugger as judges."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fs.block.device import BlockDevice
from fs.block.file import FileDevice
from fs.directpages import DirectPages
from fs.mount import mount_image
from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.fsck.checker import check
from fs.ocfs2.fsck.problems import Problem
from fs.vfs import Vfs
from tests.support.tools import need_tool

BLOCK = 4096
ALL = os.environ.get("CRASH_CLUSTER") == "1"
"""Every case of the long campaigns, not the part that `make test` has time for."""
FEATURES = (
    "noinline-data,noindexed-dirs,norefcount,nodiscontig-bg,noxattr,noappend-dio,nobackup-super,"
    "nosparse,nounwritten"
)
_CLEAN = re.compile(
    r"""Checking\ OCFS2\ filesystem\ in\ .*
      | \s+(Label|UUID|Number\ of\ blocks|Block\ size|Number\ of\ clusters|Cluster\ size
           |Number\ of\ slots):\s.*
      | \*\*\ Skipping\ slot\ recovery\ because\ -n\ was\ given\.\ \*\*
      | .*\ was\ run\ with\ -f,\ check\ forced\.
      | .*\ is\ clean\.\ +.*
      | Pass\ \w+:\ Checking\ .*
      | All\ passes\ succeeded\.
      | fsck\.ocfs2\ \d.*
      | \s*""",
    re.VERBOSE,
)
"""What fsck.ocfs2 -fn prints of an image without a fault; any other line is one."""


def make_volume(
    path: Path, *, mebibytes: int = 24, slots: int = 2, features: str = FEATURES
) -> Path:
    """Make an image of the minimal profile at `path`."""
    with path.open("wb") as file:
        file.truncate(mebibytes << 20)
    command = [
        need_tool("mkfs.ocfs2"), "-q", "-M", "cluster", "-N", str(slots), "-b", "4K", "-C", "4K",
        "-J", "size=4M", f"--fs-features={features}", str(path),
    ]  # fmt: skip
    # It says that no cluster service is there, and goes on.
    subprocess.run(command, check=True, capture_output=True)
    return path


def faults(path: Path) -> list[str]:
    """What fsck.ocfs2 finds wrong; its exit status tells nothing, so its lines are judged."""
    command = [need_tool("fsck.ocfs2"), "-fn", str(path)]
    if os.geteuid() == 0:
        # Root would lock half a gigabyte into memory, which takes longer than the check.
        command = [need_tool("setpriv"), "--bounding-set=-ipc_lock", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    wrong = [line for line in lines if not _CLEAN.fullmatch(line)]
    if not any("All passes succeeded." in line for line in lines):
        wrong.append(f"fsck.ocfs2 did not get to its end: {lines[-3:]}")
    return wrong


def problems(path: Path) -> list[Problem]:
    """What our own checker finds wrong."""
    device = FileDevice(path, read_only=True)
    try:
        return check(device)
    finally:
        device.close()


def debugfs(path: Path, request: str, folder: Path | None = None) -> str:
    """What debugfs.ocfs2 answers to a request."""
    command = [need_tool("debugfs.ocfs2"), "-R", request, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return done.stdout + done.stderr


Tree = dict[str, tuple[str, object]]
"""Path -> ("dir", sorted names), ("file", bytes) or ("link", target)."""


def vfs_tree(vfs: Vfs) -> Tree:
    """The tree as our file system reads it; lost+found left out."""
    tree: Tree = {}
    for top, directories, others in vfs.walk():
        tree[top] = ("dir", sorted([*directories, *others]))
        for name in others:
            path = f"{top.rstrip('/')}/{name}"
            if vfs.lstat(path).st_mode & 0o170000 == 0o120000:
                tree[path] = ("link", vfs.readlink(path))
            else:
                tree[path] = ("file", read(vfs, path))
    return tree


def dumped_tree(path: Path, folder: Path, names: list[str]) -> Tree:
    """The same as debugfs.ocfs2 reads it: `names` in the root are dumped into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    requests = folder.parent / f"{folder.name}.requests"
    requests.write_text("".join(f"rdump /{name} {folder}\n" for name in names))
    command = [need_tool("debugfs.ocfs2"), "-n", "-f", str(requests), str(path)]
    subprocess.run(command, capture_output=True, check=False)
    tree: Tree = {"/": ("dir", sorted(os.listdir(folder)))}
    for top, directories, files in os.walk(folder):
        where = "/" + os.path.relpath(top, folder)
        for name in directories + files:
            full = Path(top, name)
            inside = os.path.normpath(f"{where}/{name}")
            if full.is_symlink():
                tree[inside] = ("link", str(full.readlink()))
            elif full.is_dir():
                tree[inside] = ("dir", sorted(os.listdir(full)))
            else:
                tree[inside] = ("file", full.read_bytes())
    return tree


def read(vfs: Vfs, path: str) -> bytes:
    """A whole file."""
    handle = vfs.open(path)
    try:
        return vfs.pread(handle, vfs.fstat(handle).st_size, 0)
    finally:
        vfs.close(handle)


def write(vfs: Vfs, path: str, data: bytes) -> None:
    """A whole file, made anew."""
    handle = vfs.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        done = vfs.write(handle, data)
        assert done == len(data), f"{path}: {done} bytes of {len(data)}"
    finally:
        vfs.close(handle)


class Clock:
    """A clock that moves one millisecond each time it is read, from 2025 on."""

    def __init__(self) -> None:
        self.now_ns = 1_735_689_600_000_000_000

    def __call__(self) -> int:
        self.now_ns += 1_000_000
        return self.now_ns


class Volume:
    """An image and the file systems mounted from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = Clock()
        self.mounts: list[Vfs] = []
        self.judged = True
        """Judge it at the end of the test; off only where the test damages it on purpose."""

    def mount(
        self,
        *,
        stack: Callable[[BlockDevice], BlockDevice] = lambda device: device,
        **options: Any,
    ) -> Vfs:
        """Mount it; it is unmounted at the end of the test at the latest."""
        fs = mount_image(self.path, clock_ns=self.clock, stack=stack, **options)
        assert isinstance(fs, Ocfs2)
        vfs = Vfs(fs, DirectPages(fs, fs.checksums))
        self.mounts.append(vfs)
        return vfs

    def unmount(self) -> None:
        """Unmount everything that is still mounted."""
        while self.mounts:
            self.mounts.pop().unmount()

    def judge(self, folder: Path) -> None:
        """Unmount; both checkers find no fault, debugfs.ocfs2 reads the tree that we read."""
        self.unmount()
        assert faults(self.path) == []
        assert problems(self.path) == []
        vfs = self.mount(read_only=True)
        ours = vfs_tree(vfs)
        self.unmount()
        names = [str(name) for name in ours["/"][1]]  # type: ignore[attr-defined]
        theirs = dumped_tree(self.path, folder, names)
        links = {path for path, (kind, _) in ours.items() if kind == "link"}
        assert theirs.keys() | links == ours.keys()
        for path, found in theirs.items():
            if found[0] != "dir" and path in ours:
                assert ours[path] == found, path
