"""Every bound of the transports, with its unit and reason, and what a cluster takes of the kernel.

Message queues are the scarce thing.  Linux charges each queue to RLIMIT_MSGQUEUE of its owner
(819,200 bytes unless raised) and counts it against fs.mqueue.queues_max (256 for the whole IPC
namespace).  When either runs out mq_open(3) fails with EMFILE or ENOSPC, whose texts speak of
files; `explain_queue_limit` says it properly, before anything was started.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Final, NamedTuple

from ipc.abi import BATCH_ENTRY_BYTES, EXTENT_PAGES_MAX, PAGE_BYTES, REPLY_BYTES, REQUEST_BYTES

GUESTS_MAX: Final = 256
"""Guest records in an arena; the kernel's queue count allows 128 with two queues each."""
POOLS_PER_GUEST: Final = 64
"""Xen had 16; a pool costs one record of 48 bytes."""
GUEST_NAME_CHARACTERS_MAX: Final = 31

QUEUES_PER_GUEST: Final = 2
REQUEST_QUEUE_MESSAGES: Final = 8
"""Calls are synchronous, so one would do; eight let a guest send ahead and still bound a flood."""
REPLY_QUEUE_MESSAGES: Final = 8
"""As many as requests: a reply always has room unless the guest stopped reading."""

WINDOW_SLOTS: Final = EXTENT_PAGES_MAX
WINDOW_TABLE_OFFSET: Final = PAGE_BYTES
"""Page 0 of a window is the shared info page, page 1 the batch table."""
WINDOW_CALL_OFFSET: Final = 2 * PAGE_BYTES
"""Of the CALL_BLOCK, which only the guest writes."""
WINDOW_COMPLETION_OFFSET: Final = 3 * PAGE_BYTES
"""Of the COMPLETION_BLOCK, which only the hypervisor writes."""
WINDOW_SLOTS_OFFSET: Final = 4 * PAGE_BYTES
WINDOW_BYTES: Final = WINDOW_SLOTS_OFFSET + WINDOW_SLOTS * PAGE_BYTES
BATCH_TABLE_BYTES: Final = EXTENT_PAGES_MAX * BATCH_ENTRY_BYTES

PATIENCE_SECONDS: Final = 0.1
"""How long a guest waits for a reply before it looks whether the hypervisor still lives.  It is
not a time-out of the call: with a living hypervisor the guest goes on waiting."""
YIELDS_MAX: Final = 50
"""How often each side of a ring gives the processor away before it sleeps: some 30 us if nobody
else wants it."""
SOON_NS: Final = 100_000
"""A call that comes this long after the last one makes up for looking for it: about the time that
waking a process on another core takes, and looking itself."""
SLOW_YIELD_NS: Final = 1_000_000
"""A yield that takes this long gave a whole time slice to somebody who computes."""
STRETCH_NS: Final = 200_000
"""The hypervisor serves rings for this long, and the round to its end, before it looks at the
queues again."""
BACK_OFF_CALLS_MIN: Final = 32
"""After a slow yield a side sleeps at once for this many calls."""
BACK_OFF_CALLS_MAX: Final = 4096
"""Each further slow yield doubles their number up to this; as many calls without one forget it."""

HANDSHAKE_SECONDS: Final = 5.0
"""A peer that does not finish the attach handshake in this time is dropped."""
HANDSHAKES_MAX: Final = 16
"""Unfinished handshakes at a time; more wait in the socket's backlog."""
CONTROL_MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024

# struct msg_msg (48) and struct posix_msg_tree_node (48) on 64-bit Linux, one each a message slot
# (ipc/mqueue.c, mqueue_get_inode); agrees with the queues counted on Linux 6.18 for eight shapes.
KERNEL_BYTES_PER_MESSAGE: Final = 96


def queue_bytes(messages: int, message_bytes: int) -> int:
    """Bytes that one queue of this shape charges to RLIMIT_MSGQUEUE."""
    return messages * (message_bytes + KERNEL_BYTES_PER_MESSAGE)


def queue_bytes_needed(guests: int) -> int:
    """Bytes of RLIMIT_MSGQUEUE that a cluster of `guests` takes."""
    requests = queue_bytes(REQUEST_QUEUE_MESSAGES, REQUEST_BYTES)
    replies = queue_bytes(REPLY_QUEUE_MESSAGES, REPLY_BYTES)
    return guests * (requests + replies)


class QueueLimits(NamedTuple):
    """The kernel's message-queue limits as this process meets them; -1 means no limit."""

    rlimit_bytes: int
    queues_max: int
    messages_max: int
    message_bytes_max: int

    @property
    def guests_max(self) -> int:
        """Guests that fit if nobody else of this user, or of this machine, holds a queue."""
        bounds = [GUESTS_MAX]
        if self.rlimit_bytes >= 0:
            bounds.append(self.rlimit_bytes // queue_bytes_needed(1))
        if self.queues_max >= 0:
            bounds.append(self.queues_max // QUEUES_PER_GUEST)
        return min(bounds)


def read_queue_limits(proc: Path = Path("/proc/sys/fs/mqueue")) -> QueueLimits:
    """RLIMIT_MSGQUEUE (soft) and /proc/sys/fs/mqueue; an unreadable file is no limit."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_MSGQUEUE)

    def read(name: str) -> int:
        try:
            return int((proc / name).read_text())
        except (OSError, ValueError):
            return -1

    return QueueLimits(
        -1 if soft == resource.RLIM_INFINITY else soft,
        read("queues_max"),
        read("msg_max"),
        read("msgsize_max"),
    )


def explain_queue_limit(guests: int, limits: QueueLimits) -> str | None:
    """One line that says why `guests` don't fit under `limits` and what to do; None if they do."""
    if 0 <= limits.messages_max < REQUEST_QUEUE_MESSAGES:
        return (
            f"queues of {REQUEST_QUEUE_MESSAGES} messages are needed but fs.mqueue.msg_max is "
            f"{limits.messages_max}; raise it with sysctl fs.mqueue.msg_max=10"
        )
    if 0 <= limits.message_bytes_max < REQUEST_BYTES:
        return (
            f"messages of {REQUEST_BYTES} bytes are needed but fs.mqueue.msgsize_max is "
            f"{limits.message_bytes_max}; raise it with sysctl fs.mqueue.msgsize_max=8192"
        )
    if guests <= limits.guests_max:
        return None
    if guests > GUESTS_MAX:
        return f"{guests} guests are more than the {GUESTS_MAX} that one hypervisor serves"
    queues = guests * QUEUES_PER_GUEST
    if 0 <= limits.queues_max < queues:
        return (
            f"{guests} guests need {queues} message queues but fs.mqueue.queues_max is "
            f"{limits.queues_max} ({limits.guests_max} guests fit); use fewer guests or raise it "
            f"with sysctl fs.mqueue.queues_max={queues}"
        )
    return (
        f"{guests} guests need {queue_bytes_needed(guests)} bytes of message queues but this user "
        f"may hold {limits.rlimit_bytes} ({limits.guests_max} guests fit); use fewer guests or "
        f"raise ulimit -q"
    )
