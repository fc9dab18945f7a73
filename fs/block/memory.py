"""A device in memory, for tests and for what is made once and thrown away.

Copies share the contents of blocks until one of them is written, so thousands of states of one
image are cheap.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from fs.block.device import BLOCK_BYTES, Bytes, check_extent
from fs.errors import error


class MemoryDevice:
    """`contents` gives each block; `MemoryDevice.empty` makes one of zeros."""

    block_bytes = BLOCK_BYTES

    def __init__(self, contents: Sequence[bytes], *, read_only: bool = False) -> None:
        self.contents = list(contents)
        self.blocks = len(self.contents)
        self.read_only = read_only

    @classmethod
    def empty(cls, blocks: int) -> MemoryDevice:
        """So many blocks of zeros."""
        return cls([bytes(BLOCK_BYTES)] * blocks)

    def copy(self) -> MemoryDevice:
        """A device with the same contents."""
        return MemoryDevice(self.contents)

    def read(self, block: int, count: int, into: memoryview) -> None:
        """Read whole blocks."""
        check_extent(self, block, count, into.nbytes)
        into[: count * BLOCK_BYTES] = b"".join(self.contents[block : block + count])

    def write(self, block: int, count: int, data: Bytes) -> None:
        """Write whole blocks."""
        if self.read_only:
            raise error(errno.EROFS, "a device in memory")
        view = memoryview(data)
        check_extent(self, block, count, view.nbytes)
        for number in range(count):
            self.contents[block + number] = bytes(
                view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            )

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to give back."""
