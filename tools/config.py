"""What a cluster is made of: the schema of cluster.toml, and of every built-in topology.

    name = "web"                 # part of the names of kernel objects
    seed = 1
    jail = "auto"                # off | auto (what this machine can) | strict (or not at all)

    [hypervisor]
    arena = "16M"                # bytes, or a text with K, M or G (binary)
    eviction = "clock"           # fifo | clock | s3fifo | hinted
    scheduling = "scheduled"     # greedy | static | scheduled: how guests share the arena
    admission = true             # s3fifo, hinted: new pages wait in a queue of their own
    faults_max = 256             # broken calls after which a guest is thrown out
    lend = true                  # guests' RAM comes out of the arena, too (default: false)
    checksums = true             # no wrong page from memory that changes by itself (default: false)
    transport = "auto"           # auto (the ring on x86-64) | ring | mqueue: how calls travel

    [[guest]]
    name = "web"
    count = 2                    # web1 and web2; without it one guest of this name
    memory = "4M"                # RAM beside the arena, or out of it (lend)
    tree = "stdlib"              # its disk: a copy of a folder; "stdlib" is the running Python's
    tree_limit = "13M"           # take files of the tree up to this size
    # image = "disk.img"         # or an ext2 image, used in place
    # manifest = "disk.json"     # of an image: {path: sha256}, what the files must hold
    swap = "64M"                 # a swap file of this size, made anew for each start
    # swap_image = "swap.img"    # or one that is there (`tmem mkswap`)
    ksm = false                  # true: the host's kernel may merge equal pages of its RAM
    page_states = false          # true: what `tmem balloon` takes is dropped, clean pages at once
    direct = false               # true: its disks are used around the host's page cache (O_DIRECT)
    weight = 100                 # from here on: what `tmem set` changes later; without them the
    cap = "8M"                   # hypervisor's defaults
    reserve = "1M"
    compress = true
    borrow = true                # swapped pages beyond its share, in memory that nobody uses
    priority = "normal"          # low | normal | high
    sharing = "group"            # off | guest | group | all: whose equal pages may be one
    group = "web"

    [[shared_pool]]              # who may join it; nobody else may
    uuid = "abcdef01-2345-6789-1234-567890abcdef"
    writers = ["web1"]
    readers = ["web2"]

    [[volume]]                   # a disk that several guests mount: an OCFS2 file system
    name = "data"
    nodes = ["web1", "web2"]     # by node number; what they say of a disk of their own is unused
    tree = "stdlib"              # or image and manifest, as for a guest
    tree_limit = "13M"
    pool = "shared"              # shared: one cleancache for all nodes; private: one for each
    verify = false               # true: pages from tmem must have the checksum that the disk has
    heartbeat_interval = 2.0     # seconds; from here on o2cb's words and defaults
    dead_threshold = 31
    idle_timeout = 30.0
    keepalive = 2.0
    reconnect = 2.0
    orphan_scan = 300.0          # seconds between two looks for files that nobody freed

    [[phase]]                    # the work of a measured run, phase by phase
    title = "web1 is busy"
    [phase.work.web1]
    workload = "mixed"
    passes = 3                   # everything else is the workload's own parameter

Sizes of `memory` and `arena` are whole pages.  All errors of a file are told at once, each with the
file's name and the key's path.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fs.cluster.config import Timing
from guests.swapheader import PAGES_MAX, PAGES_MIN
from ipc.errors import ExitCode, OperatorError
from ipc.limits import GUESTS_MAX
from tools.conflicts import conflicts, guest_names, tables
from tools.units import PAGE_BYTES, format_size, parse_size
from tools.uuids import parse_uuid

NODES_MAX = 32
"""Nodes that mount one shared disk: as many as the minimal OCFS2 profile has slots here."""
GUEST_MEMORY_BYTES_MIN = 2**20
"""Below this the page budget is eaten by the metadata buffers and a readahead window."""


def _pages(value: Any) -> int:
    size = parse_size(value)
    if size % PAGE_BYTES:
        raise ValueError(f"{size} bytes are no whole number of pages of {PAGE_BYTES} bytes")
    return size


def _perhaps_pages(value: Any) -> int | None:
    # A checked configuration goes to the supervisor as JSON, which has null for what is not there.
    return None if value is None else _pages(value)


def _perhaps_swap(value: Any) -> int | None:
    size = _perhaps_pages(value)
    if size is not None and not PAGES_MIN <= size // PAGE_BYTES <= PAGES_MAX:
        least, most = format_size(PAGES_MIN * PAGE_BYTES), format_size(PAGES_MAX * PAGE_BYTES)
        raise ValueError(f"a swap area of {size} bytes can't be made; it has {least} to {most}")
    return size


Size = Annotated[int, BeforeValidator(parse_size)]
Pages = Annotated[int, BeforeValidator(_pages)]
PerhapsPages = Annotated[int | None, BeforeValidator(_perhaps_pages)]
PerhapsSwap = Annotated[int | None, BeforeValidator(_perhaps_swap)]
Uuid = Annotated[str, BeforeValidator(parse_uuid)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class HypervisorConfig(_Strict):
    """The arena and how it makes room; None is the hypervisor's default."""

    arena: Pages = 16 * 2**20
    eviction: Literal["fifo", "clock", "s3fifo", "hinted"] | None = None
    scheduling: Literal["greedy", "static", "scheduled"] | None = None
    admission: bool | None = None
    lend: bool | None = None
    checksums: bool | None = None
    faults_max: int | None = Field(default=None, ge=1)
    transport: Literal["auto", "ring", "mqueue"] | None = None

    def options(self) -> dict[str, Any]:
        """What a hypervisor process is started with, where it is not to have its default."""
        values = {
            "eviction": self.eviction,
            "scheduling": self.scheduling,
            "admission": self.admission,
            "lend": self.lend,
            "checksums": self.checksums,
            "faults_max": self.faults_max,
            "transport": self.transport,
        }
        return {key: value for key, value in values.items() if value is not None}


class GuestConfig(_Strict):
    """One guest, or `count` guests of one kind."""

    name: str
    count: int | None = Field(default=None, ge=1, le=GUESTS_MAX)
    memory: Annotated[Pages, Field(ge=GUEST_MEMORY_BYTES_MIN)] = 4 * 2**20
    tree: str = "stdlib"
    tree_limit: Size = 13 * 2**20
    image: str | None = None
    manifest: str | None = None
    swap: PerhapsSwap = None
    swap_image: str | None = None
    ksm: bool = False
    page_states: bool = False
    direct: bool = False
    weight: int | None = Field(default=None, ge=1, le=65535)
    cap: PerhapsPages = None
    reserve: PerhapsPages = None
    compress: bool | None = None
    borrow: bool | None = None
    priority: Literal["low", "normal", "high"] | None = None
    sharing: Literal["off", "guest", "group", "all"] | None = None
    group: str | None = Field(default=None, min_length=1, max_length=31)

    def names(self) -> list[str]:
        """Names of the guests that this entry stands for."""
        return guest_names(self.name, self.count)

    def settings(self) -> dict[str, Any]:
        """What is set of that which `tmem set` can change, in the hypervisor's words."""
        values = {
            "weight": self.weight,
            "cap_bytes": self.cap,
            "reserve_bytes": self.reserve,
            "compress": self.compress,
            "borrow": self.borrow,
            "priority": self.priority,
            "sharing": self.sharing,
            "group": self.group,
        }
        return {key: value for key, value in values.items() if value is not None}


class SharedPoolConfig(_Strict):
    """Who may join the shared pool of a uuid."""

    uuid: Uuid
    writers: list[str] = []
    readers: list[str] = []


class VolumeConfig(_Strict):
    """A disk that guests share, and the timing of their cluster (seconds; o2cb's defaults)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    nodes: list[str] = Field(min_length=1, max_length=NODES_MAX)
    tree: str = "stdlib"
    tree_limit: Size = 13 * 2**20
    image: str | None = None
    manifest: str | None = None
    pool: Literal["shared", "private"] = "shared"
    heartbeat_interval: float = Field(default=2.0, ge=0.01, le=60)
    dead_threshold: int = Field(default=31, ge=2, le=1000)
    idle_timeout: float = Field(default=30.0, ge=0.05, le=600)
    keepalive: float = Field(default=2.0, ge=0.01, le=600)
    reconnect: float = Field(default=2.0, ge=0.01, le=600)
    orphan_scan: float = Field(default=300.0, ge=0.1, le=86400)
    verify: bool = False
    """The file system keeps checksums, and nodes compare pages that come from tmem with them."""
    nemesis: bool = False
    """Nodes may be told to cut links and spoil messages: for tests of the cluster itself."""

    def timing(self) -> Timing:
        """The same for the nodes; raises ValueError when it can't work."""
        seconds = {
            "heartbeat_interval_ns": self.heartbeat_interval,
            "idle_timeout_ns": self.idle_timeout,
            "keepalive_ns": self.keepalive,
            "reconnect_ns": self.reconnect,
        }
        nanoseconds = {name: round(value * 1e9) for name, value in seconds.items()}
        return Timing(dead_threshold=self.dead_threshold, **nanoseconds)

    @model_validator(mode="after")
    def _timing_works(self) -> Self:
        self.timing()
        return self


class WorkConfig(BaseModel):
    """What one guest does in a phase; keys that are not listed go to the workload."""

    model_config = ConfigDict(extra="allow", frozen=True)

    workload: Literal[
        "read_all", "search", "compile", "log", "make", "mixed", "histories", "counters", "programs"
    ]

    def parameters(self) -> dict[str, Any]:
        """The workload's own parameters."""
        return dict(self.model_extra or {})


class PhaseConfig(_Strict):
    """Guests work at the same time; a phase ends when the last is done."""

    title: str
    work: dict[str, WorkConfig]


class ClusterConfig(_Strict):
    """A whole cluster."""

    name: str = Field(default="tmem", pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    seed: int = Field(default=1, ge=0)
    jail: Literal["off", "auto", "strict"] = "auto"
    hypervisor: HypervisorConfig = HypervisorConfig()
    guest: list[GuestConfig] = Field(min_length=1)
    shared_pool: list[SharedPoolConfig] = []
    volume: list[VolumeConfig] = []
    phase: list[PhaseConfig] = []

    def guests(self) -> list[tuple[str, GuestConfig]]:
        """Every guest with its own name."""
        return [(name, guest) for guest in self.guest for name in guest.names()]

    def volume_of(self, guest: str) -> VolumeConfig | None:
        """The shared disk that a guest mounts, None if it has one of its own."""
        return next((volume for volume in self.volume if guest in volume.nodes), None)

    @property
    def total_memory_bytes(self) -> int:
        """RAM of all guests and the arena; the arena alone if it is their RAM, too."""
        return self.hypervisor.arena + self.memory_beside_bytes

    @property
    def memory_beside_bytes(self) -> int:
        """RAM of all guests, but for what comes out of the arena."""
        return 0 if self.hypervisor.lend else sum(guest.memory for _, guest in self.guests())


def read_config(path: Path) -> ClusterConfig:
    """The cluster of a TOML file; raises OperatorError with a line for each error.

    Paths in the file are relative to the file.
    """
    try:
        fields = tomllib.loads(path.read_text())
    except OSError as error:
        raise OperatorError(
            f"can't read the cluster file {path}: {error.strerror}", ExitCode.NO_INPUT
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"{path} is no TOML file: {error}") from None
    return validate(_resolve(fields, path.parent), str(path))


def validate(fields: dict[str, Any], source: str) -> ClusterConfig:
    """A checked cluster; `source` stands before each error."""
    complaints = []
    config = None
    try:
        config = ClusterConfig.model_validate(fields)
    except ValidationError as error:
        details = error.errors(include_url=False)
        complaints = [(_place(detail["loc"]), _text(detail)) for detail in details]
    complaints += conflicts(fields, HypervisorConfig().arena)
    if complaints or config is None:
        raise OperatorError("\n".join(f"{source}: {place}: {text}" for place, text in complaints))
    return config


def _place(location: tuple[int | str, ...]) -> str:
    """A key's path as TOML people write it: `guest[1].memory`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the file"


def _text(detail: Any) -> str:
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return "there is no such key"
    if detail["type"] == "missing":
        return "this key is missing"
    return message[0].lower() + message[1:]


def _resolve(fields: dict[str, Any], base: Path) -> dict[str, Any]:
    for disk in (*tables(fields.get("guest")), *tables(fields.get("volume"))):
        for key in ("image", "manifest", "swap_image", "tree"):
            value = disk.get(key)
            if isinstance(value, str) and (key != "tree" or value != "stdlib"):
                disk[key] = str(base / value)
    return fields
