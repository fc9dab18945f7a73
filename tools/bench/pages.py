"""Memory saved on pages of real programs: `python -m tools.bench.pages`.

Pages of five kinds are stored by each way to save and by all together: programs in /usr/bin, the
text of Python's library, an SQLite database made on the spot, zeros, random bytes.  What is counted
is what the arena holds in the end: whole frames, so that class rounding and half-filled spans are
in it, 32 bytes for each page behind an entry, and the index of shared contents.  Every page is read
back and compared.

"By 4" is four guests of one group with the same pages; all others are one guest.  Processor time is
this thread's, in memory that the kernel has given already.  Every case runs once a repetition, in
shuffled order, and medians are printed.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from hypervisor.arena import layout, private_arena
from hypervisor.compression import LZ4, LZ4HC, Codec, decompress
from hypervisor.entries import ENTRY_WORDS
from hypervisor.fill import candidates, page_of, pattern_of
from hypervisor.frames import EPHEMERAL, Frames
from hypervisor.sharing import SharedContents
from hypervisor.slab import Slabs, class_bytes
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES
from ipc.errors import ExitCode, InvariantError, OperatorError
from tools.bench.timing import median

ENTRY_BYTES: Final = 8 * ENTRY_WORDS
DOMAIN: Final = "bench"
FILE_PAGES_MAX: Final = 64
"""Of one file, so that no large program is all that is measured."""

Stored = tuple[str, int, int]
"""How a page is stored; frame, place or pattern; compressed length."""


class Way(NamedTuple):
    """What is done to a page, in this order; `guests` put the same pages one after the other."""

    name: str
    fill: bool = False
    share: bool = False
    codec: Codec | None = None
    guests: int = 1


WAYS: Final = (
    Way("raw"),
    Way("filled", fill=True),
    Way("lz4", codec=LZ4),
    Way("lz4hc", codec=LZ4HC),
    Way("shared", share=True),
    Way("all", fill=True, share=True, codec=LZ4),
    Way("all, lz4hc", fill=True, share=True, codec=LZ4HC),
    Way("shared by 4", share=True, guests=4),
    Way("all by 4", fill=True, share=True, codec=LZ4, guests=4),
)


class Figures(NamedTuple):
    """One case, a page put."""

    held_bytes: float
    put_us: float
    get_us: float


# --- pages


def _pages_of(paths: Sequence[Path], count: int, rng: random.Random) -> list[bytes]:
    """A stretch of each of the files, in random order; the last page is filled up with zeros."""
    pages: list[bytes] = []
    for path in rng.sample(paths, len(paths)):
        content = path.read_bytes()
        whole = list(_cut(content))
        first = rng.randrange(max(1, len(whole) - FILE_PAGES_MAX + 1))
        pages += whole[first : first + FILE_PAGES_MAX]
        if len(pages) >= count:
            return pages[:count]
    raise OperatorError(
        f"{len(pages)} pages in {len(paths)} files; {count} are needed", ExitCode.UNAVAILABLE
    )


def _cut(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), PAGE_BYTES):
        yield content[start : start + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")


def _programs() -> list[Path]:
    found = []
    for path in sorted(Path("/usr/bin").iterdir()):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    found.append(path)
    return found


def _database(count: int, words: Sequence[str], rng: random.Random) -> list[bytes]:
    """A table of orders with two indexes, deleted from here and there, as bytes."""
    with sqlite3.connect(":memory:") as database:
        database.execute("create table orders (id integer primary key, who, day, note, cents)")
        database.execute("create index by_who on orders (who)")
        database.execute("create index by_day on orders (day, cents)")
        rows = count * PAGE_BYTES // 120
        database.executemany(
            "insert into orders (who, day, note, cents) values (?, ?, ?, ?)",
            (
                (
                    f"{rng.choice(words)}.{rng.choice(words)}",
                    f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
                    " ".join(rng.choices(words, k=rng.randint(1, 9))),
                    rng.randint(100, 99_999),
                )
                for _ in range(rows)
            ),
        )
        database.execute("delete from orders where id % 7 = 0")
        database.commit()
        content = database.serialize()
    database.close()
    pages = list(_cut(content))
    if len(pages) < count:
        raise InvariantError(f"the database has {len(pages)} pages, not {count}")
    return pages[:count]


def corpora(count: int, rng: random.Random) -> dict[str, list[bytes]]:
    """`count` pages of each kind; OperatorError if this machine has too few files."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    text = _pages_of(library, count, rng)
    words = sorted({word for page in text[:50] for word in page.decode("latin-1").split()})
    return {
        "programs": _pages_of(_programs(), count, rng),
        "text": text,
        "database": _database(count, words, rng),
        "zeros": [bytes(PAGE_BYTES)] * count,
        "random": [rng.randbytes(PAGE_BYTES) for _ in range(count)],
    }


# --- one case


class Rig:
    """An arena, and pages stored in it one way."""

    def __init__(self, way: Way, pages: int, seed: int) -> None:
        self._way = way
        arena = private_arena(layout(pages + 1024).end)
        self._data = arena.data
        self._data[:] = bytes(len(self._data))  # so that the kernel's part is not in the figures
        self._frames = Frames(arena.frames_count)
        self._slabs = Slabs(arena, self._frames)
        self._contents = SharedContents(seed)
        self._stored: list[Stored] = []
        """By content: what is shared."""
        self._entries = 0

    def put(self, page: bytes, member: int, *, may_be_filled: bool) -> Stored:
        """Store a page; where and how."""
        way = self._way
        if may_be_filled:
            pattern = pattern_of(page)
            if pattern is not None:
                self._entries += 1
                return ("filled", pattern, 0)
        digest = -1
        if way.share:
            digest = self._contents.digest(page, DOMAIN)
            content = self._contents.find(digest)
            if content >= 0 and self.get(self._stored[content]) == page:
                self._contents.add(content, member, PAGE_BYTES)
                self._entries += 1
                return self._stored[content]
            if content >= 0:
                digest = -1
        stored = self._store(page)
        if digest >= 0:
            content = self._contents.insert(digest, stored[1])
            self._contents.add(content, member, PAGE_BYTES)
            self._stored.append(stored)
            self._entries += stored[0] == "raw"
        return stored

    def _store(self, page: bytes) -> Stored:
        codec = self._way.codec
        data = codec.compress(page) if codec is not None else page
        if codec is not None and class_bytes(len(data)):
            place = self._slabs.allocate(len(data), persistent=False)
            self._slabs.write(place, data)
            self._entries += 1
            return ("slab", place, len(data))
        frame = self._frames.take(EPHEMERAL)
        self._data[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES] = page
        return ("raw", frame, 0)

    def get(self, stored: Stored) -> bytes:
        """The page that is stored there."""
        kind, where, length = stored
        if kind == "filled":
            return page_of(where)
        if kind == "slab":
            page = decompress(LZ4.number, self._slabs.read(where, length))
            if page is None:
                raise InvariantError("a page can't be decompressed")
            return page
        return bytes(self._data[where * PAGE_BYTES : (where + 1) * PAGE_BYTES])

    @property
    def held_bytes(self) -> int:
        """Frames, entries, and the index of shared contents."""
        frames = self._frames.count - self._frames.free
        index = self._contents.metadata_bytes if self._way.share else 0
        return frames * PAGE_BYTES + self._entries * ENTRY_BYTES + index


def _maybe_filled(window: memoryview, count: int) -> Iterator[bool]:
    """For each page, by extents, whether it is worth a look."""
    for slot in range(0, count, EXTENT_PAGES_MAX):
        extent = min(EXTENT_PAGES_MAX, count - slot)
        bitmap = candidates(window, slot, extent)
        for bit in range(extent):
            yield bool(bitmap >> bit & 1)


def run(way: Way, pages: Sequence[bytes], seed: int) -> Figures:
    """Store all pages once for each guest, read them back, compare."""
    rig = Rig(way, len(pages), seed)
    window = memoryview(b"".join(pages)).cast("Q")
    now: Callable[[], int] = time.thread_time_ns
    stored = []
    began = now()
    for member in range(way.guests):
        hints = _maybe_filled(window, len(pages)) if way.fill else iter([False] * len(pages))
        for page, may_be_filled in zip(pages, hints, strict=True):
            stored.append(rig.put(page, member, may_be_filled=may_be_filled))
    put_ns = now() - began
    began = now()
    found = [rig.get(one) for one in stored]
    get_ns = now() - began
    if found != list(pages) * way.guests:
        raise InvariantError(f"{way.name}: a page came back wrong")
    puts = len(stored)
    return Figures(rig.held_bytes / puts, put_ns / 1e3 / puts, get_ns / 1e3 / puts)


# --- all cases


def measure(pages: int, repetitions: int, seed: int) -> list[dict[str, Any]]:
    """A record of each kind of pages and way to store them."""
    rng = random.Random(seed)
    kinds = corpora(pages, rng)
    cases = [(kind, way) for kind in kinds for way in WAYS]
    samples: dict[tuple[str, Way], list[Figures]] = {case: [] for case in cases}
    for _ in range(repetitions):
        for kind, way in rng.sample(cases, len(cases)):
            samples[kind, way].append(run(way, kinds[kind], rng.getrandbits(64)))
    records = []
    for (kind, way), found in samples.items():
        held = median([figures.held_bytes for figures in found])
        records.append(
            {
                "pages": kind,
                "way": way.name,
                "held_bytes": round(held, 1),
                "saved": round(1 - held / PAGE_BYTES, 4),
                "put_us": round(median([figures.put_us for figures in found]), 3),
                "get_us": round(median([figures.get_us for figures in found]), 3),
            }
        )
    return records


def tables(records: Sequence[dict[str, Any]]) -> list[str]:
    """One table a figure, as lines."""
    kinds = list(dict.fromkeys(record["pages"] for record in records))
    values = {(record["pages"], record["way"]): record for record in records}
    lines = []
    for title, key, digits in (
        ("bytes held a page of 4096", "held_bytes", 0),
        ("share saved", "saved", 2),
        ("us a page, put", "put_us", 1),
        ("us a page, get", "get_us", 1),
    ):
        lines.append(title.ljust(26) + "".join(f"{kind:>10}" for kind in kinds))
        for way in WAYS:
            cells = "".join(f"{values[kind, way.name][key]:>10.{digits}f}" for kind in kinds)
            lines.append(f"  {way.name:<24}{cells}")
        lines.append("")
    return lines[:-1]


def main(arguments: list[str]) -> int:
    """Print the tables, or the records as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.pages")
    parser.add_argument("--pages", type=int, default=4096, help="of each kind")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        records = measure(options.pages, options.repetitions, options.seed)
    except OperatorError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(records, indent=1) if options.json else "\n".join(tables(records)))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
