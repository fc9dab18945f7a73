"""What is fed with arbitrary bytes, and what must hold whatever they are.

`wire`     every parser of bytes that come from outside: requests, batch tables, HELLO, control
           frames.  Anything but the exception that the parser declares is a finding.
`machine`  a whole machine: the bytes are read as steps of three guests, two of which may share
           pools (shaped calls, raw messages, batch tables), and of the administrator, with deaths,
           restarts, reaping and idle work between them.  Findings are any exception, a reply that
           contradicts ABI.md, bytes of a guest that does not share in a window, and a broken
           invariant.
`ring`     the hypervisor's end of rings whose guests write anything anywhere (`rings`).
`mesh`     one end of a connection between two nodes: frames, handshake and seals (`mesh`).
`attach`, `control`            what comes through sockets (`doors`).
`locks`, `cluster`, `ranges`   what members of a cluster send each other (`peers`).
`ext`, `ocfs2`, `journal`, `swap`   what is on a disk (`disks`).
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable
from typing import Any, Final

from hypervisor.administration import Administration
from hypervisor.arena import FRAMES_MIN, Arena, format_arena, layout
from hypervisor.auth import Grants, Role
from hypervisor.balance import MODES
from hypervisor.eviction import POLICIES
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pools import Settings
from hypervisor.recovery import recover
from ipc.abi import (
    ANY_UUID,
    BATCH_ENTRY,
    BATCH_ENTRY_BYTES,
    EXTENT_PAGES_MAX,
    FIRST_FAULT_REASON,
    INVALID_OID,
    PAGE_BYTES,
    REQUEST,
    REQUEST_BYTES,
    UUID_BYTES,
    CallFlag,
    Op,
    Priority,
    Reason,
    Reply,
    ReplyFlag,
    Status,
    oid_from_int,
    pool_flag_word,
)
from ipc.attach import HandshakeError, decode_hello
from ipc.codec import BadRecord, decode, encode, split_frame
from ipc.errors import GuestFault
from ipc.limits import WINDOW_SLOTS
from ipc.window import Window, anonymous_window
from ipc.wire import decode_batch, decode_reply, decode_request
from tests.fuzz.disks import fuzz_ext, fuzz_journal, fuzz_ocfs2, fuzz_swap
from tests.fuzz.doors import fuzz_attach, fuzz_control
from tests.fuzz.mesh import fuzz_mesh
from tests.fuzz.peers import fuzz_cluster, fuzz_locks, fuzz_ranges
from tests.fuzz.reading import Reader, hold
from tests.fuzz.rings import fuzz_ring

STEPS_MAX: Final = 400
CHECK_EVERY: Final = 128
"""Steps between two walks over the state, each of which costs as much as a hundred calls."""

_OPS: Final = tuple(op for op in Op if op is not Op.REPORT)
_REPORTS_FROM: Final = 256 // len(_OPS) * len(_OPS)
"""REPORT came later: it has the bytes that are left over, so that the corpus means what it did."""
_INDEXES: Final = (0, 0, 0, 1, 60, 64, 200, 2**32 - 64)
_POOL_FLAGS: Final = (
    pool_flag_word(),
    pool_flag_word(persist=True),
    pool_flag_word(shared=True),
    pool_flag_word(persist=True, shared=True, priority=Priority.LOW),
    pool_flag_word(priority=Priority.HIGH),
)
_OIDS: Final = (oid_from_int(0), oid_from_int(1), oid_from_int(1 << 191), oid_from_int(7))
_POOLS: Final = (0, 1, 2, 3)
_BATCHES: Final = (Op.PUT_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH)
_KNOWN_FLAGS: Final[dict[int, int]] = {
    Op.PUT_PAGE: int(CallFlag.HIGH | CallFlag.ACTIVE),
    Op.PUT_BATCH: int(CallFlag.HIGH | CallFlag.ACTIVE),
    Op.GET_PAGE: int(CallFlag.KEEP),
    Op.GET_BATCH: int(CallFlag.KEEP),
    Op.FLUSH_BATCH: 0,
}
"""The highest value that the flags of an operation may have."""
_UUIDS: Final = (b"E" * UUID_BYTES, b"P" * UUID_BYTES, ANY_UUID)

_KEYS: Final = (
    *("guest", "pool", "weight", "cap_bytes", "reserve_bytes", "compress", "priority", "sharing"),
    *("group", "mode", "size_bytes", "action", "uuid", "role", "nonsense"),
)
_VALUES: Final[tuple[object, ...]] = (
    *("g0", "g1", "g2", "nobody", "", "x" * 40, None, True, False, [], {}, b"g0", 1.5),
    *(0, 1, 2, 3, 100, 4096, 20 * 4096, 40 * 4096, 65536, -1, 1 << 62, 1 << 70),
    *("low", "normal", "high", "off", "guest", "group", "all", "greedy", "static", "scheduled"),
    *("allow", "deny", "list", "reader", "writer", *(uuid.hex() for uuid in _UUIDS), "zz"),
)


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
    hold(op in _OPS and not reserved, "op or reserved bits")
    hold(flags <= _KNOWN_FLAGS.get(op, 0), "flags")
    hold(count <= EXTENT_PAGES_MAX and index + count <= 2**32, "extent out of bounds")
    hold(slot + count <= WINDOW_SLOTS or op in _BATCHES, "slots out of bounds")


def _page(number: int, slot: int) -> bytes:
    """What a guest has in a slot: same-filled, noise, something that shrinks, or what all have."""
    mark = b"guest %d slot %d " % (number, slot % 64)
    match slot % 4:
        case 0:
            return bytes([number + 1]) * PAGE_BYTES
        case 1:
            return mark + random.Random(mark).randbytes(PAGE_BYTES - len(mark))
        case 2:
            return (mark * 40 + random.Random(mark).randbytes(40 * slot)).ljust(PAGE_BYTES, b"-")
    return b"common".ljust(PAGE_BYTES, b"+")


class Guest:
    """A name, a window whose slots hold bytes of this guest or of those that it shares with, and a
    sequence.  `pages` is what the slots hold as far as this guest knows."""

    def __init__(self, number: int) -> None:
        self.name = f"g{number}"
        self.window: Window = anonymous_window()
        self.own = [_page(number, slot) for slot in range(WINDOW_SLOTS)]
        sharers = (0, 1) if number < 2 else (number,)
        self.legal = {_page(one, slot) for one in sharers for slot in range(WINDOW_SLOTS)}
        self.first_pages = b"".join(self.own)
        self.pages = self.first_pages
        self.sequence = 0

    def reset(self) -> None:
        """As it was when nothing had happened."""
        self.sequence = 0
        self.pages = self.first_pages
        self.window.slots[:] = self.pages
        self.window.table[:] = bytes(len(self.window.table))

    def look(self) -> None:
        """See what a call has left in the window."""
        # Copied first: a memoryview compares element by element, 50 times slower.
        now = bytes(self.window.slots)
        if now == self.pages:
            return
        for at in range(0, len(now), PAGE_BYTES):
            page = now[at : at + PAGE_BYTES]
            if page != self.pages[at : at + PAGE_BYTES]:
                hold(page in self.legal, "another guest's bytes are in the window")
        self.pages = now


GUESTS: Final = tuple(Guest(number) for number in range(3))
"""Made once: mapping windows anew for each input would cost more than the input."""


class World:
    """A machine with the smallest arena, three guests, and the steps that bytes can name."""

    def __init__(self, data: bytes) -> None:
        self.reader = Reader(data)
        choice = self.reader.byte()
        self.policy = sorted(POLICIES)[choice % len(POLICIES)]
        self.scheduling = MODES[choice // len(POLICIES) % len(MODES)]
        self.mapping = mmap.mmap(-1, layout(FRAMES_MIN).end)
        format_arena(self.mapping)
        self.settings = {
            guest.name: Settings(
                compress=bool(choice & 32),
                group="ours" if guest is not GUESTS[2] else "",
                weight=50,
            )
            for guest in GUESTS
        }
        self.grants = Grants()
        for uuid in _UUIDS[:2]:
            for guest in GUESTS[:2]:
                self.grants.allow(uuid, guest.name, Role.WRITER)
        for guest in GUESTS:
            guest.reset()
        self.start()

    def start(self) -> None:
        """Start, or restart, over the arena as it is; guests that are new get four pools."""
        self.machine = Machine(
            Arena(self.mapping),
            policy=self.policy,
            scheduling=self.scheduling,
            lends=True,
            settings=self.settings,
            grants=self.grants,
        )
        self.administration = Administration(self.machine)
        recover(self.machine)
        for guest in GUESTS:
            if guest.name not in self.machine.clients:
                self.join(guest)

    def join(self, guest: Guest) -> None:
        """A guest attaches and makes a pool of each kind, of those that it may have."""
        self.machine.attach(guest.name, 1, 1, 0)
        for kind, flags in enumerate(_POOL_FLAGS[:4]):
            uuid = _UUIDS[max(0, kind - 2)] + bytes(8)
            self.call(guest, REQUEST.pack(0, Op.NEW_POOL, 0, 0, flags, 0, uuid, 0, 0, 0))

    def run(self) -> None:
        """All steps, and the invariants every now and then and at the end."""
        for step in range(STEPS_MAX):
            if self.reader.left <= 0:
                break
            self.step()
            if step % CHECK_EVERY == 0:
                check(self.machine)
        check(self.machine)

    def step(self) -> None:
        """One step."""
        control = self.reader.byte()
        guest = GUESTS[(control & 3) % len(GUESTS)]
        kind = control >> 2 & 15
        if kind == 0:
            self.call(guest, self.reader.take(REQUEST_BYTES))
        elif kind == 1:
            self.call(guest, self.reader.take(self.reader.byte() % (REQUEST_BYTES + 9)))
        elif kind == 2:
            self.event(guest, self.reader.byte())
        elif kind == 3 and control >> 6:
            self.write_table(guest, self.reader.take(BATCH_ENTRY_BYTES))
        elif kind == 3:
            self.administer()
        elif kind < 6:
            self.write_table(guest, self.shaped_entry())
        else:
            self.call(guest, self.shaped_request(guest))

    def shaped_request(self, guest: Guest) -> bytes:
        """A request that is right more often than not."""
        guest.sequence += 1
        choice = self.reader.byte()
        op = _OPS[choice % len(_OPS)] if choice < _REPORTS_FROM else Op.REPORT
        place, count, slot = self.reader.take(3)
        oid, index = _OIDS[place >> 2 & 3], _INDEXES[place >> 4 & 7] + (place >> 7)
        pool, count = _POOLS[place & 3], count % (EXTENT_PAGES_MAX + 1)
        fields = (0, 0, 0, bytes(24), 0)
        flags = 0
        if op in (Op.PUT_PAGE, Op.GET_PAGE):
            flags = self._flags(op)
            slots = WINDOW_SLOTS - count + 1
            fields = (count, pool, index, oid, slot % (slots + (slot == 255)))
        elif op is Op.FLUSH_PAGE:
            fields = (count, pool, index, oid, 0)
        elif op in _BATCHES:
            fields = (count, 0, 0, bytes(24), 0)
        elif op is Op.NEW_POOL:
            uuid = _UUIDS[slot % len(_UUIDS)] + bytes(8)
            fields = (0, _POOL_FLAGS[place % len(_POOL_FLAGS)], 0, uuid, 0)
        elif op is Op.FLUSH_OBJECT:
            fields = (0, pool, 0, oid, 0)
        elif op is Op.DESTROY_POOL:
            fields = (0, pool, 0, bytes(24), 0)
        elif op is Op.REPORT:
            fields = (0, pool, index, oid, 0)
        elif op is Op.LEND:
            fields = (0, 0, count if place & 128 else 0, bytes(24), 0)
        fenced = op in (Op.PUT_PAGE, Op.GET_PAGE, Op.FLUSH_PAGE, Op.FLUSH_OBJECT)
        return REQUEST.pack(guest.sequence, op, flags, *fields, slot & 3 if fenced else 0, 0)

    def _flags(self, op: Op) -> int:
        choice = self.reader.byte()
        if choice & 7:
            return 0
        return choice >> 3 & (7 if op is Op.PUT_PAGE else 31)

    def shaped_entry(self) -> bytes:
        """A batch entry that is right more often than not."""
        place, slot = self.reader.take(2)
        index = _INDEXES[place >> 4 & 7]
        flags = (0, 0, 0, int(CallFlag.LOW), int(CallFlag.KEEP))[slot % 5]
        pool, oid = _POOLS[place & 3], _OIDS[place >> 2 & 3]
        return BATCH_ENTRY.pack(pool, index, slot % 65, flags, oid, slot)

    def administer(self) -> None:
        """A record of the administrator, sensible or not."""
        verbs = [*self.administration.verbs, "nonsense"]
        record: dict[str, Any] = {"verb": verbs[self.reader.byte() % len(verbs)]}
        for _ in range(self.reader.byte() % 5):
            key = _KEYS[self.reader.byte() % len(_KEYS)]
            record[key] = _VALUES[self.reader.byte() % len(_VALUES)]
        answer = self.administration.answer(record)
        hold(bool(answer), "no answer")
        encode(answer)

    def write_table(self, guest: Guest, entry: bytes) -> None:
        """Write one entry into several places of the batch table."""
        first = self.reader.byte() % EXTENT_PAGES_MAX
        for place in range(first, EXTENT_PAGES_MAX, 1 + self.reader.byte() % 8):
            at = place * BATCH_ENTRY_BYTES
            guest.window.table[at : at + BATCH_ENTRY_BYTES] = entry

    def event(self, guest: Guest, choice: int) -> None:
        """What happens besides calls."""
        if choice % 4 == 0:
            self.machine.depart(self.machine.clients[guest.name])
            self.join(guest)
        elif choice % 4 == 1:
            self.start()
        elif choice % 4 == 2 and choice & 128:
            contents = self.machine.store.contents
            contents.compact(choice >> 2 & 31)
            contents.recompress(self.machine.store.sequence, choice & 16, 8)
        else:
            self.machine.store.reap(choice)

    def call(self, guest: Guest, message: bytes) -> None:
        """One call and all that can be said about its reply without knowing what is stored."""
        client = self.machine.clients[guest.name]
        store = self.machine.store
        before = store.sequence, store.frames.free, len(client.members)
        reply = decode_reply(self.machine.execute(client, message, guest.window))
        _check_reply(message, reply)
        hold(reply.generation == self.machine.generation, "the generation is another")
        if reply.flags & ReplyFlag.FAULT or message[4] == Op.REPORT:
            after = store.sequence, store.frames.free, len(client.members)
            hold(before == after, "a faulted call or a report had an effect")
        guest.look()


def _check_reply(message: bytes, reply: Reply) -> None:
    hold(reply.sequence == int.from_bytes(message[:4], "little"), "another call's sequence")
    status, reason = Status(reply.status), Reason(reply.reason)
    fault = reason >= FIRST_FAULT_REASON
    op_byte = message[4] if len(message) > 4 else 0
    known = 0
    if op_byte == Op.NEW_POOL and status is Status.DONE:
        known = ReplyFlag.JOINED | ReplyFlag.READER
    hold(
        reply.flags & ~known == (ReplyFlag.FAULT if fault else 0),
        "FAULT does not go with the reason",
    )
    if fault:
        hold(status in (Status.EINVAL, Status.ENOSYS), f"a fault with {status!r}")
        hold(not reply.map and not reply.value, "a fault with a result")
        return
    _, op, _, count, *_ = REQUEST.unpack(message)
    hold(reply.map >> count == 0, "map has bits beyond count")
    hold((reason is Reason.NONE) == (status in (Status.DONE, Status.MISS)), "reason and status")
    whole = reply.map == (1 << count) - 1
    hold((reason is Reason.STALE_TOKEN) == (status is Status.ESTALE), "stale by half")
    if status is Status.ESTALE:
        hold(op in (Op.PUT_PAGE, Op.PUT_BATCH) and reply.value > 0, "what can be stale")
    if op in (Op.PUT_PAGE, Op.GET_PAGE, Op.PUT_BATCH, Op.GET_BATCH):
        hold((status is Status.DONE) == whole, "DONE and the map disagree")


def fuzz_machine(data: bytes) -> None:
    """One world, and all its steps."""
    World(data).run()


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
    "machine": 4000,
    "ring": 1000,
    "mesh": 600,
    "attach": 800,
    "control": 600,
    "locks": 800,
    "cluster": 800,
    "ranges": 400,
    "ext": 240,
    "ocfs2": 240,
    "journal": 240,
    "swap": 320,
}
