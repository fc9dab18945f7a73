"""POSIX shared-memory segments: create, open, remove.

Not `multiprocessing.shared_memory`: on Python 3.11 its resource tracker unlinks a segment that a
dying child had open, which is the one thing that an arena must survive (cpython issue 82300).
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import posix_ipc

from ipc.errors import ExitCode, OperatorError
from ipc.names import Registry, unlink_segment

SHARED_MEMORY_DIRECTORY = Path("/dev/shm")


def explain_segment_limit(segment_bytes: int) -> str | None:
    """One line that says why a segment of this size can't be had now; None if it can.

    A segment is sparse: without this check it is made, and the process that touches the first page
    that does not fit is killed by SIGBUS.
    """
    mib = -(-segment_bytes // 2**20)
    status = os.statvfs(SHARED_MEMORY_DIRECTORY)
    room = status.f_bavail * status.f_frsize
    if segment_bytes > room:
        return (
            f"an arena of {mib} MiB does not fit in {SHARED_MEMORY_DIRECTORY}, which has "
            f"{room // 2**20} MiB left; choose a smaller arena or remount it with a larger size="
        )
    available = available_memory_bytes()
    if available is not None and segment_bytes > available:
        return (
            f"an arena of {mib} MiB is more than the {available // 2**20} MiB of memory that are "
            "available; choose a smaller arena"
        )
    return None


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """MemAvailable, or None where the kernel does not say."""
    for line in meminfo.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def create_segment(name: str, segment_bytes: int, registry: Registry) -> mmap.mmap:
    """A new zero-filled segment, registered and mapped; raises OperatorError if it can't be had."""
    refusal = explain_segment_limit(segment_bytes)
    if refusal is not None:
        raise OperatorError(refusal, ExitCode.UNAVAILABLE)
    registry.add("segment", name)
    try:
        memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=segment_bytes)
    except (OSError, posix_ipc.Error) as error:
        registry.remove("segment", name)
        raise OperatorError(
            f"can't make the segment {name}: {error}", ExitCode.UNAVAILABLE
        ) from None
    return _map(memory)


def open_segment(name: str) -> mmap.mmap | None:
    """Map an existing segment whole; None if there is none of this name."""
    try:
        memory = posix_ipc.SharedMemory(name)
    except posix_ipc.ExistentialError:
        return None
    return _map(memory)


def remove_segment(name: str, registry: Registry) -> None:
    """Remove the name; the memory goes with its last mapping."""
    unlink_segment(name)
    registry.remove("segment", name)


def allocated_bytes(name: str) -> int:
    """Memory that the segment really holds: its allocated blocks, not its size."""
    return (SHARED_MEMORY_DIRECTORY / name.lstrip("/")).stat().st_blocks * 512


def _map(memory: posix_ipc.SharedMemory) -> mmap.mmap:
    try:
        return mmap.mmap(memory.fd, memory.size)
    finally:
        memory.close_fd()
