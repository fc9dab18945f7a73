"""From the path of an image file to a mounted file system.

The one place that puts the image's name in front of what is wrong with it, and that closes the
image again when it can't be mounted.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from fs.block.device import BlockDevice
from fs.block.file import FileDevice
from fs.errors import ImageError
from fs.ext.filesystem import BUFFERS_BLOCKS, ExtFileSystem


def mount_image(
    path: str | os.PathLike[str],
    *,
    clock_ns: Callable[[], int],
    buffer_blocks: int = BUFFERS_BLOCKS,
    read_only: bool = False,
    stack: Callable[[BlockDevice], BlockDevice] = lambda device: device,
) -> ExtFileSystem:
    """Mount the image at `path`; `ImageError` when that is not possible.

    `stack` may put devices on the image, such as `CountingDevice`. `unmount` closes the image.
    """
    device = stack(FileDevice(path, read_only=read_only))
    try:
        return ExtFileSystem(
            device, clock_ns=clock_ns, buffer_blocks=buffer_blocks, read_only=read_only
        )
    except ImageError as reason:
        device.close()
        raise ImageError(f"image {os.fspath(path)}: {reason}") from reason
    except BaseException:
        device.close()
        raise
