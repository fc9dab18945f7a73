"""The sharing test: the same reading twice, with private pools and with a shared one.

    tmem up --topo shared,n=4 --test sharing

Guests that mount one volume read its whole tree: one alone, then the others, then all together.
Total memory, work and seeds are the same in both runs; only the pools differ.  With private pools
each guest's arena share is its own; in the shared one a page that any guest has let go is there for
all.  Every file is compared with the hash of the source it was copied from.

The record: `disk_reads_pages` of both runs (all guests, from mounting on, counted in their block
devices), `verified_pages` and `mismatches` of both together, and the runs as `tmem up` has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ipc.codec import Record
from ipc.errors import ExitCode, OperatorError
from tools.config import ClusterConfig, PhaseConfig, VolumeConfig, WorkConfig
from tools.demo import Reporter, check_cluster, prepare_disks, run_work
from tools.interrupts import Interrupts
from tools.rundir import ClusterDirectory
from tools.units import PAGE_BYTES

POOLS: Final = ("private", "shared")
_PASSES: Final = 2


def measure_sharing(
    config: ClusterConfig, run: Path, cache: Path, reporter: Reporter, interrupts: Interrupts
) -> Record:
    """Both runs; the record that becomes results.json."""
    volume = only_volume(config, "sharing")
    directories = {pool: ClusterDirectory(run / pool) for pool in POOLS}
    for directory in directories.values():
        check_cluster(config, directory)
    disks = prepare_disks(config, cache)
    results: Record = {"seed": config.seed, "name": config.name, "test": "sharing"}
    reads = {}
    for pool, directory in directories.items():
        changed = _with_pool(config, volume, pool)
        outcome = run_work(changed, disks, directory, "on", reporter, interrupts)
        results[pool] = outcome
        reads[pool] = _sum(outcome, "disk_reads_pages")
    both = [results[pool] for pool in POOLS]
    verified_bytes = sum(_sum(one, "bytes_verified") for one in both)
    results |= {
        "disk_reads_pages": reads,
        "verified_pages": -(-verified_bytes // PAGE_BYTES),
        "mismatches": sum(_sum(one, "mismatches") for one in both),
    }
    return results


def only_volume(config: ClusterConfig, test: str) -> VolumeConfig:
    """The volume of a cluster that a test is about; raises OperatorError."""
    if len(config.volume) != 1 or len(config.volume[0].nodes) < 2:
        raise OperatorError(
            f"the test {test} needs one volume that two or more guests mount; take --topo shared",
            ExitCode.USAGE,
        )
    return config.volume[0]


def _with_pool(config: ClusterConfig, volume: VolumeConfig, pool: str) -> ClusterConfig:
    first, *others = volume.nodes
    once: dict[str, Any] = {"workload": "read_all", "passes": 1}
    again = {**once, "passes": _PASSES}
    phases = [
        PhaseConfig(title=f"{first} reads the tree", work={first: WorkConfig(**once)}),
        PhaseConfig(title="the others read it", work={name: WorkConfig(**once) for name in others}),
        PhaseConfig(
            title="all read it again", work={name: WorkConfig(**again) for name in volume.nodes}
        ),
    ]
    volumes = [volume.model_copy(update={"pool": pool})]
    return config.model_copy(update={"volume": volumes, "phase": phases})


def _sum(outcome: Record, key: str) -> int:
    return sum(guest[key] for guest in outcome["guests"].values())


def verdict(results: Record) -> tuple[ExitCode, list[str]]:
    """The exit code, and a line for each thing that went wrong."""
    code, lines = ExitCode.OK, []
    for pool in POOLS:
        for line in results[pool]["errors"]:
            code = ExitCode.VIOLATED
            lines.append(f"{pool}: {line}")
        for name, guest in results[pool]["guests"].items():
            if "exit_code" in guest:
                code = ExitCode.GUEST_DIED
                lines.append(f"{pool}: guest {name} died (exit code {guest['exit_code']})")
            if guest["mismatches"]:
                code = ExitCode.VIOLATED
                paths = ", ".join(guest["mismatch_paths"])
                lines.append(f"{pool}: {name} read {guest['mismatches']} wrong files: {paths}")
    return code, lines


HEADER: Final = ("guest", "reads private", "reads shared", "saved", "hits private", "hits shared")


def table(results: Record) -> list[tuple[str, ...]]:
    """A row of texts for each guest and one for all."""
    names = list(results["shared"]["guests"])
    return [_row(results, name, [name]) for name in names] + [_row(results, "all", names)]


def _row(results: Record, title: str, names: list[str]) -> tuple[str, ...]:
    reads, hits = [], []
    for pool in POOLS:
        guests = [results[pool]["guests"][name] for name in names]
        reads.append(sum(guest["disk_reads_pages"] for guest in guests))
        found = sum(guest["cleancache"].get("succ_gets", 0) for guest in guests)
        missed = sum(guest["cleancache"].get("failed_gets", 0) for guest in guests)
        hits.append(f"{found / (found + missed):.1%}" if found + missed else "-")
    private, shared = reads
    saved = f"{1 - shared / private:.1%}" if private else "-"
    return title, f"{private:,}", f"{shared:,}", saved, *hits


def summary(results: Record) -> list[str]:
    """What stands below the table."""
    reads = results["disk_reads_pages"]
    saved = 1 - reads["shared"] / reads["private"] if reads["private"] else 0.0
    return [
        "reads: pages from the disk, from mounting on; hits: gets that tmem answered",
        f"shared pool: {saved:.1%} fewer disk reads than with private pools of the same memory",
        f"verified {results['verified_pages']:,} pages; mismatches {results['mismatches']}",
    ]
