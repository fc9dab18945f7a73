"""The tmem hypercall ABI: operations, statuses, flags and the layout of every message.

`ipc/ABI.md` is generated from this module (`python -m tools.abi_document`), comments and docstrings
included; a client in another language needs nothing else.

A call is one REQUEST on the guest's request queue and one REPLY with the same sequence on its
reply queue.  A call of several pages answers for each: bit i of `map` belongs to page index + i of
an extent or to entry i of a batch, and `status` is that of the first page that was not served, or
DONE.  Entries of a batch are executed in order, each as a call of one page; an entry that is
refused does not stop those behind it.  A call that breaks a rule of this document has no effect at
all: its reply has the FAULT flag, a reason of 64 or more, and status EINVAL (ENOSYS for an unknown
operation).

Differences from Xen's `public/tmem.h`, and why:

* A call moves up to 64 pages (an *extent* of consecutive indexes of one object, or a *batch* of
  unrelated handles), because one call a page was the main complaint about the original.
  The reply carries a result bit for each page.
* Page bytes travel through the guest's *window*, a shared mapping of page slots, so a message is
  64 bytes whatever it moves.  Xen named a guest frame; a process has none.
* A refusal carries a `Reason`.  Xen's guest could not tell "full" from "not allowed".
* A malformed call gets the FAULT flag with -EINVAL, where Xen spread -EINVAL, -EFAULT and silence.
* Everything is little-endian and of fixed width, so a 32-bit client sees the same bytes.
* SHARED together with PERSIST is a legal pool type (Xen refused it): a page is charged to the guest
  that put it and lives until it is flushed or the last sharer leaves.
* A guest that asks for a shared pool and may not have it gets -EPERM and a reason: SHARED_DENIED
  (no grant for this uuid), SHARED_NEEDS_UUID (the uuid is "none"), KIND_DIFFERS (ephemeral and
  persistent do not mix), TOO_MANY_SHARERS.  Xen silently made such a pool private, and a guest that
  is not told can't be coherent.  The flags of the reply say whether the pool was there already
  (JOINED) and whether this guest may only get from it (READER).
* A page of a shared pool is charged to the guest that put it, and a frozen guest is one whose own
  puts are refused; Xen looked at the pool's owner for both.
* The charge for what a guest put into a shared pool passes to another sharer when that guest has
  gone.  One that only gives its pool id back goes on paying: to join, put and leave in a loop would
  else spend what others may hold.
* A put may carry a hint (LOW, HIGH, ACTIVE), a get may leave a private ephemeral page where it is
  (KEEP), and two of Xen's reserved pool flag bits hold the pool's priority.
* Puts and flushes carry a fencing token, the number of the last exclusive grant of a lock that the
  guests have among themselves.  A put under an older one than was seen for its object is refused:
  who lost a lock without knowing it can't put an old page back.  Xen trusted all sharers to be on
  time.
* LEND moves memory between a guest's RAM and tmem.  Xen's balloon did that through the page tables
  of the guest, with a call of another subsystem; a process has no such tables.
* REPORT says that a page is not what it must be.  Xen's guests had nobody to tell.
* A flush that succeeds answers DONE while frozen; Xen did the work and answered -EFROZEN.

Operation numbers, pool flag bits and status values that Xen had keep their meaning.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple, NewType

SPEC_VERSION: Final = 1
"""Xen's TMEM_SPEC_VERSION: 1 is the one with 192-bit object ids."""

ABI_REVISION: Final = 6
"""Counts changes of this document; answered by VERSION and checked when a guest attaches."""

PAGE_BYTES: Final = 4096
OID_BYTES: Final = 24
UUID_BYTES: Final = 16
EXTENT_PAGES_MAX: Final = 64
"""Pages of one call: the width of the result map."""

PoolId = NewType("PoolId", int)
GuestId = NewType("GuestId", int)


class Op(IntEnum):
    """Operations; 1 to 7 are Xen's numbers.

    `uses` names the fields of REQUEST that an operation reads; every other field except `sequence`
    and `op` must be 0.  `map` and `value` are 0 where nothing is said.  `token` may have any value
    in the operations that use it; it is looked at in puts and flushes of shared ephemeral pools
    only, and 0 is the oldest of all.  A pool id of a shared pool whose grant was taken back answers
    EPERM with SHARED_DENIED to everything but DESTROY_POOL.
    """

    NEW_POOL = 1
    """Make a pool: `pool` holds the pool flag word, `oid` the uuid and then eight zero bytes.

    uses: pool oid
    DONE: `value` is the pool id, the smallest that is free, below 64.
    EPERM: TOO_MANY_POOLS (64 a guest, 4096 in all), and for a shared pool SHARED_DENIED,
    SHARED_NEEDS_UUID, KIND_DIFFERS or TOO_MANY_SHARERS.

    A shared pool is made by the first guest that names its uuid and joined by the others, each
    under an id of its own.  To name it twice is legal and gives a second id.
    """
    DESTROY_POOL = 2
    """Drop a pool with all its pages; its id is free at once.

    Of a shared pool that others still use only this guest's id goes; the pages stay.  Those that it
    put are charged to it until it detaches or ends, and to another sharer then.

    uses: pool
    DONE: it is gone.
    MISS: there was no such pool.
    """
    PUT_PAGE = 4
    """Store `count` pages from the window slots `slot`... as pages `index`... of an object.

    A page that is there already is replaced; if the new data can't be kept the old data is dropped
    too, so it is never readable again.  Pages that were stored stay when later ones are refused.

    `flags` may hint: LOW or HIGH (not both) priority, and ACTIVE.

    Into a shared ephemeral pool: a put whose `token` is below the newest that any put or flush of
    this object had is refused and changes nothing, whatever is there.  After a restart of the
    hypervisor, and for objects that it has not heard of for long, that may be the newest token of
    other objects of the pool; never a lower one than was seen.

    uses: flags count pool index oid slot token
    map: the pages that were stored.
    DONE: all of them.
    ENOMEM: NO_MEMORY, OVER_ALLOTMENT, or NO_OBJECT_SLOT.
    ENOSPC: DUPLICATE_FLUSHED.
    EFROZEN: FROZEN (a page that is there already is replaced all the same).
    EPERM: NOT_WRITER.
    ESTALE: STALE_TOKEN; `value` is the token that would have been needed.
    ENODEV: NO_SUCH_POOL.
    """
    GET_PAGE = 5
    """Copy pages `index`... of an object into the window slots `slot`....

    The slot of a page that is not there is left as it was.  A page that was got from a private
    ephemeral pool is removed from it, unless `flags` says KEEP; one of a persistent or shared pool
    stays.

    uses: flags count pool index oid slot token
    map: the pages that were there.
    DONE: all of them.
    MISS: the first one whose bit is clear was not there.
    EEMPTY: POOL_EMPTY, the pool has no page at all.
    EIO: DAMAGED, of a persistent pool; the other pages whose bits are clear may not be there.
    ENODEV: NO_SUCH_POOL.
    """
    FLUSH_PAGE = 6
    """Drop `count` pages of an object.  What is not there is no failure.

    A flush is never refused for its `token`; in a shared ephemeral pool it is remembered, so that
    no put under an older one is taken.

    uses: count pool index oid token
    map: the pages that were there (an absent page is served too, so the status is DONE).
    DONE: none of them is there any more.
    EPERM: NOT_WRITER.
    ENODEV: NO_SUCH_POOL.
    """
    FLUSH_OBJECT = 7
    """Drop all pages of an object.  What is not there is no failure.  `token` as in FLUSH_PAGE.

    uses: pool oid token
    DONE: `value` is the number of pages that were there.
    EPERM: NOT_WRITER.
    ENODEV: NO_SUCH_POOL.
    """
    VERSION = 32
    """Ask what is spoken.

    uses: nothing
    DONE: `value` is SPEC_VERSION in the upper 32 bits and ABI_REVISION in the lower 32.
    """
    PUT_BATCH = 33
    """As PUT_PAGE of one page for each of the first `count` entries of the batch table.

    uses: count
    map: the entries that were stored.
    ESTALE: STALE_TOKEN; `value` is the token that the first refused entry would have needed.
    """
    GET_BATCH = 34
    """As GET_PAGE of one page for each of the first `count` entries of the batch table.

    uses: count
    map: the entries that were there.
    """
    FLUSH_BATCH = 35
    """As FLUSH_PAGE of one page for each of the first `count` entries of the batch table; `slot`
    of an entry must be 0.

    uses: count
    map: the entries that were there.
    """
    LEND = 36
    """Have `index` pages of the host's memory as RAM, in all.

    For guests whose RAM and tmem are to come out of one memory.  The number is absolute, so a call
    whose fate is unknown is repeated as it is.  To have more, a guest asks and then uses what it is
    lent; to have less, it gives pages back to the host and then says so.  One call moves at most
    1024 pages, and fewer when there is no room: ephemeral pages make room as for a persistent put.
    The guest asks again as long as the answer changes.  What is lent counts against no cap and no
    allotment.  It comes back when the guest detaches or ends.

    uses: index
    DONE: `value` is the number of pages that it has now; fewer than it wants is no failure.
    ENOSYS: LENDING_OFF
    """
    REPORT = 37
    """Say that page `index` of an object, as it was got, is not what it must be.

    For guests that know better what a page holds, by a checksum of their own.  Slot `slot` of the
    window holds the page that the guest got.  If it is that very page which is there, the
    hypervisor knows who put it, when and under which token; all of this goes into the audit log.

    That the page is wrong is a claim of the guest's, and nothing but that line and a count follows
    from it: no page, pool or guest is treated otherwise.  So a guest reports first and flushes
    then; one that may only get from the pool reports as well.  Lines of the log are limited for
    each guest; what is beyond the limit is only counted.

    uses: pool index oid slot
    DONE: it was noted; the page is there, and so it is known who put it.
    MISS: it was noted; another page is there by now, or none.
    ENODEV: NO_SUCH_POOL.
    """


class Status(IntEnum):
    """The result of a call: 1 done, 0 not there, else a negated Linux errno or one of Xen's two."""

    DONE = 1  # served whole
    MISS = 0  # a page, or the pool to destroy, is not there
    EPERM = -1  # not allowed, or more than a guest may have
    EIO = -5  # the page is there, but it is not what was put
    ENOMEM = -12  # no room
    ENODEV = -19  # no such pool
    EINVAL = -22  # fault: a rule of this document was broken
    ENOSPC = -28  # no room for the new page, so the old one was dropped
    ENOSYS = -38  # fault: no such operation; or it is switched off
    ESTALE = -116  # the lock under which the page is put is not the newest
    EFROZEN = -1000  # Xen's: the guest is frozen, so no new page is taken
    EEMPTY = -1001  # Xen's: the pool holds no page at all


class Reason(IntEnum):
    """Why a call was refused (below 64) or faulted (64 and above); 0 goes with DONE and MISS."""

    NONE = 0  # nothing to explain
    # An ordinary no.
    NO_MEMORY = 1  # every frame holds a page that may not be evicted
    FROZEN = 2  # new pages are refused while the guest is frozen
    DUPLICATE_FLUSHED = 3  # the new page could not be kept, so the old one was dropped
    NO_SUCH_POOL = 4  # this guest has no pool of this id
    POOL_EMPTY = 5  # a get from a pool without a page
    TOO_MANY_POOLS = 6  # this guest has 64 pools, or all guests together 4096
    SHARED_DENIED = 7  # the administrator has not allowed this guest on this uuid, or no longer
    OVER_ALLOTMENT = 8  # the guest's persistent pages use up its share, or all its pages its cap
    NO_OBJECT_SLOT = 9  # a new object, or part of one, and no room to keep track of it
    NOT_WRITER = 10  # the guest may only get from this shared pool
    TOO_MANY_SHARERS = 11  # the shared pool has 64 members, or there are 1024 memberships in all
    SHARED_NEEDS_UUID = 12  # a shared pool can't have the uuid "none"
    KIND_DIFFERS = 13  # of an ephemeral and a persistent pool with one uuid the second one asked
    STALE_TOKEN = 14  # the object was put or flushed under a newer fencing token
    LENDING_OFF = 15  # guests of this hypervisor have their RAM for themselves
    DAMAGED = 16  # the memory that holds the page has changed by itself; it is lost
    # The guest broke a rule: these come with ReplyFlag.FAULT.
    BAD_LENGTH = 64  # a request has 64 bytes
    UNKNOWN_OP = 65  # no such operation
    BAD_COUNT = 66  # count is 0 or above 64
    BAD_SLOT = 67  # slot + count passes the window, or a flush names a slot
    BAD_INDEX = 68  # index + count passes 2**32
    RESERVED_BITS = 69  # a field or byte that must be 0 is not
    BAD_FLAGS = 70  # flags of a request or of a batch entry that the operation does not know
    BAD_POOL_FLAGS = 71  # a reserved or unserved bit of the pool flag word
    BAD_SPEC_VERSION = 72  # the pool flag word is of another spec version
    BAD_PAGE_SIZE = 73  # the pool flag word asks for other pages than 4 KiB
    INVALID_OID = 74  # the object id is all ones


FIRST_FAULT_REASON: Final = Reason.BAD_LENGTH
"""Reasons from here on come with the FAULT flag."""


class PoolFlag(IntFlag):
    """Pool flag word of NEW_POOL; bit meanings as in Xen."""

    PERSIST = 1  # persistent: kept until flushed; otherwise ephemeral: may vanish at any time
    SHARED = 2  # shared by all who name the uuid and are allowed to
    PRECOMPRESSED = 4  # reserved by Xen, never used; refused


POOL_PAGE_SIZE_SHIFT: Final = 4
"""Place of the page size in the pool flag word."""
POOL_PAGE_SIZE_MASK: Final = 0xF
"""Bits 4-7: log2(page bytes) - 12.  Must be 0."""
POOL_VERSION_SHIFT: Final = 24
"""Bits 24-31: SPEC_VERSION."""
POOL_PRIORITY_SHIFT: Final = 8
"""Place of the pool's priority in the pool flag word."""
POOL_PRIORITY_MASK: Final = 0x3
"""Bits 8-9: a Priority.  Pages of a pool of lower priority are evicted first."""
POOL_RESERVED_BITS: Final = 0x00FFFC08
"""Must be 0."""


class Priority(IntEnum):
    """Of a guest or a pool; 3 is refused."""

    NORMAL = 0  # the default
    LOW = 1  # its pages go before those of others
    HIGH = 2  # its pages go after those of others


class CallFlag(IntFlag):
    """Flags of REQUEST and BATCH_ENTRY: hints of a put, and how a get treats the page."""

    NONE = 0  # nothing to say
    LOW = 1  # put: this page is of little value
    HIGH = 2  # put: this page is of great value
    ACTIVE = 4  # put: the page was used more than once while the guest had it
    KEEP = 8  # get: leave the page in a private ephemeral pool


class ReplyFlag(IntFlag):
    """Flags of REPLY."""

    NONE = 0  # the call was served or refused
    FAULT = 1  # the guest broke the ABI; the call had no effect
    JOINED = 2  # NEW_POOL: another guest had made this shared pool
    READER = 4  # NEW_POOL: this guest may only get from the pool


ANY_UUID: Final = b"\xff" * UUID_BYTES
"""The uuid that means "none": such a pool is never shared."""
INVALID_OID: Final = b"\xff" * OID_BYTES
"""Xen's sentinel (it ends a save stream); refused as an object id."""

# --- messages -----------------------------------------------------------------------------------

REQUEST: Final = struct.Struct("<IBBHII24sQQQ")
"""sequence, op, flags, count, pool, index, oid, slot, token, reserved.

sequence: any number; the reply repeats it.  Neighbouring calls must differ.
op: the operation.
flags: CallFlag bits that the operation knows.
count: pages of an extent or entries of a batch, 1 to 64.
pool: a pool id; NEW_POOL has the pool flag word here.
index: page number in the object of the first page; index + count may be at most 2**32.
oid: object id, 192 bits of the guest's choice, all ones excepted; NEW_POOL has the uuid here.
slot: window slot of the first page; slot + count may be at most the number of slots.
token: fencing token of shared ephemeral pools; not looked at in others.
reserved: 0.
"""
REPLY: Final = struct.Struct("<IiHHIQQ")
"""sequence, status, reason, flags, generation, map, value.

sequence: of the request (of a request shorter than four bytes: those bytes, then zeros).
status: a Status.
reason: a Reason.
flags: a ReplyFlag.
generation: of the hypervisor; goes up by one with each start on the same arena.
map: bit i answers for page index + i or batch entry i; bit 0 is the lowest.
value: as the operation says.
"""
BATCH_ENTRY: Final = struct.Struct("<IIII24sQ")
"""pool, index, slot, flags, oid, token.

pool: a pool id; entries of one batch may name different pools.
index: page number in the object.
slot: window slot of the page; two entries may name one slot.
flags: CallFlag bits that the operation knows.
oid: object id.
token: as in REQUEST.
"""

HELLO: Final = struct.Struct("<4sHH32s32s56s")
"""magic, revision, flags, name, token, reserved.

magic: "TMEM".
revision: ABI_REVISION.
flags: a HelloFlag.
name: the guest's name, padded with zero bytes.
token: the 32 bytes that the guest was started with.
reserved: zeros.
"""
WELCOME: Final = struct.Struct("<4sHHiIIIIIQ64s64s96s")
"""magic, revision, flags, status, guest, generation, slots, table offset, slots offset,
window bytes, request queue, reply queue, message.

magic: "TMWE".
revision: ABI_REVISION.
flags: a WelcomeFlag.
status: DONE, or EPERM when the guest is refused: then `message` says why and the rest is 0.
guest: number of this guest; CONFIRM repeats it.
generation: as in REPLY.
slots: page slots of the window.
table offset: of the batch table, in bytes from the start of the window.
slots offset: of slot 0, likewise.
window bytes: how much to map.
request queue: its name for mq_open(3), with the leading slash, padded with zero bytes.
reply queue: likewise.
message: text for a person, UTF-8, padded with zero bytes.
"""
CONFIRM: Final = struct.Struct("<4sI")
"""magic, guest.

magic: "TMOK"; "TMBY" makes it a BYE.
guest: number of this guest, from WELCOME; 0 in a BYE.
"""

CALL_BLOCK: Final = struct.Struct("<QQ48s64s")
"""posted, sleeping, reserved, request.

posted: number of the last call; a call is made by a change of it, so it starts from 0 with 1.
sleeping: 1 while the guest sleeps in its reply queue, else 0.
reserved: zeros; not looked at.
request: REQUEST.
"""
COMPLETION_BLOCK: Final = struct.Struct("<QQ16s32s")
"""completed, sleeping, reserved, reply.

completed: the value of `posted` of the last call that was answered.
sleeping: 1 while the hypervisor does not look at `posted` unless it is rung for.
reserved: zeros.
reply: REPLY.
"""

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


class HelloFlag(IntFlag):
    """Flags of HELLO; the others must be 0."""

    NONE = 0  # calls will go through the queues
    RING = 1  # some would go through the ring; the guest must be ready to do without


class WelcomeFlag(IntFlag):
    """Flags of WELCOME."""

    NONE = 0  # the guest has no pools
    RESUMED = 1  # the guest's pools were kept (it came back after a hypervisor restart)
    RING = 2  # calls may go through the ring; granted to nobody who did not ask


class Reply(NamedTuple):
    """REPLY, unpacked."""

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
    # Halves of one writer each; nothing that is written often shares a cache line with the other's.
    assert CALL_BLOCK.size == 128
    assert COMPLETION_BLOCK.size == 64


check_sizes()


def oid_from_int(number: int) -> bytes:
    """A 192-bit object id as its 24 little-endian bytes; `number` below 2**192."""
    return number.to_bytes(OID_BYTES, "little")


PUT_HINTS: Final = CallFlag.LOW | CallFlag.HIGH | CallFlag.ACTIVE
"""Flags that a put may carry; LOW and HIGH exclude each other."""


def pool_flag_word(
    *, persist: bool = False, shared: bool = False, priority: Priority = Priority.NORMAL
) -> int:
    """The flag word of NEW_POOL for 4 KiB pages and this spec version."""
    word = SPEC_VERSION << POOL_VERSION_SHIFT | priority << POOL_PRIORITY_SHIFT
    if persist:
        word |= PoolFlag.PERSIST
    if shared:
        word |= PoolFlag.SHARED
    return word
