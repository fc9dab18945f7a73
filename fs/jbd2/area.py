"""The blocks of a device that a journal lives in.

A journal is a file: its blocks need not be neighbours. Neighbours are read and written in one
operation.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence

from fs.block.device import BLOCK_BYTES, BlockDevice, Bytes
from fs.errors import corrupt, error

RUN_BLOCKS_MAX = 256
"""Blocks in one device operation: 1 MiB."""


class Area:
    """Journal block n lives in block `blocks[n]` of `device`.

    EUCLEAN when a block is outside of the device or named twice.
    """

    def __init__(self, device: BlockDevice, blocks: Sequence[int]) -> None:
        self.device = device
        self.blocks = tuple(blocks)
        self._own = frozenset(self.blocks)
        if not self.blocks or min(self.blocks) < 0 or max(self.blocks) >= device.blocks:
            raise corrupt(f"a journal of {len(self.blocks)} blocks is not inside its device")
        if len(self._own) != len(self.blocks):
            raise corrupt("the journal has a block twice")

    def __len__(self) -> int:
        """Blocks of the journal."""
        return len(self.blocks)

    def __contains__(self, block: object) -> bool:
        """True when `block` of the device belongs to the journal."""
        return block in self._own

    def is_home(self, block: int) -> bool:
        """True when the journal may hold images of this block: on the device, not its own."""
        return 0 <= block < self.device.blocks and block not in self._own

    def read(self, index: int, count: int = 1) -> bytearray:
        """The contents of journal blocks `index .. index + count - 1`."""
        data = bytearray(count * BLOCK_BYTES)
        view = memoryview(data)
        for start, length in self._runs(index, count):
            self.device.read(
                self.blocks[index + start],
                length,
                view[start * BLOCK_BYTES : (start + length) * BLOCK_BYTES],
            )
        return data

    def write(self, index: int, data: Bytes) -> None:
        """Write whole journal blocks from `index` on."""
        view = memoryview(data)
        for start, length in self._runs(index, view.nbytes // BLOCK_BYTES):
            self.device.write(
                self.blocks[index + start],
                length,
                view[start * BLOCK_BYTES : (start + length) * BLOCK_BYTES],
            )

    def _runs(self, index: int, count: int) -> Iterator[tuple[int, int]]:
        if index < 0 or count <= 0 or index + count > len(self.blocks):
            raise error(
                errno.EINVAL, f"blocks {index}..{index + count - 1} of {len(self)} of the journal"
            )
        return neighbours(self.blocks[index : index + count])


def neighbours(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and length of each run of block numbers that follow each other, bounded in length."""
    start = 0
    for end in range(1, len(blocks) + 1):
        if (
            end == len(blocks)
            or blocks[end] != blocks[end - 1] + 1
            or end - start == RUN_BLOCKS_MAX
        ):
            yield start, end - start
            start = end


def write_home(device: BlockDevice, images: Mapping[int, Bytes]) -> None:
    """Write each image over its block, in ascending order and neighbours in one write."""
    blocks = sorted(images)
    for start, length in neighbours(blocks):
        run = [images[block] for block in blocks[start : start + length]]
        device.write(blocks[start], length, run[0] if length == 1 else b"".join(run))
