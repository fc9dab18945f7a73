"""Redis, memcached and lmdb holding the same working set of 4 KiB values.

Each is driven by the fastest of its ordinary clients' ways that acknowledge every value: Redis by
redis-py with hiredis (MSET and MGET, a pipeline, or MSETs of fewer keys: for each batch size
whichever was quickest in three short trials), memcached by pymemcache's set_many and get_many, lmdb
by one transaction a batch.  The servers listen on Unix sockets in a directory of their own, keep
nothing on disk, and end with the benchmark.  A request of 64 values to Redis is slow or quick by a
factor of two for seconds at a time, whatever we do; its spread shows it.
lmdb is a library: no second process, no copy between processes, no sync.

As with our own calls, the content of what comes back is looked at outside the measured time.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from ipc.abi import PAGE_BYTES
from ipc.errors import ExitCode, InvariantError, OperatorError
from tools.bench.plan import Plan
from tools.bench.timing import Case, Figures, Skipped, cpu_ns, figures, pin

COUNTS: Final = (1, 32, 64)
_START_SECONDS: Final = 10.0
_STOP_SECONDS: Final = 5.0
_TRIALS: Final = 3
_PIECE_KEYS: Final = 16
_VARIANTS: Final = 8
"""Different values; a value's first bytes are its key."""

Way = TypeVar("Way")

_now = time.perf_counter_ns

Store = Callable[[dict[str, bytes]], object]
Load = Callable[[list[str]], list[bytes | None]]


class Peer:
    """One peer with its working set; `pid` is its server's, None for a library."""

    def __init__(
        self, name: str, plan: Plan, pid: int | None, stores: list[Store], loads: list[Load]
    ) -> None:
        self._name = name
        self._pid = pid
        self._trial_seconds = plan.phase_seconds
        self._pages = plan.working_set_pages
        self._random = random.Random(plan.seed)
        self._tails = [self._random.randbytes(PAGE_BYTES - 8) for _ in range(_VARIANTS)]
        for first in range(0, self._pages, max(COUNTS)):
            stores[0](self._values(first, max(COUNTS)))
        self._stores: dict[int, Store] = {}
        self._loads: dict[int, Load] = {}
        for count in COUNTS:
            self._stores[count] = self._quickest(count, stores, self._time_stores)
            self._loads[count] = self._quickest(count, loads, self._time_loads)

    def cases(self) -> list[Case]:
        """Gets and puts of each batch size."""
        return [
            case
            for count in COUNTS
            for case in (
                self._case("get", count, partial(self._time_loads, self._loads[count], count)),
                self._case("put", count, partial(self._time_stores, self._stores[count], count)),
            )
        ]

    def _quickest(
        self, count: int, ways: list[Way], run: Callable[[Way, int, float], list[int]]
    ) -> Way:
        """The way with the shortest median of any trial; pinned, as the ratios that matter are."""
        if len(ways) == 1:
            return ways[0]
        pids = [os.getpid(), *([self._pid] if self._pid else [])]
        cores = os.sched_getaffinity(0)
        pin(pids, {max(cores)})
        best = [float("inf")] * len(ways)
        for _ in range(_TRIALS):
            for at, way in enumerate(ways):
                durations = sorted(run(way, count, self._trial_seconds))
                best[at] = min(best[at], durations[len(durations) // 2])
        pin(pids, cores)
        return ways[best.index(min(best))]

    def _case(self, verb: str, count: int, run: Callable[[float], list[int]]) -> Case:
        name = f"{self._name} {verb} {count}"

        def timed(seconds: float, core: int | None) -> dict[str, Figures]:
            del core  # pinned by the runner
            before = cpu_ns(self._pid) if self._pid else 0
            durations = run(seconds)
            spent = cpu_ns(self._pid) - before if self._pid else None
            return {name: figures(durations, count, spent)}

        return Case(name, timed)

    def _time_loads(self, load: Load, count: int, seconds: float) -> list[int]:
        durations: list[int] = []
        deadline = _now() + int(seconds * 1e9)
        end = 0
        while end < deadline:
            keys = self._keys(self._place(count), count)
            begin = _now()
            values = load(keys)
            end = _now()
            durations.append(end - begin)
            last = values[-1]
            if len(values) != count or last is None or last[:8].decode() != keys[-1]:
                raise InvariantError(f"{self._name} does not hold {keys[-1]}")
        return durations

    def _time_stores(self, store: Store, count: int, seconds: float) -> list[int]:
        durations: list[int] = []
        deadline = _now() + int(seconds * 1e9)
        end = 0
        while end < deadline:
            values = self._values(self._place(count), count)
            begin = _now()
            store(values)
            end = _now()
            durations.append(end - begin)
        return durations

    def _place(self, count: int) -> int:
        return self._random.randrange(self._pages // count) * count

    def _keys(self, first: int, count: int) -> list[str]:
        return [f"{number:08d}" for number in range(first, first + count)]

    def _values(self, first: int, count: int) -> dict[str, bytes]:
        tails = self._tails
        return {
            key: key.encode() + tails[at % _VARIANTS]
            for at, key in enumerate(self._keys(first, count))
        }


def start(plan: Plan, stack: ExitStack) -> tuple[list[Case], list[int], list[Skipped]]:
    """Start what is here; cases, server processes to pin, and what is missing."""
    cases: list[Case] = []
    pids: list[int] = []
    skipped: list[Skipped] = []
    for name, make in (("redis", _redis), ("memcached", _memcached), ("lmdb", _lmdb)):
        try:
            peer, pid = make(plan, stack)
        except _Missing as missing:
            skipped.append(Skipped(name, str(missing)))
            continue
        cases += peer.cases()
        pids += [pid] if pid else []
    return cases, pids, skipped


class _Missing(Exception):
    """A peer is not installed; the text says how to get it."""


def _redis(plan: Plan, stack: ExitStack) -> tuple[Peer, int]:
    try:
        import hiredis  # noqa: F401 - redis-py takes it when it is there
        import redis
    except ImportError as error:
        raise _Missing(f"{error.name} is not installed: make setup") from None
    program = _program("redis-server")
    directory = _directory(stack)
    path = directory / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(path), "--dir", str(directory)]
    pid = _serve([*command, "--save", "", "--appendonly", "no"], path, stack)
    client: Any = redis.Redis(unix_socket_path=str(path))
    stack.callback(client.close)
    _wait(client.ping, redis.exceptions.RedisError)

    def store_pipelined(values: dict[str, bytes]) -> None:
        pipeline = client.pipeline(transaction=False)
        for key, value in values.items():
            pipeline.set(key, value)
        pipeline.execute()

    def load_pipelined(keys: list[str]) -> list[bytes | None]:
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.get(key)
        loaded: list[bytes | None] = pipeline.execute()
        return loaded

    def store_singly(values: dict[str, bytes]) -> None:
        for key, value in values.items():
            client.set(key, value)

    def load_singly(keys: list[str]) -> list[bytes | None]:
        return [client.get(key) for key in keys]

    def store_pieces(values: dict[str, bytes]) -> None:
        items = list(values.items())
        for first in range(0, len(items), _PIECE_KEYS):
            client.mset(dict(items[first : first + _PIECE_KEYS]))

    return Peer(
        "redis",
        plan,
        pid,
        [client.mset, store_pipelined, store_pieces, store_singly],
        [client.mget, load_pipelined, load_singly],
    ), pid


def _memcached(plan: Plan, stack: ExitStack) -> tuple[Peer, int]:
    try:
        from pymemcache.client.base import Client
        from pymemcache.exceptions import MemcacheError
    except ImportError as error:
        raise _Missing(f"{error.name} is not installed: make setup") from None
    program = _program("memcached")
    path = _directory(stack) / "memcached.sock"
    memory_mib = plan.working_set_pages // 256 * 2 + 64
    command = [program, "-s", str(path), "-t", "1", "-m", str(memory_mib)]
    if os.getuid() == 0:
        command += ["-u", pwd.getpwuid(0).pw_name]
    pid = _serve(command, path, stack)
    # Nagle has no meaning here; without_reply would not be an acknowledged put.
    client: Any = Client(str(path), default_noreply=False)
    stack.callback(client.close)
    _wait(client.version, (OSError, MemcacheError))

    def store(values: dict[str, bytes]) -> None:
        if client.set_many(values):
            raise InvariantError("memcached refused a value")

    def load(keys: list[str]) -> list[bytes | None]:
        found: dict[str, bytes] = client.get_many(keys)
        return [found.get(key) for key in keys]

    return Peer("memcached", plan, pid, [store], [load]), pid


def _lmdb(plan: Plan, stack: ExitStack) -> tuple[Peer, None]:
    try:
        import lmdb
    except ImportError as error:
        raise _Missing(f"{error.name} is not installed: make setup") from None
    # /var/tmp outlives a reboot (FHS 3.0, 5.15), so it is no tmpfs: lmdb is meant to map a file.
    directory = _directory(stack, "/var/tmp")
    size = plan.working_set_pages * PAGE_BYTES * 8 + (64 << 20)
    environment = lmdb.open(str(directory), map_size=size, sync=False, metasync=False)
    stack.callback(environment.close)

    def store(values: dict[str, bytes]) -> None:
        with environment.begin(write=True) as transaction:
            for key, value in values.items():
                transaction.put(key.encode(), value)

    def load(keys: list[str]) -> list[bytes | None]:
        with environment.begin() as transaction:
            return [transaction.get(key.encode()) for key in keys]

    return Peer("lmdb", plan, None, [store], [load]), None


def _program(name: str) -> str:
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin")
    if path is None:
        raise _Missing(f"{name} is not installed: make setup, or apt-get install {name}")
    return path


def _directory(stack: ExitStack, parent: str | None = None) -> Path:
    directory = tempfile.TemporaryDirectory(prefix="tmem-bench-", dir=parent)
    return Path(stack.enter_context(directory))


def _serve(command: list[str], path: Path, stack: ExitStack) -> int:
    """Start a server and wait for its socket; it is stopped by the stack."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(_stop, server)
    deadline = time.monotonic() + _START_SECONDS
    while not path.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise OperatorError(
                f"{command[0]} does not start; run '{' '.join(command)}' to see why",
                ExitCode.UNAVAILABLE,
            )
        time.sleep(0.01)
    return server.pid


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(_STOP_SECONDS)
        return
    server.kill()
    server.wait()


def _wait(call: Callable[[], object], not_yet: Any) -> None:
    """Until the server answers: its socket may be there a moment earlier."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            call()
        except not_yet:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
