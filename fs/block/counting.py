"""A device that counts what passes through it: the only source of every "disk reads" figure."""

from __future__ import annotations

from fs.block.device import BlockDevice, Bytes


class CountingDevice:
    """Passes everything on to `device`. Only operations that succeeded are counted.

    `reads`, `writes` and `flushes` count calls; `read_pages` and `write_pages` count blocks of 4
    KiB.
    """

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self.block_bytes = device.block_bytes
        self.blocks = device.blocks
        self.read_only = device.read_only
        self.reads = 0
        self.read_pages = 0
        self.writes = 0
        self.write_pages = 0
        self.flushes = 0

    def read(self, block: int, count: int, into: memoryview) -> None:
        """Read and count."""
        self._device.read(block, count, into)
        self.reads += 1
        self.read_pages += count

    def write(self, block: int, count: int, data: Bytes) -> None:
        """Write and count."""
        self._device.write(block, count, data)
        self.writes += 1
        self.write_pages += count

    def flush(self) -> None:
        """Flush and count."""
        self._device.flush()
        self.flushes += 1

    def close(self) -> None:
        """Close the device below."""
        self._device.close()
