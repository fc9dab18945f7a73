"""Clients of cleancache: one with a disk that is a dictionary, one with a kernel and a real image.

Both know their data for certain: whatever tmem answers must be what the disk holds.
"""

from __future__ import annotations

import os
import random
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

from fs.hooks import Extent, FileKey
from guests.attachment import Attachment
from guests.cleancache import Cleancache
from guests.kernel import GuestSpec, Kernel
from ipc.abi import PAGE_BYTES
from tools.image import make_file_system
from tools.sim.ledger import require
from tools.sim.programs import make_page

if TYPE_CHECKING:
    from tools.sim.cluster import Cluster
    from tools.sim.lives import Life

_FILES: Final = 6
_FILE_PAGES: Final = 40
_KERNEL_PAGES: Final = 176
"""Beside the window, the transfer frames and 8 buffers 68 frames are left for the page cache."""
_KERNEL_FILE_BYTES: Final = 45 * PAGE_BYTES


class CacheUser:
    """A page cache without pages: it evicts what it has read at once."""

    def __init__(self, cluster: Cluster, life: Life, rng: random.Random) -> None:
        self._random = rng
        self._disk: dict[tuple[FileKey, int], bytes] = {}
        self._generations = [1] * _FILES
        self._attachment = Attachment(
            partial(cluster.connect, life), cluster.now_seconds, partial(cluster.detach, life)
        )
        self._cleancache = Cleancache(self._attachment)
        self._cleancache.attach()

    def step(self) -> None:
        """Read and evict, write, truncate or remove."""
        rng = self._random
        number = rng.randrange(_FILES)
        key = FileKey(1000 + number, self._generations[number])
        index = rng.randrange(_FILE_PAGES)
        choice = rng.random()
        if choice < 0.35:
            self._read(key, index, rng.choice((1, 4, 32)))
        elif choice < 0.75:
            self._evict()
        elif choice < 0.93:
            self._cleancache.flush_page(key, index)
            self._disk[key, index] = make_page(rng)
        elif choice < 0.98:
            self._cleancache.flush_inode(key)
            for name in [name for name in self._disk if name[0] == key]:
                del self._disk[name]
        else:
            # Its pages stay in tmem, under a name that is never used again.
            self._generations[number] += 1

    def _read(self, key: FileKey, index: int, count: int) -> None:
        into = bytearray(count * PAGE_BYTES)
        found = self._cleancache.get_pages(key, index, count, memoryview(into))
        for at in range(count):
            if found >> at & 1:
                page = bytes(into)[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
                require(page == self._disk.get((key, index + at)), f"not what the disk has: {key}")

    def _evict(self) -> None:
        """Some pages of the disk, as if they had been in memory."""
        rng = self._random
        if not self._disk:
            return
        extents: list[Extent] = []
        pages: list[bytes] = []
        for _ in range(rng.randrange(1, 7)):
            key, index = rng.choice(list(self._disk))
            length = 0
            while length < 10 and (key, index + length) in self._disk:
                pages.append(self._disk[key, index + length])
                length += 1
            extents.append(Extent(key, index, length, rng.random() < 0.3))
        self._cleancache.put_extents(extents, memoryview(b"".join(pages)))

    def end(self) -> None:
        """Unmount."""
        self._cleancache.flush_fs()
        self._attachment.close()

    def bury(self) -> None:
        """Nothing of it is outside."""


class KernelUser:
    """A whole guest kernel on an image of its own, in memory."""

    def __init__(self, cluster: Cluster, life: Life, rng: random.Random) -> None:
        self._random = rng
        self._files: dict[str, bytearray] = {}
        self._image = os.memfd_create("image", os.MFD_CLOEXEC)
        self._kernel: Kernel | None = None
        os.write(self._image, _pristine_image())
        path = Path(f"/proc/self/fd/{self._image}")
        try:
            self._kernel = Kernel(
                GuestSpec(
                    life.name, path, _KERNEL_PAGES * PAGE_BYTES, path.parent, buffer_blocks=8
                ),
                clock_ns=cluster.clock_ns,
                now_seconds=cluster.now_seconds,
                connect=partial(cluster.connect, life),
                detach=partial(cluster.detach, life),
            )
        except BaseException:
            os.close(self._image)
            raise

    def step(self) -> None:
        """One file operation."""
        rng = self._random
        name = f"/f{rng.randrange(_FILES)}"
        choice = rng.random()
        if name not in self._files:
            self._files[name] = bytearray()
            self._write(name, 0, rng.choice((1, 20, 40)) * PAGE_BYTES, os.O_CREAT)
        elif choice < 0.55:
            self._read(name)
        elif choice < 0.80:
            self._write(name, rng.randrange(_KERNEL_FILE_BYTES), rng.randrange(1, 5 * PAGE_BYTES))
        elif choice < 0.90:
            size = rng.randrange(len(self._files[name]) + 1)
            self._vfs.truncate(name, size)
            del self._files[name][size:]
        elif choice < 0.95:
            del self._files[name]
            self._vfs.unlink(name)
        else:
            self._vfs.sync()

    @property
    def _vfs(self):  # type: ignore[no-untyped-def]
        assert self._kernel is not None
        return self._kernel.vfs

    def _read(self, name: str) -> None:
        content = self._files[name]
        offset = self._random.randrange(len(content) + 1)
        size = self._random.choice((PAGE_BYTES, 16 * PAGE_BYTES, 2 * _KERNEL_FILE_BYTES))
        handle = self._vfs.open(name)
        found = self._vfs.pread(handle, size, offset)
        self._vfs.close(handle)
        require(found == content[offset : offset + size], f"{name} holds something else")

    def _write(self, name: str, offset: int, size: int, flags: int = 0) -> None:
        content = self._files[name]
        data = self._random.randbytes(size)
        handle = self._vfs.open(name, os.O_WRONLY | flags)
        self._vfs.pwrite(handle, data, offset)
        self._vfs.close(handle)
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + size] = data

    def end(self) -> None:
        """Every file is right, and the image is unmounted."""
        for name, content in self._files.items():
            handle = self._vfs.open(name)
            require(
                self._vfs.pread(handle, 2 * _KERNEL_FILE_BYTES, 0) == content, f"{name} differs"
            )
            self._vfs.close(handle)
        assert self._kernel is not None
        self._kernel.stop()

    def bury(self) -> None:
        """Its disk goes as it is."""
        if self._kernel is not None:
            self._kernel.device.close()
            self._kernel = None
            os.close(self._image)


@cache
def _pristine_image() -> bytes:
    """An empty ext2 image."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        tree.mkdir()
        image = Path(folder, "image")
        make_file_system(tree, image, UUID(int=1))
        return image.read_bytes()
