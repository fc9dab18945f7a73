"""Small real clusters for tests: a folder with a short path, a source tree, `tmem` as a process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ipc.codec import Record
from ipc.names import Registry
from tools.control import ask
from tools.rundir import ClusterDirectory

ROOT = Path(__file__).parents[2]


@contextmanager
def short_folder() -> Iterator[Path]:
    """An empty folder; pytest's own have paths too long for a Unix socket in a run directory."""
    path = Path(tempfile.mkdtemp(prefix="tm-"))
    try:
        yield path
    finally:
        # Whatever a failed test left running is found by its registry.
        for registry in path.rglob("registry"):
            Registry(registry.parent).clean()
        shutil.rmtree(path, ignore_errors=True)


def write_tree(folder: Path, *, files: int = 120, seed: int = 1) -> Path:
    """A tree of files of 1 byte to 80 KiB, some of them Python, about 2.6 MB for 120 files."""
    numbers = random.Random(seed)
    for number in range(files):
        path = folder / f"part{number % 5}" / f"file{number}.{'py' if number % 3 else 'bin'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = numbers.choice([1, 500, 4096, 20_000, 80_000])
        if path.suffix == ".py":
            line = f"value_{numbers.getrandbits(64)} = {numbers.getrandbits(64)}\n"
            path.write_text(line * (1 + size // len(line)))
        else:
            path.write_bytes(numbers.randbytes(size))
    return folder


def cluster_toml(
    name: str,
    tree: Path,
    *,
    memory: str = "1M",
    arena: str = "2M",
    passes: int = 3,
    guests: tuple[str, ...] = ("red", "blue"),
) -> str:
    """A cluster of two guests that take turns at being busy, as a cluster file.

    It is over before the memory scheduler has seen anything, and shares by weight would give the
    idle guest half of the arena; first come, first served makes reads a matter of the work alone.
    """
    lines = [f'name = "{name}"', "seed = 7", "[hypervisor]", f'arena = "{arena}"']
    lines.append('scheduling = "greedy"')
    for guest in guests:
        lines += ["[[guest]]", f'name = "{guest}"', f'memory = "{memory}"', f'tree = "{tree}"']
    for hot in guests:
        lines += ["[[phase]]", f'title = "{hot} is hot"']
        lines += [f"[phase.work.{hot}]", 'workload = "mixed"', f"passes = {passes}"]
        for light in guests:
            if light != hot:
                lines += [f"[phase.work.{light}]", 'workload = "log"', "lines = 300"]
    return "\n".join(lines) + "\n"


FAST_TIMING = {
    "heartbeat_interval": 0.1,
    "dead_threshold": 10,
    "idle_timeout": 0.6,
    "keepalive": 0.1,
    "reconnect": 0.1,
}
"""A silent node is dead after a second."""


def volume_toml(
    name: str,
    tree: Path,
    *,
    image: Path | None = None,
    guests: tuple[str, ...] = ("red", "blue", "green"),
    arena: str = "4M",
    **timing: float,
) -> str:
    """A cluster of guests that mount one volume, as a cluster file."""
    lines = [f'name = "{name}"', "seed = 7", "[hypervisor]", f'arena = "{arena}"']
    for guest in guests:
        lines += ["[[guest]]", f'name = "{guest}"', 'memory = "1M"']
    nodes = ", ".join(f'"{guest}"' for guest in guests)
    lines += ["[[volume]]", 'name = "data"', f"nodes = [{nodes}]"]
    lines += [f'tree = "{tree}"' if image is None else f'image = "{image}"']
    lines += [f"{key} = {value}" for key, value in (FAST_TIMING | timing).items()]
    return "\n".join(lines) + "\n"


def tmem(*arguments: str, cwd: Path, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def tmem_here(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process: for commands that only ask or refuse, of which tests have many."""
    from tools.cli import main

    output, errors = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with (
        contextlib.chdir(cwd),
        patch.dict(os.environ, environment(), clear=True),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        code = main(list(arguments))
    texts = []
    for stream in (output, errors):
        stream.seek(0)
        texts.append(stream.read())
    return subprocess.CompletedProcess(arguments, code, *texts)


def command(*arguments: str) -> list[str]:
    """`tmem` with the interpreter that runs the test."""
    return [sys.executable, "-m", "tools", *arguments]


def environment() -> dict[str, str]:
    """The environment of a command; the project is found wherever the command runs."""
    values = {key: value for key, value in os.environ.items() if not key.startswith("TMEM_")}
    path = os.pathsep.join(filter(None, [str(ROOT), values.get("PYTHONPATH", "")]))
    return values | {"PYTHONPATH": path, "NO_COLOR": "1"}


@contextmanager
def tmem_process(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on while the test does something; killed at the end if it still runs."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> None:
    """Wait for a condition; the test fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def left_behind(folder: Path, name: str) -> list[str]:
    """Registered things of clusters below a folder, and segments of a cluster's name."""
    entries = [entry.name for entry in folder.rglob("registry/*")]
    return entries + [path.name for path in Path("/dev/shm").glob(f"tmem-{name}-*")]


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of the newest measured run below a folder."""
    results: dict[str, Any] = json.loads((folder / "runs/latest/results.json").read_text())
    return results


class LiveGuests:
    """The guests of the one cluster that runs below a folder."""

    def __init__(self, folder: Path) -> None:
        (path,) = (folder / "runs").glob("*/on")
        self.folder = folder
        self._directory = ClusterDirectory(path)

    def ask(self, guest: str, verb: str, **fields: object) -> Record:
        """Over the guest's control socket."""
        return ask(self._directory.guest_socket(guest), {"verb": verb, **fields})

    def pids(self) -> dict[str, int]:
        """Processes by name, those that are there."""
        rows = json.loads(tmem("ps", "--json", cwd=self.folder).stdout)
        return {row["name"]: int(row["pid"]) for row in rows if row["pid"] is not None}
