"""Read every file and compare its hash with the manifest.

Parameters: manifest, passes (1), paths_fraction (1), suffix ("").
"""

from __future__ import annotations

from collections.abc import Iterator

from guests.workloads.job import Job
from guests.workloads.verify import read_verified


def run(job: Job) -> Iterator[None]:
    """In the order of the paths, `passes` times."""
    manifest = job.manifest()
    paths = job.paths(manifest)
    passes = job.count("passes", 1, 1, 10_000)
    job.total = passes * len(paths)
    for _ in range(passes):
        for path in paths:
            yield from read_verified(job, path, manifest[path])
            job.done += 1
