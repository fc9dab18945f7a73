"""What the demo runs: a working set of files that are read, searched and compiled, and a log.

Parameters:
  manifest        what the files must hold
  paths_fraction  size of the working set, as a share of the files (1); drawn by the seed
  passes          how often as many files as the working set has are visited (1)
  zipf            0: every file once a pass, in an order drawn anew (0); above: a file's chance to
                  be visited falls with its rank to this power
  search, compile shares of visits that search (0.3) and, among .py files, compile (0.1)
  log_lines       lines logged after each visit (1)
  pattern, and the log's rotate_bytes, keep, fsync_lines, directory

A heavy phase has a working set above the guest's memory and several passes; a light one a small
`paths_fraction` and one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import accumulate

from guests.workloads.compile import compile_file
from guests.workloads.job import Job
from guests.workloads.log import RotatingLog, line_of
from guests.workloads.search import pattern_of, search_file
from guests.workloads.verify import read_verified


def visits(job: Job, paths: list[str]) -> list[str]:
    """The files of one pass, in the order of the visits."""
    zipf = job.number("zipf", 0.0, 0.0, 4.0)
    if not zipf:
        return job.random.sample(paths, len(paths))
    weights = list(accumulate(rank**-zipf for rank in range(1, len(paths) + 1)))
    return job.random.choices(paths, cum_weights=weights, k=len(paths))


def run(job: Job) -> Iterator[None]:
    """`passes` times as many visits as the working set has files."""
    manifest = job.manifest()
    paths = job.paths(manifest)
    # Ranks are drawn too, or the first names of the alphabet would always be the popular ones.
    job.random.shuffle(paths)
    passes = job.count("passes", 1, 1, 10_000)
    pattern = pattern_of(job)
    search_share = job.number("search", 0.3, 0.0, 1.0)
    compile_share = job.number("compile", 0.1, 0.0, 1.0)
    log_lines = job.count("log_lines", 1, 0, 1000)
    job.total = passes * len(paths)
    with ExitStack() as at_end:
        log = at_end.enter_context(closing(RotatingLog(job))) if log_lines else None
        for _ in range(passes):
            for path in visits(job, paths):
                chance = job.random.random()
                if chance < search_share:
                    yield from search_file(job, path, manifest[path], pattern)
                elif chance < search_share + compile_share and path.endswith(".py"):
                    yield from compile_file(job, path, manifest[path])
                else:
                    yield from read_verified(job, path, manifest[path])
                if log is not None:
                    for _ in range(log_lines):
                        yield from log.append(line_of(job, job.done))
                job.done += 1
        if log is not None:
            yield from log.finish()
