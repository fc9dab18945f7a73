"""Files that a program finds in /proc and /sys, with Linux's names: text made when it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fs.filelocks import END, handle_owner
from fs.ocfs2.filesystem import Ocfs2
from guests.kernel import Kernel, no_cleancache
from ipc.abi import PAGE_BYTES

_DEBUG: Final = "/sys/kernel/debug/cleancache/"


def virtual_file(kernel: Kernel, path: str) -> bytes | None:
    """The content of a virtual file, None if `path` is none."""
    if path.startswith(_DEBUG):
        name = path.removeprefix(_DEBUG)
        if name not in ("succ_gets", "failed_gets", "puts", "invalidates"):
            return None
        cleancache = kernel.cleancache
        counters = cleancache.counters() if cleancache is not None else no_cleancache()
        return f"{counters[name]}\n".encode()
    make = _FILES.get(path)
    return None if make is None else make(kernel).encode()


def _meminfo(kernel: Kernel) -> str:
    memory, pages = kernel.memory, kernel.pages
    budget = memory.budget
    rows = {
        "MemTotal": budget.total,
        "MemFree": memory.free_pages,
        "Buffers": budget.buffers,
        "Cached": pages.cached_pages,
        "Active(file)": pages.active_pages,
        "Inactive(file)": pages.cached_pages - pages.active_pages,
        "Dirty": pages.dirty_pages,
        "Transfer": budget.transfer,
        "TmemWindow": budget.window,
    }
    kib = PAGE_BYTES // 1024
    return "".join(f"{name + ':':<15} {count * kib:>9} kB\n" for name, count in rows.items())


def _vmstat(kernel: Kernel) -> str:
    counters, lists = kernel.pages.counters, kernel.pages
    rows = {
        "nr_free_pages": kernel.memory.free_pages,
        "nr_active_file": lists.active_pages,
        "nr_inactive_file": lists.cached_pages - lists.active_pages,
        "nr_dirty": lists.dirty_pages,
        "nr_written": counters.written_pages,
        "pgpgin": kernel.device.read_pages * PAGE_BYTES // 1024,
        "pgpgout": kernel.device.write_pages * PAGE_BYTES // 1024,
        "pgsteal_direct": counters.evictions,
        "page_cache_hits": counters.hits,
        "page_cache_misses": counters.misses,
        "readahead_pages": counters.readahead_pages,
    }
    return "".join(f"{name} {count}\n" for name, count in rows.items())


def _locks(kernel: Kernel) -> str:
    """As Linux's, with handles where it has processes: below zero, as it shows them, too."""
    held = kernel.vfs.file_locks
    rows = [
        ("FLOCK ", exclusive, handle_owner(handle), inode.ino, 0, END)
        for inode, handle, exclusive in held.whole_files()
    ]
    rows += [
        ("OFDLCK" if one.owner < 0 else "POSIX ", one.exclusive, one.owner, inode.ino, *one[:2])
        for inode, one in held.ranges()
    ]
    return "".join(
        f"{number}: {kind} ADVISORY  {'WRITE' if exclusive else 'READ '} {owner} 00:00:{ino} "
        f"{start} {'EOF' if end == END else end - 1}\n"
        for number, (kind, exclusive, owner, ino, start, end) in enumerate(rows, 1)
    )


def _mounts(kernel: Kernel) -> str:
    kind = "ocfs2" if isinstance(kernel.fs, Ocfs2) else "ext2"
    return f"/dev/vda / {kind} {'ro' if kernel.fs.read_only else 'rw'},noatime 0 0\n"


_FILES: Final[dict[str, Callable[[Kernel], str]]] = {
    "/proc/locks": _locks,
    "/proc/meminfo": _meminfo,
    "/proc/vmstat": _vmstat,
    "/proc/mounts": _mounts,
}
