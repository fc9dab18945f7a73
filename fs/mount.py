"""From the path of an image file to a mounted file system.

The one place that puts the image's name in front of what is wrong with it, and that closes the
image again when it can't be mounted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

from fs.block.device import BlockDevice
from fs.block.file import FileDevice
from fs.errors import ImageError
from fs.ext.filesystem import BUFFERS_BLOCKS, ExtFileSystem
from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.locking import ClusterLocks
from fs.ocfs2.super import is_ocfs2


def mount_image(
    path: str | os.PathLike[str],
    *,
    clock_ns: Callable[[], int],
    buffer_blocks: int = BUFFERS_BLOCKS,
    read_only: bool = False,
    stack: Callable[[BlockDevice], BlockDevice] = lambda device: device,
    locks: ClusterLocks | None = None,
    node: int = 0,
    live_nodes: Callable[[], Collection[int]] | None = None,
    node_label: Callable[[int], str] = "node {}".format,
    open_device: Callable[..., BlockDevice] = FileDevice,
    keep_checksums: bool = False,
) -> ExtFileSystem | Ocfs2:
    """Mount the image at `path`, ext2 or OCFS2; `ImageError` when that is not possible.

    `stack` may put devices on the image, such as `CountingDevice`. `unmount` closes the image.
    `locks`, `node`, `live_nodes`, `node_label` and `keep_checksums` are for OCFS2, see there;
    `open_device(path, read_only=...)` opens an image that several nodes share.
    """
    device = stack(open_device(path, read_only=read_only))
    try:
        if is_ocfs2(device):
            return Ocfs2(
                device,
                clock_ns=clock_ns,
                locks=locks,
                node=node,
                live_nodes=live_nodes,
                node_label=node_label,
                buffer_blocks=buffer_blocks,
                read_only=read_only,
                keep_checksums=keep_checksums,
            )
        return ExtFileSystem(
            device, clock_ns=clock_ns, buffer_blocks=buffer_blocks, read_only=read_only
        )
    except ImageError as reason:
        device.close()
        raise ImageError(f"image {os.fspath(path)}: {reason}") from reason
    except BaseException:
        device.close()
        raise
