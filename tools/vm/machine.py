"""One virtual machine: QEMU with software emulation, one CPU, one disk, two serial ports.

No KVM (it is not to be had everywhere), no network, no root. The machine's clock counts
instructions and jumps over idle time (`-icount ... sleep=off`): waiting for the heartbeat costs
nothing, and a busy host can't make the machine late. So its seconds are not ours.

The disk is the image file itself. `cache=unsafe`: what the machine wrote is in the host's page
cache when its power is cut, which is all that a power cut of the machine can test; lost and
reordered writes are the business of other tests.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ipc.errors import ExitCode, OperatorError
from tools.vm.kernel import Kernel
from tools.vm.programs import need

MEMORY_MIB: Final = 256
NICER: Final = 5
"""A machine keeps a CPU busy all the time; whoever waits for an answer here goes first."""
_NAP_SECONDS: Final = 0.05
GUEST_LIMIT_SECONDS: Final = 40_000
"""Of the machine's own clock: a wait for a disk moves it by some 1000 s a second."""


@dataclass(frozen=True)
class Run:
    """How a machine ended: what it said on its two ports, and how long it took here."""

    console: bytes
    report: bytes
    seconds: float
    timed_out: bool
    cut: bool
    """Its power was cut from here."""


def run_machine(
    kernel: Kernel,
    initramfs: bytes,
    disk: Path,
    folder: Path,
    *,
    patience_seconds: float,
    cut_at: bytes | None = None,
) -> Run:
    """Boot, and wait until the machine is off. Its files are left in `folder`.

    Its power is cut when `cut_at` stands in the report.
    """
    qemu = need("qemu-system-x86_64")
    (folder / "initramfs").write_bytes(initramfs)
    # A comma in a path would end an option of QEMU's; links have names of our own.
    link = folder / "disk"
    link.unlink(missing_ok=True)
    link.symlink_to(disk.absolute())
    arguments = [
        *("-accel", "tcg", "-icount", "shift=2,sleep=off"),
        *("-m", str(MEMORY_MIB), "-smp", "1"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot"),
        *("-serial", "file:console", "-serial", "file:report"),
        *("-kernel", str(kernel.image.absolute()), "-initrd", "initramfs"),
        *("-append", "console=ttyS0 panic=1 loglevel=7"),
        *("-drive", "file=disk,format=raw,if=virtio,cache=unsafe"),
    ]
    start = time.monotonic()
    with subprocess.Popen(
        [qemu, *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            os.setpriority(os.PRIO_PROCESS, process.pid, os.nice(0) + NICER)
            while process.poll() is None and time.monotonic() < start + patience_seconds:
                if cut_at is not None and cut_at in _read(folder / "report"):
                    break
                time.sleep(_NAP_SECONDS)
            ended = process.poll() is not None
        finally:
            process.kill()
        assert process.stderr is not None
        complaints = process.stderr.read()
    told = _read(folder / "report")
    cut = not ended and cut_at is not None and cut_at in told
    if ended and process.returncode:
        text = complaints.decode(errors="replace").strip()
        raise OperatorError(
            f"qemu failed ({process.returncode}): {text.splitlines()[-1] if text else 'no word'}",
            ExitCode.INCONCLUSIVE,
        )
    return Run(
        _read(folder / "console"),
        told,
        time.monotonic() - start,
        timed_out=not ended and not cut,
        cut=cut,
    )


def _read(path: Path) -> bytes:
    """What the machine said so far; it may not have begun."""
    return path.read_bytes() if path.exists() else b""
