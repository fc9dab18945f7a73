"""OCFS2 volumes in image files: made and checked for a person who names the file."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.block.file import FileDevice
from fs.errors import ImageError
from fs.mount import mount_image
from fs.ocfs2.fsck.checker import check
from fs.ocfs2.fsck.problems import Problem
from fs.ocfs2.mkfs import Parameters, make_volume
from guests.volumeview import volume_status
from ipc.codec import Record
from ipc.errors import ExitCode, OperatorError
from tools.units import format_size

_EXT_MAGIC = b"\x53\xef"
_EXT_MAGIC_AT = 1024 + 56


def make_image(
    path: Path,
    *,
    size_bytes: int | None,
    slots: int,
    label: bytes,
    uuid: bytes,
    cluster: bytes,
    journal_bytes: int,
    verify: bool,
    generation: int,
    now_s: int,
    force: bool,
) -> str:
    """Make a volume in the file `path`; a line that says what was made.

    Without `size_bytes` the file must be there, and is used as long as it is. Raises
    OperatorError; a file that this call has created is gone then.
    """
    parameters = Parameters(
        slots=slots,
        uuid=uuid,
        generation=generation,
        now_s=now_s,
        label=label,
        cluster=cluster,
        journal_bytes=journal_bytes,
        attributes=verify,
    )
    existed = path.exists()
    try:
        parameters.check()
        fresh = _prepare(path, size_bytes, force=force)
        device = FileDevice(path, made_by="tmem mkfs")
        try:
            make_volume(device, parameters, fresh=fresh)
        finally:
            device.close()
    except ImageError as reason:
        if not existed:
            path.unlink(missing_ok=True)
        text = str(reason)
        text = text if text.startswith("image ") else f"image {path}: {text}"
        raise OperatorError(text, ExitCode.USAGE) from None
    except OSError as reason:
        if not existed:
            path.unlink(missing_ok=True)
        why = reason.strerror or str(reason)
        raise OperatorError(f"image {path}: can't be written: {why}", ExitCode.NO_INPUT) from None
    size = format_size(path.stat().st_size)
    return f"{path}: an OCFS2 volume of {size} with {slots} slots, uuid {uuid.hex()}"


def _prepare(path: Path, size_bytes: int | None, *, force: bool) -> bool:
    """Make the file or check it; True when it reads as zeros."""
    if not path.exists():
        if size_bytes is None:
            raise ImageError("no such file; say how large it shall be with --size")
        with path.open("xb") as file:
            file.truncate(size_bytes // BLOCK_BYTES * BLOCK_BYTES)
        return True
    device = FileDevice(path, made_by="tmem mkfs")
    try:
        is_empty = all(not any(_head(device, block)) for block in range(min(3, device.blocks)))
    finally:
        device.close()
    if not is_empty and not force:
        raise ImageError("there is something in this file; overwrite it with --force")
    if size_bytes is not None:
        os.truncate(path, size_bytes // BLOCK_BYTES * BLOCK_BYTES)
    return False


def stat_image(path: Path) -> Record:
    """What `tmem fs stat` shows of the file system in the file `path`, which is not changed.

    Nodes have numbers only: their names are the cluster's. Raises OperatorError.
    """
    try:
        fs = mount_image(
            path,
            clock_ns=time.time_ns,
            read_only=True,
            open_device=partial(FileDevice, made_by="tmem mkfs"),
        )
    except ImageError as reason:
        raise OperatorError(str(reason), ExitCode.NO_INPUT) from None
    try:
        return volume_status(fs, ())
    except (ImageError, OSError) as reason:
        raise OperatorError(f"image {path}: {reason}", ExitCode.NO_INPUT) from None
    finally:
        fs.unmount()


def check_image(path: Path) -> list[Problem]:
    """What is wrong with the volume in the file `path`; `ImageError` when it can't be checked."""
    device = FileDevice(path, read_only=True, made_by="tmem mkfs")
    try:
        return check(device)
    except ImageError as reason:
        if _is_ext(device):
            raise ImageError(
                f"image {path}: is of ext2, ext3 or ext4, and this command checks OCFS2; use"
                f" e2fsck -fn {path}"
            ) from None
        raise ImageError(f"image {path}: {reason}") from None
    finally:
        device.close()


def _is_ext(device: BlockDevice) -> bool:
    return _head(device, 0)[_EXT_MAGIC_AT : _EXT_MAGIC_AT + 2] == _EXT_MAGIC


def _head(device: BlockDevice, block: int) -> bytearray:
    data = bytearray(BLOCK_BYTES)
    device.read(block, 1, memoryview(data))
    return data
