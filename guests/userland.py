"""What the programs of a guest live on: memory, swap, frontswap, and who is killed; the balloon.

    processes  ->  anonymous  ->  swap  ->  frontswap, else the swap disk
                      |
                   reclaim (with the page cache)  <-  balloon  <-  selfballoon, the hypervisor
                                                      (monitor: with page states)

Without a swap disk there is no frontswap either, as in Linux: the slot of a page is on the disk,
wherever the page is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from fs.block.device import BlockDevice
from fs.block.file import FileDevice
from guests.anonymous import AnonymousMemory
from guests.attachment import Attachment
from guests.balloon import Balloon
from guests.frontswap import Frontswap
from guests.hostmemory import HostMemory
from guests.hypercall import Hypercalls
from guests.memory import Memory
from guests.monitor import Monitor
from guests.pressure import Pressure
from guests.process import Processes
from guests.reclaim import BATCH_PAGES
from guests.selfballoon import Needs, SelfBalloon
from guests.swap import Swap
from guests.swapdisk import open_swap

KILLS_SHOWN: Final = 10
IDLE_SECONDS: Final = 0.02
"""At most so long at a time, while there is no work."""


class _Listener:
    """A user of the attachment that puts nothing there: the hypervisor's wishes come with it."""

    def __init__(self) -> None:
        self.calls: Hypercalls | None = None

    def serve(self, calls: Hypercalls) -> bool:
        self.calls = calls
        return True

    def lost(self) -> None:
        """What was wished last is still wished."""
        self.calls = None


class Userland:
    """All of it, for one kernel.  Raises ImageError for a swap area that can't be used."""

    def __init__(
        self,
        memory: Memory,
        *,
        now_seconds: Callable[[], float],
        wait: Callable[[], None],
        swap_path: Path | None = None,
        swap_uuid: bytes | None = None,
        attachment: Attachment | None = None,
        frontswap: bool = True,
        stack: Callable[[BlockDevice], BlockDevice] = lambda device: device,
        open_device: Callable[..., BlockDevice] = FileDevice,
    ) -> None:
        """`wait` lets time pass while a page is waited for; without an attachment there is no
        `frontswap`; `open_device(path, made_by=...)` opens the swap area, and `stack` puts
        devices on it."""
        self.swap: Swap | None = None
        self.frontswap: Frontswap | None = None
        self._memory = memory
        self._now_seconds = now_seconds
        self._attachment = attachment
        self._listener = _Listener()
        if attachment is not None:
            attachment.join(self._listener)
        self._seen = (0, 0)
        """Attachment and notification that were heeded last."""
        self._to_write_back = 0
        self._wished_pages = self._own_target_pages = memory.budget.total
        if swap_path is not None:
            disk = open_swap(swap_path, uuid=swap_uuid, stack=stack, open_device=open_device)
            if attachment is not None and frontswap:
                self.frontswap = Frontswap(attachment, now_seconds, wait)
            self.swap = Swap(disk, self.frontswap, now_seconds)
        self.pressure = Pressure(lambda: int(now_seconds() * 1e9), lambda: len(self.processes) > 1)
        self.anonymous = AnonymousMemory(memory, self.swap, self.pressure.stalled)
        total = memory.budget.total + (self.swap.total_pages if self.swap is not None else 0)
        self.processes = Processes(self.anonymous, total)
        memory.reclaim.exhausted = self.processes.kill_for_memory
        if self.frontswap is not None:
            self.frontswap.on_lost = self.processes.note_lost
        self.host = HostMemory(memory, attachment, now_seconds)
        self.balloon = Balloon(memory, self.host)
        self.monitor = (
            Monitor(memory, self.balloon, self.host) if memory.states is not None else None
        )
        self.selfballoon = SelfBalloon(
            now_seconds, self._needs, self._set_own_target, self.shrink_frontswap
        )

    def in_background(self) -> None:
        """What is due between two steps of work."""
        self.processes.kill_the_robbed()
        self._memory.reclaim.in_background()
        self.pressure.update()
        self._heed_hypervisor()
        self.selfballoon.step()
        (self.balloon if self.monitor is None else self.monitor).step()

    def idle(self) -> None:
        """While there is no work: tell of pages that are not wanted any more, and let the balloon
        come nearer to its target than by a batch a look."""
        if self.frontswap is not None:
            self.frontswap.flush()
        until = self._now_seconds() + IDLE_SECONDS
        while self.monitor is None and self._now_seconds() < until and self.balloon.step():
            pass

    # --- the balloon

    def _needs(self) -> Needs:
        budget = self._memory.budget
        return Needs(
            size=self.balloon.size_pages,
            maximum=budget.total,
            committed=self.processes.committed_pages,
            reserved=budget.total - budget.frames,
            frontswap=self.frontswap.pages if self.frontswap is not None else 0,
        )

    def _set_own_target(self, pages: int) -> int:
        """What the guest thinks that it needs; the hypervisor may wish less."""
        self._own_target_pages = pages
        return self.balloon.set_target(min(pages, self._wished_pages))

    def shrink_frontswap(self, target_pages: int) -> None:
        """Bring pages back from frontswap until so many are left, as far as frames are free."""
        if self.frontswap is not None:
            slots = set(self.frontswap.oldest(self.frontswap.pages - target_pages))
            self.anonymous.swap_back(slots, [process.table for process in self.processes])

    def switch_selfballooning(self, name: str, value: int) -> None:
        """Set a knob; ValueError.  Switched off, the guest has its full size again."""
        self.selfballoon.knobs.set(name, value)
        if not self.selfballoon.knobs.selfballooning:
            self._set_own_target(self._memory.budget.total)

    def _heed_hypervisor(self) -> None:
        """The size that it wishes; and take pages back out of tmem when it asks for that, a batch
        at a time."""
        attachment, calls = self._attachment, self._listener.calls
        if attachment is None or calls is None:
            return
        info = calls.channel.window.info()
        if self._seen != (attachment.attaches, info.notifications):
            self._seen = attachment.attaches, info.notifications
            self._to_write_back = info.writeback_pages
            self._wished_pages = info.balloon_target_pages or self._memory.budget.total
            self._set_own_target(self._own_target_pages)
        if self._to_write_back > 0 and self.swap is not None:
            done = self.swap.write_back(min(BATCH_PAGES, self._to_write_back))
            self._to_write_back = self._to_write_back - done if done else 0

    def close(self) -> None:
        """All programs end, and the swap area is not used any more."""
        for process in list(self.processes):
            process.exit()
        if self.swap is not None:
            self.swap.close()

    # --- figures

    def counters(self) -> dict[str, Any]:
        """Of `status`: pages of 4 KiB."""
        return {
            "anonymous": self._anonymous(),
            "swap": self._swap(),
            "frontswap": self._frontswap(),
            "pressure": self.pressure.record(),
            "balloon": {
                "size_pages": self.balloon.size_pages,
                "target_pages": self.balloon.target_pages,
                "floor_pages": self.balloon.floor_pages,
                "maximum_pages": self.balloon.maximum_pages,
                "inflated_pages": self.balloon.inflated_pages,
                "deflated_pages": self.balloon.deflated_pages,
                "lent_pages": self.host.lent_pages if self.host.lends else 0,
                "selfballooning": bool(self.selfballoon.knobs.selfballooning),
            },
            "page_states": self.monitor.counters() if self.monitor is not None else None,
        }

    def _anonymous(self) -> dict[str, Any]:
        counters, processes = self.anonymous.counters, self.processes
        reclaim = self._memory.reclaim
        return {
            "pages": self.anonymous.pages,
            "active_pages": self.anonymous.lists.active_pages,
            "committed_pages": processes.committed_pages,
            "processes": len(processes),
            "faults": counters.faults,
            "major_faults": counters.major_faults,
            "zero_fills": counters.zero_fills,
            "copies": counters.copies,
            "evictions": counters.evictions,
            "readahead_hits": counters.readahead_hits,
            "direct_reclaim_pages": reclaim.direct_pages,
            "background_reclaim_pages": reclaim.background_pages,
            "oom_kills": processes.oom_kills,
            "kills": [str(kill) for kill in processes.kills[-KILLS_SHOWN:]],
        }

    def _swap(self) -> dict[str, int]:
        swap = self.swap
        if swap is None:
            names = ("in", "out", "written_back", "lost_writes", "retired", "refused")
            calls = ("total_pages", "free_pages", "cached_pages", "read_calls", "write_calls")
            return dict.fromkeys((*(f"{name}_pages" for name in names), *calls), 0)
        return {
            "in_pages": swap.counters.pages_in,
            "out_pages": swap.counters.pages_out,
            "written_back_pages": swap.counters.written_back,
            "lost_writes_pages": swap.counters.lost_writes,
            "retired_pages": swap.disk.counters.retired_slots,
            "refused_pages": swap.disk.aside_slots,
            "total_pages": swap.total_pages,
            "free_pages": swap.free_pages,
            "cached_pages": self.anonymous.cached_pages,
            "read_calls": swap.disk.counters.reads,
            "write_calls": swap.disk.counters.writes,
        }

    def _frontswap(self) -> dict[str, Any]:
        front = self.frontswap
        if front is None:
            names = ("loads", "succ_stores", "failed_stores", "invalidates", "lost", "curr_pages")
            return {**dict.fromkeys(names, 0), "attached": False, "refusals": {}}
        counters = front.counters
        return {
            "loads": counters.loads,
            "succ_stores": counters.succ_stores,
            "failed_stores": counters.failed_stores,
            "invalidates": counters.invalidates,
            "lost": counters.lost,
            "curr_pages": front.pages,
            "attached": front.attached,
            "refusals": dict(front.refusals),
        }
