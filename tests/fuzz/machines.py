"""A whole machine, its guests and its administrator, as bytes say.

Three guests, two of which may share pools, make calls (shaped ones, raw messages, batch tables),
some while they write into their own window; the administrator asks for all that there is; guests go
and come back, the hypervisor is restarted over its arena, idle work is done in pieces, and in an
arena with checksums bits of pages flip.

Findings are any exception, a reply that contradicts ABI.md, a window that a call changed elsewhere
than it says, bytes of a guest that does not share, a page that is not as it was put, an answer that
is no record, and a broken invariant.
"""

from __future__ import annotations

import mmap
import random
from typing import Any, Final
from unittest import mock

from hypervisor import deferral
from hypervisor.administration import Administration
from hypervisor.arena import FRAMES_MIN, Arena, format_arena, layout
from hypervisor.auth import Grants, Role
from hypervisor.balance import MODES
from hypervisor.eviction import POLICIES
from hypervisor.frames import CONTENT, EPHEMERAL, PERSISTENT
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pools import Settings
from hypervisor.recovery import recover
from hypervisor.sharing import Sharing
from hypervisor.snapshot import snapshot
from ipc.abi import (
    ANY_UUID,
    BATCH_ENTRY,
    BATCH_ENTRY_BYTES,
    EXTENT_PAGES_MAX,
    FIRST_FAULT_REASON,
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
from ipc.codec import encode
from ipc.limits import WINDOW_SLOTS
from ipc.window import Window, anonymous_window
from ipc.wire import decode_reply
from tests.fuzz.reading import Reader, hold

STEPS_MAX: Final = 400
CHECK_EVERY: Final = 128
"""Steps between two walks over the state, each of which costs as much as a hundred calls."""
_FRAMES: Final = (FRAMES_MIN, FRAMES_MIN, 160, 600)
_KEPT_FRAMES: Final = 8
"""So few that pages are left raw also in an arena as small as these."""

_OFTEN: Final = (
    *(Op.PUT_PAGE, Op.GET_PAGE) * 9,
    *(Op.PUT_BATCH, Op.GET_BATCH) * 3,
)
_OPS: Final = (*_OFTEN, *Op)
_INDEXES: Final = (0, 0, 0, 0, 1, 60, 64, 2**32 - 64)
_POOL_FLAGS: Final = (
    pool_flag_word(),
    pool_flag_word(persist=True),
    pool_flag_word(shared=True),
    pool_flag_word(persist=True, shared=True, priority=Priority.LOW),
    pool_flag_word(priority=Priority.HIGH),
)
_OIDS: Final = (oid_from_int(1), oid_from_int(1), oid_from_int(0), oid_from_int(1 << 191))
"""Few, or hardly anything that is asked for would be there."""
_POOLS: Final = (0, 1, 2, 3)
_BATCHES: Final = (Op.PUT_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH)
_UUIDS: Final = (b"E" * UUID_BYTES, b"P" * UUID_BYTES, ANY_UUID)

_SOME_BYTES: Final = (0, 4096, 20 * 4096, 40 * 4096, 65536, 1 << 20)
SENSIBLE: Final[dict[str, tuple[object, ...]]] = {
    "guest": ("g0", "g1", "g2", "g3"),
    "pool": (0, 1, 2, 3),
    "weight": (0, 1, 100, 65535),
    "cap_bytes": _SOME_BYTES,
    "reserve_bytes": _SOME_BYTES,
    "size_bytes": _SOME_BYTES,
    "compress": (False, True),
    "borrow": (False, True),
    "priority": ("low", "normal", "high"),
    "sharing": ("off", "guest", "group", "all"),
    "group": ("ours", "", "x" * 31),
    "mode": ("greedy", "static", "scheduled"),
    "action": ("allow", "deny", "list"),
    "uuid": tuple(uuid.hex() for uuid in _UUIDS),
    "role": ("reader", "writer"),
    "oid": ("00", "01", oid_from_int(1 << 191).hex(), "1.1", "7.0"),
    "index": (0, 1, 60, 63, 64, 200, 2**32 - 1),
    "also_deny": (False, True),
    "what": ("token", "key"),
}
ASKED: Final[tuple[tuple[str, ...], ...]] = (
    ("set", "guest", "weight", "priority"),
    ("set", "guest", "cap_bytes"),
    ("set", "guest", "reserve_bytes"),
    ("set", "guest", "compress"),
    ("set", "guest", "sharing", "group"),
    ("set", "guest", "borrow"),
    ("set", "guest", "pool", "weight", "priority"),
    ("list", "guest"),
    ("pools", "guest"),
    ("freeze", "guest"),
    ("thaw",),
    ("thaw", "guest"),
    ("balloon", "guest", "size_bytes"),
    ("balloon",),
    ("schedule", "mode"),
    ("freeable",),
    ("flush", "size_bytes"),
    ("flush", "guest", "size_bytes"),
    ("auth", "action", "guest", "uuid", "role"),
    ("auth", "action", "uuid"),
    ("destroy", "guest", "pool"),
    ("destroy", "guest"),
    ("page", "oid", "index"),
    ("page", "oid", "index", "guest"),
    ("quarantine", "guest"),
    ("quarantine", "guest", "also_deny"),
    ("quarantined",),
    ("reseed",),
    ("rotated", "what"),
)
VALUES: Final[tuple[object, ...]] = (
    *("nobody", "", "x" * 40, None, True, False, [], {}, b"g0", 1.5, float("nan"), "9" * 5000),
    *(0, 1, 2, 3, 100, 4095, -1, 1 << 62, 1 << 63, 1 << 70, "9" * 5000 + ".1", "1." + "9" * 5000),
    *("low", "group", "all", "allow", "zz", "\u0663.1", "\0", "-" * 32),
)
_KEYS: Final = (*SENSIBLE, "nonsense", "verb")


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

    def look(self, filled: set[int] | None) -> None:
        """See what a call has left in the window: in these slots, or (None) in any."""
        # Copied first: a memoryview compares element by element, 50 times slower.
        now = bytes(self.window.slots)
        if now == self.pages:
            return
        for at in range(0, len(now), PAGE_BYTES):
            page = now[at : at + PAGE_BYTES]
            if page != self.pages[at : at + PAGE_BYTES]:
                hold(page in self.legal, "another guest's bytes are in the window")
                filled_here = filled is None or at // PAGE_BYTES in filled
                hold(filled_here, "a slot that the call was not to fill")
        self.pages = now


class Racing:
    """A window as the hypervisor has it while the guest writes: at each look some slots and entries
    are others.  Whole pages, so that what is put is still known."""

    def __init__(self, guest: Guest, choice: int) -> None:
        self._guest = guest
        self._choice = choice
        self._looks = 0

    def _write(self) -> None:
        self._looks += 1
        window, own = self._guest.window, self._guest.own
        slot = self._choice * self._looks % WINDOW_SLOTS
        for number in (slot, 0, 1):
            page = own[(self._choice + self._looks + number) % WINDOW_SLOTS]
            window.slots[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = page
        at = slot % EXTENT_PAGES_MAX * BATCH_ENTRY_BYTES + self._choice % BATCH_ENTRY_BYTES
        window.table[at] ^= self._choice & 255

    @property
    def slots(self) -> memoryview:
        self._write()
        return self._guest.window.slots

    @property
    def words(self) -> memoryview:
        self._write()
        return self._guest.window.words

    def slot(self, number: int, count: int = 1) -> memoryview:
        self._write()
        return self._guest.window.slot(number, count)

    def read_table(self, count: int) -> bytes:
        table = self._guest.window.read_table(count)
        self._write()
        return table


GUESTS: Final = tuple(Guest(number) for number in range(3))
"""Made once: mapping windows anew for each input would cost more than the input."""


class World:
    """A machine with the smallest arena, three guests, and the steps that bytes can name."""

    def __init__(self, data: bytes) -> None:
        self.reader = Reader(data)
        choice, shape = self.reader.take(2)
        self.policy = sorted(POLICIES)[choice % len(POLICIES)]
        self.scheduling = MODES[choice // len(POLICIES) % len(MODES)]
        self.checksums = bool(shape & 4)
        frames = _FRAMES[shape & 3]
        self.mapping = mmap.mmap(-1, layout(frames, checksums=self.checksums).end)
        format_arena(self.mapping, checksums=self.checksums)
        self.in_pieces = bool(shape & 8)
        self.defers = bool(shape & 16)
        self.settings = {
            guest.name: Settings(
                compress=bool(shape & 32),
                borrow=bool(shape & 64),
                sharing=Sharing.OFF if shape & 128 else Sharing.GROUP,
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
        least = _KEPT_FRAMES if self.defers else deferral.KEPT_FRAMES_LEAST
        with mock.patch.object(deferral, "KEPT_FRAMES_LEAST", least):
            self.machine = Machine(
                Arena(self.mapping),
                policy=self.policy,
                scheduling=self.scheduling,
                lends=True,
                settings=self.settings,
                grants=self.grants,
            )
        self.machine.balance.in_pieces = self.in_pieces
        self.administration = Administration(self.machine, random_bytes=lambda n: b"r" * n)
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
        for guest in GUESTS:
            hold(bytes(guest.window.slots) == guest.pages, "a window changed without a call")

    def step(self) -> None:
        """One step."""
        control = self.reader.byte()
        guest = GUESTS[(control & 3) % len(GUESTS)]
        kind = control >> 2 & 15
        seldom = control >> 6 == 0
        if kind == 0 and seldom:
            self.call(guest, self.reader.take(REQUEST_BYTES))
        elif kind == 1 and seldom:
            self.call(guest, self.reader.take(self.reader.byte() % (REQUEST_BYTES + 9)))
        elif kind == 2:
            self.event(guest, self.reader.byte())
        elif kind == 3 and seldom:
            self.write_table(guest, self.reader.take(BATCH_ENTRY_BYTES))
        elif kind == 3:
            self.administer()
        elif kind == 4:
            self.write_table(guest, self.shaped_entry())
        elif kind == 6:
            self.call(guest, self.shaped_request(guest), races=1 + self.reader.byte())
        else:
            self.call(guest, self.shaped_request(guest))

    def shaped_request(self, guest: Guest) -> bytes:
        """A request that is right more often than not."""
        guest.sequence += 1
        choice = self.reader.byte()
        op = _OPS[choice % len(_OPS)]
        place, count, slot = self.reader.take(3)
        oid, index = _OIDS[place >> 2 & 3], _INDEXES[place >> 4 & 7] + (place >> 7)
        pool = _POOLS[place & 3]
        # Many small ones, or each put would push out all that there is.
        count = count % (EXTENT_PAGES_MAX + 1) if count >= 224 else 1 << (count & 7) % 5
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
            fields = (0, pool, index, oid, slot % (WINDOW_SLOTS + (slot == 255)))
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
        which, present, odd = self.reader.take(3)
        verb, *keys = ASKED[which % len(ASKED)]
        record: dict[str, Any] = {"verb": verb}
        for number, key in enumerate(keys):
            if not present >> number & 1:
                values = SENSIBLE[key]
                record[key] = values[self.reader.byte() % len(values)]
        if odd & 7 == 7:
            key = _KEYS[self.reader.byte() % len(_KEYS)]
            record[key] = VALUES[self.reader.byte() % len(VALUES)]
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
        store = self.machine.store
        match choice & 7:
            case 0:
                self.machine.depart(self.machine.clients[guest.name])
                self.join(guest)
            case 1:
                self.start()
            case 2:
                store.contents.compact(choice >> 3, 0.0)
                store.contents.recompress(store.sequence, choice >> 3, 8)
            case 3:
                hold(self.machine.idle(1 + (choice >> 3)) >= 0, "less than no work")
            case 4:
                for _ in range(choice >> 3):
                    self.machine.balance.divide()
            case 5:
                self.rot(choice >> 3)
            case 6:
                store.squeeze(choice >> 3)
                self.look()
            case _:
                store.reap(choice)

    def rot(self, choice: int) -> None:
        """A bit flips in many pages that lie as they were put, where checksums find it."""
        kinds = self.machine.store.frames.kinds
        raw = [n for n, kind in enumerate(kinds) if kind in (EPHEMERAL, PERSISTENT, CONTENT)]
        if self.checksums:
            for frame in raw[choice & 3 :: 1 + (choice >> 2)]:
                self.machine.store.arena.data[frame * PAGE_BYTES + 64 * choice] ^= 1 << choice % 8

    def look(self) -> None:
        """What the server notes now and then, and what `tmem stats` shows."""
        machine = self.machine
        machine.moments.note(machine.store.sequence, machine.store.sequence * 10**9)
        encode(snapshot(machine, lambda _client: True))

    def call(self, guest: Guest, message: bytes, *, races: int = 0) -> None:
        """One call and all that can be said about its reply without knowing what is stored."""
        client = self.machine.clients[guest.name]
        store = self.machine.store
        before = store.sequence, store.frames.free, len(client.members)
        window: Any = Racing(guest, races) if races else guest.window
        reply = decode_reply(self.machine.execute(client, message, window))
        _check_reply(message, reply)
        hold(reply.generation == self.machine.generation, "the generation is another")
        if reply.flags & ReplyFlag.FAULT or message[4] == Op.REPORT:
            after = store.sequence, store.frames.free, len(client.members)
            hold(before == after, "a call without effect had one")
        guest.look(None if races else _slots_of(message, reply))


def _slots_of(message: bytes, reply: Reply) -> set[int] | None:
    """The slots that a call may have filled; None: any."""
    if reply.flags & ReplyFlag.FAULT:
        return set()
    _, op, _, count, _, _, _, slot, _, _ = REQUEST.unpack(message)
    if op == Op.GET_BATCH:
        return None
    got = range(count) if op == Op.GET_PAGE else ()
    return {slot + at for at in got if reply.map >> at & 1}


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
