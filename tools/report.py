"""What a measured run found: results.json, the table, and the verdict.

The documented keys of results.json (others may come and go):

    seed                       the run's seed
    off, on                    the two runs; in each
      total_memory_bytes       RAM of all guests and the arena; the same in both
      guests.NAME
        disk_reads_pages       pages read from the disk, counted in the block device
        disk_writes_pages      pages written
        files_verified         files whose bytes were compared with the source tree's hash
        bytes_verified         bytes of those
        mismatches             files whose bytes were not the source's
        seconds                time at work
        cleancache             (only in `on`) succ_gets, failed_gets, puts, invalidates: pages, as
                               the guest counted them, by Linux's names
      hypervisor               (zeros in `off`, where there is none)
        cpu_seconds            CPU time of the process
        hypercalls             calls served
        pages_put, pages_got   pages accepted and given back
        evictions              pages dropped to make room

    With swap there are for each guest also `swap` (in_pages, out_pages: moved from and to the swap
    disk), `frontswap` (loads, succ_stores, ...) and `anonymous` (faults, oom_kills, ...).

The figures of the table and their sources:

    saved        1 - disk reads on / disk reads off
    hits         succ_gets / (succ_gets + failed_gets)
    us/page      the hypervisor's CPU time for this guest over its pages put and got
    core         the same CPU time over the guest's time at work
    saved/s      disk reads off minus on, in bytes, over the guest's time at work in `on`
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ipc.codec import Record
from ipc.errors import ExitCode
from tools.units import PAGE_BYTES, format_size


def write_results(results: Record, run: Path) -> Path:
    """Write results.json of a run and point `latest` beside the run to it."""
    path = run / "results.json"
    temporary = run / ".results.json"
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.rename(path)
    link = run.parent / f".latest.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(run.name)
    link.rename(run.parent / "latest")
    return path


def verdict(results: Record) -> tuple[ExitCode, list[str]]:
    """The exit code, and a line for each thing that went wrong."""
    lines = []
    code = ExitCode.OK
    for mode in ("off", "on"):
        for name, guest in results[mode]["guests"].items():
            if "exit_code" in guest:
                code = ExitCode.GUEST_DIED
                lines.append(f"{mode}: guest {name} died (exit code {guest['exit_code']})")
    for mode in ("off", "on"):
        if results[mode]["errors"]:
            code = ExitCode.VIOLATED
            lines += [f"{mode}: {line}" for line in results[mode]["errors"]]
        for name, guest in results[mode]["guests"].items():
            if guest["mismatches"]:
                code = ExitCode.VIOLATED
                paths = ", ".join(guest["mismatch_paths"])
                lines.append(f"{mode}: {name} read {guest['mismatches']} wrong files: {paths}")
    return code, lines


HEADER = (
    "guest",
    "reads off",
    "reads on",
    "saved",
    "hits",
    "puts",
    "us/page",
    "core",
    "saved/s",
)
LEGEND = (
    "reads: pages from the disk; hits: gets that tmem answered; us/page, core: the hypervisor's",
    "CPU for this guest, per page moved and as share of one core; saved/s: disk I/O not done",
)


def table(results: Record) -> list[tuple[str, ...]]:
    """A row of texts for each guest and one for all of them."""
    off, on = results["off"]["guests"], results["on"]["guests"]
    rows = [_row(name, [off[name]], [on[name]]) for name in on]
    if len(rows) > 1:
        rows.append(_row("all", list(off.values()), list(on.values())))
    return rows


def _row(name: str, off: list[Record], on: list[Record]) -> tuple[str, ...]:
    reads_off = _sum(off, "disk_reads_pages")
    reads_on = _sum(on, "disk_reads_pages")
    cleancache = [guest["cleancache"] for guest in on]
    hits, misses = _sum(cleancache, "succ_gets"), _sum(cleancache, "failed_gets")
    puts = _sum(cleancache, "puts")
    cpu_ns = sum(guest.get("hypervisor", {}).get("cpu_ns", 0) for guest in on)
    seconds = _sum(on, "seconds") if len(on) == 1 else max(guest["seconds"] for guest in on)
    return (
        name,
        f"{reads_off:,}",
        f"{reads_on:,}",
        _percent(reads_off - reads_on, reads_off),
        _percent(hits, hits + misses),
        f"{puts:,}",
        f"{cpu_ns / 1000 / (puts + hits):.2f}" if puts + hits else "-",
        _percent(cpu_ns / 1e9, seconds),
        f"{format_size((reads_off - reads_on) * PAGE_BYTES / seconds)}/s" if seconds else "-",
    )


def summary(results: Record) -> list[str]:
    """What was compared with what, in a few lines."""
    off, on = results["off"], results["on"]
    files = sum(_sum(list(run["guests"].values()), "files_verified") for run in (off, on))
    size = sum(_sum(list(run["guests"].values()), "bytes_verified") for run in (off, on))
    wrong = sum(_sum(list(run["guests"].values()), "mismatches") for run in (off, on))
    hypervisor = on["hypervisor"]
    swapping = _swapping(off, on)
    memory = " on, ".join(format_size(run["total_memory_bytes"]) for run in (on, off))
    return [
        f"total memory {memory} off",
        f"verified {files:,} files, {format_size(size)}; mismatches {wrong}",
        *([swapping] if swapping else []),
        "hypervisor "
        + ", ".join(
            [
                f"{hypervisor['cpu_seconds']:.2f} s CPU",
                f"{hypervisor['hypercalls']:,} calls",
                f"{hypervisor['pages_put']:,} pages put",
                f"{hypervisor['pages_got']:,} got",
                f"{hypervisor['evictions']:,} evicted",
            ]
        ),
    ]


def _swapping(off: Record, on: Record) -> str:
    """What the swap disks had to do, if they had anything to do."""
    pages, killed = [], 0
    for run in (off, on):
        swaps = [guest.get("swap", {}) for guest in run["guests"].values()]
        pages.append(_sum(swaps, "in_pages") + _sum(swaps, "out_pages"))
        programs = [guest.get("anonymous", {}) for guest in run["guests"].values()]
        killed += _sum(programs, "oom_kills")
    if not any(pages) and not killed:
        return ""
    fewer = _percent(pages[0] - pages[1], pages[0])
    return (
        f"swap disks: {pages[0]:,} pages moved off, {pages[1]:,} on, {fewer} saved; "
        f"{killed} programs killed for lack of memory"
    )


def _sum(records: list[Record], key: str) -> Any:
    return sum(record.get(key, 0) for record in records)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"
