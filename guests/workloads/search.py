"""Search files for a regular expression, line by line, as grep does.

Parameters: manifest, pattern, passes (1), paths_fraction (1), suffix ("").
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from guests.workloads.job import BadParameters, Job
from guests.workloads.verify import read_verified

DEFAULT_PATTERN = r"\b(class|def) [A-Z_]\w*"


class Search:
    """Counts matches in chunks; a line that a chunk cuts is searched with the next chunk."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self._pattern = pattern
        self._rest = b""
        self.matches = 0

    def feed(self, chunk: bytes) -> None:
        """Search the lines that this chunk completes."""
        lines, newline, rest = chunk.rpartition(b"\n")
        if newline:
            self._count(self._rest + lines)
            self._rest = rest
        else:
            self._rest += rest

    def finish(self) -> int:
        """Search the last line; how many matches there were."""
        self._count(self._rest)
        self._rest = b""
        return self.matches

    def _count(self, lines: bytes) -> None:
        self.matches += sum(1 for _ in self._pattern.finditer(lines))


def search_file(job: Job, path: str, expected: str, pattern: re.Pattern[bytes]) -> Iterator[None]:
    """Search one file, and verify it."""
    search = Search(pattern)
    yield from read_verified(job, path, expected, search.feed)
    job.findings.matches += search.finish()


def pattern_of(job: Job) -> re.Pattern[bytes]:
    """The parameter `pattern`, compiled."""
    text = job.text("pattern", DEFAULT_PATTERN)
    try:
        return re.compile(text.encode())
    except re.error as error:
        raise BadParameters(f"{job.workload}: pattern {text!r}: {error}") from None


def run(job: Job) -> Iterator[None]:
    """In the order of the paths, `passes` times."""
    manifest = job.manifest()
    pattern = pattern_of(job)
    paths = job.paths(manifest)
    passes = job.count("passes", 1, 1, 10_000)
    job.total = passes * len(paths)
    for _ in range(passes):
        for path in paths:
            yield from search_file(job, path, manifest[path], pattern)
            job.done += 1
