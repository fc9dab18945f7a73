"""What the arena costs beside the pages: `python -m tools.bench.metadata 1024 1024`.

A process of its own fills a real segment through the machine until every frame holds a page, and
counts what it then holds beyond those frames: the segment's allocated blocks (columns, records) and
the growth of its own anonymous memory (`RssAnon`: every Python object, array and allocator's
leftover).  The kernel's page tables for the mapped segment (8 bytes a page, whatever is built on
it) are told apart and not in the fraction.  Prints JSON.

With `--shared` the pages are in a shared pool, under fencing tokens; `--rewritten 10` says that so
many of 100 are then flushed and put again, in extents of eight, each under a newer token of its
file, as when a node has changed the file there.
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
from typing import Final

from hypervisor.arena import format_arena, layout
from hypervisor.auth import Role
from hypervisor.machine import Machine
from ipc.abi import (
    ANY_UUID,
    EXTENT_PAGES_MAX,
    PAGE_BYTES,
    REPLY,
    REQUEST,
    Op,
    oid_from_int,
    pool_flag_word,
)
from ipc.errors import ExitCode, InvariantError, OperatorError
from ipc.names import Registry, object_name
from ipc.segment import allocated_bytes, create_segment, remove_segment
from ipc.window import anonymous_window

_UUID: Final = b"metadata of pool"
_TOKEN: Final = 1 << 32 | 5
_REWRITTEN_PAGES: Final = 8


def status_bytes(field: str) -> int:
    """A field of /proc/self/status: RssAnon (anonymous memory in RAM), VmPTE (page tables)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OperatorError(f"this kernel has no {field} in /proc/self/status", ExitCode.UNAVAILABLE)


class Filler:
    """A guest, and its pool, in which every page has a frame."""

    def __init__(self, machine: Machine, object_pages: int, *, shared: bool) -> None:
        machine.memberships.grants.allow(_UUID, "guest", Role.WRITER)
        client = machine.attach("guest", os.getpid(), 0, os.getuid())
        if client is None:
            raise InvariantError("a fresh machine has no room for a guest")
        self._machine = machine
        self._client = client
        self._object_pages = object_pages
        self._tokens: list[int] = []
        """Of each object."""
        self._window = anonymous_window()
        # Neither filled with one byte nor compressible: each page shall have a frame.
        self._window.slots[:] = random.Random(1).randbytes(len(self._window.slots))
        uuid = _UUID if shared else ANY_UUID
        self._pool = self._call(Op.NEW_POOL, 0, pool_flag_word(shared=shared), 0, uuid + bytes(8))[
            6
        ]

    def _call(
        self, op: Op, count: int, pool: int, index: int, oid: bytes, token: int = 0
    ) -> tuple[int, ...]:
        request = REQUEST.pack(1, op, 0, count, pool, index, oid, 0, token, 0)
        reply: tuple[int, ...] = REPLY.unpack(
            self._machine.execute(self._client, request, self._window)
        )
        return reply

    def _put(self, number: int, index: int, count: int) -> int:
        oid, token = oid_from_int(number), self._tokens[number]
        return self._call(Op.PUT_PAGE, count, self._pool, index, oid, token)[5].bit_count()

    def fill(self) -> int:
        """Put objects until every frame holds a page; the number of pages."""
        pages = 0
        frames = self._machine.store.frames
        while frames.free:
            number = len(self._tokens)
            self._tokens.append(_TOKEN)
            for index in range(0, self._object_pages, EXTENT_PAGES_MAX):
                count = min(EXTENT_PAGES_MAX, self._object_pages - index, frames.free)
                if not count:
                    break
                pages += self._put(number, index, count)
        return pages

    def rewrite(self, pages: int) -> None:
        """Flush so many pages, here and there, and put them again under newer tokens."""
        rng = random.Random(2)
        for _ in range(pages // _REWRITTEN_PAGES):
            # The last object may be a short one.
            number = rng.randrange(max(1, len(self._tokens) - 1))
            index = rng.randrange(max(1, self._object_pages - _REWRITTEN_PAGES + 1))
            count = min(_REWRITTEN_PAGES, self._object_pages)
            self._tokens[number] += 1
            oid = oid_from_int(number)
            self._call(Op.FLUSH_PAGE, count, self._pool, index, oid, self._tokens[number])
            self._put(number, index, count)

    def close(self) -> None:
        """Done with it."""
        self._window.close()


def measure_here(
    arena_mib: int, object_pages: int, *, shared: bool = False, rewritten_percent: int = 0
) -> dict[str, float]:
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
            filler = Filler(machine, object_pages, shared=shared)
            pages = filler.fill()
            filler.rewrite(frames * rewritten_percent // 100)
            filler.close()
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


def measure(
    arena_mib: int, object_pages: int, *, shared: bool = False, rewritten_percent: int = 0
) -> dict[str, float]:
    """The same in a process of its own, so that nothing else is in the balance."""
    command = [sys.executable, "-m", "tools.bench.metadata", str(arena_mib), str(object_pages)]
    command += ["--shared", f"--rewritten={rewritten_percent}"] if shared else []
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
    parser.add_argument("--shared", action="store_true", help="the pages of a shared pool")
    parser.add_argument("--rewritten", type=int, default=0, metavar="PERCENT")
    options = parser.parse_args()
    found = measure_here(
        options.arena_mib,
        options.object_pages,
        shared=options.shared,
        rewritten_percent=options.rewritten,
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
