"""A machine with several guests, every answer of which is held against what should be there.

The oracle may lose an ephemeral page when pages were evicted; it never accepts a wrong, stale or
foreign one, nor the loss of a persistent one.  Of persistent pools it knows exactly what is there,
so it knows each bit of each answer.  Of a machine that lends it knows what each guest has as RAM,
over restarts too, and that a LEND gets all that can be had.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from hypervisor.administration import Administration
from hypervisor.arena import Arena, format_arena
from hypervisor.auth import Grants, Role
from hypervisor.machine import Machine
from hypervisor.pools import Settings
from hypervisor.recovery import recover
from ipc.abi import (
    ANY_UUID,
    PAGE_BYTES,
    REQUEST,
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
from ipc.window import Window, anonymous_window
from ipc.wire import decode_reply
from tests.support.expectations import (
    BODIES,
    COMMON_PAGES,
    GUESTS,
    KIND_OF,
    PARTS,
    PERSISTENT,
    UUIDS,
    Entry,
    Intent,
    Known,
    Mismatch,
    held_pages,
)
from tests.support.kills import WRITERS, killed_at
from tests.support.ram import Ram
from tests.support.reports import Reports, check_provenance
from tests.support.wishes import Wishes

ARENA_BYTES: Final = 1 << 20


class CheckedMachine:
    """`log` keeps the last steps, for whoever has to explain a failure; `counts` the answers."""

    def __init__(
        self,
        seed: int | random.Random,
        policy: str = "clock",
        scheduling: str = "scheduled",
        *,
        kills: float = 0.0,
        lends: bool = False,
    ) -> None:
        self.random = seed if isinstance(seed, random.Random) else random.Random(seed)
        self.policy = policy
        self.kills = kills
        """Part of the steps that end in a death."""
        self.scheduling = scheduling
        self.lends = lends
        self.ram = Ram(lends=lends)
        self.mapping = mmap.mmap(-1, ARENA_BYTES)
        format_arena(self.mapping)
        self.windows: dict[str, Window] = {name: anonymous_window() for name in GUESTS}
        self.ids: dict[tuple[str, int], int] = {}
        """(guest, part) -> pool id."""
        self.known: dict[tuple[str, int], Known] = {}
        """(owner, kind) -> pages; the owner of shared ones is ""."""
        self.version = 0
        self.wishes = Wishes(self.windows, lambda name: self.pool(name, 1).pages)
        self.settings: dict[str, Settings] = {}
        self.grants = Grants()
        self.reports = Reports()
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
            lends=self.lends,
            settings=self.settings,
            grants=self.grants,
            secret=self.random.randbytes(8),
            clock_ns=lambda: self.wishes.now_ns,
        )
        self.administration = Administration(self.machine)
        recover(self.machine)
        self.ram.started(self.machine, self.settings)
        self.wishes.started(self.machine)
        for known in self.known.values():
            known.restarted(known.newest)

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
        self.wishes.came(name)
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
        if KIND_OF[part] == 1:
            self.wishes.took_back(name, self.pool(name, part).pages)
        self.left(name, [part])

    def depart(self, name: str) -> None:
        self.machine.depart(self.machine.clients[name])
        self.ram.lent[name] = 0
        self.left(name, [part for part in PARTS if (name, part) in self.ids])
        self.join(name)

    def balloon(self, name: str, pages: int) -> None:
        self.ask(verb="balloon", guest=name, size_bytes=pages * PAGE_BYTES)
        self.wishes.balloon(name, pages)

    def list_guests(self) -> None:
        answer = self.ask(verb="list")
        self.wishes.listed(answer["guests"])
        lent = {name: record["lent_pages"] for name, record in answer["guests"].items()}
        if lent != self.ram.lent or answer["arena"]["lent_frames"] != sum(lent.values()):
            raise Mismatch(f"{lent} is listed as RAM: {self.ram.lent}")

    def bound(self, name: str, cap_bytes: int, reserve_bytes: int) -> None:
        """Set a cap and a reservation; what is lent can't be reserved."""
        answer = self.administration.answer(
            {"verb": "set", "guest": name, "cap_bytes": cap_bytes, "reserve_bytes": reserve_bytes}
        )
        own = self.settings[name].reserve_bytes if name in self.settings else 0
        if "error" in answer and reserve_bytes <= max(own, self.ram.lendable * PAGE_BYTES + own):
            raise Mismatch(f"{reserve_bytes} bytes could be reserved: {answer['error']}")
        if "error" not in answer and self.ram.lendable < 0:
            raise Mismatch(f"{reserve_bytes} bytes are reserved of what is lent")

    def left(self, name: str, parts: list[int]) -> None:
        """A guest has given these pools back: what nobody has any more is gone."""
        for part in parts:
            del self.ids[name, part]
        for part in parts:
            kind = KIND_OF[part]
            if kind not in UUIDS or not any(KIND_OF[one] == kind for _, one in self.ids):
                self.known.pop(("" if kind in UUIDS else name, kind), None)

    # --- RAM

    def lend(self, name: str, wanted: int) -> None:
        """A guest wants to have so many frames."""
        most = self.ram.most(name, wanted)
        self.ram.answered(name, wanted, most, self.call(name, Op.LEND, index=wanted))

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
        most = self.ram.most(name, index) if op == Op.LEND else 0
        reply = decode_reply(self.machine.execute(client, request, self.windows[name]))
        if op != Op.NEW_POOL and reply.flags:
            raise Mismatch(f"{op.name} of {name} is a fault: {reply}")
        if reply.sequence != self.version & 0xFFFF or reply.map >> count:
            raise Mismatch(f"{op.name} of {name}: {reply}")
        self.wishes.called(name, op, count, reply, short=self.lends and reply.value < most)
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
            return COMMON_PAGES[int(choice * 1000) % len(COMMON_PAGES)]
        mark = self.version.to_bytes(8, "little")
        return b"".join((mark, BODIES[int(choice * 1000) % len(BODIES)], mark))

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
        known = self.pool(name, part)
        needed = known.needed(oid)
        if token < needed:
            if reply[1:3] != (Status.ESTALE, Reason.STALE_TOKEN) or (reply.map, reply.value) != (
                0,
                needed,
            ):
                raise Mismatch(f"a put with token {token} below {needed}: {reply}")
            return
        if reply.reason == Reason.STALE_TOKEN:
            raise Mismatch(f"a put with token {token}, needed {needed}: {reply}")
        known.see(oid, token)
        if (reply.status == Status.DONE) != (reply.map == (1 << count) - 1):
            raise Mismatch(f"status and map of a put: {reply}")
        first_refused = (~reply.map & (reply.map + 1)).bit_length() - 1
        if reply.reason == Reason.NO_OBJECT_SLOT and known.persistent:
            # The reason is that of the first page refused; one further on may be replaced in vain.
            if first_refused < count and known.get(oid, index + first_refused) is not None:
                raise Mismatch("no object for a page that has one")
        for at, page in enumerate(pages):
            reason = reply.reason if not reply.map >> at & 1 else 0
            # A page behind this one may have evicted it.
            self.was_put(name, part, oid, index + at, page, reason, evictions, token)
        known.remember(oid, index + count // 2, self.version)
        if known.fenced:
            check_provenance(self.machine, known, oid)

    def was_put(
        self,
        name: str,
        part: int,
        oid: int,
        index: int,
        page: bytes,
        reason: int,
        evictions: int,
        token: int,
    ) -> None:
        """The outcome of one page: no `reason`, or that of some page of its call."""
        known = self.pool(name, part)
        there = known.get(oid, index) is not None
        if reason == Reason.STALE_TOKEN:
            # Nothing changed.
            return
        if not reason:
            if known.persistent and not there and self.settings[name].frozen:
                raise Mismatch(f"a frozen guest put a new page at {oid}:{index}")
            known.put(oid, index, page, evictions)
            known.putters[oid, index] = name, token
        elif there:
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
        self.pool(name, part).see(oid, token)
        for at in range(count):
            self.was_flushed(name, part, oid, index + at, bool(reply.map >> at & 1))

    def was_flushed(self, name: str, part: int, oid: int, index: int, there: bool) -> None:
        known = self.pool(name, part)
        sure = known.persistent or known.seen.get((oid, index)) == self.evictions
        expected = known.drop(oid, index)
        if there != expected and (there or sure):
            raise Mismatch(f"a flush of {part} {oid}:{index} found {there}, not {expected}")
        if known.kind == 1 and there:
            self.wishes.took_back(name, 1)

    def flush_object(self, name: str, part: int, oid: int, token: int = 0) -> None:
        reply = self.call(name, Op.FLUSH_OBJECT, self.ids[name, part], oid, token=token)
        if self.denied(name, part, reply, writes=True):
            return
        known = self.pool(name, part)
        known.see(oid, token)
        pages = known.drop_object(oid)
        if reply.status != Status.DONE or reply.value > pages:
            raise Mismatch(f"flushing {pages} pages: {reply}")
        if known.persistent and reply.value != pages:
            raise Mismatch(f"flushing {pages} persistent pages: {reply}")
        if known.kind == 1:
            self.wishes.took_back(name, pages)

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
                    entry.token,
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
            known = self.pool(name, entry.part)
            needed = known.needed(entry.oid)
            if op != Op.GET_BATCH:
                known.see(entry.oid, entry.token)
            if op == Op.PUT_BATCH:
                reason = 0 if served else Reason.NO_MEMORY
                if entry.token < needed:
                    if served:
                        raise Mismatch(f"entry {at} has token {entry.token}, not {needed}")
                    reason = Reason.STALE_TOKEN
                self.was_put(*handle, by_slot[entry.slot], reason, evictions, entry.token)
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

    def report(self, name: str, part: int, oid: int, index: int, slot: int) -> None:
        """A guest says that a page is wrong: the one that is there, or was there lately."""
        known = self.pool(name, part)
        page = known.get(oid, index) or self.page()
        self.windows[name].slot(slot)[:] = page
        self.reports.begin(self.machine)
        reply = self.call(name, Op.REPORT, self.ids[name, part], oid, index, slot=slot)
        if self.denied(name, part, reply, writes=False):
            self.reports.denied()
        else:
            self.reports.answered(known, (oid, index), page, reply, self.evictions)

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
            if pool.tokens is not None:
                newest = pool.tokens.newest
                touched = intent is not None and (owner, kind) == (intent.owner, intent.kind)
                sent = intent.token if intent is not None and touched else 0
                if newest not in (known.newest, max(known.newest, sent)):
                    raise Mismatch(f"token {known.newest} became {newest} over a death")
                known.restarted(newest)
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
                known.putters.pop((oid, index), None)
            if page not in allowed and (known.persistent or page is not None):
                raise Mismatch(f"a death changed {owner} {kind} {oid}:{index}")
            if page is None:
                known.drop(oid, index)
            else:
                known.put(oid, index, page, self.evictions)
