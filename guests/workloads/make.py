"""Build a tree of Python files as `make -jN` builds one of C files: several compilers at a time.

Parameters: manifest, paths_fraction (1), suffix (".py"), jobs (4: compilers at a time),
memory_pages (64: memory of the compiler of a file of average size), passes (1: how often the tree
is built), objects ("/objects": the folder of what is made).

A compiler is a process of the guest with memory of its own, and what it does is what a compiler
does: it reads its source and everything that the source imports, directly or not (C's headers), all
of it verified; parses; keeps the syntax tree in its memory and walks over it, where it writes here
and there; compiles for real; walks once more; writes the object file; looks whether every page of
its memory is right; ends.  When all is built the objects are read and compared, as by a linker, and
everything is written to the disk (`sync`).

Its memory holds the nodes of the real syntax tree, as records with the pointers, positions and
numbers that a compiler written in C has there, so it is as compressible as such memory is.  Each
page begins with a stamp of whose it is, where, and how often it was written: no two are alike.
The tree takes more or less memory than the process is given, and is cut or repeated to fit.

Compilers take turns, a millisecond or so each.  One that is killed for memory, or that gets none,
is counted (`killed_programs`), and make goes on with the next file.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import marshal
import os
import re
import struct
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Final, TypeVar

from fs.errors import error
from guests.process import Process, ProcessKilled
from guests.workloads.compile import SOURCE_BYTES_MAX
from guests.workloads.job import Job
from guests.workloads.verify import CHUNK_BYTES, read_verified
from ipc.abi import PAGE_BYTES

_STAMP: Final = struct.Struct("<IIQ")
_NODE: Final = struct.Struct("<HHIIIIQQQQ")
"""kind, flags, line, column, last line, last column, then pointers: type, parent, child, next."""
_TREE_BYTES: Final = PAGE_BYTES - _STAMP.size
_STEP_PAGES: Final = 16
_TURN_STEPS: Final = 4
"""Of a compiler, before another has its turn.  It lives for about ten turns."""
_WRITTEN_SHARE: Final = 4
"""A walk writes to one page in so many."""
_MEMORY_MOST: Final = 2
"""A compiler takes at most so many times the memory of an average one."""
_HEAP_START: Final = 0x5555_5575_0000
_TYPES_START: Final = 0x5555_5555_4000
_IMPORT: Final = re.compile(
    rb"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import|import[ \t]+([\w., \t]+))", re.MULTILINE
)

Translated = TypeVar("Translated")


class _Build:
    """What all compilers of one make share."""

    def __init__(self, job: Job, manifest: dict[str, str], sources: list[str]) -> None:
        self.job = job
        self.manifest = manifest
        self.memory_pages = job.count("memory_pages", 64, 1, 1_000_000)
        self.objects_folder = "/" + job.text("objects", "/objects").strip("/")
        self.objects: dict[str, str] = {}
        """Path of each object file, and its hash."""
        self._imports: dict[str, list[str]] = {}
        sizes = {path: job.vfs.stat(path).st_size for path in sources}
        self._sizes = sizes
        self._average_bytes = max(1, sum(sizes.values()) // max(1, len(sizes)))

    def pages_of(self, path: str) -> int:
        """Memory of the compiler of a file."""
        scaled = self.memory_pages * self._sizes[path] // self._average_bytes
        return max(1, min(scaled, _MEMORY_MOST * self.memory_pages))

    def headers(self, path: str, source: bytes) -> Iterator[str]:
        """Files of the tree that a source needs, which are to be read (`note`) as they come."""
        self.note(path, source)
        seen = {path}
        waiting = deque([path])
        while waiting:
            for found in self._imports.get(waiting.popleft(), ()):
                if found not in seen:
                    seen.add(found)
                    waiting.append(found)
                    yield found

    def note(self, path: str, source: bytes) -> None:
        """Look what a file imports, if that is not known."""
        if path in self._imports:
            return
        names: set[str] = set()
        for package, modules in _IMPORT.findall(source):
            names |= {name.split()[0] for name in modules.decode().split(",") if name.split()}
            names |= {_absolute(path, package.decode())} if package else set()
        wanted = {
            f"/{name.strip('.').replace('.', '/')}{end}"
            for name in names
            for end in (".py", "/__init__.py")
        }
        self._imports[path] = sorted(wanted & self.manifest.keys())


def _absolute(path: str, name: str) -> str:
    """The module that an import statement in a file means, from the top of the tree."""
    inner = name.lstrip(".")
    if inner == name:
        return name
    folders = path.strip("/").split("/")[: -(len(name) - len(inner))]
    return ".".join([*folders, inner])


class _Memory:
    """The memory of one compiler, and what it should hold."""

    def __init__(self, job: Job, process: Process, pages: int, tree: bytes) -> None:
        self._job = job
        self._process = process
        self._tree = tree * (pages * _TREE_BYTES // len(tree) + 1)
        self._writes = [0] * pages
        self._address = process.map(pages * PAGE_BYTES)

    def _page(self, number: int) -> bytes:
        at = number * _TREE_BYTES
        stamp = _STAMP.pack(self._process.pid, number, self._writes[number])
        return stamp + self._tree[at : at + _TREE_BYTES]

    def fill(self) -> Iterator[None]:
        """Build the tree."""
        yield from self._walk(range(len(self._writes)), ())

    def walk(self) -> Iterator[None]:
        """Look at every page, and write to some."""
        everything = range(len(self._writes))
        yield from self._walk(everything[::_WRITTEN_SHARE], everything)

    def verify(self) -> Iterator[None]:
        """Look at every page."""
        yield from self._walk((), range(len(self._writes)))

    def _walk(self, written: range | tuple[()], read: range | tuple[()]) -> Iterator[None]:
        process = self._process
        for number in read or written:
            address = self._address + number * PAGE_BYTES
            if number in read and process.read(address, PAGE_BYTES) != self._page(number):
                self._job.findings.mismatch(f"{process.name} page {number}")
            if number in written:
                self._writes[number] += 1
                process.write(address, self._page(number))
            if number % _STEP_PAGES == _STEP_PAGES - 1:
                yield
        yield


def _tree_bytes(tree: ast.AST) -> bytes:
    """A syntax tree as a C program has it in memory: nodes with pointers, in the order made."""
    nodes = list(ast.walk(tree))
    places = {id(node): _HEAP_START + number * _NODE.size for number, node in enumerate(nodes)}
    parents: dict[int, int] = {}
    following: dict[int, int] = {}
    records = []
    kinds: dict[type, int] = {}
    for node in nodes:
        children = [places[id(child)] for child in ast.iter_child_nodes(node)]
        for child, after in zip(children, [*children[1:], 0], strict=False):
            parents[child], following[child] = places[id(node)], after
        place = places[id(node)]
        kind = kinds.setdefault(type(node), len(kinds))
        records.append(
            _NODE.pack(
                kind,
                len(children) & 0xFFFF,
                getattr(node, "lineno", 0),
                getattr(node, "col_offset", 0),
                getattr(node, "end_lineno", 0) or 0,
                getattr(node, "end_col_offset", 0) or 0,
                _TYPES_START + 0x1A0 * kind,
                parents.get(place, 0),
                children[0] if children else 0,
                following.get(place, 0),
            )
        )
    return b"".join(records)


def _compiler(build: _Build, path: str) -> Generator[None, None, None]:
    """One process, from its start to its end."""
    job = build.job
    process = job.processes.spawn(f"cc {path}")
    try:
        yield from _compile(build, path, process)
    except ProcessKilled:
        job.findings.killed_programs += 1
    except OSError as reason:
        if reason.errno != errno.ENOMEM:
            raise
        job.findings.killed_programs += 1
    finally:
        process.exit()


def _compile(build: _Build, path: str, process: Process) -> Iterator[None]:
    job = build.job
    mismatches = job.findings.mismatches
    source = yield from _read(job, path, build.manifest[path])
    for header in build.headers(path, source):
        build.note(header, (yield from _read(job, header, build.manifest[header])))
    if job.findings.mismatches > mismatches or len(source) > SOURCE_BYTES_MAX:
        return
    tree = _try(job, lambda: ast.parse(source, path))
    if tree is None:
        return
    memory = _Memory(job, process, build.pages_of(path), _tree_bytes(tree))
    yield from memory.fill()
    yield from memory.walk()
    code = _try(job, lambda: compile(tree, path, "exec", dont_inherit=True))
    if code is None:
        return
    job.findings.compiled_files += 1
    yield from memory.walk()
    yield from _write_object(build, path, marshal.dumps(code))
    yield from memory.verify()


def _try(job: Job, translate: Callable[[], Translated]) -> Translated | None:
    """What becomes of a source; None if it is no Python, as some of Python's own tests."""
    try:
        with warnings.catch_warnings():
            # About the code of other people.
            warnings.simplefilter("ignore")
            return translate()
    except (SyntaxError, ValueError):
        job.findings.uncompilable_files += 1
        return None


def _read(job: Job, path: str, expected: str) -> Generator[None, None, bytes]:
    """Read a whole file, verified."""
    chunks: list[bytes] = []
    yield from read_verified(job, path, expected, chunks.append)
    return b"".join(chunks)


def _write_object(build: _Build, path: str, content: bytes) -> Iterator[None]:
    vfs = build.job.vfs
    target = f"{build.objects_folder}/{path.strip('/').replace('/', '.')}c"
    build.objects.pop(target, None)
    handle = vfs.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for at in range(0, len(content), CHUNK_BYTES):
            chunk = content[at : at + CHUNK_BYTES]
            if vfs.write(handle, chunk) < len(chunk):
                raise error(errno.ENOSPC, target)
            yield
    finally:
        vfs.close(handle)
    build.objects[target] = hashlib.sha256(content).hexdigest()


def run(job: Job) -> Iterator[None]:
    """`jobs` compilers at a time, in an order drawn by the seed; then the linker."""
    manifest = job.manifest()
    suffix = job.text("suffix", ".py")
    sources = [path for path in job.paths(manifest) if path.endswith(suffix)]
    jobs = job.count("jobs", 4, 1, 1000)
    passes = job.count("passes", 1, 1, 10_000)
    build = _Build(job, manifest, sources)
    with suppress(FileExistsError):
        job.vfs.mkdir(build.objects_folder)
    job.total = passes * len(sources)
    yield
    for _ in range(passes):
        waiting = deque(job.random.sample(sources, len(sources)))
        yield from _in_turn(build, waiting, jobs)
        for path, digest in sorted(build.objects.items()):
            yield from read_verified(job, path, digest)
        job.vfs.sync()


def _in_turn(build: _Build, waiting: deque[str], jobs: int) -> Iterator[None]:
    """So many compilers at a time."""
    running: deque[Generator[None, None, None]] = deque()
    try:
        while waiting or running:
            if waiting and len(running) < jobs:
                running.append(_compiler(build, waiting.popleft()))
            for _ in range(_TURN_STEPS):
                try:
                    next(running[0])
                except StopIteration:
                    running.popleft()
                    build.job.done += 1
                    break
                yield
            else:
                running.rotate(-1)
    finally:
        for compiler in running:
            compiler.close()
