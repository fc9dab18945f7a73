"""The block device interface: numbered blocks of 4 KiB, the same size as a page of memory.

One size for block and page is deliberate: a page of a file is exactly one block, so a page cache,
tmem and the disk all speak of the same unit and no read-modify-write of part of a block is ever
needed.

Invariants of every device:
  I1  a read or write inside `[0, blocks)` moves whole blocks or raises `OSError`; nothing is ever
      short;
  I2  after `flush()` returns, all writes that returned before it survive a power cut;
  I3  a device is used by one thread at a time.
"""

from __future__ import annotations

import errno
from typing import Final, Protocol

BLOCK_BYTES: Final = 4096

Bytes = bytes | bytearray | memoryview
"""What may be written to a device.

Anything contiguous with the buffer protocol that Python 3.11 can name.
"""


class BlockDevice(Protocol):
    """Blocks `0 .. blocks-1` of `block_bytes` each.

    Errors are `OSError` (EIO unless a device says otherwise).
    """

    @property
    def block_bytes(self) -> int:
        """Bytes in a block: always `BLOCK_BYTES` here."""
        ...

    @property
    def blocks(self) -> int:
        """Whole blocks that the device holds."""
        ...

    @property
    def read_only(self) -> bool:
        """True when `write` raises EROFS."""
        ...

    def read(self, block: int, count: int, into: memoryview) -> None:
        """Fill `into[: count * block_bytes]` from `count` blocks that start at `block`."""
        ...

    def write(self, block: int, count: int, data: Bytes) -> None:
        """Write `count` blocks that start at `block`.

        `data` holds exactly `count * block_bytes` bytes.
        """
        ...

    def flush(self) -> None:
        """Make every earlier write durable."""
        ...

    def close(self) -> None:
        """Give the device back; closing twice is allowed."""
        ...


def check_extent(device: BlockDevice, block: int, count: int, length_bytes: int) -> None:
    """Raise `OSError` EINVAL when an extent leaves the device or its buffer is too small.

    Block numbers come from a disk image in the end, so this is a check and not an assertion.
    """
    if (
        count <= 0
        or block < 0
        or block + count > device.blocks
        or length_bytes < count * device.block_bytes
    ):
        raise OSError(
            errno.EINVAL,
            f"blocks {block}..{block + count - 1} of {device.blocks}, buffer of {length_bytes}",
        )
