"""What the machine's own tools say of files and the disks below them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.tools import need_tool

IN_MEMORY = ("tmpfs", "ramfs")


def mount_of(path: Path) -> list[str]:
    """Device and kind of the file system that a file is on, as df has it."""
    command = ["df", "--output=source,fstype", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return shown.splitlines()[1].split()


def is_on_disk(path: Path) -> bool:
    """Whether there is a disk below it, so that O_DIRECT can be tested there."""
    return mount_of(path)[1] not in IN_MEMORY


def in_host_cache(path: Path) -> int:
    """Pages of a file in the host's page cache, as util-linux has it (mincore)."""
    command = [need_tool("fincore"), "--bytes", "--noheadings", "--output", "PAGES", str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
