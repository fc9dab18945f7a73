"""Kill the hypervisor under load, start it again on the same segment, and hold it to its promises.

    python -m tools.crash_restart --restarts 500 [--guests 2] [--seed 1]

Real processes: one hypervisor, which is sent SIGKILL at a random moment and started again, and
guests that put, get and flush all the while.  A guest keeps a model of what each page may hold.  A
call that the kill cut short may or may not have been executed, so it widens the model; a reply
narrows it again.  After each restart every guest attaches anew and reads back all of its
persistent pages, whole.

  lost   an accepted persistent page is gone or has the wrong bytes
  stale  an ephemeral get returned anything but the last accepted data

Both must be 0.  The last line says restarts, persistent pages checked, lost, stale; the exit code
is 0 if the promises held and 1 if not.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import multiprocess
from multiprocess.connection import Connection, wait

from guests.hypercall import Hypercalls
from hypervisor.boot import HypervisorSpec
from hypervisor.boot import run as run_hypervisor
from ipc import attach
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES, Reply, Status, oid_from_int
from ipc.errors import Disconnected, ExitCode
from ipc.names import Registry

ABSENT = 0
"""The version of a page that is not there."""

_OBJECTS = 6
_PAGES_PER_OBJECT = 160
_ARENA_BYTES = 8 << 20
"""1,989 frames for two guests of up to 1,920 pages each: eviction is part of the load."""


@dataclass
class Tally:
    """What one guest, or all of them, saw."""

    restarts: int = 0
    calls: int = 0
    persistent_checked: int = 0
    ephemeral_hits: int = 0
    lost: int = 0
    stale: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Sum up; the number of restarts is the cluster's, not a sum."""
        self.calls += other.calls
        self.persistent_checked += other.persistent_checked
        self.ephemeral_hits += other.ephemeral_hits
        self.lost += other.lost
        self.stale += other.stale
        self.examples += other.examples

    def line(self) -> str:
        """The closing line."""
        return (
            f"restarts {self.restarts}, persistent pages checked {self.persistent_checked}, "
            f"lost {self.lost}, stale {self.stale} "
            f"({self.calls} calls, {self.ephemeral_hits} ephemeral hits)"
        )


def page_bytes(name: str, persistent: bool, key: tuple[int, int], version: int) -> bytes:
    """A whole page that no other page equals: its name, 32 bytes, over and over."""
    text = f"{name} {'p' if persistent else 'e'} {key[0]}:{key[1]} v{version}"
    return text.encode().ljust(32, b".") * (PAGE_BYTES // 32)


class PoolModel:
    """What each page of one pool may hold; a page that is not listed is absent for certain."""

    def __init__(self, name: str, persistent: bool) -> None:
        self.name = name
        self.persistent = persistent
        self.pool = -1
        self.may_hold: dict[tuple[int, int], set[int]] = {}

    def possible(self, key: tuple[int, int]) -> set[int]:
        """Versions that the page may have, ABSENT among them."""
        return self.may_hold.get(key, {ABSENT})

    def settle(self, key: tuple[int, int], version: int) -> None:
        """A reply told what the page holds."""
        if version == ABSENT:
            self.may_hold.pop(key, None)
        else:
            self.may_hold[key] = {version}

    def widen(self, key: tuple[int, int], version: int) -> None:
        """A call without a reply may have done this."""
        self.may_hold[key] = self.possible(key) | {version}


class Loader:
    """One guest: random calls, a model, and a check of everything after each restart."""

    def __init__(self, run_directory: Path, name: str, token: bytes, seed: int) -> None:
        self._run_directory = run_directory
        self._name = name
        self._token = token
        self._random = random.Random(f"{name} {seed}")
        self._version = 0
        self._models = [PoolModel(name, persistent=False), PoolModel(name, persistent=True)]
        self.tally = Tally()
        self._connect()
        for model in self._models:
            model.pool = self._calls.new_pool(persist=model.persistent).value

    def _connect(self) -> None:
        # Either transport, the other perhaps after the next restart.
        ring = None if self._random.random() < 0.5 else False
        self._channel = attach.connect(
            self._run_directory, self._name, self._token, patience_seconds=30, ring=ring
        )
        self._calls = Hypercalls(self._channel)

    def reconnect(self) -> None:
        """Attach to the restarted hypervisor and read every persistent page back."""
        self._channel.close()
        self._connect()
        if not self._channel.resumed:
            self._fail("lost", "the pools are gone")
        for model in self._models:
            if model.persistent:
                for key in sorted(model.may_hold):
                    self._get(model, key[0], key[1], 1)

    def step(self) -> None:
        """One random call; raises Disconnected when it was cut short, with the model widened."""
        model = self._random.choice(self._models)
        oid = self._random.randrange(_OBJECTS)
        count = self._random.choice((1, 1, 7, 32, EXTENT_PAGES_MAX))
        index = self._random.randrange(_PAGES_PER_OBJECT - count)
        choice = self._random.random()
        if choice < 0.5:
            self._put(model, oid, index, count)
        elif choice < 0.8:
            self._get(model, oid, index, count)
        elif choice < 0.98:
            self._flush(model, oid, index, count)
        else:
            self._flush_object(model, oid)
        self.tally.calls += 1

    def _put(self, model: PoolModel, oid: int, index: int, count: int) -> None:
        keys = [(oid, index + i) for i in range(count)]
        versions = range(self._version + 1, self._version + 1 + count)
        self._version += count
        for slot, (key, version) in enumerate(zip(keys, versions, strict=True)):
            self._channel.window.slot(slot)[:] = page_bytes(
                self._name, model.persistent, key, version
            )
        try:
            reply = self._calls.put(model.pool, oid_from_int(oid), index, count)
        except Disconnected:
            for key, version in zip(keys, versions, strict=True):
                model.widen(key, version)
            raise
        for bit, (key, version) in enumerate(zip(keys, versions, strict=True)):
            # A refused duplicate put drops the older page.
            model.settle(key, version if reply.map >> bit & 1 else ABSENT)

    def _get(self, model: PoolModel, oid: int, index: int, count: int) -> None:
        keys = [(oid, index + i) for i in range(count)]
        try:
            reply = self._calls.get(model.pool, oid_from_int(oid), index, count)
        except Disconnected:
            if not model.persistent:
                for key in keys:
                    model.widen(key, ABSENT)
            raise
        for slot, key in enumerate(keys):
            self._judge(model, key, reply, slot)

    def _judge(self, model: PoolModel, key: tuple[int, int], reply: Reply, slot: int) -> None:
        possible = model.possible(key)
        if model.persistent:
            self.tally.persistent_checked += possible != {ABSENT}
        if not reply.map >> slot & 1:
            if model.persistent and ABSENT not in possible:
                self._fail("lost", f"{key} is gone")
            model.settle(key, ABSENT)
            return
        page = bytes(self._channel.window.slot(slot))
        found = [
            version
            for version in possible - {ABSENT}
            if page == page_bytes(self._name, model.persistent, key, version)
        ]
        if not found:
            self._fail("lost" if model.persistent else "stale", f"{key} holds {page[:32]!r}")
        if model.persistent:
            model.settle(key, found[0] if found else ABSENT)
        else:
            self.tally.ephemeral_hits += 1
            model.settle(key, ABSENT)

    def _flush(self, model: PoolModel, oid: int, index: int, count: int) -> None:
        keys = [(oid, index + i) for i in range(count)]
        try:
            self._calls.flush_page(model.pool, oid_from_int(oid), index, count)
        except Disconnected:
            for key in keys:
                model.widen(key, ABSENT)
            raise
        for key in keys:
            model.settle(key, ABSENT)

    def _flush_object(self, model: PoolModel, oid: int) -> None:
        keys = [key for key in model.may_hold if key[0] == oid]
        try:
            reply = self._calls.flush_object(model.pool, oid_from_int(oid))
        except Disconnected:
            for key in keys:
                model.widen(key, ABSENT)
            raise
        if reply.status != Status.DONE:
            self._fail("lost", f"flush of object {oid} answered {reply.status}")
        for key in keys:
            model.settle(key, ABSENT)

    def _fail(self, kind: str, what: str) -> None:
        if kind == "lost":
            self.tally.lost += 1
        else:
            self.tally.stale += 1
        if len(self.tally.examples) < 5:
            self.tally.examples.append(f"{self._name}: {kind}: {what}")


def run_guest(run_directory: Path, name: str, token: bytes, seed: int, pipe: Connection) -> None:
    """Load the hypervisor until told to stop; says "checked" after each full read-back."""
    guest = Loader(run_directory, name, token, seed)
    pipe.send("checked")
    while True:
        try:
            guest.step()
        except Disconnected:
            _until_connected(guest)
            pipe.send("checked")
        if pipe.poll():
            break
    pipe.send(guest.tally)


def _until_connected(guest: Loader) -> None:
    while True:
        try:
            guest.reconnect()
        except Disconnected:
            continue
        return


def crash_restart(
    restarts: int, guests: int, seed: int, *, cluster: str, run_directory: Path, eviction: str
) -> Tally:
    """Run the campaign in `run_directory`, which is left without processes and kernel objects."""
    registry = Registry(run_directory)
    context = multiprocess.get_context("forkserver")
    spec = HypervisorSpec(cluster, run_directory, _ARENA_BYTES, eviction, os.getpid())
    moments = random.Random(seed)
    processes = []
    pipes: list[Connection] = []

    def start_hypervisor() -> multiprocess.Process:
        process = context.Process(target=run_hypervisor, args=(spec,), daemon=True)
        process.start()
        return process

    hypervisor = start_hypervisor()
    tally = Tally()
    try:
        for number in range(guests):
            name, token = f"guest{number}", os.urandom(32)
            attach.enrol(run_directory, name, token, os.getuid())
            ours, theirs = context.Pipe()
            arguments = (run_directory, name, token, seed, theirs)
            process = context.Process(target=run_guest, args=arguments, daemon=True)
            process.start()
            theirs.close()
            registry.add_process(process.pid)
            processes.append(process)
            pipes.append(ours)
        _await_all(pipes)
        for _ in range(restarts):
            time.sleep(moments.uniform(0.0, 0.03))
            os.kill(hypervisor.pid, signal.SIGKILL)
            hypervisor.join()
            registry.remove_process(hypervisor.pid)
            hypervisor = start_hypervisor()
            _await_all(pipes)
            tally.restarts += 1
        for pipe in pipes:
            pipe.send("stop")
            tally.add(_receive_tally(pipe))
        os.kill(hypervisor.pid, signal.SIGTERM)
        hypervisor.join(10)
    finally:
        for process in [*processes, hypervisor]:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()
        registry.clean()
    return tally


def _await_all(pipes: list[Connection], patience_seconds: float = 60) -> None:
    """Wait until every guest has said "checked"."""
    waiting = list(pipes)
    deadline = time.monotonic() + patience_seconds
    while waiting:
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"{len(waiting)} guests did not come back after a restart")
        for pipe in ready:
            if isinstance(pipe, Connection):
                pipe.recv()
            waiting.remove(pipe)


def _receive_tally(pipe: Connection) -> Tally:
    while True:
        message = pipe.recv()
        if isinstance(message, Tally):
            return message


def main() -> int:
    """Command line; returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.crash_restart", description=__doc__)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--guests", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--eviction", default="clock")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    run_directory = Path(tempfile.mkdtemp(prefix="tmem-crash-"))
    try:
        tally = crash_restart(
            options.restarts,
            options.guests,
            options.seed,
            cluster=f"crash{os.getpid()}",
            run_directory=run_directory,
            eviction=options.eviction,
        )
    finally:
        shutil.rmtree(run_directory, ignore_errors=True)
    for example in tally.examples:
        print(example)
    print(tally.line())
    return ExitCode.VIOLATED if tally.lost or tally.stale else ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
