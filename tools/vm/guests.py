"""A whole cluster of ours that loses its power: guests, lock manager, shared cleancache, one disk.

It is started as a person would start it, works through its guests, and is killed with everything
in it at once. Only processes of its own record are killed, the supervisor first, so that it starts
nothing again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ipc.names import Registry, process_start
from tools.rundir import ClusterDirectory

NAMES: Final = ("alpha", "bravo", "carol", "delta")
"""The guests are nodes 0, 1, ... in this order."""
_ROOT: Final = Path(__file__).resolve().parents[2]
_PATIENCE_SECONDS: Final = 300
_GONE_SECONDS: Final = 20.0


class ClusterFailed(Exception):
    """A command to the cluster failed; the text says which, and how."""


class Guests:
    """A running cluster of four guests that share a disk; leaving the context kills it.

    The disk is a new one with a copy of a tree, or `image`.
    """

    def __init__(self, folder: Path, image: Path | None = None) -> None:
        self._folder = folder.absolute()
        self._directory = ClusterDirectory(self._folder / "on")
        self._given = image
        self.image = (image or self._directory.images / "data.img").absolute()

    def __enter__(self) -> Self:
        # The timing of o2cb: a busy machine must not make a node fence itself.
        what = ["--topo", f"shared,n={len(NAMES)},tree=2M,timing=o2cb"]
        if self._given is not None:
            what = ["--file", str(self._write_file(self._given))]
        try:
            self._tmem("up", "-d", *what)
        except BaseException:
            self.cut_power()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cut_power()

    def _write_file(self, image: Path) -> Path:
        lines = [f'[[guest]]\nname = "{name}"\nmemory = "3M"' for name in NAMES]
        lines.append(f"[[volume]]\nname = 'data'\nnodes = {list(NAMES)}")
        lines.append(f"image = '{image.absolute()}'")
        # A dead node's heartbeat is waited for as long as this allows, at o2cb's pace a minute; a
        # cluster that takes longer than 30 s to start is given up.
        lines.append("heartbeat_interval = 0.5\ndead_threshold = 25")
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "cluster.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def stop(self) -> None:
        """Unmount everywhere and end the cluster."""
        self._tmem("down")

    def run(self, guest: str, *words: str) -> str:
        """What a command in a guest prints."""
        return self._tmem("exec", guest, "--", *words)

    def sums(self, guest: str) -> dict[bytes, str]:
        """The sha256 of every file by path, as a guest reads it."""
        paths = self.run(guest, "find", "/", "-type", "f").splitlines()
        lines = self.run(guest, "sha256sum", *paths).splitlines()
        return {os.fsencode(line[66:].lstrip("/")): line[:64] for line in lines}

    def cut_power(self) -> None:
        """Kill everything that belongs to the cluster, and wait until it is gone."""
        processes = self._processes()
        for pid, _ in processes:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + _GONE_SECONDS
        while any(process_start(pid) == start for pid, start in processes):
            if time.monotonic() > deadline:
                raise ClusterFailed("processes of the cluster outlived SIGKILL")
            time.sleep(0.05)
        if processes:
            self._directory.sweep()

    def _processes(self) -> list[tuple[int, int]]:
        """Those that live, with their start times; the supervisor comes first."""
        record = self._directory.read()
        found = []
        if record is not None and record.lives:
            found.append((record.supervisor_pid, record.supervisor_start))
        for kind, name in Registry(self._directory.path).entries():
            pid, _, start = name.partition(":")
            if kind == "process" and process_start(int(pid)) == int(start):
                found.append((int(pid), int(start)))
        return found

    def _tmem(self, command: str, *words: str) -> str:
        line = [sys.executable, "-m", "tools", command, "--run", str(self._folder), *words]
        answer = subprocess.run(
            line,
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
        if answer.returncode:
            said = (answer.stderr.strip() or answer.stdout.strip() or "no word").splitlines()
            raise ClusterFailed(f"tmem {command} {' '.join(words[:4])}: {said[-1]}")
        return answer.stdout
