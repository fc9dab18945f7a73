"""Swap files: made for a person who names the file, and the one of each guest of a cluster.

A guest's own swap file is made anew for each start of its cluster, has the uuid that belongs to the
guest's name (`guests.swapheader.owner_uuid`), and goes with the cluster.  One that was made before
is used in place, unless its uuid says that it belongs to another guest.

The blocks of a file of a given size are allocated, so that no guest finds the host's disk full
when it is short of memory, and so that Linux takes it, which refuses swap files with holes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from fs.block.device import BLOCK_BYTES
from fs.block.file import FileDevice
from fs.errors import ImageError
from guests.swapheader import (
    LABEL_BYTES_MAX,
    MADE_BY,
    check_label,
    check_owner,
    check_pages,
    make_swap,
    names_owner,
    owner_uuid,
    read_header,
)
from ipc.errors import ExitCode, OperatorError
from tools.units import format_size

_HEAD_BLOCKS: Final = 3
"""Where every file system has something: they are zero in a file that is free to take."""


@dataclass(frozen=True)
class Swap:
    """The swap of a guest: `image`, or a file of `size_bytes` to be made; its uuid."""

    guest: str
    uuid: bytes
    size_bytes: int = 0
    image: Path | None = None

    def path(self, folder: Path) -> Path:
        """The file that the guest uses; `folder` is that of the cluster's images."""
        return self.image or folder / f"{self.guest}.swap"

    def make(self, folder: Path) -> None:
        """Make the file if it is to be a new one; raises OperatorError."""
        if self.image is not None:
            return
        path = self.path(folder)
        path.unlink(missing_ok=True)
        try:
            _create(path, self.size_bytes)
            make_swap(path, uuid=self.uuid, label=self.guest[:LABEL_BYTES_MAX])
        except OSError as reason:
            path.unlink(missing_ok=True)
            raise OperatorError(
                f"{self.guest}: can't make a swap file of {format_size(self.size_bytes)} at {path}:"
                f" {reason.strerror}",
                ExitCode.UNAVAILABLE,
            ) from None


def prepare_swap(guest: str, size_bytes: int | None, image: str | None) -> Swap | None:
    """The swap that a guest shall have, by size or as an image that is there.

    Raises OperatorError for an image that can't be used, before anything is started.
    """
    if image is None:
        return None if size_bytes is None else Swap(guest, owner_uuid(guest), size_bytes)
    path = Path(image).absolute()
    try:
        device = FileDevice(path, made_by=MADE_BY)
    except ImageError as reason:
        raise OperatorError(f"{guest}: {reason}", ExitCode.NO_INPUT) from None
    try:
        header = read_header(device)
        if names_owner(header.uuid):
            check_owner(header, owner_uuid(guest))
    except ImageError as reason:
        raise OperatorError(f"{guest}: image {path}: {reason}", ExitCode.NO_INPUT) from None
    finally:
        device.close()
    return Swap(guest, header.uuid, image=path)


def make_swap_file(
    path: Path, *, size_bytes: int | None, label: str, uuid: bytes, force: bool
) -> str:
    """Make a swap area in the file `path`; a line that says what was made.

    Without `size_bytes` the file must be there, and is used as long as it is. Raises
    OperatorError; a file that this call has created is gone then.
    """
    existed = path.exists()
    try:
        # Before a file that is there is made longer or shorter.
        check_label(label)
        if size_bytes is not None:
            check_pages(size_bytes // BLOCK_BYTES)
        if existed:
            _take(path, size_bytes, force=force)
        elif size_bytes is None:
            raise ImageError("no such file; say how large it shall be with --size")
        else:
            _create(path, size_bytes)
        make_swap(path, uuid=uuid, label=label)
    except ImageError as reason:
        text = str(reason)
        text = text if text.startswith("image ") else f"image {path}: {text}"
        raise OperatorError(text, ExitCode.USAGE) from None
    except OSError as reason:
        if not existed:
            path.unlink(missing_ok=True)
        why = reason.strerror or str(reason)
        raise OperatorError(f"image {path}: can't be written: {why}", ExitCode.NO_INPUT) from None
    size = format_size((path.stat().st_size // BLOCK_BYTES - 1) * BLOCK_BYTES)
    named = f", label {label}" if label else ""
    return f"{path}: a swap area of {size}, uuid {UUID(bytes=uuid)}{named}"


def _create(path: Path, size_bytes: int) -> None:
    # Nobody but its owner may read what a guest had in memory.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    _resize(path, size_bytes)


def _take(path: Path, size_bytes: int | None, *, force: bool) -> None:
    """Make a file ready that is there: one that is empty or a swap area already, or any."""
    if path.stat().st_size:
        device = FileDevice(path, made_by=MADE_BY)
        try:
            if not force and not _is_zero(device) and not _is_swap(device):
                raise ImageError("there is something in this file; overwrite it with --force")
        finally:
            device.close()
    if size_bytes is not None:
        _resize(path, size_bytes)


def _resize(path: Path, size_bytes: int) -> None:
    """Give a file so many whole blocks, all of them with a place on the disk."""
    size_bytes = size_bytes // BLOCK_BYTES * BLOCK_BYTES
    with path.open("r+b") as file:
        file.truncate(size_bytes)
        os.posix_fallocate(file.fileno(), 0, size_bytes)


def _is_zero(device: FileDevice) -> bool:
    head = bytearray(min(_HEAD_BLOCKS, device.blocks) * BLOCK_BYTES)
    device.read(0, len(head) // BLOCK_BYTES, memoryview(head))
    return not any(head)


def _is_swap(device: FileDevice) -> bool:
    try:
        read_header(device)
    except ImageError:
        return False
    return True
