"""What guests are asked to do: seeded, verified, in small steps.

A workload is a generator over a `Job`; it yields wherever the kernel may look after something else
(its control socket), at least once for each chunk of a file.  It counts what it verified and what
was wrong; wrong content never ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from guests.workloads import compile as compile_workload
from guests.workloads import (
    counters,
    histories,
    log,
    make,
    mixed,
    programs,
    races,
    read_all,
    search,
)
from guests.workloads.job import Job

Workload = Callable[[Job], Iterator[None]]

WORKLOADS: dict[str, Workload] = {
    "read_all": read_all.run,
    "search": search.run,
    "compile": compile_workload.run,
    "log": log.run,
    "make": make.run,
    "mixed": mixed.run,
    "counters": counters.run,
    "histories": histories.run,
    "programs": programs.run,
    "races": races.run,
}
