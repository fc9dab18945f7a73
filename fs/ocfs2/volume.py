"""The parts of a mounted volume, wired together, and how an operation on it runs."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from fs.block.device import BlockDevice
from fs.dlm.modes import Mode
from fs.errors import ImageError, corrupt, error
from fs.ocfs2.attributes import Attributes
from fs.ocfs2.blocks import BlockCache
from fs.ocfs2.checksums import Capacity, Checksums
from fs.ocfs2.dinode import Dinodes, Ocfs2Inode
from fs.ocfs2.directory import Directories
from fs.ocfs2.extents import Extents
from fs.ocfs2.flags import DynFeature
from fs.ocfs2.inodelocks import InodeLocks, Rank, Wanted
from fs.ocfs2.locking import ClusterLocks
from fs.ocfs2.orphans import Orphans
from fs.ocfs2.space import Space
from fs.ocfs2.super import Superblock, system_file_names
from fs.ocfs2.transaction import MetadataJournal, Transactions

LOGGED_BLOCKS_MAX: Final = 256
"""Blocks that may wait in the log (and in memory) for the checkpoint: 1 MiB."""

Result = TypeVar("Result")


class Volume:
    """Everything of a mount but its slot. Reads the superblock and the system directory."""

    def __init__(
        self,
        device: BlockDevice,
        locks: ClusterLocks,
        node: int,
        clock_ns: Callable[[], int],
        buffer_blocks: int,
    ) -> None:
        self.device = device
        self.node = node
        self.now_ns = clock_ns
        self.read_only = False
        self.has_journal = False
        self.super = Superblock(device)
        cache = BlockCache(device, buffer_blocks)
        self.transactions = Transactions(device, cache, None, LOGGED_BLOCKS_MAX)
        self.dinodes = Dinodes(self.transactions, self.super.fs_generation, self.super.blocks)
        if self.super.has_attributes:
            self.dinodes.features |= DynFeature.HAS_XATTR
        self.extents = Extents(self.transactions, self.dinodes, self.super.blocks)
        self.directories = Directories(self.transactions, self.extents, self.super.blocks)
        self.locks = InodeLocks(locks, node, self.transactions, self.dinodes, clock_ns)
        self.locks.system_blocks |= {self.super.root_block, self.super.system_dir_block}
        self.system_dir = self.locks.inode(self.super.system_dir_block)
        self.system = self._system_files()
        self.checksums: Checksums | None = None
        """Of the pages of files, if this mount keeps them."""
        self.space = Space(
            self.super, self.transactions, self.dinodes, self.extents, self.locks, self.system
        )
        self.attributes = Attributes(
            device,
            self.transactions,
            self.extents,
            self.space,
            self.super.fs_generation,
            self.super.uuid_hash,
        )
        self.orphans = Orphans(
            self.transactions, self.dinodes, self.directories, self.locks, self.space, self.system
        )

        # What was read until here may be changed by other nodes before anyone hears of it.
        self.locks.doubt_all(also_held=True)

    def _system_files(self) -> dict[bytes, Ocfs2Inode]:
        wanted = system_file_names(self.super.slots)
        files: dict[bytes, Ocfs2Inode] = {}
        with self.locked(self.system_dir, Mode.PR):
            if not self.system_dir.is_dir:
                raise corrupt("the system directory is something else")
            for entry in self.directories.entries(self.system_dir):
                if entry.name in wanted:
                    self.locks.system_blocks.add(entry.ino)
                    files[entry.name] = self.locks.inode(entry.ino)
        for name, kind in wanted.items():
            if name not in files:
                raise ImageError(f"has no system file {name.decode()}; repair it with fsck.ocfs2")
            with self.locked(files[name], Mode.PR):
                if files[name].mode & 0o170000 != kind or not files[name].is_system:
                    raise corrupt(f"system file {name.decode()} is something else")
        if len({inode.ino for inode in files.values()}) != len(files):
            raise corrupt("two system files have the same inode")
        return files

    def use_journal(self, journal: MetadataJournal, slot: int) -> None:
        """Changes go through the journal of this slot from now on."""
        self.transactions.use_journal(journal)
        self.has_journal = True
        self.space.slot = slot

    def system_blocks(self, name: bytes) -> list[int]:
        """The data blocks of a system file."""
        inode = self.system[name]
        with self.locked(inode, Mode.PR):
            if inode.clusters > self.super.blocks:
                raise corrupt(f"system file {name.decode()} is larger than the volume")
            return self.extents.map(inode, 0, inode.clusters)

    def keep_checksums(self, random_bytes: Callable[[int], bytes], capacity: Capacity) -> None:
        """Before anything of a file is read or changed."""
        self.checksums = Checksums(
            self.transactions,
            self.dinodes,
            self.attributes if self.super.has_attributes else None,
            random_bytes,
            self._make_checksums_room,
            capacity,
        )
        self.transactions.before_commit = self.checksums.close

    def _make_checksums_room(self, file: Ocfs2Inode) -> None:
        """For a file that has its clusters already; it does without when space runs out."""
        checksums = self.checksums
        assert checksums is not None

        def body() -> None:
            checksums.make_room(file)
            self.dinodes.store(file)

        try:
            self.run([Wanted(Rank.INODE, file.ino, file), self.space.wants_clusters], body)
        except OSError as reason:
            if reason.errno != errno.ENOSPC:
                raise

    # How an operation runs

    @contextmanager
    def locked(self, inode: Ocfs2Inode, mode: Mode) -> Iterator[None]:
        """The meta lock of an inode, in use."""
        self.locks.acquire(inode, mode)
        try:
            yield
        finally:
            self.locks.release(inode, mode)

    def run(self, wanted: Iterable[Wanted], body: Callable[[], Result]) -> Result:
        """Do `body` as one operation, all or nothing, with these locks in EX.

        When space runs out and some was freed since the last commit, that is given free for use
        by a commit and the operation is tried once more.
        """
        self.check_writable()
        wants = list(wanted)
        try:
            return self.locks.run(wants, body)
        except OSError as reason:
            if reason.errno != errno.ENOSPC or not self.transactions.freed:
                raise
        self.transactions.commit()
        return self.locks.run(wants, body)

    def check_writable(self) -> None:
        """EROFS when nothing may be changed."""
        if self.read_only or self.transactions.aborted:
            raise error(errno.EROFS)

    def touch(self, *inodes: Ocfs2Inode) -> None:
        """These inodes' fields are about to be changed by the operation."""
        for inode in inodes:
            self.transactions.touch(inode)

    def stamp(self, directory: Ocfs2Inode) -> None:
        """A directory's entries changed: set its times and store it."""
        directory.mtime_ns = directory.ctime_ns = self.now_ns()
        self.dinodes.store(directory)
