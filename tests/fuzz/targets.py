"""What is fed with arbitrary bytes, and what must hold whatever they are.

`wire`     every parser of bytes that come from outside: requests, batch tables, HELLO, control
           frames.  Anything but the exception that the parser declares is a finding.
`machine`  a whole machine, its guests and its administrator (`machines`).
`ring`     the hypervisor's end of rings whose guests write anything anywhere (`rings`).
`mesh`     one end of a connection between two nodes: frames, handshake and seals (`mesh`).
`attach`, `control`            what comes through sockets (`doors`, `records`).
`locks`, `ranges`, `cluster`   what members of a cluster send each other (`peers`, `members`).
`ext`, `swap`, `ocfs2`, `journal`   what is on a disk (`disks`, `volumes`, `journals`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ipc.abi import (
    BATCH_ENTRY_BYTES,
    EXTENT_PAGES_MAX,
    FIRST_FAULT_REASON,
    INVALID_OID,
    CallFlag,
    Op,
)
from ipc.attach import HandshakeError, decode_hello
from ipc.codec import BadRecord, decode, split_frame
from ipc.errors import GuestFault
from ipc.limits import WINDOW_SLOTS
from ipc.wire import decode_batch, decode_request
from tests.fuzz.disks import fuzz_ext, fuzz_swap
from tests.fuzz.doors import fuzz_attach
from tests.fuzz.journals import fuzz_journal
from tests.fuzz.machines import fuzz_machine
from tests.fuzz.members import fuzz_cluster
from tests.fuzz.mesh import fuzz_mesh
from tests.fuzz.peers import fuzz_locks, fuzz_ranges
from tests.fuzz.reading import hold
from tests.fuzz.records import fuzz_control
from tests.fuzz.rings import fuzz_ring
from tests.fuzz.volumes import fuzz_ocfs2

_BATCHES: Final = (Op.PUT_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH)
_KNOWN_FLAGS: Final[dict[int, int]] = {
    Op.PUT_PAGE: int(CallFlag.HIGH | CallFlag.ACTIVE),
    Op.PUT_BATCH: int(CallFlag.HIGH | CallFlag.ACTIVE),
    Op.GET_PAGE: int(CallFlag.KEEP),
    Op.GET_BATCH: int(CallFlag.KEEP),
    Op.FLUSH_BATCH: 0,
}
"""The highest value that the flags of an operation may have."""


def fuzz_wire(data: bytes) -> None:
    """The first byte chooses the parser."""
    kind, rest = data[:1], data[1:]
    try:
        match kind[0] % 5 if kind else 0:
            case 0:
                _check_request(decode_request(rest))
            case 1:
                whole = len(rest) - len(rest) % BATCH_ENTRY_BYTES
                op = _BATCHES[whole // BATCH_ENTRY_BYTES % len(_BATCHES)]
                for _, _, slot, flags, oid, _ in decode_batch(rest[:whole], op):
                    hold(slot < WINDOW_SLOTS and oid != INVALID_OID, "batch entry out of bounds")
                    hold(flags <= _KNOWN_FLAGS[op], "flags of a batch entry")
            case 2:
                decode_hello(rest)
            case 3:
                hold(isinstance(decode(rest), dict), "a record is a map")
            case _:
                frame = split_frame(rest)
                hold(frame is None or len(frame[0]) + len(frame[1]) + 4 == len(rest), "frame")
    except GuestFault as fault:
        hold(fault.reason >= FIRST_FAULT_REASON, f"a fault for {fault.reason!r}")
    except (HandshakeError, BadRecord):
        pass


def _check_request(request: tuple[int, int, int, int, int, int, bytes, int, int, int]) -> None:
    _, op, flags, count, _, index, _, slot, _, reserved = request
    hold(op in tuple(Op) and not reserved, "op or reserved bits")
    hold(flags <= _KNOWN_FLAGS.get(op, 0), "flags")
    hold(count <= EXTENT_PAGES_MAX and index + count <= 2**32, "extent out of bounds")
    hold(slot + count <= WINDOW_SLOTS or op in _BATCHES, "slots out of bounds")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "wire": fuzz_wire,
    "machine": fuzz_machine,
    "ring": fuzz_ring,
    "mesh": fuzz_mesh,
    "attach": fuzz_attach,
    "control": fuzz_control,
    "locks": fuzz_locks,
    "cluster": fuzz_cluster,
    "ranges": fuzz_ranges,
    "ext": fuzz_ext,
    "ocfs2": fuzz_ocfs2,
    "journal": fuzz_journal,
    "swap": fuzz_swap,
}
LENGTH_MAX: Final = {
    "wire": 400,
    "machine": 2400,
    "ring": 1000,
    "mesh": 600,
    "attach": 800,
    "control": 600,
    "locks": 800,
    "cluster": 800,
    "ranges": 400,
    "ext": 97,
    "ocfs2": 97,
    "journal": 160,
    "swap": 130,
}
