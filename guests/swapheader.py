"""The first page of a swap area, as `mkswap` writes it and Linux reads it.

    0     1024 bytes  left to boot loaders
    1024  u32         version, 1
    1028  u32         last page; the header is page 0
    1032  u32         number of bad pages
    1036  16 bytes    uuid
    1052  16 bytes    label, ends with a zero
    1068  468 bytes   zeros
    1536  u32 each    bad pages, at most 637
    4086  10 bytes    SWAPSPACE2

Numbers are little-endian.  Differs from Linux: Linux turns an area of the other byte order round
and uses it, and cuts one that is too short for its disk down when it can; here both are refused,
since such an image was damaged or meant for somebody else.  Linux refuses bad pages in a swap file,
because a file may lie anywhere on a disk; here the file is the disk.

A uuid of version 5 says whose an area is: it is made from the guest's name.  Any other uuid (mkswap
takes random ones, version 4) says nothing about an owner.
"""

from __future__ import annotations

import os
import struct
import uuid as uuids
from typing import Final, NamedTuple

from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.block.file import FileDevice
from fs.errors import ImageError

MADE_BY: Final = "tmem mkswap"
PAGES_MIN: Final = 10
"""Header included; mkswap makes nothing smaller either."""
PAGES_MAX: Final = 2**32
LABEL_BYTES_MAX: Final = 15
UUID_BYTES: Final = 16
BAD_PAGES_MAX: Final = 637

_FIELDS: Final = struct.Struct("<III16s16s")
_FIELDS_AT: Final = 1024
_BAD_PAGES_AT: Final = 1536
_SIGNATURE: Final = b"SWAPSPACE2"
_SIGNATURE_AT: Final = BLOCK_BYTES - len(_SIGNATURE)
_OLD_SIGNATURE: Final = b"SWAP-SPACE"
_HIBERNATED: Final = (b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001")
"""Of Linux itself, of uswsusp and of another; blkid knows the same."""
_OTHER_PAGE_BYTES: Final = (8192, 16384, 32768, 65536)
_OWNERS: Final = uuids.UUID("7f1c2a9e-5d0b-4c7e-9b52-3c1f6f0d8a44")


class SwapHeader(NamedTuple):
    """What a header says; slots are the pages `1 .. last_page` that are not bad."""

    last_page: int
    bad_pages: tuple[int, ...]
    uuid: bytes
    label: str


def owner_uuid(guest: str) -> bytes:
    """The uuid of the swap area that belongs to the guest of this name."""
    return uuids.uuid5(_OWNERS, guest).bytes


def names_owner(uuid: bytes) -> bool:
    """Whether an area with this uuid belongs to one guest and to no other."""
    return uuids.UUID(bytes=uuid).version == 5


def make_swap(
    device_or_path: BlockDevice | str | os.PathLike[str], *, uuid: bytes, label: str = ""
) -> None:
    """Make all of a device, or of a file that is there, a swap area.  Raises ImageError, OSError.

    Only the first page is written, and is on the disk after the call.
    """
    if isinstance(device_or_path, str | os.PathLike):
        device = FileDevice(device_or_path, made_by=MADE_BY)
        try:
            make_swap(device, uuid=uuid, label=label)
        except ImageError as reason:
            raise ImageError(f"image {device.path}: {reason}") from None
        finally:
            device.close()
        return
    if len(uuid) != UUID_BYTES:
        raise ValueError(f"a uuid has {UUID_BYTES} bytes, not {len(uuid)}")
    check_label(label)
    check_pages(device_or_path.blocks)
    page = bytearray(BLOCK_BYTES)
    _FIELDS.pack_into(page, _FIELDS_AT, 1, device_or_path.blocks - 1, 0, uuid, label.encode())
    page[_SIGNATURE_AT:] = _SIGNATURE
    device_or_path.write(0, 1, page)
    device_or_path.flush()


def check_label(label: str) -> None:
    """Raise ImageError if a label does not fit a header."""
    size = len(label.encode())
    if size > LABEL_BYTES_MAX or "\0" in label:
        raise ImageError(
            f"the label {label!r} has {size} bytes; take at most {LABEL_BYTES_MAX}, none of them 0"
        )


def check_pages(pages: int) -> None:
    """Raise ImageError if no swap area can have so many pages, header included."""
    if not PAGES_MIN <= pages <= PAGES_MAX:
        raise ImageError(
            f"a swap area has {PAGES_MIN} to {PAGES_MAX} pages of 4 KiB, not {pages};"
            " take another size"
        )


def read_header(device: BlockDevice) -> SwapHeader:
    """The checked header of a swap area; raises ImageError."""
    page = _read(device, 0)
    _check_signature(device, page)
    version, last_page, bad_count, uuid, label = _FIELDS.unpack_from(page, _FIELDS_AT)
    if version == 1 << 24:
        raise _unusable("is a swap area of a machine with the other byte order")
    if version != 1:
        raise _unusable(f"is a swap area of version {version}, and only version 1 is known")
    if last_page == 0:
        raise _unusable("has a swap header that counts no page behind it")
    if last_page >= device.blocks:
        raise _unusable(
            f"is too short for its swap header, which counts {_pages(last_page + 1)},"
            f" and there are {_pages(device.blocks)}"
        )
    bad_pages = _bad_pages(page, bad_count, last_page)
    if len(bad_pages) == last_page:
        raise _unusable("has no usable page: its swap header calls all of them bad")
    text = label.partition(b"\0")[0].decode(errors="replace")
    return SwapHeader(last_page, bad_pages, uuid, text)


def check_owner(header: SwapHeader, uuid: bytes) -> None:
    """Raise ImageError if the area is not the one with this uuid."""
    if header.uuid != uuid:
        named = f" {header.label!r}" if header.label else ""
        raise ImageError(
            f"belongs to another guest: the swap area{named} has the uuid"
            f" {uuids.UUID(bytes=header.uuid)} and not {uuids.UUID(bytes=uuid)};"
            f" correct the path or make an area with {MADE_BY}"
        )


def _check_signature(device: BlockDevice, page: bytes) -> None:
    signature = page[_SIGNATURE_AT:]
    if signature == _SIGNATURE:
        return
    if signature == _OLD_SIGNATURE:
        raise _unusable("is a swap area of the old kind, SWAP-SPACE, which Linux gave up too")
    if signature.startswith(_HIBERNATED):
        raise ImageError(
            "holds the memory of a machine that hibernates; wake that machine up first,"
            f" or make the area again with {MADE_BY} --force"
        )
    for size_bytes in _OTHER_PAGE_BYTES:
        block = size_bytes // BLOCK_BYTES - 1
        if block < device.blocks and _read(device, block)[_SIGNATURE_AT:] == _SIGNATURE:
            raise _unusable(
                f"is a swap area of pages of {size_bytes // 1024} KiB, and a guest's have 4"
            )
    raise ImageError(f"holds no swap area; make one with {MADE_BY} or correct the path")


def _bad_pages(page: bytes, count: int, last_page: int) -> tuple[int, ...]:
    if count > BAD_PAGES_MAX:
        raise _unusable(
            f"has a swap header with {count} bad pages, and there is room for {BAD_PAGES_MAX}"
        )
    listed = struct.unpack_from(f"<{count}I", page, _BAD_PAGES_AT)
    for bad in listed:
        if not 1 <= bad <= last_page:
            raise _unusable(
                f"has a swap header that calls page {bad} bad, and its pages are 1 to {last_page}"
            )
    if len(set(listed)) < count:
        raise _unusable("has a swap header that names a bad page twice")
    return listed


def _unusable(what: str) -> ImageError:
    return ImageError(f"{what}; make it again with {MADE_BY}")


def _pages(pages: int) -> str:
    return f"{pages} pages ({pages * BLOCK_BYTES // 1024} KiB)"


def _read(device: BlockDevice, block: int) -> bytes:
    data = bytearray(BLOCK_BYTES)
    try:
        device.read(block, 1, memoryview(data))
    except OSError as reason:
        why = os.strerror(reason.errno or 0)
        raise ImageError(
            f"block {block}, where a swap area has its signature, can't be read ({why});"
            " check the disk below it"
        ) from reason
    return bytes(data)
