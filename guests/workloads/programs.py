"""Programs that use more memory than there is, and look whether it holds what they wrote.

Parameters: programs (4), pages (256: each program's memory), passes (3), locality (0.0: share of
the accesses that go to the first tenth of the memory), writes (0.5: share of accesses that write),
forks (0: how many of the programs begin as a child of the one before, with its pages), noise (0.5:
share of each page that can't be compressed; Linux's swapped pages shrink to about a half).

Every page that was written holds its program's number, its own, and how often it was written, all
over, and noise made from these at its end; a page that was never written is zeros.  A child knows
what its parent had written.  Programs take turns, an access each.  A program that is killed is
counted and forgotten: that is no mismatch, to read anything else than what was written is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from random import Random
from typing import Final

from guests.process import Process, ProcessKilled
from guests.workloads.job import Job
from ipc.abi import PAGE_BYTES

_STAMP: Final = struct.Struct("<IIQ")
_COPIES: Final = PAGE_BYTES // _STAMP.size
_TURN: Final = 16
"""Accesses between two looks of the kernel at other things."""


class _Program:
    """A process and what its memory should hold."""

    def __init__(
        self, process: Process, pages: int, noise_bytes: int, parent: _Program | None
    ) -> None:
        self.process = process
        self.noise_bytes = noise_bytes
        self.pages = pages
        self.address: int = (
            parent.address if parent is not None else process.map(pages * PAGE_BYTES)
        )
        self.stamps: dict[int, bytes] = dict(parent.stamps) if parent is not None else {}

    def write(self, page: int, count: int) -> None:
        stamp = _STAMP.pack(self.process.pid, page, count)
        self.process.write(self.address + page * PAGE_BYTES, self._content(stamp))
        self.stamps[page] = stamp

    def is_right(self, page: int) -> bool:
        content = self.process.read(self.address + page * PAGE_BYTES, PAGE_BYTES)
        stamp = self.stamps.get(page)
        return content == (bytes(PAGE_BYTES) if stamp is None else self._content(stamp))

    def _content(self, stamp: bytes) -> bytes:
        plain = (stamp * _COPIES)[self.noise_bytes :]
        return plain + Random(stamp).randbytes(self.noise_bytes)


def run(job: Job) -> Iterator[None]:
    """Fill, then access at random, then read all."""
    count = job.count("programs", 4, 1, 1000)
    pages = job.count("pages", 256, 1, 1_000_000)
    passes = job.count("passes", 3, 0, 1000)
    locality = job.number("locality", 0.0, 0.0, 1.0)
    writes = job.number("writes", 0.5, 0.0, 1.0)
    forks = job.count("forks", 0, 0, 1000)
    noise = int(job.number("noise", 0.5, 0.0, 1.0) * PAGE_BYTES)
    job.total = count * pages * (passes + 2)
    yield
    programs: list[_Program] = []
    try:
        for number in range(count):
            parent = programs[-1] if programs and number <= forks else None
            programs.append(_start(job, number, pages, noise, parent))
            yield from _each(job, programs[-1:], iter(range(pages)), fill=True)
        order = job.random
        everywhere = (
            order.randrange(max(1, pages // 10))
            if order.random() < locality
            else order.randrange(pages)
            for _ in range(pages * passes)
        )
        yield from _each(job, programs, everywhere, writes=writes)
        yield from _each(job, programs, iter(range(pages)))
    finally:
        for program in programs:
            program.process.exit()


def _start(
    job: Job, number: int, pages: int, noise_bytes: int, parent: _Program | None
) -> _Program:
    if parent is not None and parent.process.is_alive:
        return _Program(parent.process.fork(f"program{number}"), pages, noise_bytes, parent)
    return _Program(job.processes.spawn(f"program{number}"), pages, noise_bytes, None)


def _each(
    job: Job,
    programs: list[_Program],
    pages: Iterator[int],
    *,
    fill: bool = False,
    writes: float = 0.0,
) -> Iterator[None]:
    """All programs access each of the pages in turn."""
    for page in pages:
        for program in programs:
            job.done += 1
            if not program.process.is_alive:
                continue
            try:
                if fill or job.random.random() < writes:
                    program.write(page, job.done)
                elif not program.is_right(page):
                    job.findings.mismatch(f"{program.process.name} page {page}")
            except ProcessKilled:
                pass  # the kernel has it on record
        if page % _TURN == 0 or len(programs) > 1:
            yield
