"""Real guests that race each other on one volume, and what each wrote down of it.

The test's own process supervises them, so that one start serves many races and a killed guest can
be started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fs.block.device import BLOCK_BYTES
from fs.block.file import FileDevice
from fs.directpages import DirectPages
from fs.dlm.modes import Mode
from fs.mount import mount_image
from fs.ocfs2.chains import ChainAllocator
from fs.ocfs2.locking import LocalLocks
from fs.ocfs2.mkfs import Parameters, blocks_needed, make_volume
from fs.ocfs2.volume import Volume
from fs.vfs import Vfs
from ipc.errors import Disconnected
from tests.support.clusters import short_folder, volume_toml, wait_until
from tools.cluster import Cluster
from tools.config import read_config
from tools.demo import check_cluster, plan_cluster, prepare_disks
from tools.interrupts import Interrupts
from tools.rundir import ClusterDirectory

GUESTS = ("red", "blue", "green")
DEAD_THRESHOLD = 40
IDLE_SECONDS = 2.0
"""On a busy machine a guest may get no turn for a second. One that is killed is seen at once."""
FREE_BLOCKS = 600
"""Of a full volume: less than a group of inodes."""
FREE_INODES = 200
_SYNCS = ("fsync",)


@dataclass(frozen=True)
class Call:
    """One call of a racer; `end_ns` is None if it never came back."""

    who: str
    name: str
    path: str
    begin_ns: int
    end_ns: int | None
    error: str | None
    facts: dict[str, Any]

    @property
    def done(self) -> bool:
        """It came back, and not with an error."""
        return self.end_ns is not None and self.error is None


@dataclass(frozen=True)
class Seen:
    """A name in the tree as one node saw it in the end."""

    kind: str
    size: int
    links: int
    value: Any


@dataclass
class Outcome:
    """What is known of a race when it is over."""

    calls: list[Call] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    trees: dict[str, dict[str, Seen]] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    """Racers that were killed; what they did since their last fsync may not have happened."""

    @property
    def tree(self) -> dict[str, Seen]:
        """What is there in the end."""
        return next(iter(self.trees.values()))

    def certain(self, call: Call) -> bool:
        """It happened, and nothing can undo it."""
        if not call.done:
            return False
        return call.who not in self.lost or (call.end_ns or 0) < self._last_sync_ns(call.who)

    def _last_sync_ns(self, who: str) -> int:
        syncs = [c.begin_ns for c in self.calls if c.who == who and c.name in _SYNCS and c.done]
        return max(syncs, default=0)

    def named(self, *names: str) -> Iterator[Call]:
        """Calls that may have happened."""
        return (call for call in self.calls if call.name in names and call.error is None)


def read_record(who: str, path: Path) -> tuple[list[Call], list[str], dict[str, Seen]]:
    """Calls, complaints and the tree of one record; its last line may be cut off."""
    calls: list[Call] = []
    wrong: list[str] = []
    tree: dict[str, Seen] = {}
    begun: dict[str, Any] | None = None

    def close(line: dict[str, Any] | None) -> None:
        if begun is not None:
            facts = begun if line is None else line
            end = None if line is None else line["ns"]
            error = None if line is None else line["error"]
            name, where = begun["call"], begun["path"]
            calls.append(Call(who, name, where, begun["ns"], end, error, facts))

    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if line["at"] == "begin":
            assert begun is None, f"{who}: {begun} has no end"
            begun = line
        elif line["at"] == "end":
            close(line)
            begun = None
        elif line["at"] == "wrong":
            wrong.append(f"{who}: {line['call']}")
        else:
            tree[line["path"]] = Seen(line["call"], line["size"], line["links"], line["value"])
    close(None)
    return calls, wrong, tree


class RacingGuests:
    """A cluster that is up."""

    def __init__(self, folder: Path, image: Path, cluster: Cluster) -> None:
        self.folder = folder
        self.image = image
        self.cluster = cluster
        self._starts = 0
        self._records: dict[str, Path] = {}

    def start(self, guest: str, kind: str, seed: int, **parameters: object) -> str:
        """Let a guest race; the name under which it does."""
        self._starts += 1
        who = f"{guest}{self._starts}"
        self._records[who] = self.folder / f"{who}.jsonl"
        everything = {"record": os.fspath(self._records[who]), "who": who, "kind": kind}
        question = {
            "verb": "run",
            "workload": "races",
            "seed": seed * 1000 + self._starts,
            "parameters": everything | parameters,
        }
        answer = self.cluster.ask_guest(guest, question, timeout_seconds=60)
        assert answer == {"accepted": True}, answer
        return who

    def status(self, guest: str) -> dict[str, Any]:
        """What the guest says of its work; of one that waits for a lock: nothing."""
        with contextlib.suppress(Disconnected):
            return self.cluster.ask_guest(guest, {"verb": "status"}, timeout_seconds=1.0)
        return {"state": "running", "done": 0}

    def finish(self, *guests: str) -> None:
        """Wait for the end of their work."""
        for guest in guests:
            wait_until(partial(self._idle, guest), f"the work of {guest}", 90)

    def _idle(self, guest: str) -> bool:
        self.cluster.watch()
        assert guest in self.cluster.alive, f"{guest} died: {self.log(guest)}"
        status = self.status(guest)
        assert status["state"] != "failed", status["error"]
        return bool(status["state"] == "idle")

    def alone(self, guest: str, kind: str, **parameters: object) -> str:
        """One guest does it, to its end."""
        who = self.start(guest, kind, 0, **parameters)
        self.finish(guest)
        _calls, wrong, _tree = read_record(who, self._records[who])
        assert wrong == []
        return who

    def race(self, kind: str, seed: int, operations: int, folder: str) -> Outcome:
        """All guests at once, in a folder that was prepared; then each looks at the tree."""
        whose = [
            self.start(
                guest, kind, seed, operations=operations, folder=folder, cutter=int(not number)
            )
            for number, guest in enumerate(GUESTS)
        ]
        self.finish(*GUESTS)
        return self.outcome(whose, folder)

    def outcome(self, whose: list[str], folder: str, lost: Sequence[str] = ()) -> Outcome:
        """What these racers did, and what is there now."""
        outcome = Outcome(lost=frozenset(lost))
        for who in whose:
            calls, wrong, _tree = read_record(who, self._records[who])
            outcome.calls += calls
            outcome.wrong += wrong
        for guest in GUESTS:
            who = self.alone(guest, "look", folder=folder)
            outcome.trees[guest] = read_record(who, self._records[who])[2]
        return outcome

    def await_work(self, guest: str, done: int) -> None:
        """Until it has done so many operations."""
        wait_until(lambda: self.status(guest)["done"] > done, f"{done} operations of {guest}")

    def kill(self, guest: str) -> None:
        """SIGKILL, and its end is seen."""
        self.cluster.signal(guest, signal.SIGKILL)

        def is_seen() -> bool:
            self.cluster.watch()
            return guest not in self.cluster.alive

        wait_until(is_seen, f"the end of {guest}")

    def log(self, name: str) -> str:
        """What a process has logged."""
        return self.cluster.directory.log(name).read_text()

    def down(self) -> None:
        """All unmount."""
        self.cluster.stop()


@contextmanager
def racing_guests(
    name: str, *, room_blocks: int = 4096, full: bool = False
) -> Iterator[RacingGuests]:
    """Three guests on a fresh volume with room for so much, or on one that is nearly full.

    It lies in memory: while one waits for a disk the others don't race it.
    """
    with short_folder() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        image = Path(memory, "image")
        parameters = Parameters(slots=3, uuid=os.urandom(16), generation=5, now_s=1)
        with image.open("xb") as file:
            file.truncate((blocks_needed(parameters) + room_blocks) * BLOCK_BYTES)
        device = FileDevice(image)
        make_volume(device, parameters, fresh=True)
        device.close()
        if full:
            _fill(image)
        text = volume_toml(
            name,
            folder,
            image=image,
            guests=GUESTS,
            dead_threshold=DEAD_THRESHOLD,
            idle_timeout=IDLE_SECONDS,
        )
        (folder / "cluster.toml").write_text(text)
        config = read_config(folder / "cluster.toml")
        directory = ClusterDirectory(folder / "on")
        check_cluster(config, directory)
        disks = prepare_disks(config, folder / "cache")
        plan = plan_cluster(config, disks, directory, "on")
        with Cluster(plan, directory, Interrupts()) as cluster:
            yield RacingGuests(folder, image, cluster)


def _fill(image: Path) -> None:
    """Leave few inodes free in the one group that there is, and no room for another."""
    used = read_space(image).inode_bits_used
    fs = mount_image(image, clock_ns=time.time_ns)
    vfs = Vfs(fs, DirectPages(fs))
    vfs.mkdir("/filling")
    for number in range(1024 - used - 2 - FREE_INODES):
        vfs.symlink("nowhere", f"/filling/{number}")
    handle = vfs.open("/filling/blocks", os.O_CREAT | os.O_WRONLY)
    vfs.ftruncate(handle, (vfs.statfs().blocks_free - FREE_BLOCKS) * BLOCK_BYTES)
    vfs.unmount()


@dataclass(frozen=True)
class Space:
    """Where the clusters of a volume that nobody has mounted are."""

    free: int
    inode_bits: list[int]
    """Of each slot's inode allocator; they are clusters of its groups."""
    inode_bits_used: int
    extent_bits: list[int]
    orphan_clusters: int

    @property
    def accounted(self) -> int:
        """Free, or held by what only grows: after all files are gone nothing else may be held."""
        return self.free + sum(self.inode_bits) + sum(self.extent_bits) + self.orphan_clusters


def read_space(image: Path) -> Space:
    """Look at the allocators."""
    device = FileDevice(image, read_only=True)
    try:
        volume = Volume(device, LocalLocks(), 0, lambda: 0, 256)
        slots = range(volume.super.slots)

        def bits(kind: bytes) -> tuple[list[int], int]:
            found = []
            used = 0
            for slot in slots:
                inode = volume.system[kind % slot]
                with volume.locked(inode, Mode.PR):
                    allocator = ChainAllocator(
                        volume.transactions, volume.dinodes, inode, volume.super.blocks
                    )
                    found.append(allocator.total_bits)
                    used += found[-1] - allocator.free_bits
            return found, used

        clusters = 0
        for slot in slots:
            orphans = volume.system[b"orphan_dir:%04d" % slot]
            with volume.locked(orphans, Mode.PR):
                clusters += orphans.clusters
        with volume.locked(volume.space.clusters.inode, Mode.PR):
            free = volume.space.clusters.free_bits
        inodes, used = bits(b"inode_alloc:%04d")
        extents, _used = bits(b"extent_alloc:%04d")
        return Space(free, inodes, used, extents, clusters)
    finally:
        device.close()
