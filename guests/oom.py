"""What the out-of-memory killer says before it kills, line by line, as Linux's log has it.

    out of memory: active_anon:3 inactive_anon:61 active_file:0 inactive_file:0 free:0
    Free swap  = 0kB
    Total swap = 2396kB
    Tasks state (memory values in pages):
    [  pid  ]   uid  tgid total_vm      rss pgtables_bytes swapents oom_score_adj name
    [      1]     0     1      600       64         8192      599             0 program0
    oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),global_oom,task=program0,pid=1,uid=0

Only what there is: a guest has no zones, no cgroups and no users, and its kernel does not know for
whom it reclaims, so nobody "invoked" the killer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from guests.anonymous import AnonymousMemory, PageTable
from ipc.abi import PAGE_BYTES

TASKS_SHOWN: Final = 100
"""Those that have most."""


class Task(NamedTuple):
    """A row of the table."""

    pid: int
    name: str
    pages: int
    """Of its address space."""
    table: PageTable
    oom_score_adj: int


def report(memory: AnonymousMemory, tasks: Sequence[Task], victim: Task) -> Iterator[str]:
    """All lines but the last, which tells of the kill."""
    swap, kib = memory.swap, PAGE_BYTES // 1024
    yield "out of memory: " + " ".join(f"{name}:{n}" for name, n in memory.usage().items())
    yield f"Free swap  = {swap.free_pages * kib if swap is not None else 0}kB"
    yield f"Total swap = {swap.total_pages * kib if swap is not None else 0}kB"
    yield "Tasks state (memory values in pages):"
    yield ("[  pid  ]   uid  tgid total_vm      rss pgtables_bytes swapents oom_score_adj name")
    largest = sorted(tasks, key=lambda one: -one.table.resident_pages - one.table.swapped_pages)
    for one in sorted(largest[:TASKS_SHOWN], key=lambda one: one.pid):
        table = one.table
        yield (
            f"[{one.pid:7}] {0:5} {one.pid:5} {one.pages:8} {table.resident_pages:8} "
            f"{table.bytes:8} {table.swapped_pages:8}         {one.oom_score_adj:5} {one.name}"
        )
    if len(tasks) > TASKS_SHOWN:
        yield f"and {len(tasks) - TASKS_SHOWN} smaller ones"
    yield (
        "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),global_oom,"
        f"task={victim.name},pid={victim.pid},uid=0"
    )
