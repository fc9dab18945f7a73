"""Programs of Debian's that the checks run, and what to install where one is missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ipc.errors import ExitCode, OperatorError
from tools.image import find_program

PACKAGES: Final = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "busybox": "busybox-static",
    "debugfs.ocfs2": "ocfs2-tools",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "fsck.ocfs2": "ocfs2-tools",
    "mkfs.ocfs2": "ocfs2-tools",
    "qemu-system-x86_64": "qemu-system-x86 seabios",
}


def need(name: str) -> str:
    """The path of a program."""
    need_all([name])
    path = find_program(name)
    assert path is not None
    return path


def need_all(names: Iterable[str] = PACKAGES) -> None:
    """Raise an OperatorError that names every package which is missing, if one is."""
    missing = [name for name in names if find_program(name) is None]
    if missing:
        packages = sorted({PACKAGES[name] for name in missing})
        raise OperatorError(
            f"{', '.join(missing)} missing; as root: apt-get install {' '.join(packages)}",
            ExitCode.INCONCLUSIVE,
        )
