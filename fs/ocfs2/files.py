"""The blocks and the life of inodes: growing, cutting, freeing.

A volume of the minimal profile has no holes. A write far behind the end of a file therefore gives
it all clusters up to there, and the ones in between are filled with zeros on the disk, as Linux
does on a volume without the sparse feature. So are clusters that a file has beyond its end (a
failed write or another writer's reserve left them) before its size passes them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from fs.block.device import BLOCK_BYTES
from fs.dlm.modes import Mode
from fs.errors import corrupt, error
from fs.inode import Inode
from fs.ocfs2.dinode import FILE_CLUSTERS_MAX, Ocfs2Inode, own
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.inodelocks import Wanted
from fs.ocfs2.locking import OPEN, lock_name
from fs.ocfs2.names import wants_child
from fs.ocfs2.volume import Volume
from fs.runs import runs

CUT_RECORDS_MAX: Final = 64
"""Extents freed in one operation: bounds the blocks that it changes."""
_ZERO_BLOCKS: Final = 256


class Files:
    """What happens to an inode apart from its names."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._open: set[int] = set()
        """Inodes that this node holds open; its own open locks don't keep it from freeing them."""
        self.forget: Callable[[Inode], None] = lambda _inode: None
        """What a page cache is told of a file that is gone."""

    # Locks around data

    @contextmanager
    def reading(self, inode: Inode) -> Iterator[None]:
        """The inode and its pages are current inside."""
        with self._volume.locked(own(inode), Mode.PR):
            yield

    @contextmanager
    def writing(self, inode: Inode) -> Iterator[None]:
        """The inode and its pages are current and this node's alone inside."""
        file = own(inode)
        with self._volume.locked(file, Mode.EX):
            try:
                yield
            finally:
                self._volume.locks.changed(file.ino)

    # Blocks

    def map(self, inode: Inode, index: int, count: int) -> list[int]:
        """Block numbers of pages, 0 beyond the last one. The caller has the lock in use."""
        return self._volume.extents.map(own(inode), index, count)

    def allocate(self, inode: Inode, index: int, count: int) -> list[int]:
        """Block numbers of pages after they and all before them got blocks."""
        file = own(inode)
        volume = self._volume
        volume.check_writable()
        if index + count > FILE_CLUSTERS_MAX:
            raise error(errno.EFBIG)
        with volume.locked(file, Mode.EX):
            self._extend(file, index + count)
            self._zero(file, index)
            return volume.extents.map(file, index, count)

    def _extend(self, file: Ocfs2Inode, clusters: int) -> None:
        volume = self._volume
        checksums = volume.checksums

        def body() -> None:
            if checksums is None:
                volume.space.extend(file, clusters - file.clusters)
            else:
                with checksums.growing(file):
                    volume.space.extend(file, clusters - file.clusters)
            volume.dinodes.store(file)

        def with_checksums() -> None:
            body()
            assert checksums is not None
            checksums.make_room(file)
            volume.dinodes.store(file)

        if clusters <= file.clusters:
            return
        wants = [wants_child(file), volume.space.wants_clusters]
        if checksums is not None:
            try:
                volume.run(wants, with_checksums)
            except OSError as reason:
                if reason.errno != errno.ENOSPC:
                    raise
            else:
                return
        volume.run(wants, body)

    def _zero(self, file: Ocfs2Inode, index: int) -> None:
        """Zero the disk from the file's end up to page `index`."""
        pages = -(-file.size // BLOCK_BYTES)
        if index < pages or (index == pages and not file.size % BLOCK_BYTES):
            return
        if file.size % BLOCK_BYTES:
            self._zero_tail(file, pages - 1, file.size % BLOCK_BYTES)
        zeros = bytes(_ZERO_BLOCKS * BLOCK_BYTES)
        for start in range(pages, index, _ZERO_BLOCKS):
            blocks = self._volume.extents.map(file, start, min(_ZERO_BLOCKS, index - start))
            for run in runs(blocks):
                view = memoryview(zeros)[: run.length * BLOCK_BYTES]
                self._volume.device.write(run.block, run.length, view)

    def _zero_tail(self, file: Ocfs2Inode, page: int, used: int) -> None:
        block = self._volume.extents.map(file, page, 1)[0]
        if not block:
            raise corrupt(f"inode {file.ino} has no cluster {page}")
        data = bytearray(BLOCK_BYTES)
        self._volume.device.read(block, 1, memoryview(data))
        if any(data[used:]):
            data[used:] = bytes(BLOCK_BYTES - used)
            self._volume.device.write(block, 1, data)

    def truncate(self, inode: Inode, size: int) -> None:
        """Set the size; free what is beyond, or fill with zeros up to there."""
        file = own(inode)
        volume = self._volume
        volume.check_writable()
        clusters = -(-size // BLOCK_BYTES)
        if clusters > FILE_CLUSTERS_MAX:
            raise error(errno.EFBIG)
        with volume.locked(file, Mode.EX):
            if size > file.size:
                self._extend(file, clusters)
                self._zero(file, clusters)
            self._cut(file, clusters, size)

    def _cut(self, file: Ocfs2Inode, clusters: int, size: int) -> None:
        """Set the size, then free clusters from `clusters` on, in bounded operations."""
        volume = self._volume

        def body() -> bool:
            volume.touch(file)
            if volume.checksums is not None and not volume.checksums.cut(file, clusters):
                volume.dinodes.store(file)
                return False
            file.size = size
            file.mtime_ns = file.ctime_ns = volume.now_ns()
            done = volume.space.cut(file, clusters, CUT_RECORDS_MAX)
            volume.dinodes.store(file)
            return done

        wants: list[Wanted] = [wants_child(file)]
        if file.clusters > clusters:
            wants.append(volume.space.wants_clusters)
        while not volume.run(wants, body):
            pass

    def write(self, inode: Inode) -> None:
        """Record the fields of an inode."""
        file = own(inode)
        volume = self._volume
        volume.check_writable()
        if file.is_file and file.size > file.clusters * BLOCK_BYTES:
            raise error(errno.EINVAL, f"{file.size} bytes in {file.clusters} clusters")
        volume.run([wants_child(file)], lambda: volume.dinodes.store(file))

    # Open files

    def opened(self, inode: Inode) -> None:
        """This node holds the file open: no other node may free it. ENOENT if one did."""
        file = own(inode)
        name = lock_name(OPEN, file.ino)
        self._volume.locks.locks.acquire(name, Mode.PR)
        try:
            with self._volume.locked(file, Mode.PR):
                removed = not file.nlink
        except BaseException as reason:
            self._close(name, Mode.PR)
            if isinstance(reason, OSError) and reason.errno == errno.ESTALE:
                raise error(errno.ENOENT, f"inode {file.ino} is removed") from reason
            raise
        if removed:
            self._close(name, Mode.PR)
            if not self._volume.read_only:
                # Whoever removed it may have found it open here, and left it to this node.
                self.free_orphan(file)
            raise error(errno.ENOENT, f"inode {file.ino} is removed")
        self._open.add(file.ino)

    def hold_open(self, file: Ocfs2Inode) -> None:
        """The same for a file that was just made, and can't be gone."""
        self._volume.locks.locks.acquire(lock_name(OPEN, file.ino), Mode.PR)
        self._open.add(file.ino)

    def closed(self, inode: Inode) -> None:
        """The last handle at this node is closed."""
        self._open.discard(own(inode).ino)
        self._close(lock_name(OPEN, own(inode).ino), Mode.PR)

    def _close(self, name: bytes, mode: Mode) -> None:
        locks = self._volume.locks.locks
        locks.release(name, mode)
        locks.drop(name)

    # The end

    def free(self, inode: Inode) -> bool:
        """Free an inode without names, unless a node holds it open, this one among them.

        True when it is freed, by this call or by another node before.
        """
        file = own(inode)
        self._volume.check_writable()
        if file.ino in self._open:
            return False  # an orphan that somebody else left; its last close here frees it
        name = lock_name(OPEN, file.ino)
        if not self._volume.locks.locks.try_acquire(name, Mode.EX):
            return False  # its last closer finds it in the orphan directory
        try:
            with self._volume.locked(file, Mode.EX):
                return self._free(file)
        except OSError as reason:
            if reason.errno != errno.ESTALE:
                raise
            return True
        finally:
            self._close(name, Mode.EX)

    def free_orphan(self, inode: Inode) -> bool:
        """The same for one that nobody removed here: the page cache may know it all the same, as
        one whose dead user is distrusted, and its number will be another file's."""
        freed = self.free(inode)
        if freed:
            self.forget(inode)
        return freed

    def _free(self, file: Ocfs2Inode) -> bool:
        volume = self._volume
        if file.nlink or file.is_system:
            return False
        if not file.flags & InodeFlag.ORPHANED:
            raise corrupt(f"inode {file.ino} has no name and is no orphan")

        def body() -> bool:
            volume.touch(file)
            if not volume.attributes.free(file):
                volume.dinodes.store(file)
                return False
            done = volume.space.cut(file, 0, CUT_RECORDS_MAX)
            file.size = min(file.size, file.clusters * BLOCK_BYTES)
            volume.dinodes.store(file)
            if done:
                volume.orphans.remove(file)
                volume.dinodes.retire(file, volume.now_ns())
                volume.space.free_inode(file)
                file.gone = True
            return done

        wants = [wants_child(file), volume.orphans.wants(file.orphaned_slot)]
        if file.clusters or file.attribute_block:
            wants.append(volume.space.wants_clusters)
        while not volume.run(wants, body):
            pass
        return True
