"""A device that takes as long as a slower disk would.

Latency model: an operation of `count` blocks takes `seek_ns + count * transfer_ns`, plus the time
of the device below; a flush takes `seek_ns`. No queueing, no head position, no parallelism:
enough to make a saved read worth its price, not a model of any product.
"""

from __future__ import annotations

from collections.abc import Callable

from fs.block.device import BlockDevice, Bytes


class DelayingDevice:
    """Waits before it passes each operation on to `device`.

    `sleep` takes seconds, as `time.sleep` does.
    """

    def __init__(
        self,
        device: BlockDevice,
        *,
        seek_ns: int,
        transfer_ns: int,
        sleep: Callable[[float], object],
    ) -> None:
        self._device = device
        self._seek_ns = seek_ns
        self._transfer_ns = transfer_ns
        self._sleep = sleep
        self.block_bytes = device.block_bytes
        self.blocks = device.blocks
        self.read_only = device.read_only

    def _wait(self, count: int) -> None:
        self._sleep((self._seek_ns + count * self._transfer_ns) / 1e9)

    def read(self, block: int, count: int, into: memoryview) -> None:
        """Wait, then read."""
        self._wait(count)
        self._device.read(block, count, into)

    def write(self, block: int, count: int, data: Bytes) -> None:
        """Wait, then write."""
        self._wait(count)
        self._device.write(block, count, data)

    def flush(self) -> None:
        """Wait, then flush."""
        self._wait(0)
        self._device.flush()

    def close(self) -> None:
        """Close the device below."""
        self._device.close()
