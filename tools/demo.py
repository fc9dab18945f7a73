"""The measured run: the same work twice on the same total memory, without tmem and with it.

* `off`: the arena's memory is divided among the guests as ordinary RAM; there is no hypervisor.
* `on`: each guest has its own RAM, and one arena is shared by all; with `lend` their RAM comes out
  of the arena, and in `off` they have the arena and nothing else.

Both start from fresh copies of the same images, run the same phases with the same seeds, and
compare every file they read with the source tree's hash.  What is compared in the end is the disk
reads that the block devices of the guests counted.

The memory of `off` is exactly that of `on`: an arena that can't be divided into whole pages gives
the first guests a page more.  The interpreter's own memory is in neither.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from fs.errors import ImageError
from fs.mount import mount_image
from guests.node import NodeSpec
from guests.shareddisk import read_layout
from ipc.codec import Record
from ipc.errors import Disconnected, ExitCode, OperatorError
from ipc.jail import check_strict
from tools.administer import questions
from tools.cluster import Cluster, ClusterPlan, GuestPlan, check_limits
from tools.config import ClusterConfig, GuestConfig, VolumeConfig
from tools.image import build_image, copy_image
from tools.interrupts import Interrupts
from tools.jails import missing_here
from tools.rundir import ClusterDirectory
from tools.swapfile import Swap, prepare_swap
from tools.topology import phases as default_phases
from tools.units import PAGE_BYTES
from tools.volumeimage import build_volume

MODES: Final = ("off", "on")
NODE_KEY_BYTES: Final = 32
_POLL_SECONDS: Final = 0.25
_PASSES: Final = 3


class Reporter(Protocol):
    """Who shows how a run goes on."""

    def mode(self, mode: str, phases: int) -> None:
        """One of the two runs begins."""

    def phase(self, number: int, title: str, work: dict[str, str]) -> None:
        """A phase begins; `work` is the workload's name by guest."""

    def status(self, statuses: dict[str, Record]) -> None:
        """How far the guests are, as each last said."""

    def news(self, line: str) -> None:
        """Something happened that a person should know."""

    def close(self) -> None:
        """Nothing more will come."""


@dataclass(frozen=True)
class Disk:
    """What a guest's disk is made of; `copied` images are the run's own, and called `name`.

    `swap` is of the guest alone, also where several have one disk.
    """

    name: str
    source: Path
    manifest: Path | None
    copied: bool
    swap: Swap | None = None

    def path(self, directory: ClusterDirectory) -> Path:
        """The image that the guest uses."""
        return directory.images / f"{self.name}.img" if self.copied else self.source


def check_cluster(config: ClusterConfig, directory: ClusterDirectory) -> None:
    """Raise OperatorError if this machine or this directory can't hold the cluster."""
    if config.jail == "strict":
        check_strict(missing_here())
    guests = config.guests()
    directory.check()
    check_limits(len(guests), config.memory_beside_bytes, config.hypervisor.arena)


def prepare_disks(config: ClusterConfig, cache: Path) -> dict[str, Disk]:
    """The disk of every guest; images of trees are built or taken from the cache."""
    swaps = {
        name: prepare_swap(name, guest.swap, guest.swap_image) for name, guest in config.guests()
    }
    volumes = {
        node: disk
        for volume in config.volume
        for disk in [
            _prepare_disk(volume.name, volume, cache, len(volume.nodes), verify=volume.verify)
        ]
        for node in volume.nodes
    }
    return {
        name: replace(volumes.get(name) or _prepare_disk(name, guest, cache), swap=swaps[name])
        for name, guest in config.guests()
    }


def _prepare_disk(
    name: str,
    disk: GuestConfig | VolumeConfig,
    cache: Path,
    slots: int = 0,
    *,
    verify: bool = False,
) -> Disk:
    if disk.image is not None:
        if slots:
            # First, or an image that is none would be told to become one of ext2.
            _check_slots(name, Path(disk.image), slots)
        _check_image(name, disk.image)
        manifest = None if disk.manifest is None else Path(disk.manifest).absolute()
        if manifest is not None and not manifest.is_file():
            raise OperatorError(f"{name}: the manifest {manifest} is missing", ExitCode.NO_INPUT)
        return Disk(name, Path(disk.image).absolute(), manifest, copied=False)
    if slots:
        image = build_volume(disk.tree, disk.tree_limit, name, slots, cache, verify=verify)
    else:
        image = build_image(disk.tree, disk.tree_limit, name, cache)
    return Disk(name, image.path.absolute(), image.manifest.absolute(), copied=True)


def _check_image(name: str, image: str) -> None:
    """Mount it once, read-only: what is wrong with it is said before anything is started."""
    try:
        mount_image(image, clock_ns=time.time_ns, read_only=True).unmount()
    except ImageError as error:
        raise OperatorError(f"{name}: {error}", ExitCode.NO_INPUT) from None


def _check_slots(name: str, image: Path, nodes: int) -> None:
    """A volume must have a slot for each of its nodes."""
    try:
        slots = read_layout(image).slots
    except ImageError as error:
        raise OperatorError(f"{name}: {error}", ExitCode.NO_INPUT) from None
    if slots < nodes:
        raise OperatorError(
            f"{name}: image {image}: has {slots} slots for {nodes} nodes; make it anew with more",
            ExitCode.NO_INPUT,
        )


def plan_cluster(
    config: ClusterConfig, disks: dict[str, Disk], directory: ClusterDirectory, mode: str
) -> ClusterPlan:
    """The cluster of one mode; disks that are copies are named by their place in `directory`."""
    arena = config.hypervisor.arena
    shares = divide_pages(arena, len(config.guests())) if mode == "off" else None
    nodes = {node: spec for volume in config.volume for node, spec in _nodes(volume)}
    guests = []
    for number, (name, guest) in enumerate(config.guests()):
        memory_bytes = guest.memory
        if shares is not None:
            memory_bytes = shares[number] + (0 if config.hypervisor.lend else memory_bytes)
        image = disks[name].path(directory)
        swap = disks[name].swap
        guests.append(
            GuestPlan(
                name,
                memory_bytes,
                image,
                nodes.get(name),
                swap=None if swap is None else swap.path(directory.images),
                swap_uuid=None if swap is None else swap.uuid,
                ksm=guest.ksm,
                page_states=guest.page_states,
                direct=guest.direct,
            )
        )
    if mode == "off":
        return ClusterPlan(config.name, guests, None, jail=config.jail)
    told = [*questions(config), *_grants(config, disks)]
    options = config.hypervisor.options()
    return ClusterPlan(config.name, guests, arena, options, told, config.jail)


def _nodes(volume: VolumeConfig) -> Iterator[tuple[str, NodeSpec]]:
    """Each guest that mounts a volume, and its place among them."""
    key = os.urandom(NODE_KEY_BYTES)
    for number, name in enumerate(volume.nodes):
        yield (
            name,
            NodeSpec(
                volume=volume.name,
                number=number,
                names=tuple(volume.nodes),
                key=key,
                timing=volume.timing(),
                shared=volume.pool == "shared",
                nemesis=volume.nemesis,
                orphan_scan_ns=round(volume.orphan_scan * 1e9),
                verify=volume.verify,
            ),
        )


def _grants(config: ClusterConfig, disks: dict[str, Disk]) -> Iterator[Record]:
    """The nodes of a volume may share a pool under its uuid, all as writers."""
    for volume in config.volume:
        if volume.pool == "shared":
            try:
                uuid = read_layout(disks[volume.nodes[0]].source).uuid
            except ImageError as error:
                raise OperatorError(f"volume {volume.name}: {error}", ExitCode.NO_INPUT) from None
            for name in volume.nodes:
                yield {
                    "verb": "auth",
                    "action": "allow",
                    "guest": name,
                    "uuid": uuid.hex(),
                    "role": "writer",
                }


def divide_pages(total_bytes: int, parts: int) -> list[int]:
    """Whole pages that add up to `total_bytes`; the first parts take the odd ones."""
    pages, odd = divmod(total_bytes // PAGE_BYTES, parts)
    return [(pages + (number < odd)) * PAGE_BYTES for number in range(parts)]


def copy_disks(disks: dict[str, Disk], directory: ClusterDirectory) -> None:
    """Give every guest its own copy of a cached image, and every volume one for its nodes; make
    their swap files."""
    directory.images.mkdir(mode=0o700, parents=True, exist_ok=True)
    for disk in {disk.name: disk for disk in disks.values() if disk.copied}.values():
        copy_image(disk.source, disk.path(directory))
    for disk in disks.values():
        if disk.swap is not None:
            disk.swap.make(directory.images)


def remove_disks(directory: ClusterDirectory) -> None:
    """Remove the guests' copies, of which the cache has the originals, and their swap files."""
    shutil.rmtree(directory.images, ignore_errors=True)


def measure(
    config: ClusterConfig,
    run: Path,
    cache: Path,
    reporter: Reporter,
    interrupts: Interrupts,
    *,
    keep_images: bool = False,
) -> Record:
    """Both runs; the record that becomes results.json."""
    directories = {mode: ClusterDirectory(run / mode) for mode in MODES}
    for directory in directories.values():
        check_cluster(config, directory)
    disks = prepare_disks(config, cache)
    results: Record = {"seed": config.seed, "name": config.name}
    for mode, directory in directories.items():
        results[mode] = run_work(
            config, disks, directory, mode, reporter, interrupts, keep_images=keep_images
        )
    return results


def run_work(
    config: ClusterConfig,
    disks: dict[str, Disk],
    directory: ClusterDirectory,
    mode: str,
    reporter: Reporter,
    interrupts: Interrupts,
    *,
    keep_images: bool = False,
) -> Record:
    """All phases on a cluster that is started for them; what was counted."""
    for name, disk in disks.items():
        if disk.manifest is None:
            raise OperatorError(
                f"{name}: a measured run compares every file with a manifest and this image has "
                "none; add the key manifest, or start the cluster with 'tmem up -d'"
            )
    interrupts.check()
    plan = plan_cluster(config, disks, directory, mode)
    try:
        copy_disks(disks, directory)
        with Cluster(plan, directory, interrupts) as cluster:
            return _Run(config, disks, cluster, reporter, interrupts).result(mode)
    finally:
        if not keep_images:
            remove_disks(directory)


class _Run:
    """One mode's work on a cluster that is up."""

    def __init__(
        self,
        config: ClusterConfig,
        disks: dict[str, Disk],
        cluster: Cluster,
        reporter: Reporter,
        interrupts: Interrupts,
    ) -> None:
        self._config = config
        self._disks = disks
        self._cluster = cluster
        self._reporter = reporter
        self._interrupts = interrupts
        self._last: dict[str, Record] = {}
        self._errors: list[str] = []

    def result(self, mode: str) -> Record:
        phases = list(work_of(self._config))
        self._reporter.mode(mode, len(phases))
        for number, (title, work) in enumerate(phases):
            self._reporter.phase(number, title, {name: item[0] for name, item in work.items()})
            self._phase(number, work)
        for name in self._cluster.alive:
            self._poll(name)
        return self._collect(mode)

    def _phase(self, number: int, work: dict[str, tuple[str, dict[str, Any]]]) -> None:
        order = [name for name, _ in self._config.guests()]
        busy = []
        for name, (workload, parameters) in work.items():
            if name not in self._cluster.alive:
                continue
            question = {
                "verb": "run",
                "workload": workload,
                # Distinct by phase and guest, and the same for both modes.
                "seed": self._config.seed * 1_000_003 + number * 1_009 + order.index(name),
                "parameters": {"manifest": os.fspath(self._disks[name].manifest or "")}
                | parameters,
            }
            try:
                answer = self._cluster.ask_guest(name, question)
            except Disconnected as error:
                self._complain(f"{name}: {error}")
                continue
            if answer.get("accepted"):
                busy.append(name)
            else:
                self._complain(f"{name}: {workload}: {answer.get('error')}")
        while busy:
            self._interrupts.sleep(_POLL_SECONDS)
            for line in self._cluster.watch():
                self._reporter.news(line)
            busy = [name for name in busy if name in self._cluster.alive and self._poll(name)]
            self._reporter.status(self._last)

    def _poll(self, name: str) -> bool:
        """Whether the guest is still at work, as far as it answers."""
        try:
            status = self._cluster.ask_guest(name, {"verb": "status"})
        except Disconnected:
            # Busy beyond patience, or dying: the next `watch` knows.
            return True
        self._last[name] = status
        if status["state"] == "failed":
            self._complain(f"{name}: {status['workload']}: {status['error']}")
        return bool(status["state"] == "running")

    def _complain(self, line: str) -> None:
        if line not in self._errors:
            self._errors.append(line)
            self._reporter.news(line)

    def _collect(self, mode: str) -> Record:
        memory = {guest.name: guest.memory_bytes for guest in self._cluster.plan.guests}
        lent = mode == "on" and self._config.hypervisor.lend
        beside_bytes = 0 if lent else sum(memory.values())
        hypervisor: Record = dict.fromkeys(
            ("cpu_seconds", "hypercalls", "pages_put", "pages_got", "evictions"), 0
        )
        stats: Record = {"guests": {}}
        if mode == "on":
            stats = self._final_stats()
            hypervisor = {key: stats[key] for key in hypervisor} | {
                "restarts": self._cluster.restarts,
                "uptime_seconds": stats["uptime_seconds"],
                "arena": stats["arena"],
            }
        guests = {}
        for name, memory_bytes in memory.items():
            counters = self._last.get(name, {}).get("counters", {})
            guests[name] = guest_result(counters, memory_bytes, on=mode == "on")
            if name in self._cluster.deaths:
                guests[name]["exit_code"] = self._cluster.deaths[name]
            if name in stats["guests"]:
                guests[name]["hypervisor"] = stats["guests"][name]
        return {
            "total_memory_bytes": beside_bytes + (self._cluster.plan.arena_bytes or 0),
            "guests": guests,
            "hypervisor": hypervisor,
            "errors": self._errors,
        }

    def _final_stats(self) -> Record:
        """The hypervisor's figures; waits for one that is just being restarted."""
        while True:
            try:
                return self._cluster.stats()
            except Disconnected:
                self._interrupts.sleep(_POLL_SECONDS)
                for line in self._cluster.watch():
                    self._reporter.news(line)


def guest_result(counters: Record, memory_bytes: int, *, on: bool) -> Record:
    """A guest's part of results.json, from the counters of its own kernel."""
    keys = (
        "disk_reads_pages",
        "disk_read_calls",
        "disk_writes_pages",
        "disk_write_calls",
        "files_verified",
        "bytes_verified",
        "mismatches",
        "seconds",
    )
    result: Record = {key: counters.get(key, 0) for key in keys}
    result["mismatch_paths"] = counters.get("mismatch_paths", [])
    result["memory_bytes"] = memory_bytes
    for part in ("page_cache", "anonymous", "swap", "frontswap"):
        result[part] = counters.get(part, {})
    if on:
        result["cleancache"] = counters.get("cleancache", {})
        if counters.get("verification") is not None:
            result["verification"] = counters["verification"]
    return result


def work_of(
    config: ClusterConfig,
) -> Iterator[tuple[str, dict[str, tuple[str, dict[str, Any]]]]]:
    """Title and work by guest of every phase; a file without phases gets those of a topology."""
    if config.phase:
        for phase in config.phase:
            yield (
                phase.title,
                {name: (item.workload, item.parameters()) for name, item in phase.work.items()},
            )
        return
    names = [name for name, _ in config.guests()]
    for entry in default_phases(names, _PASSES):
        work: dict[str, tuple[str, dict[str, Any]]] = {}
        for name, item in entry["work"].items():
            parameters = {key: value for key, value in item.items() if key != "workload"}
            work[name] = (str(item["workload"]), parameters)
        yield str(entry["title"]), work
