"""Run directories: where a cluster keeps its sockets, logs and registry, and how it is found again.

    runs/<time>/            a run: results.json of a measured run, and of each cluster a folder
        off/ on/            the two clusters of a measured run, one after the other
        private/ shared/    those of the sharing test; coherence/ that of the coherence test
        on/                 the cluster of `tmem up -d`
            cluster.json    who supervises it; here only while it lives
            registry/       every kernel object and process (`ipc.names`)
            attach.sock control.sock guest-NAME.sock
            log/NAME.log    one log a process
            images/NAME.img the guests' disks, and NAME.swap where they have swap
    runs/latest             the newest finished measured run
    runs/cache/             images, by content

One rule finds a cluster: `--run DIR`, else `$TMEM_RUN_DIR`, else the newest run below `./runs` in
which a supervisor lives.  DIR may be a run or the folder of a cluster.

A socket's path has at most 107 bytes.  Where a folder's path is too long for that, a link below the
temporary folder leads to it; `door` in the folder names the link, and it goes with the cluster.

Commands believe a run directory: they end the processes and remove the objects that its registry
names, and files in it.  So one that belongs to somebody else is refused, and passed over in a
search: its owner could make root end any process and remove any file.

A cluster is *live* while the process that cluster.json names is that same process, *stale* when it
is not and something is still registered or cluster.json is still there.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ipc.attach import CONTROL_SOCKET
from ipc.errors import ExitCode, OperatorError
from ipc.limits import GUEST_NAME_CHARACTERS_MAX
from ipc.names import Registry, process_start

RUNS: Final = Path("runs")
ENVIRONMENT: Final = "TMEM_RUN_DIR"

# sockaddr_un.sun_path has 108 bytes and ends with a zero (unix(7)); the longest name of ours is
# guest-NAME.sock.
_FOLDER_BYTES_MAX: Final = 107 - len(f"/guest-{'x' * GUEST_NAME_CHARACTERS_MAX}.sock")
_DOOR_FILE: Final = "door"
_CLUSTER_FILE: Final = "cluster.json"
_LEFT: Final = (
    "*.sock",
    "*.sock.lock",
    "listener-*",
    "arena",
    "settings*",
    "keys/*",
    _CLUSTER_FILE,
)
TAKEN_NAMES: Final = frozenset(("administrator", "audit", "console", "hypervisor", "supervisor"))
"""Not for guests, each of which has a log of its name that it may write to; who reads logs, and the
audit log that names guests, takes these for somebody else."""
_CLUSTER_FOLDERS: Final = ("on", "off", "shared", "private", "coherence")


@dataclass(frozen=True)
class GuestRecord:
    """A guest as other commands see it; `pid` is None until it was started."""

    name: str
    memory_bytes: int
    image: str
    pid: int | None


@dataclass(frozen=True)
class ClusterRecord:
    """What cluster.json holds: the cluster, its guests, and the process that looks after them."""

    name: str
    arena_bytes: int
    guests: list[GuestRecord]
    supervisor_pid: int
    supervisor_start: int

    @property
    def lives(self) -> bool:
        """Whether the supervisor is still the process that wrote this record."""
        return process_start(self.supervisor_pid) == self.supervisor_start


class ClusterDirectory:
    """The folder of one cluster."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def logs(self) -> Path:
        """The folder of the logs."""
        return self.path / "log"

    @property
    def images(self) -> Path:
        """The folder of the guests' disks."""
        return self.path / "images"

    def log(self, name: str) -> Path:
        """The log of a guest, of `hypervisor`, `supervisor` or `console`."""
        return self.logs / f"{name}.log"

    def guest_socket(self, name: str) -> Path:
        """The control socket of a guest."""
        return self.door / f"guest-{name}.sock"

    @property
    def hypervisor_socket(self) -> Path:
        """The control socket of the hypervisor."""
        return self.door / CONTROL_SOCKET

    @property
    def door(self) -> Path:
        """The folder by a path that is short enough for sockets in it.

        The link lies where everybody may make one: one that was swept away, and made again by
        somebody else, leads nowhere.
        """
        try:
            link = Path((self.path / _DOOR_FILE).read_text())
            if link.readlink() == self.path and link.lstat().st_uid == self.path.stat().st_uid:
                return link
        except OSError:
            pass
        return self.path

    def key_file(self, volume: str) -> Path:
        """The key of a volume's nodes; there only after it was changed (`tools.rotate`)."""
        return self.path / "keys" / volume

    def start_report(self, name: str) -> Path:
        """Why a guest did not start; there only after it failed."""
        return self.path / f"guest-{name}.error"

    @property
    def is_ours(self) -> bool:
        """Whether this folder is ours or root's, or there is none."""
        return self._owner() in (os.geteuid(), 0, None)

    def _owner(self) -> int | None:
        try:
            return self.path.stat().st_uid
        except OSError:
            return None

    def check_owner(self) -> None:
        """Raise OperatorError if it is somebody else's."""
        if not self.is_ours:
            raise OperatorError(
                f"{self.path} belongs to user {self._owner()}, and who uses it does what stands "
                "there: use it as that user, or choose another directory with --run",
                ExitCode.USAGE,
            )

    def check(self) -> None:
        """Raise OperatorError if a cluster can't live here; makes nothing."""
        self.check_owner()
        record = self.read()
        if record is not None and record.lives:
            raise OperatorError(
                f"a cluster is running in {self.path} (process {record.supervisor_pid}); stop it "
                "with 'tmem down' or choose another directory with --run"
            )
        if self.is_stale():
            raise OperatorError(
                f"{self.path} is a stale run directory: a dead cluster left something behind; "
                f"remove it with 'tmem clean --run {self.path}'"
            )

    def make(self) -> None:
        """Make the folders of a new cluster; raises OperatorError when that can't be done."""
        try:
            for folder in (self.path, self.logs, self.images):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if len(os.fsencode(self.path)) > _FOLDER_BYTES_MAX:
                self._make_door()
        except OSError as error:
            raise OperatorError(
                f"can't make the run directory {self.path}: {error.strerror}; choose another with "
                "--run"
            ) from None

    def _make_door(self) -> None:
        """A link with a short path; the file that names it is there first, so it is never lost."""
        if self.door != self.path:
            return
        link = Path(tempfile.gettempdir(), f"tmem-{secrets.token_hex(8)}")
        (self.path / _DOOR_FILE).touch(mode=0o600)
        (self.path / _DOOR_FILE).write_text(str(link))
        link.symlink_to(self.path)

    def _remove_door(self) -> None:
        door = self.door
        if door != self.path:
            door.unlink()
        (self.path / _DOOR_FILE).unlink(missing_ok=True)

    def is_stale(self) -> bool:
        """Whether no supervisor lives here but something was left behind."""
        record = self.read()
        if record is not None:
            return not record.lives
        return (self.path / _CLUSTER_FILE).exists() or self.has_entries()

    def has_entries(self) -> bool:
        """Whether the registry names a kernel object or a process."""
        registry = self.path / "registry"
        return registry.is_dir() and any(registry.iterdir())

    def write(self, record: ClusterRecord) -> None:
        """Say who supervises the cluster that lives here."""
        temporary = self.path / f".{_CLUSTER_FILE}"
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(asdict(record), indent=1) + "\n")
        temporary.rename(self.path / _CLUSTER_FILE)

    def read(self) -> ClusterRecord | None:
        """The record, None if there is no readable one."""
        try:
            fields = json.loads((self.path / _CLUSTER_FILE).read_text())
            guests = [GuestRecord(**guest) for guest in fields.pop("guests")]
            return ClusterRecord(guests=guests, **fields)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def sweep(self) -> list[str]:
        """Remove what a cluster left, by its registry; what was found, as lines for a person."""
        found = []
        if self.has_entries():
            registry = Registry(self.path)
            # A process that was being started is not written down yet; its parent is.
            registered = [name for kind, name in registry.entries() if kind == "process"]
            for pid in children_of({int(name.partition(":")[0]) for name in registered}):
                registry.add_process(pid)
            found = [f"{kind} {name}" for kind, name in registry.clean()]
        self._remove_door()
        for pattern in _LEFT:
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)
        return found


def children_of(parents: set[int]) -> list[int]:
    """Processes whose parent is one of `parents` (field 4 of /proc/PID/stat)."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) in parents:
            children.append(int(path.parent.name))
    return children


def new_run(runs: Path, now: datetime.datetime) -> Path:
    """A name for a new run below `runs`, in the order of time; no folder is made."""
    stem = now.strftime("%Y%m%d-%H%M%S")
    path = runs / stem
    number = 2
    while path.exists():
        path = runs / f"{stem}.{number}"
        number += 1
    return path


def clusters(run: Path | None) -> Iterator[ClusterDirectory]:
    """Cluster folders of a run, or of all runs below ./runs, newest first."""
    if run is None and ENVIRONMENT in os.environ:
        run = Path(os.environ[ENVIRONMENT])
    if run is not None:
        parents = [run]
    elif RUNS.is_dir():
        parents = sorted(
            (path for path in RUNS.iterdir() if path.is_dir() and not path.is_symlink()),
            key=lambda path: path.name,
            reverse=True,
        )
    else:
        parents = []
    for parent in parents:
        for path in (parent, *(parent / folder for folder in _CLUSTER_FOLDERS)):
            if (path / "log").is_dir() or (path / "registry").is_dir():
                directory = ClusterDirectory(path)
                if run is not None:
                    directory.check_owner()
                if directory.is_ours:
                    yield directory


def find_live(run: Path | None) -> tuple[ClusterDirectory, ClusterRecord]:
    """The live cluster that a command means; raises OperatorError if there is none."""
    stale = None
    for directory in clusters(run):
        record = directory.read()
        if record is not None and record.lives:
            return directory, record
        if directory.is_stale():
            stale = stale or directory
    if stale is not None:
        raise OperatorError(
            f"no cluster is running: {stale.path} is a stale run directory; remove what it left "
            "with 'tmem clean'",
            ExitCode.UNAVAILABLE,
        )
    raise _no_cluster(run)


def find_logged(run: Path | None) -> ClusterDirectory:
    """The live cluster, else the newest that has logs; raises OperatorError if there is none."""
    newest = None
    for directory in clusters(run):
        record = directory.read()
        if record is not None and record.lives:
            return directory
        newest = newest or directory
    if newest is None:
        raise _no_cluster(run)
    return newest


def _no_cluster(run: Path | None) -> OperatorError:
    where = run or os.environ.get(ENVIRONMENT) or RUNS.absolute()
    return OperatorError(
        f"no cluster is running in {where}; start one with 'tmem up -d' or name its directory "
        "with --run",
        ExitCode.UNAVAILABLE,
    )
