"""The nemesis: what goes wrong in a cluster while a test looks whether it stays coherent.

    kill        SIGKILL of a guest; it is started again as a new node under its old number
    pause       SIGSTOP for less than the dead time, or for longer than it
    partition   the links between two nodes are cut for longer than the idle timeout
    messages    messages of all nodes are lost, late, doubled and overtaken for a while
    hypervisor  SIGKILL of the hypervisor; the supervisor starts it again
    drop        the hypervisor drops all clean pages that nobody is promised

A plan is made from a seed before anything happens: kinds, victims, moments and durations.  What the
machine makes of it in time is not repeatable; the plan is.

At most one node is lost at a time and never all: killing and long pauses wait for each other, so
that a majority is always there.  A partition of two nodes fences one of them, as quorum says.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

from ipc.errors import ExitCode, OperatorError
from tools.config import VolumeConfig

KINDS: Final = ("kill", "pause", "partition", "messages", "hypervisor", "drop")
_FATAL: Final = ("kill", "pause", "partition")
_RECOVERY_SECONDS: Final = 3.0
"""After a node was lost the others get this long, beside the dead time, before the next is."""


@dataclass(frozen=True)
class Action:
    """One thing that goes wrong, from `at_seconds` on, and for how long."""

    kind: str
    at_seconds: float
    duration_seconds: float
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For a person, in the order of a sentence."""
        who = " ".join(("", *self.nodes))
        lasting = f" for {self.duration_seconds:.1f} s" if self.duration_seconds else ""
        return f"{self.at_seconds:.1f} s {self.kind}{who}{lasting}"


def parse_kinds(text: str) -> tuple[str, ...]:
    """The kinds of `kill,pause,...`, or `all`; raises OperatorError."""
    kinds = KINDS if text == "all" else tuple(part for part in text.split(",") if part)
    for kind in kinds:
        if kind not in KINDS:
            raise OperatorError(
                f"there is no nemesis {kind!r}; there are {', '.join(KINDS)} and all",
                ExitCode.USAGE,
            )
    return kinds


def plan(kinds: tuple[str, ...], volume: VolumeConfig, seconds: float, seed: int) -> list[Action]:
    """What shall happen within `seconds`, in order."""
    random = Random(f"nemesis {seed}")
    dead_seconds = volume.heartbeat_interval * volume.dead_threshold
    actions: list[Action] = []
    at = 0.3
    fatal_at = 0.0
    while kinds and at < seconds:
        kind = random.choice(kinds)
        if kind in _FATAL and (at < fatal_at or len(volume.nodes) < 2):
            harmless = [one for one in kinds if one not in _FATAL]
            if not harmless:
                at = max(at, fatal_at)
                continue
            kind = random.choice(harmless)
        action = _draw(kind, at, volume, dead_seconds, random)
        actions.append(action)
        if kind in _FATAL:
            fatal_at = at + action.duration_seconds + dead_seconds + _RECOVERY_SECONDS
        at += random.uniform(0.3, 1.5)
    return actions


def _draw(
    kind: str, at: float, volume: VolumeConfig, dead_seconds: float, random: Random
) -> Action:
    nodes: tuple[str, ...] = ()
    duration = 0.0
    if kind in ("kill", "pause"):
        nodes = (random.choice(volume.nodes),)
    if kind == "pause":
        short = random.random() < 0.5
        duration = dead_seconds * (random.uniform(0.2, 0.5) if short else random.uniform(1.3, 1.6))
    elif kind == "partition":
        nodes = tuple(sorted(random.sample(volume.nodes, 2)))
        duration = volume.idle_timeout + dead_seconds * 1.5
    elif kind == "messages":
        duration = random.uniform(0.5, 1.5)
    at_milliseconds = int(at * 1000)  # rounded up it could lie behind the end of the test
    return Action(kind, at_milliseconds / 1000, round(duration, 3), nodes)
