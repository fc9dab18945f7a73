"""Real ext2 images, made by mke2fs and judged by e2fsck and debugfs."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fs.block.device import BlockDevice
from fs.directpages import DirectPages
from fs.mount import mount_image
from fs.vfs import Vfs
from tests.support.tools import need_tool

BLOCK = 4096


class Clock:
    """A clock that moves one millisecond each time it is read, from 2025 on."""

    def __init__(self) -> None:
        """Start in January 2025."""
        self.now_ns = 1_735_689_600_000_000_000

    def __call__(self) -> int:
        """The next moment."""
        self.now_ns += 1_000_000
        return self.now_ns


@dataclass
class Image:
    """An image file and the file systems mounted from it."""

    path: Path
    clock: Clock = field(default_factory=Clock)
    mounts: list[Vfs] = field(default_factory=list)
    judged: bool = True
    """Judge it at the end of the test; off only where the test damages it on purpose."""

    def mount(
        self,
        *,
        read_only: bool = False,
        buffer_blocks: int = 64,
        stack: Callable[[BlockDevice], BlockDevice] = lambda device: device,
    ) -> Vfs:
        """Mount it; it is unmounted at the end of the test at the latest."""
        mounted = mount_image(
            self.path,
            clock_ns=self.clock,
            read_only=read_only,
            buffer_blocks=buffer_blocks,
            stack=stack,
        )
        vfs = Vfs(mounted, DirectPages(mounted))
        self.mounts.append(vfs)
        return vfs

    def unmount(self) -> None:
        """Unmount everything that is still mounted."""
        while self.mounts:
            self.mounts.pop().unmount()

    def e2fsck(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run e2fsck on it."""
        command = [need_tool("e2fsck"), *(options or ("-fn",)), str(self.path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def debugfs(self, request: str) -> str:
        """What debugfs answers to a request."""
        command = [need_tool("debugfs"), "-R", request, str(self.path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def field(self, name: str) -> str:
        """A line of the superblock as `debugfs stats` names it."""
        match = re.search(rf"^{re.escape(name)}:\s*(.*)$", self.debugfs("stats"), re.MULTILINE)
        assert match is not None, name
        return match.group(1)

    def judge(self, scratch: Path) -> None:
        """Unmount; e2fsck must say clean, and debugfs must read the tree that we read."""
        self.unmount()
        verdict = self.e2fsck()
        assert verdict.returncode == 0, verdict.stdout + verdict.stderr
        scratch.mkdir()
        self.debugfs(f'rdump / "{scratch}"')
        theirs = host_tree(scratch)
        ours = vfs_tree(self.mount(read_only=True))
        self.unmount()
        shutil.rmtree(scratch)
        assert ours == theirs


def vfs_tree(vfs: Vfs) -> dict[str, object]:
    """Path to content (files), target (links) or None (directories)."""
    tree: dict[str, object] = {}
    for path, directories, others in vfs.walk():
        for name in directories:
            tree[f"{path.rstrip('/')}/{name}"] = None
        for name in others:
            full = f"{path.rstrip('/')}/{name}"
            if stat.S_ISLNK(vfs.lstat(full).st_mode):
                tree[full] = vfs.readlink(full)
            else:
                tree[full] = read(vfs, full)
    return tree


def host_tree(root: Path) -> dict[str, object]:
    """The same of a directory on the host."""
    tree: dict[str, object] = {}
    # Not Path.rglob: on Python 3.11.2 it fails on a link whose target is longer than a name may be.
    found = [
        Path(top, name) for top, folders, files in os.walk(root) for name in (*folders, *files)
    ]
    for path in sorted(found):
        name = f"/{path.relative_to(root)}"
        if path.is_symlink():
            tree[name] = os.readlink(path)  # noqa: PTH115 (keeps a slash at the end)
        elif path.is_dir():
            tree[name] = None
        else:
            tree[name] = path.read_bytes()
    return tree


def read(vfs: Vfs, path: str) -> bytes:
    """The whole content of a file."""
    handle = vfs.open(path)
    try:
        return vfs.read(handle, vfs.fstat(handle).st_size)
    finally:
        vfs.close(handle)


def write(vfs: Vfs, path: str, data: bytes) -> None:
    """Make or replace a file."""
    handle = vfs.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        assert vfs.write(handle, data) == len(data)
    finally:
        vfs.close(handle)


MakeImage = Callable[..., Image]
"""Of the fixture `make_image`."""
