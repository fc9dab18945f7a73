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

import contextlib
import tomllib
from collections.abc import Iterator
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
from ipc.attach import is_guest_name
from ipc.errors import ExitCode, OperatorError
from ipc.limits import GUEST_NAME_CHARACTERS_MAX, GUESTS_MAX
from tools.rundir import TAKEN_NAMES
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
    complaints += _disagreements(fields)
    if complaints or config is None:
        raise OperatorError("\n".join(f"{source}: {place}: {text}" for place, text in complaints))
    return config


def _disagreements(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(place, text) of values that are good by themselves and don't fit each other.

    Looks at the file as it was written, so that it can speak when other values are wrong.
    """
    owners: dict[str, int] = {}
    images: set[Path] = set()
    for number, guest in enumerate(_tables(fields.get("guest"))):
        name, count = guest.get("name"), guest.get("count")
        if isinstance(name, str) and (count is None or isinstance(count, int)):
            for one in guest_names(name, count):
                if not is_guest_name(one):
                    yield (
                        f"guest[{number}].name",
                        (
                            f"{one!r} is no guest name: use up to {GUEST_NAME_CHARACTERS_MAX} "
                            "lower-case letters, digits, dots, dashes and underscores"
                        ),
                    )
                    break
                if one in TAKEN_NAMES or one.endswith(".sock"):
                    yield (
                        f"guest[{number}].name",
                        f"{one!r} is the name of something else in a run directory: use another",
                    )
                    break
                if one in owners:
                    yield (
                        f"guest[{number}].name",
                        (f"{one!r} is already the name of guest[{owners[one]}]"),
                    )
                    break
                owners[one] = number
        for key in ("image", "swap_image"):
            image = guest.get(key)
            if isinstance(image, str):
                path = Path(image).resolve()
                if path in images or (isinstance(count, int) and count > 1):
                    yield (
                        f"guest[{number}].{key}",
                        f"{image} is in use by another guest; each guest needs an image of its own",
                    )
                images.add(path)
        if guest.get("swap") is not None and guest.get("swap_image") is not None:
            yield (
                f"guest[{number}].swap_image",
                "there is the key swap too; a guest has one of both",
            )
    for number, phase in enumerate(_tables(fields.get("phase"))):
        work = phase.get("work")
        for name in work if isinstance(work, dict) else ():
            if name not in owners:
                names = ", ".join(owners)
                yield f"phase[{number}].work.{name}", f"no guest has this name; there are {names}"
    yield from _bad_volumes(fields, list(owners), images)
    yield from _useless_direct(fields)
    yield from _bad_shares(fields)
    yield from _bad_grants(fields, list(owners))


def _bad_volumes(
    fields: dict[str, Any], names: list[str], images: set[Path]
) -> Iterator[tuple[str, str]]:
    """Shared disks that are there twice, or whose nodes are nobody or have another disk."""
    volumes: dict[str, int] = {}
    homes: dict[str, int] = {}
    for number, volume in enumerate(_tables(fields.get("volume"))):
        name, image, nodes = volume.get("name"), volume.get("image"), volume.get("nodes")
        if isinstance(name, str) and volumes.setdefault(name, number) != number:
            yield f"volume[{number}].name", f"{name!r} is the name of volume[{volumes[name]}]"
        if isinstance(image, str):
            path = Path(image).resolve()
            if path in images:
                yield f"volume[{number}].image", f"{image} is in use by somebody else"
            images.add(path)
        for node in nodes if isinstance(nodes, list) else []:
            place = f"volume[{number}].nodes"
            if node not in names:
                yield place, f"no guest is called {node!r}; there are {', '.join(names)}"
            elif node in homes:
                yield place, f"{node!r} mounts volume[{homes[node]}]; a guest has one disk"
            else:
                homes[node] = number


def _useless_direct(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Guests whose only disk is one that nodes share, which is never used around the page cache."""
    nodes = [
        node
        for volume in _tables(fields.get("volume"))
        for node in (volume["nodes"] if isinstance(volume.get("nodes"), list) else ())
    ]
    for number, guest in enumerate(_tables(fields.get("guest"))):
        name, count = guest.get("name"), guest.get("count")
        if guest.get("direct") is not True or "swap" in guest or "swap_image" in guest:
            continue
        if not isinstance(name, str) or not (count is None or isinstance(count, int)):
            continue
        if any(one in nodes for one in guest_names(name, count)):
            yield (
                f"guest[{number}].direct",
                "is for disks of its own, and it has a shared volume and no swap; leave it out",
            )


def _bad_shares(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Memory settings that can't all be kept."""
    hypervisor = fields.get("hypervisor")
    hypervisor = hypervisor if isinstance(hypervisor, dict) else {}
    arena_bytes = _size(hypervisor.get("arena", HypervisorConfig().arena))
    reserved_bytes = 0
    for number, guest in enumerate(_tables(fields.get("guest"))):
        count = guest.get("count")
        guests = count if isinstance(count, int) else 1
        cap_bytes, reserve_bytes = _size(guest.get("cap")), _size(guest.get("reserve"))
        reserved_bytes += guests * (reserve_bytes or 0)
        if cap_bytes and reserve_bytes and reserve_bytes > cap_bytes:
            yield (
                f"guest[{number}].reserve",
                f"{format_size(reserve_bytes)} is more than its cap of {format_size(cap_bytes)}",
            )
        if guest.get("sharing") == "group" and "group" not in guest:
            yield f"guest[{number}].sharing", "which group? add the key group"
    if arena_bytes is not None and reserved_bytes > arena_bytes:
        yield (
            "guest",
            (
                f"all reserves together are {format_size(reserved_bytes)} and the arena has "
                f"{format_size(arena_bytes)}"
            ),
        )


def _bad_grants(fields: dict[str, Any], names: list[str]) -> Iterator[tuple[str, str]]:
    """Shared pools that are there twice, or speak of a guest twice or of nobody."""
    pools: dict[str, int] = {}
    for number, pool in enumerate(_tables(fields.get("shared_pool"))):
        with contextlib.suppress(ValueError):
            first = pools.setdefault(parse_uuid(pool.get("uuid")), number)
            if first != number:
                yield f"shared_pool[{number}].uuid", f"shared_pool[{first}] has it already"
        seen: set[str] = set()
        for role in ("writers", "readers"):
            listed = pool.get(role)
            for name in listed if isinstance(listed, list) else []:
                place = f"shared_pool[{number}].{role}"
                if name not in names:
                    yield place, f"no guest is called {name!r}; there are {', '.join(names)}"
                elif name in seen:
                    yield place, f"{name!r} stands here twice; a writer may read too"
                seen.add(name)


def _size(value: Any) -> int | None:
    """Bytes, None of what is no size: that is told elsewhere."""
    try:
        return parse_size(value)
    except ValueError:
        return None


def guest_names(name: str, count: int | None) -> list[str]:
    """Names of the guests that one entry stands for."""
    if count is None:
        return [name]
    return [f"{name}{number}" for number in range(1, min(count, GUESTS_MAX) + 1)]


def _tables(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


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
    for disk in (*_tables(fields.get("guest")), *_tables(fields.get("volume"))):
        for key in ("image", "manifest", "swap_image", "tree"):
            value = disk.get(key)
            if isinstance(value, str) and (key != "tree" or value != "stdlib"):
                disk[key] = str(base / value)
    return fields
