"""The timings of a cluster: o2cb's, with its defaults, and what follows from them.

All nodes of a cluster must have the same timings. A node that believes in a longer dead time than
the others would go on writing after they took its locks, so `differences` is asked when a node
joins, and a node that differs is refused.

What follows (as in Linux fs/ocfs2/cluster/heartbeat.h and tcp_internal.h):
  write timeout   (dead_threshold - 1) intervals: a node that could not write its heartbeat for so
                  long fences itself;
  dead            dead_threshold samples without a change: one interval later than that;
  quorum delay    (dead_threshold + 2) intervals after a connection was lost: by then a node that
                  is really dead was declared dead, so whoever still beats was only cut off.

Differs from Linux: the heartbeat interval can be changed (o2hb's is a constant).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import Final

MAX_NODES: Final = 255
"""Node numbers are 0 .. 254, as in o2cb."""

LIVE_THRESHOLD: Final = 2
"""Changed samples after which a node is live."""

MIN_DEAD_THRESHOLD: Final = 2

_TIMING: Final = struct.Struct("<QIQQQ")
_MAX_INTERVAL_NS: Final = 3600 * 10**9


@dataclass(frozen=True)
class Timing:
    """The timings of one node. `ValueError` when they can't work."""

    heartbeat_interval_ns: int = 2_000_000_000
    dead_threshold: int = 31
    idle_timeout_ns: int = 30_000_000_000
    keepalive_ns: int = 2_000_000_000
    reconnect_ns: int = 2_000_000_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value <= _MAX_INTERVAL_NS:
                raise ValueError(f"{field.name} is {value}; give a number above 0, below an hour")
        if self.dead_threshold < MIN_DEAD_THRESHOLD:
            raise ValueError(
                f"dead_threshold is {self.dead_threshold}; with less than {MIN_DEAD_THRESHOLD}"
                " a node has no time to write"
            )
        if self.dead_ms >= 1 << 32:
            raise ValueError(
                f"the dead time is {self.dead_ms} ms; the heartbeat has 32 bits for it"
            )
        if self.keepalive_ns >= self.idle_timeout_ns:
            raise ValueError(
                f"keepalive_ns is {self.keepalive_ns}, not below idle_timeout_ns"
                f" {self.idle_timeout_ns}: every idle link would be cut"
            )

    @classmethod
    def fast(cls) -> Timing:
        """Short timings for tests: dead after 1.4 s."""
        return cls(
            heartbeat_interval_ns=200_000_000,
            dead_threshold=7,
            idle_timeout_ns=1_000_000_000,
            keepalive_ns=200_000_000,
            reconnect_ns=200_000_000,
        )

    @property
    def dead_ns(self) -> int:
        """How long a silent node is still taken for live."""
        return self.dead_threshold * self.heartbeat_interval_ns

    @property
    def dead_ms(self) -> int:
        """The same in the unit of the heartbeat sector."""
        return self.dead_ns // 1_000_000

    @property
    def write_timeout_ns(self) -> int:
        """How long a node may go on after the last heartbeat that it wrote."""
        return (self.dead_threshold - 1) * self.heartbeat_interval_ns

    @property
    def quorum_delay_ns(self) -> int:
        """From the loss of a connection to the quorum decision."""
        return (self.dead_threshold + 2) * self.heartbeat_interval_ns

    @property
    def resend_ns(self) -> int:
        """After what time a membership message without answer is sent again."""
        return self.heartbeat_interval_ns // 2

    def differences(self, other: Timing, mine: str, theirs: str) -> list[str]:
        """What differs, one clause each, with the names of both nodes and both values."""
        return [
            f"{field.name} is {getattr(self, field.name)} at {mine}"
            f" and {getattr(other, field.name)} at {theirs}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]

    def encode(self) -> bytes:
        """The fixed form that a join carries."""
        return _TIMING.pack(*(getattr(self, field.name) for field in fields(self)))

    @classmethod
    def decode(cls, untrusted_data: bytes) -> Timing:
        """`ValueError` when these are no timings."""
        if len(untrusted_data) != _TIMING.size:
            raise ValueError(f"timings of {len(untrusted_data)} bytes, not {_TIMING.size}")
        return cls(*_TIMING.unpack(untrusted_data))


TIMING_BYTES: Final = _TIMING.size


def node_label(node: int, names: dict[int, str]) -> str:
    """What a person reads: the name first, the number with it."""
    name = names.get(node)
    return f"node {name} ({node})" if name else f"node {node}"
