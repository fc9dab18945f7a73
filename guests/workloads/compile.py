"""Compile Python files as they were read.

Parameters: manifest, passes (1), paths_fraction (1), suffix (".py").
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Final

from guests.workloads.job import Job
from guests.workloads.verify import read_verified

SOURCE_BYTES_MAX: Final = 1 << 20
"""Larger files are verified but not compiled: a step must stay short."""


def compile_file(job: Job, path: str, expected: str) -> Iterator[None]:
    """Verify one file and compile it if it was right."""
    chunks: list[bytes] = []
    mismatches = job.findings.mismatches
    yield from read_verified(job, path, expected, chunks.append)
    source = b"".join(chunks)
    if job.findings.mismatches > mismatches or len(source) > SOURCE_BYTES_MAX:
        return
    try:
        with warnings.catch_warnings():
            # About the code of other people.
            warnings.simplefilter("ignore")
            compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        # Python's own tests hold files that are wrong on purpose.
        job.findings.uncompilable_files += 1
    else:
        job.findings.compiled_files += 1


def run(job: Job) -> Iterator[None]:
    """In the order of the paths, `passes` times."""
    manifest = job.manifest()
    suffix = job.text("suffix", ".py")
    paths = [path for path in job.paths(manifest) if path.endswith(suffix)]
    passes = job.count("passes", 1, 1, 10_000)
    job.total = passes * len(paths)
    for _ in range(passes):
        for path in paths:
            yield from compile_file(job, path, manifest[path])
            job.done += 1
