"""What the arena costs beside the pages: `python -m tools.bench.metadata 1024 1024`.

A process of its own fills a real segment through the machine until every frame holds a page, and
counts what it then holds beyond those frames: the segment's allocated blocks (columns, records) and
the growth of its own anonymous memory (`RssAnon`: every Python object, array and allocator's
leftover).  The kernel's page tables for the mapped segment (8 bytes a page, whatever is built on
it) are told apart and not in the fraction.  Prints JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from hypervisor.arena import format_arena, layout
from hypervisor.machine import Machine
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES, REPLY, REQUEST, Op, oid_from_int, pool_flag_word
from ipc.errors import ExitCode, InvariantError, OperatorError
from ipc.names import Registry, object_name
from ipc.segment import allocated_bytes, create_segment, remove_segment
from ipc.window import anonymous_window


def status_bytes(field: str) -> int:
    """A field of /proc/self/status: RssAnon (anonymous memory in RAM), VmPTE (page tables)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OperatorError(f"this kernel has no {field} in /proc/self/status", ExitCode.UNAVAILABLE)


def fill(machine: Machine, object_pages: int) -> int:
    """Put objects of `object_pages` pages until every frame holds one; the number of pages."""
    client = machine.attach("guest", os.getpid(), 0, os.getuid())
    if client is None:
        raise InvariantError("a fresh machine has no room for a guest")
    window = anonymous_window()
    # Neither filled with one byte nor compressible: each page shall have a frame.
    window.slots[:] = random.Random(1).randbytes(len(window.slots))

    def call(op: Op, count: int, pool: int, index: int, oid: bytes) -> tuple[int, ...]:
        request = REQUEST.pack(1, op, 0, count, pool, index, oid, 0, 0, 0)
        reply: tuple[int, ...] = REPLY.unpack(machine.execute(client, request, window))
        return reply

    pool = call(Op.NEW_POOL, 0, pool_flag_word(), 0, bytes(24))[6]
    pages = 0
    number = 0
    frames = machine.store.frames
    while frames.free:
        number += 1
        oid = oid_from_int(number)
        for index in range(0, object_pages, EXTENT_PAGES_MAX):
            count = min(EXTENT_PAGES_MAX, object_pages - index, frames.free)
            if not count:
                break
            pages += call(Op.PUT_PAGE, count, pool, index, oid)[5].bit_count()
    window.close()
    return pages


def measure_here(arena_mib: int, object_pages: int) -> dict[str, float]:
    """Fill an arena of `arena_mib` and weigh it, in this process."""
    frames = arena_mib * 2**20 // PAGE_BYTES
    with tempfile.TemporaryDirectory(prefix="tmem-bench-") as directory:
        registry = Registry(Path(directory))
        name = object_name("bench", "arena", os.urandom)
        mapping = create_segment(name, layout(frames).end, registry)
        try:
            gc.collect()
            before = status_bytes("RssAnon")
            tables_before = status_bytes("VmPTE")
            machine = Machine(format_arena(mapping))
            pages = fill(machine, object_pages)
            gc.collect()
            heap = status_bytes("RssAnon") - before
            tables = status_bytes("VmPTE") - tables_before
            segment = allocated_bytes(name) - pages * PAGE_BYTES
            if pages != frames:
                raise InvariantError(f"{frames} frames hold {pages} pages")
        finally:
            remove_segment(name, registry)
    arena = frames * PAGE_BYTES
    return {
        "arena_bytes": arena,
        "object_pages": object_pages,
        "pages": pages,
        "segment_metadata_bytes": segment,
        "python_heap_bytes": heap,
        "page_table_bytes": tables,
        "metadata_fraction": round((segment + heap) / arena, 6),
    }


def measure(arena_mib: int, object_pages: int) -> dict[str, float]:
    """The same in a process of its own, so that nothing else is in the balance."""
    command = [sys.executable, "-m", "tools.bench.metadata", str(arena_mib), str(object_pages)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OperatorError(
            f"the metadata measurement failed: {done.stderr.strip().splitlines()[-1]}",
            ExitCode.UNAVAILABLE,
        )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print one measurement as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.metadata")
    parser.add_argument("arena_mib", type=int)
    parser.add_argument("object_pages", type=int)
    options = parser.parse_args()
    print(json.dumps(measure_here(options.arena_mib, options.object_pages)))


if __name__ == "__main__":
    main()
