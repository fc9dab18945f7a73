"""The disk that nodes share, before a node has mounted it and after it has unmounted it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fs.block.device import BLOCK_BYTES, BlockDevice, Bytes
from fs.block.file import FileDevice
from fs.block.shared import SECTOR_BYTES
from fs.errors import ImageError
from fs.ocfs2.locking import LocalLocks
from fs.ocfs2.volume import Volume


@dataclass(frozen=True)
class Layout:
    """What a node must know of a volume before it may lock anything."""

    uuid: bytes
    slots: int
    heartbeat_sector: int
    heartbeat_nodes: int


def read_layout(image: Path) -> Layout:
    """Where the heartbeat area is; it never moves.  Raises ImageError."""
    device = FileDevice(image, read_only=True, made_by="tmem mkfs")
    try:
        volume = Volume(device, LocalLocks(), 0, lambda: 0, 64)
        blocks = volume.system_blocks(b"heartbeat")
        run = 1
        while run < len(blocks) and blocks[run] == blocks[0] + run:
            run += 1
        if not blocks or not blocks[0]:
            raise ImageError("has no heartbeat area; make it anew with tmem mkfs")
        nodes = min(run * BLOCK_BYTES // SECTOR_BYTES, 255)
        sector = blocks[0] * (BLOCK_BYTES // SECTOR_BYTES)
        return Layout(volume.super.uuid, volume.super.slots, sector, nodes)
    except ImageError as reason:
        raise ImageError(f"image {image}: {reason}") from None
    except OSError as reason:
        raise ImageError(f"image {image}: {reason.strerror}") from None
    finally:
        device.close()


class KeptDevice:
    """The shared device for a file system that closes it at unmount: the heartbeat goes on."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self.block_bytes = device.block_bytes
        self.blocks = device.blocks
        self.read_only = device.read_only
        self.flush = device.flush

    def read(self, block: int, count: int, into: memoryview) -> None:
        """Fill `into`."""
        self._device.read(block, count, into)

    def write(self, block: int, count: int, data: Bytes) -> None:
        """Write whole blocks."""
        self._device.write(block, count, data)

    def close(self) -> None:
        """Not ours to close."""
