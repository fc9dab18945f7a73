"""Files that a program finds in /proc and /sys, with Linux's names: text made when it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fs.filelocks import END, handle_owner
from fs.ocfs2.filesystem import Ocfs2
from guests.kernel import Kernel, no_cleancache
from guests.swap import SwapCounters
from ipc.abi import PAGE_BYTES

_DEBUG: Final = "/sys/kernel/debug/cleancache/"
_FRONTSWAP: Final = "/sys/kernel/debug/frontswap/"


def virtual_file(kernel: Kernel, path: str) -> bytes | None:
    """The content of a virtual file, None if `path` is none."""
    if path.startswith(_DEBUG):
        name = path.removeprefix(_DEBUG)
        if name not in ("succ_gets", "failed_gets", "puts", "invalidates"):
            return None
        cleancache = kernel.cleancache
        counters = cleancache.counters() if cleancache is not None else no_cleancache()
        return f"{counters[name]}\n".encode()
    if path.startswith(_FRONTSWAP):
        name = path.removeprefix(_FRONTSWAP)
        if name not in ("loads", "succ_stores", "failed_stores", "invalidates"):
            return None
        front = kernel.userland.frontswap
        return f"{getattr(front.counters, name) if front is not None else 0}\n".encode()
    make = FILES.get(path)
    return None if make is None else make(kernel).encode()


def _meminfo(kernel: Kernel) -> str:
    memory, pages, userland = kernel.memory, kernel.pages, kernel.userland
    budget, anonymous, swap = memory.budget, userland.anonymous, userland.swap
    swap_total = swap.total_pages if swap is not None else 0
    active_files, active_anon = pages.active_pages, anonymous.lists.active_pages
    files, anon = pages.cached_pages, anonymous.pages
    # What the balloon took is not the guest's, as with Linux's balloon drivers.
    total = budget.total - budget.frames + memory.used_pages + memory.free_pages
    rows = {
        "MemTotal": total,
        "MemFree": memory.free_pages,
        "MemAvailable": memory.free_pages + files - pages.dirty_pages,
        "Buffers": budget.buffers,
        "Cached": files,
        "SwapCached": anonymous.cached_pages,
        "Active": active_files + active_anon,
        "Inactive": files + anon - active_files - active_anon,
        "Active(anon)": active_anon,
        "Inactive(anon)": anon - active_anon,
        "Active(file)": active_files,
        "Inactive(file)": files - active_files,
        "Unevictable": 0,
        "Mlocked": 0,
        "SwapTotal": swap_total,
        "SwapFree": swap.free_pages if swap is not None else 0,
        "Dirty": pages.dirty_pages,
        "Writeback": 0,
        "AnonPages": anon,
        "Mapped": 0,
        "Shmem": 0,
        "CommitLimit": total // 2 + swap_total,
        "Committed_AS": userland.processes.committed_pages,
        "Balloon": budget.total - total,
        "Transfer": budget.transfer,
        "TmemWindow": budget.window,
    }
    kib = PAGE_BYTES // 1024
    return "".join(f"{name + ':':<16}{count * kib:>8} kB\n" for name, count in rows.items())


def _vmstat(kernel: Kernel) -> str:
    counters, lists, userland = kernel.pages.counters, kernel.pages, kernel.userland
    anonymous, reclaim = userland.anonymous, kernel.memory.reclaim
    swap = userland.swap.counters if userland.swap is not None else SwapCounters()
    front = userland.frontswap
    rows = {
        "nr_free_pages": kernel.memory.free_pages,
        "nr_active_anon": anonymous.lists.active_pages,
        "nr_inactive_anon": anonymous.pages - anonymous.lists.active_pages,
        "nr_active_file": lists.active_pages,
        "nr_inactive_file": lists.cached_pages - lists.active_pages,
        "nr_dirty": lists.dirty_pages,
        "nr_written": counters.written_pages,
        "pgpgin": kernel.device.read_pages * PAGE_BYTES // 1024,
        "pgpgout": kernel.device.write_pages * PAGE_BYTES // 1024,
        "pswpin": swap.pages_in,
        "pswpout": swap.pages_out,
        "pgfault": anonymous.counters.faults,
        "pgmajfault": anonymous.counters.major_faults,
        "pgsteal_kswapd": reclaim.background_pages,
        "pgsteal_direct": reclaim.direct_pages,
        "workingset_refault_file": counters.refaults,
        "oom_kill": userland.processes.oom_kills,
        "frontswap_loads": front.counters.loads if front is not None else 0,
        "frontswap_stores": front.counters.succ_stores if front is not None else 0,
        "page_cache_hits": counters.hits,
        "page_cache_misses": counters.misses,
        "readahead_pages": counters.readahead_pages,
    }
    if kernel.verification is not None:
        rows |= {
            f"verification_{name}": int(count)
            for name, count in kernel.verification.counters().items()
        }
    if userland.monitor is not None:
        rows |= {f"cmm_{name}": count for name, count in userland.monitor.counters().items()}
    return "".join(f"{name} {count}\n" for name, count in rows.items())


def _swaps(kernel: Kernel) -> str:
    swap = kernel.userland.swap
    header = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    if swap is None:
        return header
    kib = PAGE_BYTES // 1024
    used = swap.total_pages - swap.free_pages
    return f"{header}{'/dev/vdb':<40}partition\t{swap.total_pages * kib}\t\t{used * kib}\t\t-2\n"


def _memory_pressure(kernel: Kernel) -> str:
    return kernel.userland.pressure.text()


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


FILES: Final[dict[str, Callable[[Kernel], str]]] = {
    "/proc/locks": _locks,
    "/proc/meminfo": _meminfo,
    "/proc/vmstat": _vmstat,
    "/proc/mounts": _mounts,
    "/proc/pressure/memory": _memory_pressure,
    "/proc/swaps": _swaps,
}
