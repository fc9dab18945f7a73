"""A mounted OCFS2 volume: the `FileSystem` interface over the other modules of `fs.ocfs2`.

Invariants:
  I1  there is one `Ocfs2Inode` for an inode while anyone holds it (a weak map), plus the most
      recently used ones;
  I2  a method changes everything that it changes as one operation of a transaction, or nothing;
      only freeing and cutting large files take several, each of which leaves a whole file system;
  I3  a file without names is in an orphan directory until it is freed;
  I4  nothing that another node could see is kept from it: before a lock is given up all changes
      under it are home on the disk (`downconvert`).

Whoever mounts replays the journals of all slots that nobody has mounted, before its first change,
and recovers them. Whether a slot is mounted is told by its lock, as in Linux, and not by who is a
member of the cluster. `live_nodes` names nodes that are to be left alone all the same. Slots of
nodes that die later are recovered by the caller (`recover_slot`), who knows when.

Differs from Linux: no permissions, quota or attributes; no local alloc and truncate log of its
own; a mount that may not write sees the volume as if its journals were replayed, without doing so.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Final

from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.dlm.modes import Mode
from fs.errors import ImageError
from fs.filesystem import Entry, FilePages, FsStat
from fs.hooks import FileKey
from fs.inode import Inode
from fs.ocfs2 import recovery
from fs.ocfs2.checksums import Capacity, Checksums
from fs.ocfs2.dinode import FILE_CLUSTERS_MAX, Ocfs2Inode, own
from fs.ocfs2.filelocks import NodeFileLocks
from fs.ocfs2.files import Files
from fs.ocfs2.format import NAME_BYTES_MAX
from fs.ocfs2.journals import JournalState, ReplayedDevice, SlotJournal
from fs.ocfs2.locking import DENTRY, WRITE, ClusterLocks, LocalLocks, lock_block, lock_name
from fs.ocfs2.names import Names
from fs.ocfs2.orphanscan import OrphanScan
from fs.ocfs2.rename import Renames
from fs.ocfs2.volume import Volume

INODES_CACHED: Final = 1024
BUFFERS_BLOCKS: Final = 256
"""1 MiB of metadata besides what waits in the journal."""


class Ocfs2:
    """Mounts `device` as node number `node`.

    `clock_ns` gives the time since 1970, `node_label` what people call a node. With
    `keep_checksums` the pages of files can be verified (`fs.ocfs2.checksums`). Raises `ImageError`
    (one line that begins with what is wrong; the caller knows the image's name) and closes nothing
    then.
    """

    def __init__(
        self,
        device: BlockDevice,
        *,
        clock_ns: Callable[[], int],
        locks: ClusterLocks | None = None,
        node: int = 0,
        live_nodes: Callable[[], Collection[int]] | None = None,
        node_label: Callable[[int], str] = "node {}".format,
        buffer_blocks: int = BUFFERS_BLOCKS,
        read_only: bool = False,
        keep_checksums: bool = False,
        random_bytes: Callable[[int], bytes] = os.urandom,
        checksums_capacity: Capacity = Capacity(),  # noqa: B008 - can't be changed
    ) -> None:
        self.now_ns = clock_ns
        self.node = node
        self.file_bytes_max = FILE_CLUSTERS_MAX * BLOCK_BYTES
        self.slot: int | None = None
        self.was_clean = True
        self._node_label = node_label
        self._mounted = False
        self._unmounted = False
        self._pinned: bytes | None = None
        self._pages: FilePages | None = None
        self._journal: SlotJournal | None = None
        self._recent: OrderedDict[int, Ocfs2Inode] = OrderedDict()
        if locks is None:
            locks = LocalLocks()
            live_nodes = live_nodes or tuple
        self.other_nodes = NodeFileLocks(locks, node)
        try:
            self._volume = Volume(device, locks, node, clock_ns, buffer_blocks)
            locks.downconvert = self.downconvert
            self._volume.read_only = read_only or device.read_only
            if self._volume.read_only:
                self._look_through_journals(device, locks, buffer_blocks)
            if keep_checksums:
                self._volume.keep_checksums(random_bytes, checksums_capacity)
            self.device = self._volume.device
            self._files = Files(self._volume)
            self._names = Names(self._volume, self._files.hold_open)
            self._renames = Renames(self._volume, self._names)
            self._orphan_scan = OrphanScan(self._volume, self._files, self._names)
            self.root = self._root()
            if not self._volume.read_only:
                self._claim_slot(live_nodes)
            self._mounted = True
            if not self._volume.read_only:
                self._recover_dead(live_nodes)
        except BaseException as reason:
            self._unmounted = True
            if self._pinned is not None:
                # The slot is a dead one's now, and whoever mounts next sees to it.
                locks.unpin(self._pinned)
            if isinstance(reason, OSError):
                raise ImageError(
                    f"can't be mounted ({reason.strerror}); repair it with fsck.ocfs2"
                ) from reason
            raise
        self.uuid = self._volume.super.uuid
        self.features = self._volume.super.features
        self.label = self._volume.super.label.decode(errors="replace")

    # Mounting

    def _look_through_journals(
        self, device: BlockDevice, locks: ClusterLocks, buffer_blocks: int
    ) -> None:
        volume = self._volume
        images: dict[int, bytearray] = {}
        for slot in range(volume.super.slots):
            journal = recovery.slot_journal(volume, slot)
            if journal.dirty:
                self.was_clean = False
                images |= journal.unreplayed()
        if images:
            replayed = ReplayedDevice(device, images)
            self._volume = Volume(replayed, locks, self.node, self.now_ns, buffer_blocks)
            self._volume.read_only = True

    def _root(self) -> Ocfs2Inode:
        root = self._volume.locks.inode(self._volume.super.root_block)
        with self._volume.locked(root, Mode.PR):
            if not root.is_dir:
                raise ImageError("has no root directory; repair it with fsck.ocfs2")
        return root

    def _claim_slot(self, live_nodes: Callable[[], Collection[int]] | None) -> None:
        """Take a slot and its journal; what a crash left in it is put right first.

        The journals of all dead nodes come before the first change: replayed later, they would put
        older blocks over newer ones.
        """
        volume = self._volume
        locks = volume.locks.locks
        locks.acquire(recovery.SUPER_LOCK, Mode.EX)
        # Whoever had it before may have replayed journals. Of dead nodes that nobody remembers no
        # lock is held back, so what was read until here may be older, whichever lock it was under.
        volume.locks.doubt_all(also_held=True)
        try:
            slots = recovery.slot_map(volume)
            slot = slots.choose(self.node)
            if slot is None:
                # A dead node's slot is as good: what is done for its own after a crash helps both.
                slot = next(iter(self._dead_slots(live_nodes)), None)
            if slot is None:
                owners = [node for node in slots.read() if node is not None]
                taken = ", ".join(self._node_label(node) for node in owners)
                raise ImageError(f"has no free slot: all are taken, by {taken}")
            locks.pin(self._slot_lock(slot))
            self._pinned = self._slot_lock(slot)
            slots.set(slot, self.node)
            journal = recovery.slot_journal(volume, slot)
            self.was_clean = not journal.dirty
            for dead in self._dead_slots(live_nodes):
                self.was_clean = False
                recovery.replay(volume, dead)
            recovery.replay(volume, slot)
            journal.mark_dirty()
            self._journal = journal
            volume.use_journal(journal.open(self.now_ns), slot)
            self.slot = slot
            recovery.release_leftovers(volume, slot)
        finally:
            locks.release(recovery.SUPER_LOCK, Mode.EX)
        recovery.free_orphans(volume, self._files, self._names, slot)

    def _slot_lock(self, slot: int) -> bytes:
        """Who has mounted with a slot's journal holds this in EX all the time. A member of the
        cluster that has not mounted yet has not, though the slot map may still name it."""
        journal = self._volume.system[b"journal:%04d" % slot]
        return lock_name(WRITE, journal.ino, self._volume.super.fs_generation)

    def _dead_slots(self, live_nodes: Callable[[], Collection[int]] | None) -> list[int]:
        """Slots that somebody left without unmounting. Under the super lock."""
        live = live_nodes() if live_nodes is not None else ()
        locks = self._volume.locks.locks
        dead = []
        for slot, node in enumerate(self.slot_nodes()):
            if slot == self.slot or node == self.node or node in live:
                continue
            if node is None and not recovery.slot_journal(self._volume, slot).dirty:
                continue
            if locks.try_acquire(self._slot_lock(slot), Mode.EX):
                locks.release(self._slot_lock(slot), Mode.EX)
                # Kept here it would look to the next who mounts like that of one who has mounted.
                locks.drop(self._slot_lock(slot))
                dead.append(slot)
        return dead

    def _recover_dead(self, live_nodes: Callable[[], Collection[int]] | None) -> None:
        locks = self._volume.locks.locks
        locks.acquire(recovery.SUPER_LOCK, Mode.EX)
        try:
            for slot in self._dead_slots(live_nodes):
                recovery.take_slot(self._volume, slot)
            # An orphan may also lie in a slot that was given back: its last user died.
            free = [slot for slot, node in enumerate(self.slot_nodes()) if node is None]
        finally:
            locks.release(recovery.SUPER_LOCK, Mode.EX)
        # Not under the super lock: others may need it before they give up what orphans need.
        for slot in free:
            recovery.free_orphans(self._volume, self._files, self._names, slot)

    def recover_slot(self, slot: int, is_dead: Callable[[], bool] = lambda: True) -> int:
        """Take over the slot of a dead node; returns the blocks that were replayed.

        `is_dead` is asked under the super lock: its node may have come back.
        """
        locks = self._volume.locks.locks
        locks.acquire(recovery.SUPER_LOCK, Mode.EX)
        try:
            if not is_dead():
                return 0
            replayed = recovery.take_slot(self._volume, slot)
        finally:
            locks.release(recovery.SUPER_LOCK, Mode.EX)
        recovery.free_orphans(self._volume, self._files, self._names, slot)
        return replayed

    def free_orphans(self) -> None:
        """In this node's slot and in those that nobody has: a dead node had them open, perhaps."""
        for slot, node in enumerate(self.slot_nodes()):
            if node is None or slot == self.slot:
                recovery.free_orphans(self._volume, self._files, self._names, slot)

    def scan_orphans(self) -> Iterator[int]:
        """See `OrphanScan.run`."""
        return self._orphan_scan.run()

    def journals_replayed(self) -> None:
        """Some other way than by `recover_slot`: cached blocks may be older than the disk."""
        self._volume.locks.doubt_all()

    def slot_nodes(self) -> list[int | None]:
        """The node of each slot; None: free."""
        return recovery.slot_map(self._volume).read()

    def journal_states(self) -> list[JournalState]:
        """Of each slot's journal."""
        slots = range(self._volume.super.slots)
        return [recovery.slot_journal(self._volume, slot).state() for slot in slots]

    @property
    def read_only(self) -> bool:
        """True when every change raises EROFS, also after the journal could not be written."""
        return self._volume.read_only or self._volume.transactions.aborted

    # The cluster

    def attach_pages(self, pages: FilePages) -> None:
        """Where this mount's file data is cached."""
        self._pages = pages
        self._volume.locks.distrust = pages.distrust
        self._files.forget = pages.forget
        self._volume.transactions.before_commit = self._before_commit

    def _before_commit(self) -> bool:
        if self._pages is not None:
            self._pages.sync_all()
        return self._volume.checksums is not None and self._volume.checksums.close()

    @property
    def checksums(self) -> Checksums | None:
        """What tells wrong pages of files, if this mount keeps that."""
        return self._volume.checksums

    def downconvert(self, name: bytes, to: Mode) -> None:
        """Another node wants the lock `name`: make what is cached under it ready for `to`."""
        if to == Mode.NL and name.startswith(DENTRY):
            self._names.dentries.given_up(name)
        block = lock_block(name)
        if block is None or self._unmounted:
            return
        inode = self._volume.locks.known(block)
        if inode is not None and inode.is_file and self._pages is not None:
            if to == Mode.NL:
                self._pages.invalidate(inode)
            else:
                self._pages.sync(inode)
            if not self._pages.settle(inode):
                self._volume.locks.warn(block)
                if to != Mode.NL:
                    # It reads on, under a value that warns this node as well.
                    self._pages.distrust(inode)
        checksums = self._volume.checksums
        if self._volume.transactions.cache.pinned(block) or (
            checksums is not None and checksums.unsaved(block)
        ):
            self._volume.transactions.commit()
            self._volume.transactions.checkpoint()
            if checksums is not None:
                checksums.forget(block)
        if to == Mode.NL:
            self._volume.locks.given_up(block)

    def token_of(self, key: FileKey) -> int:
        """The fencing token under which this node may put pages of a file into a shared pool."""
        return self._volume.locks.locks.token(self.file_lock_name(key))

    def file_lock_name(self, key: FileKey) -> bytes:
        """The name of the lock with that token."""
        return self._volume.locks.name(key.ino)

    def lock_name(self, inode: Inode) -> bytes:
        """The name of an inode's meta lock."""
        return self._volume.locks.name(inode.ino)

    def reading(self, inode: Inode) -> AbstractContextManager[None]:
        """The inode and its pages are current inside."""
        return self._files.reading(inode)

    def writing(self, inode: Inode) -> AbstractContextManager[None]:
        """The inode and its pages are current and this node's alone inside."""
        return self._files.writing(inode)

    def opened(self, inode: Inode) -> None:
        """The first handle of a file is opened here; ENOENT when it is gone."""
        self._files.opened(inode)

    def closed(self, inode: Inode) -> None:
        """The last handle of a file is closed here."""
        self._files.closed(inode)

    # Names

    def iget(self, ino: int) -> Ocfs2Inode:
        """The inode `ino`."""
        return self._keep(self._names.iget(ino))

    def _keep(self, inode: Ocfs2Inode) -> Ocfs2Inode:
        self._recent[inode.ino] = inode
        self._recent.move_to_end(inode.ino)
        if len(self._recent) > INODES_CACHED:
            self._recent.popitem(last=False)
        return inode

    def lookup(self, directory: Inode, name: bytes) -> Ocfs2Inode:
        """The inode that `name` stands for."""
        return self._keep(self._names.lookup(directory, name))

    def readdir(self, directory: Inode) -> list[Entry]:
        """All entries but `.` and `..`."""
        return self._names.readdir(directory)

    def create(self, directory: Inode, name: bytes, mode: int) -> Ocfs2Inode:
        """A new empty regular file, open (`closed` ends that)."""
        return self._keep(self._names.create(directory, name, mode))

    def mkdir(self, directory: Inode, name: bytes, mode: int) -> Ocfs2Inode:
        """A new empty directory."""
        return self._keep(self._names.mkdir(directory, name, mode))

    def symlink(self, directory: Inode, name: bytes, target: bytes) -> Ocfs2Inode:
        """A new symbolic link."""
        return self._keep(self._names.symlink(directory, name, target))

    def readlink(self, inode: Inode) -> bytes:
        """The target of a symbolic link."""
        return self._names.readlink(inode)

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        """A further name for a file."""
        self._names.link(inode, directory, name)

    def unlink(self, directory: Inode, name: bytes) -> Ocfs2Inode:
        """Remove a name of a non-directory."""
        return self._names.unlink(directory, name)

    def rmdir(self, directory: Inode, name: bytes) -> Ocfs2Inode:
        """Remove an empty directory."""
        return self._names.rmdir(directory, name)

    def rename(
        self, old_dir: Inode, old_name: bytes, new_dir: Inode, new_name: bytes
    ) -> Ocfs2Inode | None:
        """Move a name."""
        return self._renames.rename(old_dir, old_name, new_dir, new_name)

    # Blocks

    def map_blocks(self, inode: Inode, index: int, count: int) -> list[int]:
        """Block numbers of pages; 0 beyond the last one."""
        return self._files.map(inode, index, count)

    def allocate_blocks(self, inode: Inode, index: int, count: int) -> list[int]:
        """Block numbers of pages after all up to there got blocks."""
        return self._files.allocate(inode, index, count)

    def truncate(self, inode: Inode, size: int) -> None:
        """Set the size."""
        self._files.truncate(inode, size)

    def write_inode(self, inode: Inode) -> None:
        """Record the fields of `inode`."""
        self._files.write(inode)

    def free_inode(self, inode: Inode) -> None:
        """Free an inode without names, unless another node holds it open."""
        self._recent.pop(inode.ino, None)
        self._files.free(own(inode))

    # The whole

    def sync(self) -> None:
        """Commit everything; it survives a power cut."""
        if not self.read_only:
            self._volume.transactions.sync()

    def unmount(self) -> None:
        """Free what has no names, write everything home, give the slot back, close the device."""
        if not self._mounted:
            return
        try:
            if not self.read_only:
                self._give_back()
        finally:
            self._mounted = False
            self._unmounted = True
            self.device.close()

    def _give_back(self) -> None:
        volume = self._volume
        assert self._journal is not None and self.slot is not None
        recovery.free_orphans(volume, self._files, self._names, self.slot)
        volume.transactions.close()
        locks = volume.locks.locks
        locks.acquire(recovery.SUPER_LOCK, Mode.EX)
        try:
            self._journal.mark_clean()
            recovery.slot_map(volume).set(self.slot, None)
            locks.unpin(self._slot_lock(self.slot))
        finally:
            locks.release(recovery.SUPER_LOCK, Mode.EX)

    def statfs(self) -> FsStat:
        """Space used and free; every free cluster could become an inode."""
        clusters = self._volume.space.clusters
        with self._volume.locked(clusters.inode, Mode.PR):
            total, free = clusters.total_bits, clusters.free_bits
        return FsStat(BLOCK_BYTES, total, free, total, free, NAME_BYTES_MAX)
