"""The tmem hypercall ABI: operations, statuses, flags and the layout of every message.

`ipc/ABI.md` is generated from this module; a client in another language needs nothing else.

Differences from Xen's `public/tmem.h`, and why:

* A call moves up to 64 pages (an *extent* of consecutive indexes of one object, or a *batch* of
  unrelated handles), because one call a page was the main complaint about the original.
  The reply carries a result bit for each page.
* Page bytes travel through the guest's *window*, a shared mapping of page slots, so a message is
  64 bytes whatever it moves.  Xen named a guest frame; a process has none.
* A refusal carries a `Reason`.  Xen's guest could not tell "full" from "not allowed".
* A malformed call gets the FAULT flag with -EINVAL, where Xen spread -EINVAL, -EFAULT and silence.
* Everything is little-endian and of fixed width, so a 32-bit client sees the same bytes.
* SHARED together with PERSIST is a legal pool type (Xen refused it).  Shared pools are named by
  the ABI but this revision answers them with -EPERM and Reason.SHARED_NOT_SERVED: Xen silently
  made such a pool private, and a guest that is not told can't be coherent.

Operation numbers, pool flag bits and status values that Xen had keep their meaning.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple, NewType

SPEC_VERSION: Final = 1
"""Xen's TMEM_SPEC_VERSION: 1 is the one with 192-bit object ids."""

ABI_REVISION: Final = 1
"""Counts changes of this document; answered by VERSION and checked when a guest attaches."""

PAGE_BYTES: Final = 4096
OID_BYTES: Final = 24
UUID_BYTES: Final = 16
EXTENT_PAGES_MAX: Final = 64
"""Pages of one call: the width of the result map."""

PoolId = NewType("PoolId", int)
GuestId = NewType("GuestId", int)


class Op(IntEnum):
    """Operations; 1 to 7 are Xen's numbers."""

    NEW_POOL = 1
    DESTROY_POOL = 2
    PUT_PAGE = 4
    GET_PAGE = 5
    FLUSH_PAGE = 6
    FLUSH_OBJECT = 7
    VERSION = 32
    PUT_BATCH = 33
    GET_BATCH = 34
    FLUSH_BATCH = 35


class Status(IntEnum):
    """The result of a call: 1 done, 0 not there, else a negated Linux errno or one of Xen's two."""

    DONE = 1
    MISS = 0
    EPERM = -1
    ENOMEM = -12
    ENODEV = -19
    EINVAL = -22
    ENOSPC = -28
    ENOSYS = -38
    EFROZEN = -1000
    EEMPTY = -1001


class Reason(IntEnum):
    """Why a call was refused or faulted; 0 goes with DONE and MISS."""

    NONE = 0
    # An ordinary no.
    NO_MEMORY = 1  # every frame holds a page that may not be evicted
    FROZEN = 2
    DUPLICATE_FLUSHED = 3  # the new page could not be kept, so the old one was dropped
    NO_SUCH_POOL = 4
    POOL_EMPTY = 5
    TOO_MANY_POOLS = 6
    SHARED_NOT_SERVED = 7
    OVER_ALLOTMENT = 8
    NO_OBJECT_SLOT = 9
    # The guest broke a rule: these come with ReplyFlag.FAULT.
    BAD_LENGTH = 64
    UNKNOWN_OP = 65
    BAD_COUNT = 66
    BAD_SLOT = 67
    BAD_INDEX = 68
    RESERVED_BITS = 69
    BAD_FLAGS = 70
    BAD_POOL_FLAGS = 71
    BAD_SPEC_VERSION = 72
    BAD_PAGE_SIZE = 73
    INVALID_OID = 74


FIRST_FAULT_REASON: Final = Reason.BAD_LENGTH


class PoolFlag(IntFlag):
    """Pool flag word of NEW_POOL; bit meanings as in Xen."""

    PERSIST = 1
    SHARED = 2
    PRECOMPRESSED = 4  # reserved by Xen, never used; refused


POOL_PAGE_SIZE_SHIFT: Final = 4
POOL_PAGE_SIZE_MASK: Final = 0xF
"""Bits 4-7: log2(page bytes) - 12.  Must be 0."""
POOL_VERSION_SHIFT: Final = 24
"""Bits 24-31: SPEC_VERSION."""
POOL_RESERVED_BITS: Final = 0x00FFFF08


class CallFlag(IntFlag):
    """Per-call flags.  None is served yet: every bit must be 0 in this revision."""

    NONE = 0


class ReplyFlag(IntFlag):
    NONE = 0
    FAULT = 1  # the guest broke the ABI; the call had no effect


ANY_UUID: Final = b"\xff" * UUID_BYTES
"""The uuid that means "none": such a pool is never shared."""
INVALID_OID: Final = b"\xff" * OID_BYTES
"""Xen's sentinel (it ends a save stream); refused as an object id."""

# --- messages -----------------------------------------------------------------------------------

REQUEST: Final = struct.Struct("<IBBHII24sQQQ")
"""sequence, op, flags, count, pool, index, oid, slot, token, reserved.

NEW_POOL uses `pool` for the pool flag word and `oid` for the uuid followed by eight zero bytes."""
REPLY: Final = struct.Struct("<IiHHIQQ")
"""sequence, status, reason, flags, generation, map, value."""
BATCH_ENTRY: Final = struct.Struct("<IIII24sQ")
"""pool, index, slot, flags, oid, token."""

HELLO: Final = struct.Struct("<4sHH32s32s56s")
"""magic, abi revision, flags, guest name, token, reserved."""
WELCOME: Final = struct.Struct("<4sHHiIIIIIQ64s64s96s")
"""magic, abi revision, flags, status, guest id, generation, slots, table offset, slots offset,
window bytes, request queue, reply queue, message."""
CONFIRM: Final = struct.Struct("<4sI")
"""magic, guest id: sent by the guest when it has opened everything, answered by the same bytes."""

HELLO_MAGIC: Final = b"TMEM"
WELCOME_MAGIC: Final = b"TMWE"
CONFIRM_MAGIC: Final = b"TMOK"
BYE_MAGIC: Final = b"TMBY"

REQUEST_BYTES: Final = 64
REPLY_BYTES: Final = 32
BATCH_ENTRY_BYTES: Final = 48
HELLO_BYTES: Final = 128
WELCOME_BYTES: Final = 264
CONFIRM_BYTES: Final = 8
NAME_BYTES: Final = 32
TOKEN_BYTES: Final = 32


class WelcomeFlag(IntFlag):
    NONE = 0
    RESUMED = 1  # the guest's pools were kept (it came back after a hypervisor restart)


class Reply(NamedTuple):
    sequence: int
    status: int
    reason: int
    flags: int
    generation: int
    map: int
    value: int


def check_sizes() -> None:
    """The widths are part of the ABI; a slip here is our bug, so this asserts."""
    assert REQUEST.size == REQUEST_BYTES
    assert REPLY.size == REPLY_BYTES
    assert BATCH_ENTRY.size == BATCH_ENTRY_BYTES
    assert BATCH_ENTRY_BYTES * EXTENT_PAGES_MAX <= PAGE_BYTES
    assert HELLO.size == HELLO_BYTES
    assert WELCOME.size == WELCOME_BYTES
    assert CONFIRM.size == CONFIRM_BYTES


check_sizes()


def oid_from_int(number: int) -> bytes:
    """A 192-bit object id as its 24 little-endian bytes; `number` below 2**192."""
    return number.to_bytes(OID_BYTES, "little")


def pool_flag_word(*, persist: bool = False, shared: bool = False) -> int:
    """The flag word of NEW_POOL for 4 KiB pages and this spec version."""
    word = SPEC_VERSION << POOL_VERSION_SHIFT
    if persist:
        word |= PoolFlag.PERSIST
    if shared:
        word |= PoolFlag.SHARED
    return word
