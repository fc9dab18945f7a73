"""Reading a file as every workload does: in chunks through the vfs, and never trusting it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Final

from guests.workloads.job import Job

CHUNK_BYTES: Final = 64 * 1024
"""A file may be larger than the guest's memory; it passes through in pieces of this size."""


def read_verified(
    job: Job, path: str, expected: str, use: Callable[[bytes], None] | None = None
) -> Iterator[None]:
    """Read a file, hash it, count it; `use` is given each chunk as it was read.

    A file that can't be read counts as a mismatch, like one with other content.
    """
    digest = hashlib.sha256()
    size = 0
    try:
        handle = job.vfs.open(path)
        try:
            while chunk := job.vfs.read(handle, CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                if use is not None:
                    use(chunk)
                yield
        finally:
            job.vfs.close(handle)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        job.findings.mismatch(f"{path} ({why})")
        return
    if digest.hexdigest() == expected:
        job.findings.files_verified += 1
        job.findings.bytes_verified += size
    else:
        job.findings.mismatch(path)
    yield
