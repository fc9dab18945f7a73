"""The ways of dividing one host's memory that the experiments compare, each as a cluster to start.

All have the same total memory M for N guests; the host's own reserve is beside it in every mode.

    static       RAM of M/N each, and nothing else
    balloon      a balancer moves RAM between the guests (`balancer`), up to twice M/N for one
    cmm2         RAM of up to twice M/N for one, lent out of M (`hypervisor.lending`); when that is
                 short, the host drops what guests say they can do without (`handout`)
    tmem         RAM of half of M/N each; the other half of M is the arena, compressed
    tmem-plain   the same without compression
    self-balloon RAM of M/N each, given back when it is not needed (`guests.selfballoon`); what was
                 given back is free, and no guest has anything of it
    tmem+self-balloon
                 RAM of M/N each out of an arena of M (`hypervisor.lending`), given back when it is
                 not needed; what was given back is tmem's, compressed
    tmem+ksm     tmem, and the host's kernel merges equal pages of RAM (`merging`); on demand

Every guest has a swap disk, the same in all modes.

In `balloon` and `cmm2` there is a hypervisor too, because balloon targets come through its window,
or to lend M out; guests put nothing there.  A window, and what an arena takes for itself, are not
counted in these modes: a real balloon driver has one page for its target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from guests.memory import WINDOW_PAGES
from hypervisor.arena import FRAMES_MIN, frames_that_fit, layout
from ipc.codec import Record
from tools.cluster import ClusterPlan, GuestPlan
from tools.units import PAGE_BYTES

SELF_BALLOON_MB: Final = 512
"""What the RAM of a guest counts as in the formulas of self-ballooning."""
GAIN_PERCENT: Final = 220
"""What memory is worth in the arena: pages of compilers are compressed to less than a half."""
SELF_BALLOON_KNOBS: Final = {"interval": 1, "downhysteresis": 1, "reserved_mb": 51}
"""Builds take seconds here and not minutes: Linux's worker wakes up every 5 seconds, and takes an
eighth of what is too much.  It also leaves a tenth of the RAM alone, as we do."""


@dataclass(frozen=True)
class Host:
    """What all modes have in common.  `share_bytes` is M/N; `direct`: no disk of a guest is in the
    host's page cache."""

    name: str
    guests: tuple[str, ...]
    share_bytes: int
    direct: bool = False

    @property
    def total_bytes(self) -> int:
        """M."""
        return len(self.guests) * self.share_bytes


@dataclass(frozen=True)
class Disks:
    """The image and the swap file of a guest."""

    image: Path
    swap: Path
    swap_uuid: bytes


@dataclass(frozen=True)
class Mode:
    """One way; `make` fills in what differs."""

    memory_shares: float
    """RAM of a guest, in parts of M/N."""
    arena_shares: float | None = None
    """The arena, in parts of M; 0 is the least that can be; None: there is no hypervisor."""
    tmem: bool = False
    compress: bool = False
    borrow: bool = False
    """Guests may have swapped pages in what the others don't use."""
    balanced: bool = False
    page_states: bool = False
    self_ballooning: bool = False
    lend: bool = False
    ksm: bool = False

    @property
    def uncounted_bytes(self) -> int:
        """Of the RAM of a guest: there only so that it can be told of its target."""
        return WINDOW_PAGES * PAGE_BYTES if self.balanced or self.page_states else 0

    def plan(self, host: Host, disks: Mapping[str, Disks]) -> ClusterPlan:
        """The cluster of this mode."""
        arena_bytes = None
        memory_bytes = _pages(self.memory_shares * host.share_bytes) + self.uncounted_bytes
        if self.arena_shares is not None:
            least = layout(FRAMES_MIN).end
            arena_bytes = max(_pages(self.arena_shares * host.total_bytes), least)
            if self.page_states:
                ram_bytes = host.total_bytes + len(host.guests) * self.uncounted_bytes
                arena_bytes = layout(ram_bytes // PAGE_BYTES).end
            elif self.lend:
                # What the arena needs for itself can't be lent; tmem begins with a little.
                frames = frames_that_fit(arena_bytes) - FRAMES_MIN
                memory_bytes = frames // len(host.guests) * PAGE_BYTES
        guests = [
            GuestPlan(
                name,
                memory_bytes,
                disks[name].image,
                swap=disks[name].swap,
                swap_uuid=disks[name].swap_uuid,
                cleancache=self.tmem,
                frontswap=self.tmem,
                ksm=self.ksm,
                direct=host.direct,
                page_states=self.page_states,
            )
            for name in host.guests
        ]
        options = {"lend": True} if self.lend else {}
        return ClusterPlan(host.name, guests, arena_bytes, options, list(self._told(host)))

    def _told(self, host: Host) -> Iterator[Record]:
        """What the hypervisor is told before there are guests."""
        for name in host.guests:
            if self.tmem:
                settings = {"compress": self.compress, "borrow": self.borrow}
                yield {"verb": "set", "guest": name, **settings}
            if self.balanced:
                size_bytes = host.share_bytes + self.uncounted_bytes
                yield {"verb": "balloon", "guest": name, "size_bytes": size_bytes}

    def prepare(self, host: Host, execute: Callable[[str, list[str]], Any]) -> None:
        """Switch services of the guests on; `execute` runs a command in one."""
        if not self.self_ballooning:
            return
        knobs = {
            "frontswap_selfshrinking": int(self.tmem),
            "frontswap_gain_percent": GAIN_PERCENT if self.lend else 100,
            "mb_bytes": host.share_bytes // SELF_BALLOON_MB,
            **SELF_BALLOON_KNOBS,
            "selfballooning": 1,
        }
        for name in host.guests:
            for knob, value in knobs.items():
                execute(name, ["selfballoon", knob, str(value)])


def _pages(size_bytes: float) -> int:
    return int(size_bytes) // PAGE_BYTES * PAGE_BYTES


MODES: Final = {
    "static": Mode(1.0),
    "balloon": Mode(2.0, 0.0, balanced=True),
    "cmm2": Mode(2.0, 0.0, page_states=True, lend=True),
    "self-balloon": Mode(1.0, self_ballooning=True),
    "tmem-plain": Mode(0.5, 0.5, tmem=True),
    "tmem": Mode(0.5, 0.5, tmem=True, compress=True),
    "tmem+self-balloon": Mode(1.0, 1.0, tmem=True, compress=True, self_ballooning=True, lend=True),
}
KSM_MODE: Final = "tmem+ksm"
MODES_ON_DEMAND: Final = {KSM_MODE: replace(MODES["tmem"], ksm=True)}
