"""A raw image file as block device.

The image is locked for as long as it is open: exclusively by one writer, or shared by readers.
The lock (`flock`) belongs to the open file, so it disappears with the process, however that ends.
Linux lets two machines mount one image and destroys it; here the second one is refused with a
line that says so.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from fs.block.device import BLOCK_BYTES, Bytes, check_extent
from fs.errors import ImageError, error


class FileDevice:
    """Blocks of the image file at `path`. A tail shorter than a block is not used.

    `made_by` is the command that makes such an image, for people who have none: whoever opens a
    volume of a cluster says so.

    Raises `ImageError` when the file is missing, not a regular file, not permitted, in use, or
    empty.
    """

    block_bytes = BLOCK_BYTES
    open_flags = os.O_CLOEXEC | os.O_NONBLOCK
    """Beside the access mode."""

    def __init__(
        self, path: str | os.PathLike[str], *, read_only: bool = False, made_by: str = "mke2fs"
    ) -> None:
        self.path = Path(path)
        self._made_by = made_by
        self.read_only = read_only
        try:
            self._fd = os.open(
                self.path, (os.O_RDONLY if read_only else os.O_RDWR) | self.open_flags
            )
        except OSError as reason:
            raise ImageError(_why_not_opened(self.path, reason, made_by)) from reason
        self._closed = False
        try:
            self.blocks = self._check_and_lock()
        except ImageError:
            self.close()
            raise

    def _check_and_lock(self) -> int:
        info = os.fstat(self._fd)
        if stat.S_ISDIR(info.st_mode):
            raise ImageError(_why_not_opened(self.path, error(errno.EISDIR), self._made_by))
        if not stat.S_ISREG(info.st_mode):
            raise ImageError(
                f"image {self.path}: is not a regular file; give the path of a raw disk image"
            )
        if info.st_size < BLOCK_BYTES:
            raise ImageError(
                f"image {self.path}: only {info.st_size} bytes long;"
                f" make it again with {self._made_by}"
            )
        try:
            fcntl.flock(
                self._fd, (fcntl.LOCK_SH if self.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB
            )
        except BlockingIOError as reason:
            raise ImageError(
                f"image {self.path}: is in use by another guest;"
                " stop that guest or give each its own image"
            ) from reason
        return info.st_size // BLOCK_BYTES

    def read(self, block: int, count: int, into: memoryview) -> None:
        """Read whole blocks; EIO when the file became shorter meanwhile."""
        check_extent(self, block, count, into.nbytes)
        size = count * BLOCK_BYTES
        done = os.preadv(self._fd, [into[:size]], block * BLOCK_BYTES)
        while done < size:
            step = os.preadv(self._fd, [into[done:size]], block * BLOCK_BYTES + done)
            if step == 0:
                raise error(
                    errno.EIO, f"image {self.path} ends inside blocks {block}..{block + count - 1}"
                )
            done += step

    def write(self, block: int, count: int, data: Bytes) -> None:
        """Write whole blocks."""
        if self.read_only:
            raise error(errno.EROFS, str(self.path))
        view = memoryview(data)
        check_extent(self, block, count, view.nbytes)
        size = count * BLOCK_BYTES
        done = os.pwrite(self._fd, view[:size], block * BLOCK_BYTES)
        while done < size:
            done += os.pwrite(self._fd, view[done:size], block * BLOCK_BYTES + done)

    def flush(self) -> None:
        """`fdatasync` of the image."""
        if not self.read_only:
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file, which gives the lock back."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)


def _why_not_opened(path: Path, reason: OSError, made_by: str) -> str:
    if reason.errno == errno.ENOENT:
        return f"image {path}: no such file; make it with {made_by} or correct the path"
    if reason.errno == errno.EISDIR:
        return f"image {path}: is a directory; give the path of a raw disk image"
    why = os.strerror(reason.errno or 0)
    return f"image {path}: can't be opened ({why}); check its path and permissions"
