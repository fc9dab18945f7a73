"""Topologies: clusters by name, for people who have no cluster.toml yet.

    default (or demo)   four guests whose pressure moves from one to the next
    pair                two guests, one of them busy at a time
    single              one guest
    shared              four guests that mount one OCFS2 disk and share one pool of clean pages

`--topo pair,memory=2M,seed=7` changes a topology's parameters; the table below is what there is.

The phases: in each, one or two guests are *hot* (they read their whole tree several times, far more
than their RAM) and the others *light* (a small part of their tree, or a log).  A split of the same
memory gives every guest the same share all the time; an arena follows the heat.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from ipc.errors import ExitCode, OperatorError
from tools.config import ClusterConfig, validate
from tools.units import PAGE_BYTES, parse_size

NAMES: Final = ("alpha", "bravo", "carol", "delta")
ALIASES: Final = {"demo": "default"}

_HOT: Final[list[dict[str, Any]]] = [
    {"workload": "mixed"},
    {"workload": "search"},
    {"workload": "compile"},
    {"workload": "read_all"},
]
_LIGHT: Final[list[dict[str, Any]]] = [
    {"workload": "log", "lines": 2000},
    {"workload": "compile", "paths_fraction": 0.05},
    {"workload": "search", "paths_fraction": 0.1},
]


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError("neither on nor off")
    return text == "on"


class Parameter(NamedTuple):
    """One parameter of a topology: how its text is read, and what it means."""

    read: Any
    meaning: str


PARAMETERS: Final = {
    "n": Parameter(int, "guests"),
    "memory": Parameter(parse_size, "RAM of each guest"),
    "swap": Parameter(parse_size, "size of each guest's swap file"),
    "ksm": Parameter(_switch, "on or off: the host's kernel may merge equal pages of RAM"),
    "direct": Parameter(
        _switch, "on or off: disks are used around the host's page cache (O_DIRECT)"
    ),
    "arena": Parameter(parse_size, "size of the arena"),
    "tree": Parameter(parse_size, "size of the tree on each disk, at most"),
    "passes": Parameter(int, "how often a hot guest reads its tree in a phase"),
    "seed": Parameter(int, "seed of everything random"),
    "name": Parameter(str, "name of the cluster"),
    "eviction": Parameter(str, "which page goes first: fifo, clock, s3fifo or hinted"),
    "transport": Parameter(str, "how calls travel: auto, ring or mqueue"),
    "scheduling": Parameter(str, "how guests share the arena: greedy, static or scheduled"),
    "compress": Parameter(_switch, "on or off: compress the pages of all guests"),
    "borrow": Parameter(_switch, "on or off: swapped pages of a guest may use what is idle"),
    "checksums": Parameter(_switch, "on or off: pages are checked when they are read"),
    "lend": Parameter(_switch, "on or off: guests' RAM comes out of the arena, too"),
    "group": Parameter(str, "group in which all guests' equal pages may be one"),
    "timing": Parameter(str, "of a shared disk's cluster: o2cb (its defaults) or fast"),
    "pool": Parameter(str, "clean pages of a shared disk: shared or private"),
    "verify": Parameter(_switch, "on or off: pages of a shared disk must have its checksums"),
}

_KINDS: Final[dict[Any, str]] = {
    parse_size: "size (for example 4M)",
    int: "whole number",
    _switch: "switch (on or off)",
}

_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "default": {"n": 4, "memory": 3 * 2**20, "arena": 20 * 2**20, "passes": 12},
    "pair": {"n": 2, "memory": 3 * 2**20, "arena": 12 * 2**20, "passes": 12},
    "single": {"n": 1, "memory": 3 * 2**20, "arena": 12 * 2**20, "passes": 12},
    "shared": {"n": 4, "memory": 3 * 2**20, "arena": 20 * 2**20, "passes": 2, "timing": "fast"},
}

_TIMINGS: Final[dict[str, dict[str, Any]]] = {
    "o2cb": {},
    "fast": {
        "heartbeat_interval": 0.2,
        "dead_threshold": 16,
        "idle_timeout": 2.0,
        "keepalive": 0.2,
        "reconnect": 0.1,
    },
}
"""Timing of a cluster of nodes; `fast` declares a silent node dead after 3 s, not a minute."""


def build_topology(text: str) -> ClusterConfig:
    """The cluster of `NAME` or `NAME,key=value,...`; raises OperatorError (usage)."""
    name, _, rest = text.partition(",")
    name = ALIASES.get(name, name)
    if name not in _DEFAULTS:
        known = ", ".join([*_DEFAULTS, *ALIASES])
        raise _usage(f"there is no topology {name!r}; there are {known}")
    values: dict[str, Any] = {"tree": 13 * 2**20, "seed": 1, "name": "tmem", **_DEFAULTS[name]}
    for part in rest.split(",") if rest else []:
        key, separator, value = part.partition("=")
        if not separator or key not in PARAMETERS:
            known = ", ".join(PARAMETERS)
            raise _usage(f"{part!r} is no parameter of a topology; write key=value with {known}")
        try:
            values[key] = PARAMETERS[key].read(value)
        except ValueError:
            raise _usage(f"{part!r}: {value!r} is no {_kind(key)}") from None
    fields = _shared_cluster(values) if name == "shared" else _cluster(values)
    return validate(fields, f"--topo {text}")


def _usage(message: str) -> OperatorError:
    return OperatorError(message, ExitCode.USAGE)


def _kind(key: str) -> str:
    return _KINDS[PARAMETERS[key].read]


def _cluster(values: dict[str, Any]) -> dict[str, Any]:
    count = values["n"]
    names = guest_names(count)
    hypervisor = {
        key: values[key]
        for key in ("eviction", "scheduling", "transport", "lend", "checksums")
        if key in values
    }
    settings: dict[str, Any] = {
        key: values[key] for key in ("compress", "borrow", "swap", "ksm", "direct") if key in values
    }
    if "group" in values:
        settings |= {"sharing": "group", "group": values["group"]}
    return {
        "name": values["name"],
        "seed": values["seed"],
        "hypervisor": {"arena": values["arena"] // PAGE_BYTES * PAGE_BYTES, **hypervisor},
        "guest": [
            {"name": name, "memory": values["memory"], "tree_limit": values["tree"], **settings}
            for name in names
        ],
        "phase": phases(names, values["passes"]),
    }


def _shared_cluster(values: dict[str, Any]) -> dict[str, Any]:
    """Guests that all read the whole tree of one disk, all at the same time."""
    timing = values["timing"]
    if timing not in _TIMINGS:
        raise _usage(f"there is no timing {timing!r}; there are {', '.join(_TIMINGS)}")
    cluster = _cluster(values)
    names = [guest["name"] for guest in cluster["guest"]]
    volume = {"name": "data", "nodes": names, "tree_limit": values["tree"], **_TIMINGS[timing]}
    volume |= {key: values[key] for key in ("pool", "verify") if key in values}
    work = {"workload": "read_all", "passes": values["passes"]}
    phase = {"title": "all read", "work": dict.fromkeys(names, work)}
    return {**cluster, "volume": [volume], "phase": [phase]}


def guest_names(count: int) -> list[str]:
    """alpha, bravo, carol, delta, guest5, ..."""
    return [
        NAMES[number] if number < len(NAMES) else f"guest{number + 1}" for number in range(count)
    ]


def phases(names: list[str], passes: int) -> list[dict[str, Any]]:
    """Two rounds in which each guest is hot once, with work of another kind in the second."""
    turns = []
    for number in range(2 * len(names)):
        place = number % len(names)
        hot = names[place]
        kind = _HOT[0] if number < len(names) else _HOT[1 + place % (len(_HOT) - 1)]
        work: dict[str, dict[str, Any]] = {hot: {**kind, "passes": passes}}
        if kind["workload"] == "compile":
            # Compiling takes twenty times the reading.
            work[hot]["passes"] = max(1, passes // 8)
        for other, name in enumerate(names):
            if name != hot:
                work[name] = dict(_LIGHT[(number + other) % len(_LIGHT)])
        turns.append({"title": f"{hot} is hot", "work": work})
    return turns
