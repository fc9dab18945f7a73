"""A malformed disk image, by the guest whose disk it is.

Tries: write rubbish over the superblock, group descriptors, bitmaps, inode tables and directories
of its own disk, below its file system.  Its own kernel has to live with it; the host looks at the
image when it checks it, and when the guest is started again.

Stopped by: file system code that believes nothing on a disk (`fs.ext`, `fs.ocfs2`): an image that
makes no sense is an `ImageError` or EIO.  Nothing of the hypervisor ever reads a disk.
"""

from __future__ import annotations

from collections.abc import Iterator

from guests.adversary import Cell
from guests.workloads.job import BadParameters
from ipc.abi import PAGE_BYTES

_BLOCKS = 24
_KINDS = ("bits", "random", "ones")


def run(cell: Cell) -> Iterator[None]:
    """Parameters: kind: `random` bytes, `ones`, or single `bits`; blocks: how many are
    hit, of the `span` blocks from `first` on."""
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0}
    device = cell.kernel.device
    kind = cell.text("kind", "bits")
    if kind not in _KINDS:
        raise BadParameters(f"kind must be one of {', '.join(_KINDS)}, not {kind!r}")
    blocks = cell.count("blocks", 8, 1, 10**5)
    first = cell.count("first", 0, 0, device.blocks - 1)
    span = min(cell.count("span", _BLOCKS, 1, 10**6), device.blocks - first)
    for _ in range(blocks):
        # Where metadata lies on a small disk; block 0 has the superblock.
        block = first + cell.random.randrange(span)
        data = bytearray(PAGE_BYTES)
        device.read(block, 1, memoryview(data))
        if kind == "random":
            data[:] = cell.random.randbytes(PAGE_BYTES)
        elif kind == "ones":
            data[:] = b"\xff" * PAGE_BYTES
        else:
            for _ in range(16):
                data[cell.random.randrange(PAGE_BYTES)] ^= 1 << cell.random.randrange(8)
        device.write(block, 1, data)
        report["attempts"] += 1
        yield
    device.flush()
