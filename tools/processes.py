"""Starting hypervisor and guests: real processes, through multiprocess' forkserver.

The fork server is a small process that has none of our memory, so a guest inherits neither another
guest's mappings nor anything of this room.  Two habits of multiprocess are turned off for that:

* It imports the parent's `__main__` again in every child.  Children are started while `__main__` is
  a bare module, so there is nothing to import.
* The fork server takes over the parent's SIGINT.  It is started with SIGINT ignored, which its
  children inherit: Ctrl-C reaches only the supervisor, and that one ends the children in order.

Its socket goes into the cluster's folder: multiprocess' own choice, a new folder below /tmp, would
stay behind when the supervisor is killed.

Their environment is `_PLAIN` and no more: what a shell had there for somebody else (keys, tokens)
would lie in every guest's memory.

Standard output and error of the children go to a log, so that a terminal shows only what the
supervisor says.

What is forked from one process has one seed of Python's hash, and the hypervisor's samplers and
token groups rely on guests not knowing theirs.  So the hypervisor is not forked from the guests'
server: it is an interpreter of its own (`apart`), whose seed the kernel gives it, whatever
PYTHONHASHSEED says.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import multiprocess
import multiprocess.forkserver
import multiprocess.process
import multiprocess.resource_tracker

_ENCLOSURE: Final = "ipc.jail.enclosure"
# Imported once in the fork server; nothing of guests or hypervisor, which don't know each other.
_PRELOAD: Final = ["ipc.attach", "ipc.codec", "ipc.jail.warmup", "logging"]


_PLAIN: Final = frozenset(("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ"))
"""Variables that children have, ..."""
_PLAIN_PREFIXES: Final = ("LC_", "PYTHON")
"""... and those that begin so."""


class ProcessFactory:
    """A fork server of our own, from `start` to `close`; at most one in a process.  With `enclosed`
    what it forks can send signals to its like only."""

    def __init__(self, folder: Path, console: Path, *, enclosed: bool = False) -> None:
        self._preload = [*_PRELOAD, _ENCLOSURE] if enclosed else _PRELOAD
        self._folder = folder
        self._console = console
        self._context = multiprocess.get_context("forkserver")
        self._apart = multiprocess.get_context("spawn")
        self._server = multiprocess.forkserver._forkserver  # noqa: SLF001
        self._tracker = multiprocess.resource_tracker._resource_tracker  # noqa: SLF001
        self._settings = multiprocess.process.current_process()._config  # noqa: SLF001

    def start(self) -> list[int]:
        """Start the fork server; ids of it and its helper."""
        self._context.set_forkserver_preload(self._preload)
        self._settings["tempdir"] = os.fspath(self._folder)
        with _output_to(self._console), _sigint_ignored(), _bare_main(), _plain_environment():
            self._server.ensure_running()
        return [self._server._forkserver_pid, self._tracker._pid]  # noqa: SLF001

    def spawn(
        self, target: Callable[[Any], None], spec: object, name: str, *, apart: bool = False
    ) -> Any:
        """Start `target(spec)` in a process of its own; a multiprocess.Process.  One that is
        `apart` has nothing in common with the others."""
        if not apart:
            process = self._context.Process(target=target, args=(spec,), name=name)
            with _bare_main():
                process.start()
            return process
        process = self._apart.Process(target=target, args=(spec,), name=name)
        with (
            _output_to(self._console),
            _sigint_ignored(),
            _bare_main(),
            _plain_environment(but="PYTHONHASHSEED"),
        ):
            process.start()
        return process

    def close(self) -> None:
        """End the fork server and its helper, and wait for both."""
        self._server._stop()  # noqa: SLF001
        self._tracker._stop()  # noqa: SLF001
        self._settings.pop("tempdir", None)


@contextlib.contextmanager
def _bare_main() -> Iterator[None]:
    ours = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = ours


@contextlib.contextmanager
def _plain_environment(but: str = "") -> Iterator[None]:
    """What is started now has `_PLAIN` variables only, and not this one."""
    others = {
        name: value
        for name, value in os.environ.items()
        if name == but or not (name in _PLAIN or name.startswith(_PLAIN_PREFIXES))
    }
    for name in others:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(others)


@contextlib.contextmanager
def _sigint_ignored() -> Iterator[None]:
    """Whoever is started meanwhile ignores it for good; for us it waits, as starting takes a while:
    what is blocked is kept, though it is ignored."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, log):
            os.close(descriptor)
