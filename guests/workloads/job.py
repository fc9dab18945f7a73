"""One run of a workload: what it was asked, how far it is, and what it found out."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from random import Random
from typing import IO, Any, Final

from fs.vfs import Vfs
from guests.process import Processes

MISMATCH_PATHS_MAX: Final = 10


class BadParameters(Exception):
    """A parameter is missing or makes no sense; the text says which."""


class Findings:
    """Sums over all jobs of a guest."""

    def __init__(self) -> None:
        self.files_verified = 0
        self.bytes_verified = 0
        self.mismatches = 0
        self.mismatch_paths: list[str] = []
        self.matches = 0
        """Of the pattern searched for."""
        self.compiled_files = 0
        self.uncompilable_files = 0
        self.log_lines = 0
        self.killed_programs = 0
        """For memory, before their work was done."""

    def mismatch(self, path: str) -> None:
        """A file does not hold what it should."""
        self.mismatches += 1
        if len(self.mismatch_paths) < MISMATCH_PATHS_MAX:
            self.mismatch_paths.append(path)

    def record(self) -> dict[str, Any]:
        """The counters by name."""
        return dict(vars(self))


class Job:
    """`parameters` come from outside: `text`, `number` and `count` check what they take."""

    def __init__(
        self,
        workload: str,
        seed: int,
        parameters: dict[str, Any],
        vfs: Vfs,
        findings: Findings,
        processes: Processes,
        files: dict[str, int] | None = None,
    ) -> None:
        """`files` are descriptors by the name of a parameter, ours to close: files of the host that
        whoever wants the work done has opened, since a guest in its jail can't."""
        self.workload = workload
        self.vfs = vfs
        self.processes = processes
        self.random = Random(seed)
        self.findings = findings
        self.done = 0
        self.total = 0
        self.report: dict[str, Any] = {}
        """What it has to say beyond that, under text keys (`guests.adversary`)."""
        self._untrusted = parameters
        self._files = files or {}

    def text(self, name: str, default: str | None = None) -> str:
        """A parameter that is a text; required without a default."""
        value = self._untrusted.get(name, default)
        if value is None:
            raise BadParameters(f"{self.workload}: parameter {name} is missing")
        if not isinstance(value, str):
            raise BadParameters(f"{self.workload}: parameter {name} must be a text")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A parameter that is a number between two bounds."""
        value = self._untrusted.get(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or not least <= value <= most
        ):
            raise BadParameters(
                f"{self.workload}: parameter {name} must be a number from {least} to {most}, "
                f"not {value!r}"
            )
        return value

    def count(self, name: str, default: int, least: int, most: int) -> int:
        """A parameter that is a whole number between two bounds."""
        value = self.number(name, default, least, most)
        if value != int(value):
            raise BadParameters(f"{self.workload}: parameter {name} must be a whole number")
        return int(value)

    def open(self, name: str, mode: str = "r") -> IO[str]:
        """The file of the host that a parameter names, as text, by the line; once.  OSError."""
        path = Path(self.text(name))
        fd = self._files.pop(name, None)
        # Line buffering is for what others read while it grows.
        buffering = -1 if mode == "r" else 1
        if fd is None:
            return path.open(mode, buffering=buffering)
        return os.fdopen(fd, mode, buffering=buffering)

    def close(self) -> None:
        """Let go of files that were not asked for."""
        while self._files:
            os.close(self._files.popitem()[1])

    def manifest(self) -> dict[str, str]:
        """Path to SHA-256 of every file that must be there, from the JSON file `manifest`."""
        path = Path(self.text("manifest"))
        try:
            with self.open("manifest") as file:
                untrusted = json.loads(file.read())
        except (OSError, ValueError) as error:
            raise BadParameters(f"{self.workload}: manifest {path}: {error}") from None
        if not isinstance(untrusted, dict) or not all(
            isinstance(value, str) for value in untrusted.values()
        ):
            raise BadParameters(f"{self.workload}: manifest {path} is no map of paths to hashes")
        return {f"/{name.lstrip('/')}": digest for name, digest in untrusted.items()}

    def paths(self, manifest: dict[str, str]) -> list[str]:
        """The files to work on: the share `paths_fraction` (1), drawn by the seed, sorted.

        Only those that end with `suffix`, if it is given.
        """
        suffix = self.text("suffix", "")
        paths = sorted(path for path in manifest if path.endswith(suffix))
        fraction = self.number("paths_fraction", 1.0, 0.0, 1.0)
        if fraction < 1:
            paths = sorted(self.random.sample(paths, math.ceil(fraction * len(paths))))
        return paths
