"""A raw image file as block device, used around the host's page cache (O_DIRECT).

A guest has a page cache of its own, and the host's keeps every block a second time: then a read
that tmem saves was only a copy anyway, and measured seconds say nothing about disks.  Here each
request goes to the disk that the file is on.

O_DIRECT wants buffers, offsets and lengths that are multiples of the disk's sector.  Blocks are; a
guest's frames are, since RAM begins at a page.  Whatever else is given (metadata buffers, `bytes`)
goes through one bounce buffer, a piece at a time.  Whether a buffer is aligned is decided here, and
not by trying: some file systems answer an unaligned request through the page cache and say nothing.

Invariants: those of every `BlockDevice`, and
  D1  no request brings a page of the file into the host's page cache, and what was there when the
      device was opened has been written and dropped;
  D2  a file system that can't keep D1 is refused when the device is opened.

How long requests wait for the disk is known (`Waits`), so that a program's time can be told from
its disk's.

O_DIRECT is not durability: the disk may have a cache of its own, and the size and blocks of the
file are metadata of the host's, so `flush` is fdatasync as before.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Final

from fs.block.device import BLOCK_BYTES, Bytes, check_extent
from fs.block.file import FileDevice
from fs.block.hostcache import backing, cached_pages
from fs.errors import ImageError, error

BOUNCE_BLOCKS: Final = 32
"""As long as the longest extent of a guest."""
_SIZES_PER_DOUBLING: Final = 8


class Waits:
    """How long this thread waited for one or more disks in their reads and writes.

    What it did itself meanwhile, in the kernel, is not in it, nor that it had to wait for a
    processor when the disk was done: where many guests share few cores, that is most of a call.
    The kernel's account of the latter misses some, so it is the median that is known and no sum.
    """

    def __init__(self, now_ns: Callable[[], int] | None = None) -> None:
        """`now_ns` is a clock that stands still while the thread runs or waits for its turn."""
        self._now_ns = now_ns or self._but_for_processors_ns
        self._began_ns = 0
        self._counts: Counter[int] = Counter()
        """Of waits by size, `_SIZES_PER_DOUBLING` for each doubling: no memory grows with time."""
        self._schedstat = -1
        if now_ns is None:
            # Of the process' first thread.  Now, because a guest's jail lets it open nothing later.
            with suppress(OSError):
                self._schedstat = os.open("/proc/self/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> None:
        self._began_ns = self._now_ns()

    def __exit__(self, *exception: object) -> None:
        waited_ns = max(1, self._now_ns() - self._began_ns)
        self._counts[round(math.log2(waited_ns) * _SIZES_PER_DOUBLING)] += 1

    @property
    def median_ns(self) -> float:
        """Within a twentieth; 0 before the first wait."""
        left = self._counts.total() / 2
        for size in sorted(self._counts):
            left -= self._counts[size]
            if left <= 0:
                return float(2.0 ** (size / _SIZES_PER_DOUBLING))
        return 0.0

    def _but_for_processors_ns(self) -> int:
        now_ns = time.perf_counter_ns() - time.thread_time_ns()
        if self._schedstat < 0:
            # A kernel without the account (CONFIG_SCHED_INFO): waiting for a processor is in it.
            return now_ns
        return now_ns - int(os.pread(self._schedstat, 64, 0).split()[1])

    def close(self) -> None:
        """No device is used with it any more."""
        if self._schedstat >= 0:
            os.close(self._schedstat)
            self._schedstat = -1


class DirectFileDevice(FileDevice):
    """`FileDevice` around the host's page cache; raises ImageError also where that can't be.

    `waits` learns how long it waits for the disk, and may be of several devices of the thread.
    """

    open_flags = FileDevice.open_flags | os.O_DIRECT

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        made_by: str = "mke2fs",
        waits: Waits | None = None,
    ) -> None:
        self._waits = waits or nullcontext()
        super().__init__(path, read_only=read_only, made_by=made_by)
        # Not counted as a guest's RAM: the host's block layer would have it.
        self._bounce = memoryview(
            mmap.mmap(-1, BOUNCE_BLOCKS * BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        )
        try:
            self._leave_page_cache()
        except OSError as reason:
            self.close()
            raise ImageError(
                f"image {self.path}: can't be read with O_DIRECT ({reason.strerror}); "
                "check the disk below it"
            ) from reason
        except ImageError:
            self.close()
            raise

    def _leave_page_cache(self) -> None:
        """Drop what the file's maker left there, and see that a read brings nothing back."""
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.read(0, 1, self._bounce)
        where = backing(self._fd)
        if where.is_memory or cached_pages(self._fd, BLOCK_BYTES):
            raise ImageError(
                f"image {self.path}: {where} can't be used around the host's page cache (O_DIRECT);"
                " put the file on a disk, in another folder, or do without direct"
            )

    def read(self, block: int, count: int, into: memoryview) -> None:
        """Read whole blocks from the disk; EIO when the file became shorter meanwhile."""
        check_extent(self, block, count, into.nbytes)
        if is_aligned(into):
            self._read(block, into[: count * BLOCK_BYTES])
            return
        for first in range(0, count, BOUNCE_BLOCKS):
            piece = self._bounce[: min(BOUNCE_BLOCKS, count - first) * BLOCK_BYTES]
            self._read(block + first, piece)
            into[first * BLOCK_BYTES : first * BLOCK_BYTES + piece.nbytes] = piece

    def _read(self, block: int, into: memoryview) -> None:
        done = 0
        while done < into.nbytes:
            with self._waits:
                step = os.preadv(self._fd, [into[done:]], block * BLOCK_BYTES + done)
            if step < BLOCK_BYTES:
                raise error(
                    errno.EIO,
                    f"image {self.path} ends inside blocks "
                    f"{block}..{block + into.nbytes // BLOCK_BYTES - 1}",
                )
            # To go on in the middle of a block would be unaligned.
            done += step - step % BLOCK_BYTES

    def write(self, block: int, count: int, data: Bytes) -> None:
        """Write whole blocks to the disk."""
        if self.read_only:
            raise error(errno.EROFS, str(self.path))
        view = memoryview(data)
        check_extent(self, block, count, view.nbytes)
        view = view[: count * BLOCK_BYTES]
        if is_aligned(view):
            self._write(block, view)
            return
        for first in range(0, count, BOUNCE_BLOCKS):
            piece = self._bounce[: min(BOUNCE_BLOCKS, count - first) * BLOCK_BYTES]
            piece[:] = view[first * BLOCK_BYTES : first * BLOCK_BYTES + piece.nbytes]
            self._write(block + first, piece)

    def _write(self, block: int, data: memoryview) -> None:
        done = 0
        while done < data.nbytes:
            with self._waits:
                step = os.pwrite(self._fd, data[done:], block * BLOCK_BYTES + done)
            if step < BLOCK_BYTES:
                raise error(errno.EIO, f"image {self.path} takes no more at block {block}")
            done += step - step % BLOCK_BYTES


def is_aligned(view: memoryview) -> bool:
    """Whether a buffer begins at a page.  One that is read-only never counts as such.

    Python tells the address of what may be written to only; and `bytes` are never aligned.
    """
    if view.readonly:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) % BLOCK_BYTES == 0
