"""The first root file system of the virtual machine: busybox, kernel modules, our scripts, the job.

The part that is the same for every machine is made once in a process. The kernel unpacks several
archives one after the other, so the job is a small second one.
"""

from __future__ import annotations

import functools
import gzip
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ipc.errors import ExitCode, OperatorError
from tools.vm.cpio import Archive
from tools.vm.kernel import Kernel
from tools.vm.modules import read_module
from tools.vm.programs import need

_HERE: Final = Path(__file__).parent


def build(kernel: Kernel, job: Mapping[str, str]) -> bytes:
    """An initramfs whose /job sets the variables of `job`."""
    text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in job.items())
    second = Archive()
    second.file("job", text.encode())
    return _base(kernel) + second.finish()


@functools.lru_cache(maxsize=1)
def _base(kernel: Kernel) -> bytes:
    archive = Archive()
    for folder in ("dev", "proc", "sys", "mnt", "tmp"):
        archive.folder(folder)
    archive.file("init", (_HERE / "init.sh").read_bytes(), executable=True)
    archive.file("work.sh", (_HERE / "work.sh").read_bytes())
    for number, path in enumerate(kernel.module_files):
        archive.file(f"modules/{number:03d}-{path.name.partition('.')[0]}.ko", read_module(path))
    _add_busybox(archive)
    packed = gzip.compress(archive.finish(), compresslevel=1, mtime=0)
    return packed + bytes(-len(packed) % 4)  # an archive begins at a multiple of four bytes


def _add_busybox(archive: Archive) -> None:
    path = Path(need("busybox"))
    data = path.read_bytes()
    if b"ld-linux" in data[:4096]:
        raise OperatorError(
            f"{path} needs shared libraries; as root: apt-get install busybox-static",
            ExitCode.INCONCLUSIVE,
        )
    archive.file("bin/busybox", data, executable=True)
    applets = subprocess.run(
        [path, "--list"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    ).stdout.split()
    for applet in applets:
        if applet != "busybox":
            archive.link(f"bin/{applet}", "busybox")
