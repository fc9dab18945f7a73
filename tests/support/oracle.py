"""A machine with several guests, and what their pages should hold.

The oracle may lose an ephemeral page when pages were evicted; it never accepts a wrong, stale or
foreign one, nor the loss of a persistent one.  Of persistent pools it knows exactly what is there,
so it knows each bit of each answer.  `step` does one random thing that a guest, the administrator
or fate may do; the methods behind it do the same things by name, for whoever chooses otherwise.
Whoever drives it decides when to walk the invariants.

Pages carry a 64-bit version at both ends; some are noise, some shrink, some equal others and some
are same-filled, so that every way to store a page is taken.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from hypervisor.administration import Administration
from hypervisor.arena import Arena, format_arena
from hypervisor.auth import Grants, Role
from hypervisor.machine import Machine
from hypervisor.pools import Pool, Settings
from hypervisor.recovery import recover
from ipc.abi import (
    ANY_UUID,
    PAGE_BYTES,
    REQUEST,
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
from ipc.limits import WINDOW_SLOTS
from ipc.window import Window, anonymous_window
from ipc.wire import decode_reply
from tests.support.kills import WRITERS, killed_at

ARENA_BYTES: Final = 1 << 20
GUESTS: Final = ("a", "b", "c", "d")
UUIDS: Final = {2: b"E" * UUID_BYTES, 3: b"P" * UUID_BYTES}
PERSISTENT: Final = (1, 3)
"""Kinds of pools: 0 private ephemeral, 1 private persistent, 2 shared ephemeral, 3 shared
persistent."""
PARTS: Final = (0, 1, 2, 3, 4)
"""Pools of a guest; 4 is a second membership in the pool of kind 2."""
KIND_OF: Final = (0, 1, 2, 3, 2)
INDEX_LAST: Final = 2**32 - 1
_LATELY: Final = 48
"""Handles of a pool that were put lately and are likely to be used again."""

Handle = tuple[int, int]
"""object, index."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a batch."""

    part: int
    oid: int
    index: int
    slot: int
    flags: int


@dataclass(frozen=True, slots=True)
class Intent:
    """What a step that is killed may have done: drop these pages, or put others in their place."""

    owner: str
    kind: int
    oid: int
    first: int
    count: int
    pages: Sequence[bytes] = ()

    def touches(self, owner: str, kind: int, oid: int, index: int) -> bool:
        same = (owner, kind, oid) == (self.owner, self.kind, self.oid)
        return same and 0 <= index - self.first < self.count

    def page(self, index: int) -> bytes | None:
        return self.pages[index - self.first] if self.pages else None


class Mismatch(AssertionError):
    """The machine returned what it may not."""


class Known:
    """What the pages of one pool should be; of an ephemeral one, what they are if they are there.

    `seen` is the number of evictions when an ephemeral page was last known to be there: while there
    were none since, it must be there still.
    """

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.persistent = kind in PERSISTENT
        self.objects: dict[int, dict[int, bytes]] = {}
        self.seen: dict[Handle, int] = {}
        self.lately: list[Handle] = []
        self.pages = 0

    def get(self, oid: int, index: int) -> bytes | None:
        found = self.objects.get(oid)
        return None if found is None else found.get(index)

    def put(self, oid: int, index: int, page: bytes, evictions: int) -> None:
        found = self.objects.setdefault(oid, {})
        self.pages += index not in found
        found[index] = page
        if not self.persistent:
            self.seen[oid, index] = evictions

    def drop(self, oid: int, index: int) -> bool:
        found = self.objects.get(oid)
        if found is None or found.pop(index, None) is None:
            return False
        self.pages -= 1
        self.seen.pop((oid, index), None)
        if not found:
            del self.objects[oid]
        return True

    def drop_object(self, oid: int) -> int:
        found = self.objects.pop(oid, {})
        self.pages -= len(found)
        for index in found:
            self.seen.pop((oid, index), None)
        return len(found)

    def remember(self, oid: int, index: int, place: int) -> None:
        if len(self.lately) < _LATELY:
            self.lately.append((oid, index))
        else:
            self.lately[place % _LATELY] = (oid, index)


def _bodies() -> list[bytes]:
    """What pages are made of, between their versions; the lengths are chosen so that LZ4 gives
    most classes of slabs, and LZ4HC a smaller one for some."""
    rng = random.Random(1)
    length = PAGE_BYTES - 16
    noise = [rng.randbytes(size).ljust(length, b"\0") for size in (8, 400, 900, 1900, 2600, 3000)]
    words = [rng.randbytes(rng.randrange(3, 9)) for _ in range(24)]
    texts = [
        b"".join(rng.choice(words) for _ in range(count)).ljust(length, b".")[:length]
        for count in (60, 150, 250, 400)
    ]
    return [*noise, *texts, rng.randbytes(length)]


_BODIES: Final = _bodies()
_COMMON: Final = [
    *(b"common %d" % n + body[:-1] + b"%d" % n + b"-end...." for n, body in enumerate(_BODIES[4:])),
    bytes(PAGE_BYTES),
]
_COMMON_PAGES: Final = [(page + bytes(PAGE_BYTES))[:PAGE_BYTES] for page in _COMMON]


class World:
    """`log` keeps the last steps, for whoever has to explain a failure; `counts` the answers."""

    def __init__(
        self,
        seed: int | random.Random,
        policy: str = "clock",
        scheduling: str = "scheduled",
        *,
        kills: float = 0.0,
    ) -> None:
        self.random = seed if isinstance(seed, random.Random) else random.Random(seed)
        self.policy = policy
        self.kills = kills
        """Part of the steps that end in a death."""
        self.scheduling = scheduling
        self.mapping = mmap.mmap(-1, ARENA_BYTES)
        format_arena(self.mapping)
        self.windows: dict[str, Window] = {name: anonymous_window() for name in GUESTS}
        self.ids: dict[tuple[str, int], int] = {}
        """(guest, part) -> pool id."""
        self.known: dict[tuple[str, int], Known] = {}
        """(owner, kind) -> pages; the owner of shared ones is ""."""
        self.version = 0
        self.settings: dict[str, Settings] = {}
        self.grants = Grants()
        self.log: list[str] = []
        self.counts: dict[tuple[int, int, int], int] = {}
        self.evictions_before = 0
        self.boots = 0
        self.start()
        for name in GUESTS:
            for uuid in UUIDS.values():
                self.ask(verb="auth", action="allow", guest=name, uuid=uuid.hex())
            self.join(name)

    def start(self) -> None:
        """Start a hypervisor on the arena as it is."""
        if self.boots:
            self.evictions_before += self.machine.store.evictions
        self.boots += 1
        self.machine: Machine = Machine(
            Arena(self.mapping),
            policy=self.policy,
            scheduling=self.scheduling,
            settings=self.settings,
            grants=self.grants,
            secret=self.random.randbytes(8),
        )
        self.administration = Administration(self.machine)
        recover(self.machine)

    @property
    def evictions(self) -> int:
        """Since the beginning."""
        return self.evictions_before + self.machine.store.evictions

    def ask(self, **record: Any) -> dict[str, Any]:
        answer = self.administration.answer(record)
        if "error" in answer:
            raise Mismatch(f"{record}: {answer['error']}")
        return answer

    # --- guests and pools

    def join(self, name: str) -> None:
        """A guest attaches and makes a pool of each kind."""
        self.machine.attach(name, 1, 1, 0)
        for part in PARTS:
            self.make_pool(name, part, self.random.choice(list(Priority)))

    def make_pool(self, name: str, part: int, priority: Priority = Priority.NORMAL) -> None:
        kind = KIND_OF[part]
        uuid = UUIDS.get(kind, ANY_UUID)
        word = pool_flag_word(persist=kind in PERSISTENT, shared=kind in UUIDS, priority=priority)
        reply = self.call(name, Op.NEW_POOL, word, oid=int.from_bytes(uuid, "little"))
        role = self.role(name, kind)
        if role is None:
            if (reply.status, reply.reason) != (Status.EPERM, Reason.SHARED_DENIED):
                raise Mismatch(f"a pool without a grant: {reply}")
            return
        if reply.status == Status.DONE:
            shared = (ReplyFlag.READER if role is Role.READER else 0) | (
                ReplyFlag.JOINED if any(KIND_OF[one] == kind for _, one in self.ids) else 0
            )
            if reply.flags != (shared if kind in UUIDS else 0):
                raise Mismatch(f"flags of a new pool: {reply}")
            self.ids[name, part] = reply.value
        elif reply.reason not in (Reason.TOO_MANY_POOLS, Reason.TOO_MANY_SHARERS):
            raise Mismatch(f"no pool: {reply}")

    def role(self, name: str, kind: int) -> Role | None:
        """What a guest may do in its pools of a kind."""
        return self.grants.role(UUIDS[kind], name) if kind in UUIDS else Role.WRITER

    def pool(self, name: str, part: int) -> Known:
        """What is known of a pool."""
        kind = KIND_OF[part]
        owner = "" if kind in UUIDS else name
        found = self.known.get((owner, kind))
        if found is None:
            found = self.known[owner, kind] = Known(kind)
        return found

    def leave(self, name: str, part: int) -> None:
        reply = self.call(name, Op.DESTROY_POOL, self.ids[name, part])
        if reply.status != Status.DONE:
            raise Mismatch(f"a pool can't be destroyed: {reply}")
        self.left(name, [part])

    def depart(self, name: str) -> None:
        self.machine.depart(self.machine.clients[name])
        self.left(name, [part for part in PARTS if (name, part) in self.ids])
        self.join(name)

    def left(self, name: str, parts: list[int]) -> None:
        """A guest has given these pools back: what nobody has any more is gone."""
        for part in parts:
            del self.ids[name, part]
        for part in parts:
            kind = KIND_OF[part]
            if kind not in UUIDS or not any(KIND_OF[one] == kind for _, one in self.ids):
                self.known.pop(("" if kind in UUIDS else name, kind), None)

    # --- calls

    def call(
        self,
        name: str,
        op: Op,
        pool: int = 0,
        oid: int = 0,
        index: int = 0,
        count: int = 0,
        slot: int = 0,
        flags: int = 0,
        token: int = 0,
    ) -> Reply:
        request = REQUEST.pack(
            self.version & 0xFFFF, op, flags, count, pool, index, oid_from_int(oid), slot, token, 0
        )
        client = self.machine.clients[name]
        reply = decode_reply(self.machine.execute(client, request, self.windows[name]))
        if op != Op.NEW_POOL and reply.flags:
            raise Mismatch(f"{op.name} of {name} is a fault: {reply}")
        if reply.sequence != self.version & 0xFFFF or reply.map >> count:
            raise Mismatch(f"{op.name} of {name}: {reply}")
        key = int(op), reply.status, reply.reason
        self.counts[key] = self.counts.get(key, 0) + 1
        return reply

    def answers(self) -> dict[str, int]:
        """How often each outcome of each operation was seen."""
        return {
            f"{Op(op).name} {Status(status).name} {Reason(reason).name}": count
            for (op, status, reason), count in sorted(self.counts.items())
        }

    def denied(self, name: str, part: int, reply: Reply, *, writes: bool) -> bool:
        """Whether the call had to be refused for want of a right; it was, then."""
        role = self.role(name, KIND_OF[part])
        if role is None:
            wanted = Reason.SHARED_DENIED
        elif writes and role is Role.READER:
            wanted = Reason.NOT_WRITER
        else:
            if reply.reason in (Reason.SHARED_DENIED, Reason.NOT_WRITER, Reason.NO_SUCH_POOL):
                raise Mismatch(f"{name} was refused what it may do: {reply}")
            return False
        if (reply.status, reply.reason, reply.map) != (Status.EPERM, wanted, 0):
            raise Mismatch(f"{name} was not refused: {reply}")
        return True

    def page(self) -> bytes:
        """A page that tells which put it is of, unless it is one that is put again and again."""
        self.version += 1
        choice = self.random.random()
        if choice < 0.05:
            return self.version.to_bytes(8, "little") * 512
        if choice < 0.25:
            return _COMMON_PAGES[int(choice * 1000) % len(_COMMON_PAGES)]
        mark = self.version.to_bytes(8, "little")
        return b"".join((mark, _BODIES[int(choice * 1000) % len(_BODIES)], mark))

    def put(
        self,
        name: str,
        part: int,
        oid: int,
        index: int,
        pages: Sequence[bytes],
        slot: int,
        flags: int = 0,
        token: int = 0,
    ) -> None:
        count = len(pages)
        self.windows[name].slot(slot, count)[:] = b"".join(pages)
        evictions = self.evictions
        reply = self.call(
            name, Op.PUT_PAGE, self.ids[name, part], oid, index, count, slot, flags, token
        )
        if self.denied(name, part, reply, writes=True):
            return
        if (reply.status == Status.DONE) != (reply.map == (1 << count) - 1):
            raise Mismatch(f"status and map of a put: {reply}")
        for at, page in enumerate(pages):
            reason = reply.reason if not reply.map >> at & 1 else 0
            # A page behind this one may have evicted it.
            self.was_put(name, part, oid, index + at, page, reason, evictions)
        self.pool(name, part).remember(oid, index + count // 2, self.version)

    def was_put(
        self, name: str, part: int, oid: int, index: int, page: bytes, reason: int, evictions: int
    ) -> None:
        """The outcome of one page: no `reason`, or that of some page of its call."""
        known = self.pool(name, part)
        there = known.get(oid, index) is not None
        if not reason:
            if known.persistent and not there and self.settings[name].frozen:
                raise Mismatch(f"a frozen guest put a new page at {oid}:{index}")
            known.put(oid, index, page, evictions)
        elif there:
            if reason == Reason.NO_OBJECT_SLOT and known.persistent:
                raise Mismatch("no object for a page that has one")
            known.drop(oid, index)

    def get(
        self,
        name: str,
        part: int,
        oid: int,
        index: int,
        count: int,
        slot: int,
        *,
        keep: bool = False,
        token: int = 0,
    ) -> None:
        flags = CallFlag.KEEP if keep else 0
        reply = self.call(
            name, Op.GET_PAGE, self.ids[name, part], oid, index, count, slot, flags, token
        )
        if self.denied(name, part, reply, writes=False):
            return
        known = self.pool(name, part)
        if known.persistent and (reply.status == Status.EEMPTY) != (not known.pages):
            raise Mismatch(f"a persistent pool of {known.pages} pages: {reply}")
        got = self.windows[name].slot(slot, count).tobytes()
        for at in range(count):
            page = got[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] if reply.map >> at & 1 else None
            self.was_got(name, part, oid, index + at, page, keep=keep)

    def was_got(
        self, name: str, part: int, oid: int, index: int, page: bytes | None, *, keep: bool
    ) -> None:
        """The outcome of one page of a get."""
        known = self.pool(name, part)
        expected = known.get(oid, index)
        if page is not None:
            if page != expected:
                raise Mismatch(f"{name} {part} {oid}:{index} is wrong, stale or foreign")
            if known.kind == 0 and not keep:
                known.drop(oid, index)
            elif not known.persistent:
                known.seen[oid, index] = self.evictions
        elif expected is not None:
            if known.persistent:
                raise Mismatch(f"a persistent page is lost: {name} {part} {oid}:{index}")
            if known.seen[oid, index] == self.evictions:
                raise Mismatch(f"a page is lost though none was evicted: {part} {oid}:{index}")
            known.drop(oid, index)

    def flush(self, name: str, part: int, oid: int, index: int, count: int, token: int = 0) -> None:
        reply = self.call(name, Op.FLUSH_PAGE, self.ids[name, part], oid, index, count, token=token)
        if self.denied(name, part, reply, writes=True):
            return
        if reply.status != Status.DONE:
            raise Mismatch(f"a flush failed: {reply}")
        for at in range(count):
            self.was_flushed(name, part, oid, index + at, bool(reply.map >> at & 1))

    def was_flushed(self, name: str, part: int, oid: int, index: int, there: bool) -> None:
        known = self.pool(name, part)
        sure = known.persistent or known.seen.get((oid, index)) == self.evictions
        expected = known.drop(oid, index)
        if there != expected and (there or sure):
            raise Mismatch(f"a flush of {part} {oid}:{index} found {there}, not {expected}")

    def flush_object(self, name: str, part: int, oid: int, token: int = 0) -> None:
        reply = self.call(name, Op.FLUSH_OBJECT, self.ids[name, part], oid, token=token)
        if self.denied(name, part, reply, writes=True):
            return
        known = self.pool(name, part)
        pages = known.drop_object(oid)
        if reply.status != Status.DONE or reply.value > pages:
            raise Mismatch(f"flushing {pages} pages: {reply}")
        if known.persistent and reply.value != pages:
            raise Mismatch(f"flushing {pages} persistent pages: {reply}")

    def batch(self, name: str, op: Op, entries: Sequence[Entry]) -> None:
        """Entries are executed in order, each as a call of one page."""
        window = self.windows[name]
        pages = [self.page() if op == Op.PUT_BATCH else b"" for _ in entries]
        # Of two entries that name one slot both move the page that is there when the call is made.
        by_slot = {entry.slot: page for entry, page in zip(entries, pages, strict=True)}
        if op == Op.PUT_BATCH:
            for slot, page in by_slot.items():
                window.slot(slot)[:] = page
        window.write_table(
            [
                (
                    self.ids.get((name, entry.part), 63),
                    entry.index,
                    0 if op == Op.FLUSH_BATCH else entry.slot,
                    entry.flags,
                    oid_from_int(entry.oid),
                    self.version,
                )
                for entry in entries
            ]
        )
        evictions = self.evictions
        reply = self.call(name, op, count=len(entries))
        for at, entry in enumerate(entries):
            served = bool(reply.map >> at & 1)
            role = self.role(name, KIND_OF[entry.part])
            if (
                (name, entry.part) not in self.ids
                or role is None
                or (role is Role.READER and op != Op.GET_BATCH)
            ):
                if served:
                    raise Mismatch(f"entry {at} of {op.name} may not be served: {entry}")
                continue
            handle = name, entry.part, entry.oid, entry.index
            if op == Op.PUT_BATCH:
                reason = 0 if served else Reason.NO_MEMORY
                self.was_put(*handle, by_slot[entry.slot], reason, evictions)
            elif op == Op.FLUSH_BATCH:
                self.was_flushed(*handle, served)
            elif served and any(one.slot == entry.slot for one in entries[at + 1 :]):
                # A later entry may have written over it.
                self.was_there(*handle, keep=bool(entry.flags & CallFlag.KEEP))
            else:
                got = bytes(window.slot(entry.slot)) if served else None
                self.was_got(*handle, got, keep=bool(entry.flags & CallFlag.KEEP))

    def was_there(self, name: str, part: int, oid: int, index: int, *, keep: bool) -> None:
        """A page was got, and nobody knows any more what it was."""
        page = self.pool(name, part).get(oid, index)
        if page is None:
            raise Mismatch(f"{name} {part} {oid}:{index} was got and can't be there")
        self.was_got(name, part, oid, index, page, keep=keep)

    # --- fate and the administrator

    def reap(self, pages: int) -> None:
        self.machine.store.reap(pages)

    def idle(self, moves: int, age_puts: int) -> None:
        contents = self.machine.store.contents
        contents.compact(moves)
        contents.recompress(self.machine.store.sequence, age_puts, 8)

    def host_flush(self, name: str | None, size_bytes: int) -> None:
        self.ask(verb="flush", guest=name, size_bytes=size_bytes)

    def destroy(self, name: str, part: int | None) -> None:
        """The administrator takes pools away."""
        pool = None if part is None else self.ids[name, part]
        answer = self.ask(verb="destroy", guest=name, pool=pool)
        parts = [one for one in PARTS if (name, one) in self.ids and part in (None, one)]
        if answer["destroyed_pools"] != len(parts):
            raise Mismatch(f"{answer} of {parts}")
        self.left(name, parts)

    def die(self, number: int, action: Callable[[], None], intent: Intent | None = None) -> None:
        """Begin something, be killed before the number-th bytecode in the modules that write, start
        again, and find every page as it was, or as the intent says."""
        if not killed_at(number, WRITERS, action):
            return
        self.start()
        clients = self.machine.clients
        for (name, part), pool_id in list(self.ids.items()):
            if name not in clients or pool_id not in clients[name].members:
                del self.ids[name, part]
        for (owner, kind), known in list(self.known.items()):
            if not any(KIND_OF[part] == kind and owner in ("", name) for name, part in self.ids):
                del self.known[owner, kind]
            else:
                self.settle(owner, known, intent)
        for name in GUESTS:
            if name not in clients:
                self.join(name)
                continue
            # A pool that was made and never answered for.
            known_ids = {self.ids.get((name, part)) for part in PARTS}
            for pool_id in set(clients[name].members) - known_ids:
                self.call(name, Op.DESTROY_POOL, pool_id)

    def settle(self, owner: str, known: Known, intent: Intent | None) -> None:
        """Take for true what is there after a death, if it may be."""
        kind = known.kind
        if kind in UUIDS:
            pool = self.machine.memberships.shared[UUIDS[kind]]
        else:
            pool = self.machine.clients[owner].members[self.ids[owner, kind]].pool
        held = held_pages(pool, self.machine)
        expected = [(oid, index) for oid, found in known.objects.items() for index in found]
        for oid, index in {*held, *expected}:
            page = held.get((oid, index))
            was = known.get(oid, index)
            touched = intent is not None and intent.touches(owner, kind, oid, index)
            allowed = [was]
            if intent is not None and touched:
                allowed += [None, intent.page(index)]
            if page not in allowed and (known.persistent or page is not None):
                raise Mismatch(f"a death changed {owner} {kind} {oid}:{index}")
            if page is None:
                known.drop(oid, index)
            else:
                known.put(oid, index, page, self.evictions)

    # --- steps

    def step(self) -> None:
        rng = self.random
        name = rng.choice(GUESTS)
        part = rng.choice((0, 0, 0, 1, 1, 2, 2, 3, 3, 4))
        choice = rng.random()
        if (name, part) not in self.ids:
            self.say(f"{name} makes pool {part}")
            self.make_pool(name, part, rng.choice(list(Priority)))
        elif choice < 0.9:
            self.step_of_guest(name, part, choice / 0.9)
        elif rng.random() < self.kills:
            self.step_to_death(name, part)
        elif choice < 0.93:
            self.say("reap")
            self.reap(rng.randrange(1, 40))
        elif choice < 0.955:
            self.say("idle")
            self.idle(rng.randrange(1, 40), rng.randrange(50))
        elif choice < 0.985:
            self.administer(name, part)
        elif choice < 0.99:
            self.say(f"{name} leaves {part}")
            self.leave(name, part)
        elif choice < 0.992:
            self.say(f"{name} departs")
            self.depart(name)
        else:
            self.say("restart")
            self.start()

    def say(self, text: str) -> None:
        self.log.append(text)
        if len(self.log) > 40:
            del self.log[:20]

    def somewhere(self, name: str, part: int, count: int) -> Handle:
        """Where something was put lately, or near it, or anywhere."""
        rng = self.random
        lately = self.pool(name, part).lately
        if lately and rng.random() < 0.6:
            oid, index = rng.choice(lately)
            index -= rng.randrange(count)
        else:
            oid = rng.randrange(6)
            index = rng.choice(
                (rng.randrange(100), rng.randrange(100), INDEX_LAST - rng.randrange(99))
            )
        return oid, min(max(index, 0), INDEX_LAST + 1 - count)

    def step_of_guest(self, name: str, part: int, choice: float) -> None:
        rng = self.random
        count = rng.choice((1, 1, 1, 3, 8, 32, 64))
        oid, index = self.somewhere(name, part, count)
        slot = rng.randrange(WINDOW_SLOTS - count + 1)
        token = rng.randrange(4)
        self.say(f"{choice:.3f} {name} {part} {oid}:{index}+{count} slot {slot}")
        if choice < 0.45:
            flags = rng.choice((0, 0, CallFlag.LOW, CallFlag.HIGH, CallFlag.ACTIVE))
            pages = [self.page() for _ in range(count)]
            self.put(name, part, oid, index, pages, slot, flags, token)
        elif choice < 0.8:
            keep = rng.random() < 0.3
            self.get(name, part, oid, index, count, slot, keep=keep, token=token)
        elif choice < 0.88:
            self.flush(name, part, oid, index, count, token)
        elif choice < 0.91:
            self.flush_object(name, part, oid, token)
        else:
            op = rng.choice((Op.PUT_BATCH, Op.GET_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH))
            entries = []
            for _ in range(min(count, 8)):
                one = rng.choice(PARTS)
                flags = {
                    Op.PUT_BATCH: rng.choice((0, CallFlag.LOW)),
                    Op.GET_BATCH: rng.choice((0, CallFlag.KEEP)),
                }.get(op, 0)
                entries.append(
                    Entry(one, *self.somewhere(name, one, 1), rng.randrange(12), int(flags))
                )
            self.batch(name, op, entries)

    def step_to_death(self, name: str, part: int) -> None:
        rng = self.random
        number = int(2 ** rng.uniform(0, 12))
        count = rng.choice((1, 3, 8, 64))
        oid, index = self.somewhere(name, part, count)
        owner, kind = "" if KIND_OF[part] in UUIDS else name, KIND_OF[part]
        choice = rng.randrange(9)
        self.say(f"death {choice} at {number}: {name} {part} {oid}:{index}+{count}")
        extent = Intent(owner, kind, oid, index, count)
        if choice < 3:
            pages = [self.page() for _ in range(count)]
            extent = replace(extent, pages=pages)
            self.die(number, lambda: self.put(name, part, oid, index, pages, 0), extent)
        elif choice == 3:
            self.die(number, lambda: self.get(name, part, oid, index, count, 0), extent)
        elif choice == 4:
            self.die(number, lambda: self.flush(name, part, oid, index, count), extent)
        elif choice == 5:
            everything = Intent(owner, kind, oid, 0, INDEX_LAST + 1)
            self.die(number, lambda: self.flush_object(name, part, oid), everything)
        elif choice == 6:
            self.die(number, lambda: self.leave(name, part))
        elif choice == 7:
            self.die(number, lambda: self.depart(name))
        else:
            self.die(
                number,
                rng.choice(
                    (
                        lambda: self.reap(100),
                        lambda: self.idle(40, 0),
                        lambda: self.host_flush(None, 1 << 16),
                    )
                ),
            )

    def administer(self, name: str, part: int) -> None:
        rng = self.random
        choice = rng.randrange(11)
        kind = KIND_OF[part]
        self.say(f"administrator {choice} {name} {part}")
        if choice == 0:
            if rng.random() < 0.4:
                self.ask(verb="freeze", guest=rng.choice((None, name, name, name)))
            else:
                self.ask(verb="thaw", guest=rng.choice((None, name)))
        elif choice == 1:
            self.ask(verb="set", guest=name, compress=rng.random() < 0.5, weight=rng.randrange(300))
        elif choice in (2, 3):
            group = rng.choice(("", "red", "red", "blue"))
            scope = rng.choice(("off", "guest", "group", "group", "all"))
            self.ask(verb="set", guest=name, sharing=scope, group=group)
        elif choice == 4:
            cap = rng.choice((0, 0, 60, 200)) * PAGE_BYTES
            reserve = rng.choice((0, 10, 40)) * PAGE_BYTES
            self.ask(verb="set", guest=name, cap_bytes=cap, reserve_bytes=reserve)
        elif choice == 5 and kind in UUIDS:
            uuid = UUIDS[kind].hex()
            if self.role(name, kind) is not None and rng.random() < 0.3:
                self.ask(verb="auth", action="deny", guest=name, uuid=uuid)
            else:
                role = rng.choice(("reader", "writer", "writer"))
                self.ask(verb="auth", action="allow", guest=name, uuid=uuid, role=role)
        elif choice == 6:
            self.ask(verb="schedule", mode=rng.choice(("greedy", "static", "scheduled")))
        elif choice == 7:
            self.host_flush(rng.choice((None, name)), rng.randrange(1 << 17))
        elif choice == 8:
            priority = rng.choice(("low", "normal", "high"))
            self.ask(verb="set", guest=name, priority=priority)
            pool = self.ids[name, part]
            self.ask(
                verb="set", guest=name, pool=pool, priority=priority, weight=rng.randrange(200)
            )
        elif choice == 9 and rng.random() < 0.1:
            self.destroy(name, rng.choice((None, part)))
        else:
            self.ask(verb="list")
            self.ask(verb="pools")
            self.ask(verb="freeable")


def held_pages(pool: Pool, machine: Machine) -> dict[Handle, bytes]:
    """All pages of a pool, read without removing any."""
    store = machine.store
    data = store.arena.data
    found: dict[Handle, bytes] = {}
    for oid, one in pool.objects.items():
        for leaf_number, leaf in one.leaves():
            for place, number in enumerate(leaf):
                if number >= store.entries.base:
                    page = store.contents.read(number)
                elif number >= 0:
                    page = bytes(data[number * PAGE_BYTES : (number + 1) * PAGE_BYTES])
                else:
                    continue
                found[int.from_bytes(oid, "little"), leaf_number * 64 + place] = page
    return found
