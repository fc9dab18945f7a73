"""The kernel of a guest: memory, page cache, cleancache, a mounted file system, and one workload.

No process, socket or signal is known here: `boot` runs it in a process, tests run it in theirs.

Order of start: budget, mount, cleancache pool, page cache, vfs.  Order of stop: workload, dirty
pages and metadata to the disk, image marked clean, pool destroyed, attachment ended.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from fs.block.counting import CountingDevice
from fs.block.device import BlockDevice
from fs.block.direct import DirectFileDevice, Waits
from fs.block.file import FileDevice
from fs.hooks import FileKey, NoHooks, PageHooks
from fs.mount import mount_image
from fs.ocfs2.filesystem import Ocfs2
from fs.vfs import Vfs
from guests import ksm
from guests.attachment import Attachment
from guests.cleancache import Cleancache
from guests.memory import Memory, divide
from guests.node import Fenced, Node, NodeSpec
from guests.nodeview import lock_resources, node_status
from guests.pagecache import PageCache
from guests.privatecache import TokenNames
from guests.process import ProcessKilled
from guests.sharedcache import SharedCleancache
from guests.shareddisk import KeptDevice
from guests.userland import Userland
from guests.verification import Verification
from guests.volumeview import volume_status
from guests.workloads import WORKLOADS, Workload
from guests.workloads.job import BadParameters, Findings, Job
from ipc.channel import Channel
from ipc.jail import JailSpec

log = logging.getLogger(__name__)

WAIT_SECONDS: Final = 0.02
STEP_SECONDS: Final = 0.005
"""Work between two looks at the control socket."""


@dataclass(frozen=True)
class GuestSpec:
    """What a guest process is started with.

    `memory_bytes` is all it may use (see `guests.memory`); `buffer_blocks` is the metadata's share
    of it, None for the default.  With `attach` it uses the hypervisor of `run_directory`, where it
    was enrolled under `name` with `token` (32 bytes).  It ends with the process `supervisor_pid`,
    if one is named; it is jailed as `jail` says, and has the workload of the module `adversary`
    (`guests.adversary`).  With a `node` the image is shared with the other guests of its cluster.
    `swap` is its swap area, `swap_uuid` which one it must be.  With a hypervisor clean pages go to
    tmem if it has a `cleancache`, swapped ones go there first if it has `frontswap`, and without
    both it is only told what size to have.  `direct`: its own image and its swap area are read and
    written around the host's page cache; an image that nodes share is not.  With `page_states` it
    tells the host which pages it may drop (`guests.monitor`).
    """

    name: str
    image: Path
    memory_bytes: int
    run_directory: Path
    token: bytes = field(default=b"", repr=False)
    attach: bool = True
    buffer_blocks: int | None = None
    supervisor_pid: int | None = None
    node: NodeSpec | None = None
    swap: Path | None = None
    swap_uuid: bytes | None = None
    cleancache: bool = True
    frontswap: bool = True
    jail: JailSpec = field(default_factory=JailSpec)
    adversary: str | None = None
    ksm: bool = False
    direct: bool = False
    page_states: bool = False


class Kernel:
    """A running kernel.  `connect` attaches to the hypervisor; without it there is no tmem.

    Raises `fs.errors.ImageError` or `ipc.errors.OperatorError` if it can't start.
    """

    def __init__(
        self,
        spec: GuestSpec,
        *,
        clock_ns: Callable[[], int],
        now_seconds: Callable[[], float],
        connect: Callable[[], Channel] | None = None,
        detach: Callable[[Channel], None] = lambda channel: channel.close(),
        stack: Callable[[BlockDevice], BlockDevice] = lambda device: device,
        swap_stack: Callable[[BlockDevice], BlockDevice] = lambda device: device,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        budget = divide(
            spec.memory_bytes, attach=connect is not None, buffer_blocks=spec.buffer_blocks
        )
        self.name = spec.name
        self._now_seconds = now_seconds
        self._sleep = sleep
        self._disk_waits: Waits | None = None
        self._open_device: Callable[..., BlockDevice] = FileDevice
        if spec.direct:
            self._disk_waits = Waits()
            self._open_device = partial(DirectFileDevice, waits=self._disk_waits)
        self.node: Node | None = None
        if spec.node is not None:
            # Nodes with user ids of their own have a group in common.
            mode = 0o600 if spec.jail.gid is None else 0o660
            self.node = Node(spec.node, spec.image, spec.run_directory, socket_mode=mode)
        try:
            if self.node is not None:
                self.node.join()
            self._mount(spec, budget.buffers, clock_ns, stack)
            self.memory = Memory(budget, mergeable=spec.ksm, page_states=spec.page_states)
            self.attachment: Attachment | None = None
            self.cleancache: Cleancache | None = None
            try:
                if connect is not None:
                    self.attachment = Attachment(connect, now_seconds, detach)
                    if spec.cleancache:
                        self.cleancache = self._make_cleancache(self.attachment)
                self.userland = Userland(
                    self.memory,
                    now_seconds=now_seconds,
                    wait=self._wait,
                    swap_path=spec.swap,
                    swap_uuid=spec.swap_uuid,
                    attachment=self.attachment,
                    frontswap=spec.frontswap,
                    stack=swap_stack,
                    open_device=self._open_device,
                )
                if self.attachment is not None:
                    self.attachment.attach(refusal_is_fatal=True)
                self.userland.host.require(self.userland.balloon.floor_pages)
            except BaseException:
                if self.attachment is not None:
                    self.attachment.close()
                self.fs.unmount()
                raise
        except BaseException as reason:
            if self.node is not None:
                self.node.leave()
                if self.node.fenced_because is not None:
                    raise Fenced(errno.EIO, self.node.fenced_because) from reason
            raise
        shared = self.cleancache if isinstance(self.cleancache, SharedCleancache) else None
        self.verification = self._make_verification()
        self.pages = PageCache(self.fs, self.memory, self._hooks(), shared, self.verification)
        if self.userland.monitor is not None:
            self.userland.monitor.files = self.pages.lists
        if isinstance(self.fs, Ocfs2):
            self.fs.attach_pages(self.pages)
        self.vfs = Vfs(self.fs, self.pages)
        if self.node is not None:
            self.node.range_queries.own = self.vfs.file_locks.ranges_of
        self.findings = Findings()
        self.workloads: dict[str, Workload] = dict(WORKLOADS)
        self.job: Job | None = None
        self._steps: Iterator[None] | None = None
        self._error: str | None = None
        self._seconds = 0.0
        self._began_at = 0.0
        self._stopped = False

    # --- its disk and its cleancache

    def _mount(
        self,
        spec: GuestSpec,
        buffer_blocks: int,
        clock_ns: Callable[[], int],
        stack: Callable[[BlockDevice], BlockDevice],
    ) -> None:
        counting: list[CountingDevice] = []
        node = self.node

        def count(device: BlockDevice) -> BlockDevice:
            counting.append(CountingDevice(stack(device)))
            return counting[0]

        def open_device(path: Path, *, read_only: bool) -> BlockDevice:
            if node is not None:
                return KeptDevice(node.device)
            return self._open_device(path, read_only=read_only)

        self.fs = mount_image(
            spec.image,
            clock_ns=clock_ns,
            buffer_blocks=buffer_blocks,
            stack=count,
            locks=node.locks if node is not None else None,
            node=node.spec.number if node is not None else 0,
            live_nodes=node.live if node is not None else None,
            node_label=node.label_of if node is not None else "node {}".format,
            open_device=open_device,
            keep_checksums=node is not None and node.spec.verify,
        )
        self.device = counting[0]
        if node is not None:
            assert isinstance(self.fs, Ocfs2), "a node has looked at its volume before"
            node.mounted(self.fs)

    def _make_cleancache(self, attachment: Attachment) -> Cleancache:
        if self.node is None or not self.node.spec.shared:
            return Cleancache(attachment)
        return SharedCleancache(attachment, self.fs.uuid, self._token_of, on_stale=self._lift_token)

    def _token_of(self, key: FileKey) -> int | None:
        """The fencing token of a file's lock; None when it is not held in good standing."""
        assert self.node is not None
        assert isinstance(self.fs, Ocfs2)
        return None if self.node.cluster.fence.expired() else self.fs.token_of(key) or None

    def _lift_token(self, key: FileKey, needed: int) -> None:
        """The pool wants a higher token for a file than its lock has: ask the lock's master."""
        if self._token_of(key) is not None:
            assert self.node is not None
            assert isinstance(self.fs, Ocfs2)
            self.node.locks.lift(self.fs.file_lock_name(key), needed)

    def _hooks(self) -> PageHooks:
        if self.cleancache is None:
            return NoHooks()
        if self.node is not None and not self.node.spec.shared:
            return TokenNames(self.cleancache, self._token_of)
        return self.cleancache

    def _make_verification(self) -> Verification | None:
        """None without checksums to compare with."""
        checksums = self.fs.checksums if isinstance(self.fs, Ocfs2) else None
        if checksums is None:
            return None
        shared = self.cleancache if isinstance(self.cleancache, SharedCleancache) else None
        refuse = self._hooks().flush_page if shared is None else shared.refuse_page
        return Verification(checksums, refuse, self._now_seconds)

    # --- work

    @property
    def is_fenced(self) -> bool:
        """Whether this guest is a node that the cluster goes on without."""
        return self.node is not None and self.node.fenced_because is not None

    @property
    def is_running(self) -> bool:
        """Whether a workload has something left to do."""
        return self._steps is not None

    def start(
        self,
        workload: str,
        seed: int,
        parameters: dict[str, Any],
        files: dict[str, int] | None = None,
    ) -> None:
        """Begin a workload; raises BadParameters if it can't be begun.  `files`: see `Job`."""
        if self._steps is not None:
            raise BadParameters("a workload is running already")
        begin = self.workloads.get(workload)
        if begin is None:
            known = ", ".join(self.workloads)
            raise BadParameters(f"no workload {workload!r}; there are {known}")
        processes = self.userland.processes
        self.job = Job(workload, seed, parameters, self.vfs, self.findings, processes, files)
        self._error = None
        self._steps = begin(self.job)
        self._began_at = self._now_seconds()
        try:
            # The first step checks the parameters.
            self._step()
        except BadParameters:
            self._end(None)
            self.job = None
            raise

    def work(self) -> None:
        """Go on with the workload for about `STEP_SECONDS`."""
        until = self._now_seconds() + STEP_SECONDS
        while self._steps is not None and self._now_seconds() < until:
            self._pump()
            self._step()

    def idle(self) -> None:
        """Called now and then while there is no work: look whether the hypervisor is back."""
        self._pump()
        self.userland.idle()
        if self.attachment is not None:
            self.attachment.look()

    def _pump(self) -> None:
        if self.node is not None:
            self.node.pump()
        self.userland.in_background()

    def _wait(self) -> None:
        """A moment for others while a page is waited for."""
        if self.node is not None:
            self.node.pump()
        self._sleep(WAIT_SECONDS)

    def _step(self) -> None:
        assert self._steps is not None
        try:
            next(self._steps)
        except StopIteration:
            self._end(None)
        except (OSError, ProcessKilled) as error:
            assert self.job is not None
            log.error("workload=%s event=failed why=%s", self.job.workload, error)
            self._end(str(error))

    def _end(self, error: str | None) -> None:
        self._steps = None
        if self.job is not None:
            self.job.close()
        self._error = error
        self._seconds += self._now_seconds() - self._began_at

    def now_seconds(self) -> float:
        """The clock that waiting is measured by."""
        return self._now_seconds()

    # --- figures

    def status(self) -> dict[str, Any]:
        """What the control socket's verb `status` answers."""
        job = self.job
        state = "running" if self._steps is not None else "failed" if self._error else "idle"
        return {
            "state": state,
            "workload": job.workload if job is not None else "",
            "done": job.done if job is not None else 0,
            "total": job.total if job is not None else 0,
            "error": self._error,
            "report": job.report if job is not None else {},
            "counters": self.counters(),
            "node": None if self.node is None else node_status(self.node, self.node.now_ns()),
        }

    def volume(self) -> dict[str, Any]:
        """What the control socket's verb `volume` answers: the file system that is mounted."""
        return volume_status(self.fs, self.node.spec.names if self.node is not None else ())

    def locks(self) -> dict[str, Any]:
        """What the control socket's verb `locks` answers: cluster locks that this guest masters."""
        return lock_resources(self.node) if self.node is not None else {"resources": []}

    def counters(self) -> dict[str, Any]:
        """Sums since boot; pages of 4 KiB, disk figures as the counting device has them."""
        running = self._now_seconds() - self._began_at if self._steps is not None else 0.0
        device = self.device
        cleancache = self.cleancache
        return {
            "disk_reads_pages": device.read_pages,
            "disk_read_calls": device.reads,
            "disk_writes_pages": device.write_pages,
            "disk_write_calls": device.writes,
            # The median of image and swap area together; known only if they are direct.
            "disk_access_seconds": self._disk_waits.median_ns / 1e9 if self._disk_waits else 0.0,
            **self.findings.record(),
            "seconds": self._seconds + running,
            "page_cache": self._page_cache(),
            **self.userland.counters(),
            "cleancache": cleancache.counters() if cleancache is not None else no_cleancache(),
            "verification": None if self.verification is None else self.verification.counters(),
            "ksm": ksm.figures(),
            "memory": {
                "budget_pages": self.memory.budget.total,
                "frames": self.memory.budget.frames,
                "used_pages": self.memory.used_pages,
                "transfer_pages": self.memory.budget.transfer,
                "buffer_pages": self.memory.budget.buffers,
                "window_pages": self.memory.budget.window,
            },
        }

    def _page_cache(self) -> dict[str, int]:
        counters = self.pages.counters
        return {
            "hits": counters.hits,
            "misses": counters.misses,
            "readahead_pages": counters.readahead_pages,
            "refaults": counters.refaults,
            "evictions": counters.evictions,
            "written_pages": counters.written_pages,
            "cached_pages": self.pages.cached_pages,
            "active_pages": self.pages.active_pages,
            "dirty_pages": self.pages.dirty_pages,
        }

    # --- the end

    def stop(self) -> None:
        """Write everything back, mark the image clean, give the pool back.  Twice is once."""
        if self._stopped:
            return
        self._stopped = True
        if self._steps is not None:
            self._end(None)
        owing = False
        try:
            self.userland.close()
            self._unmount()
            owing = (
                isinstance(self.cleancache, SharedCleancache) and not self.cleancache.settle_all()
            )
        finally:
            if self.cleancache is not None:
                self.cleancache.flush_fs()
            if self.attachment is not None:
                self.attachment.close()
            if self._disk_waits is not None:
                self._disk_waits.close()
            if self.node is not None and owing:
                # What it did not flush nobody would distrust: to the others it has died.
                log.warning("event=left-without-a-word why=pages of a shared pool are not flushed")
                self.node.close()
            elif self.node is not None:
                self.node.leave()

    def _unmount(self) -> None:
        """A fenced node has nothing more to write, and no right to."""
        try:
            self.vfs.unmount()
        except OSError as reason:
            if not self.is_fenced:
                raise
            log.info("event=not-unmounted why=%s", reason.strerror)


def no_cleancache() -> dict[str, int | bool]:
    """The figures of a guest without tmem."""
    names = ("succ_gets", "failed_gets", "puts", "invalidates", "skipped", "absent", "owed_files")
    return {**dict.fromkeys(names, 0), "attached": False, "reattaches": 0, "disconnects": 0}
