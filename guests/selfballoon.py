"""Self-ballooning and frontswap self-shrinking: the guest finds out itself how much RAM it needs.

Every `interval` seconds, with all figures in pages (Linux's drivers/xen/xen-selfballoon.c):

    goal    committed + reserved + `reserved_mb`, and the pages that frontswap holds, if
            self-shrinking is on
    shrink  size - (size - goal) / `downhysteresis`
    grow    size + (goal - size) / `uphysteresis`
    floor   with u = usable memory in MB:  u < 16: no ballooning at all;  u < 64: 16 + (u - 16) / 2;
            u < 512: 40 + (u - 40) / 8;  else 99 + (u - 99) / 32;  or `min_usable_mb`, if it is set;
            in each case with what is reserved on top

Clean page cache is not committed, so it is squeezed out, into cleancache, where all guests share
the memory for it.  What frontswap holds has to come back one day: once its count has not grown for
`frontswap_inertia` rounds, a part of it (one in `frontswap_hysteresis`) is brought back into
RAM in each round.

Differs from Linux: RAM is smaller here, so what counts as a megabyte in these formulas is a knob
(`mb_bytes`), both services are off until they are switched on, and nothing is reserved unless
`reserved_mb` says so (later versions of the driver begin with a tenth of the RAM).

And Linux has no answer to a guest whose programs want more than all of its RAM: its driver then
holds on to every page, tmem has none to keep the rest in, and the rest goes to the disk.  But a
page of RAM that tmem has may hold two or three compressed ones.  With `frontswap_gain_percent`
above 100 (what the RAM is worth there) such a guest gives up as much RAM as makes all fit:

    ram + (maximum - ram) * gain = wanted     =>     ram = (maximum * gain - wanted) / (gain - 1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from ipc.abi import PAGE_BYTES


@dataclass
class Knobs:
    """As in /sys/devices/system/xen_memory, without the prefix `selfballoon_`."""

    selfballooning: int = 0
    interval: int = 5
    downhysteresis: int = 8
    uphysteresis: int = 1
    min_usable_mb: int = 0
    reserved_mb: int = 0
    frontswap_selfshrinking: int = 0
    frontswap_inertia: int = 3
    frontswap_hysteresis: int = 20
    frontswap_gain_percent: int = 100
    mb_bytes: int = 1 << 20

    def set(self, name: str, value: int) -> None:
        """Change one; ValueError for what there is not or can't be."""
        if name not in (known := [field.name for field in fields(self)]):
            raise ValueError(f"no knob {name!r}; there are {', '.join(known)}")
        switches = ("selfballooning", "frontswap_selfshrinking")
        least = 0 if name in (*switches, "min_usable_mb", "reserved_mb") else 1
        least = {"mb_bytes": PAGE_BYTES, "frontswap_gain_percent": 100}.get(name, least)
        if not least <= value <= (1 if name in switches else 1 << 32):
            raise ValueError(f"{name} can't be {value}")
        setattr(self, name, value)


@dataclass(frozen=True)
class Needs:
    """What a guest needs, in pages: `size` it has, `reserved` is no program's and no file's."""

    size: int
    maximum: int
    committed: int
    reserved: int
    frontswap: int


def goal_pages(needs: Needs, knobs: Knobs) -> int:
    """The size that the guest should come to."""
    goal = needs.committed + needs.reserved + _pages(knobs.reserved_mb, knobs)
    gain = knobs.frontswap_gain_percent
    if goal > needs.maximum and gain > 100:
        return (needs.maximum * gain - goal * 100) // (gain - 100)
    return goal + needs.frontswap if knobs.frontswap_selfshrinking else goal


def floor_pages(needs: Needs, knobs: Knobs) -> int:
    """The size that self-ballooning never goes below."""
    usable = needs.maximum - needs.reserved
    if knobs.min_usable_mb:
        return min(needs.maximum, needs.reserved + _pages(knobs.min_usable_mb, knobs))

    def part(base: int, shift_from: int, divisor: int) -> int:
        return _pages(base, knobs) + (usable - _pages(shift_from, knobs)) // divisor

    if usable < _pages(16, knobs):
        return needs.maximum
    if usable < _pages(64, knobs):
        least = part(16, 16, 2)
    elif usable < _pages(512, knobs):
        least = part(40, 40, 8)
    else:
        least = part(99, 99, 32)
    return needs.reserved + least


def next_target(needs: Needs, knobs: Knobs) -> int:
    """The balloon target of this round."""
    goal = goal_pages(needs, knobs)
    target = needs.size
    if needs.size > goal:
        target -= (needs.size - goal) // knobs.downhysteresis
    else:
        target += -(-(goal - needs.size) // knobs.uphysteresis)
    return max(floor_pages(needs, knobs), min(needs.maximum, target))


def _pages(megabytes: int, knobs: Knobs) -> int:
    return megabytes * knobs.mb_bytes // PAGE_BYTES


class SelfBalloon:
    """The service.  `shrink_frontswap(target)` brings pages back until so many are left there."""

    def __init__(
        self,
        now_seconds: Callable[[], float],
        needs: Callable[[], Needs],
        set_target: Callable[[int], int],
        shrink_frontswap: Callable[[int], None],
    ) -> None:
        self.knobs = Knobs()
        self.rounds = 0
        self._now_seconds = now_seconds
        self._needs = needs
        self._set_target = set_target
        self._shrink_frontswap = shrink_frontswap
        self._next_at = 0.0
        self._last_frontswap = 0
        self._inertia = 0

    def step(self) -> None:
        """A round, if one is due."""
        knobs, now = self.knobs, self._now_seconds()
        if now < self._next_at:
            return
        self._next_at = now + knobs.interval
        needs = self._needs()
        if knobs.frontswap_selfshrinking:
            self._shrink(needs.frontswap)
        if knobs.selfballooning:
            self.rounds += 1
            self._set_target(next_target(needs, knobs))

    def _shrink(self, pages: int) -> None:
        """Frontswap self-shrinking, as the driver has it."""
        grew = pages > self._last_frontswap
        self._last_frontswap = pages
        if not pages or grew:
            self._inertia = self.knobs.frontswap_inertia
            return
        self._inertia = max(0, self._inertia - 1)
        if self._inertia:
            return
        hysteresis = self.knobs.frontswap_hysteresis
        self._shrink_frontswap(pages - pages // hysteresis if pages > hysteresis else 0)
