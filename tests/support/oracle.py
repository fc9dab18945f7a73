"""A machine with several guests, and what their pages should hold.

The oracle may lose an ephemeral page at any time; it never accepts a wrong, stale or foreign one,
nor the loss of a persistent one.  `step` does one random thing that a guest, the administrator or
fate may do; whoever drives it decides when to walk the invariants.

Pages are 64-bit versions, repeated in the middle and at the end of a page; some are zero but for
that, some are noise, some equal to others and some same-filled, so that every way to store a page
is taken.
"""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Callable
from typing import Any

from hypervisor.administration import Administration
from hypervisor.arena import Arena, format_arena
from hypervisor.auth import Grants
from hypervisor.machine import Machine
from hypervisor.pools import Settings
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
from ipc.window import anonymous_window
from ipc.wire import decode_reply

ARENA_BYTES = 1 << 20
GUESTS = ("a", "b", "c", "d")
UUIDS = {2: b"E" * UUID_BYTES, 3: b"P" * UUID_BYTES}
KINDS = {0: (False, False), 1: (True, False), 2: (False, True), 3: (True, True)}
"""What a test's pool is: persistent, shared."""

Key = tuple[str, int, int, int]
"""owner (a guest, or "" of a shared pool), pool kind, object, index."""


class Mismatch(AssertionError):
    """The machine returned what it may not."""


class World:
    """`log` keeps the last steps, for whoever has to explain a failure."""

    def __init__(self, seed: int, policy: str = "clock", scheduling: str = "scheduled") -> None:
        self.random = random.Random(seed)
        self.policy = policy
        self.scheduling = scheduling
        self.mapping = mmap.mmap(-1, ARENA_BYTES)
        format_arena(self.mapping)
        self.windows = {name: anonymous_window() for name in GUESTS}
        self.ids: dict[tuple[str, int], int] = {}
        """(guest, kind) -> pool id."""
        self.pages: dict[Key, bytes] = {}
        self.version = 0
        self.settings: dict[str, Settings] = {}
        self.grants = Grants()
        self.log: list[str] = []
        self.counts: dict[str, int] = {}
        self.start()
        for name in GUESTS:
            for kind in UUIDS:
                self.ask(verb="auth", action="allow", guest=name, uuid=UUIDS[kind].hex())
            self.join(name)

    def start(self) -> None:
        """Start a hypervisor on the arena as it is."""
        self.machine = Machine(
            Arena(self.mapping),
            policy=self.policy,
            scheduling=self.scheduling,
            settings=self.settings,
            grants=self.grants,
            secret=self.random.randbytes(8),
        )
        self.administration = Administration(self.machine)
        recover(self.machine)

    def ask(self, **record: Any) -> dict[str, Any]:
        answer = self.administration.answer(record)
        if "error" in answer:
            raise Mismatch(f"{record}: {answer['error']}")
        return answer

    def join(self, name: str) -> None:
        """A guest attaches and makes a pool of each kind."""
        self.machine.attach(name, 1, 1, 0)
        for kind in KINDS:
            self.make_pool(name, kind)

    def make_pool(self, name: str, kind: int) -> None:
        persist, shared = KINDS[kind]
        uuid = UUIDS.get(kind, ANY_UUID)
        priority = self.random.choice(list(Priority))
        word = pool_flag_word(persist=persist, shared=shared, priority=priority)
        reply = self.call(name, Op.NEW_POOL, word, oid=int.from_bytes(uuid, "little"))
        if reply.status == Status.DONE:
            self.ids[name, kind] = reply.value
        elif reply.reason not in (Reason.SHARED_DENIED, Reason.TOO_MANY_POOLS):
            raise Mismatch(f"no pool: {reply}")

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
    ) -> Reply:
        request = REQUEST.pack(1, op, flags, count, pool, index, oid_from_int(oid), slot, 0, 0)
        client = self.machine.clients[name]
        reply = decode_reply(self.machine.execute(client, request, self.windows[name]))
        if reply.flags & ReplyFlag.FAULT:
            raise Mismatch(f"{op.name} of {name} is a fault: {reply}")
        key = f"{op.name} {Status(reply.status).name} {Reason(reply.reason).name}"
        self.counts[key] = self.counts.get(key, 0) + 1
        return reply

    # --- steps

    def step(self) -> None:
        rng = self.random
        name = rng.choice(GUESTS)
        kind = rng.choice((0, 0, 0, 1, 1, 2, 2, 3))
        oid = rng.randrange(6)
        count = rng.choice((1, 1, 1, 3, 32, 64))
        index = rng.choice((rng.randrange(100), rng.randrange(100), 2**32 - 64 - rng.randrange(64)))
        slot = rng.randrange(WINDOW_SLOTS - count + 1)
        choice = rng.random()
        known = [key for key in self.pages if key[:2] == (self.owner(name, kind), kind)]
        if known and rng.random() < 0.5:
            # Where something is, or near it.
            _, _, oid, index = rng.choice(known)
            index = min(index, 2**32 - count)
        self.log.append(f"{choice:.3f} {name} kind={kind} {oid}:{index}+{count}")
        del self.log[:-20]
        if (name, kind) not in self.ids:
            self.make_pool(name, kind)
        elif choice < 0.45:
            self.put(name, kind, oid, index, count, slot)
        elif choice < 0.75:
            self.get(name, kind, oid, index, count, slot)
        elif choice < 0.85:
            self.flush(name, kind, oid, index, count)
        elif choice < 0.89:
            reply = self.call(name, Op.FLUSH_OBJECT, self.ids[name, kind], oid)
            if reply.status == Status.DONE:
                owner = self.owner(name, kind)
                self.forget(lambda key: key[:3] == (owner, kind, oid))
        elif choice < 0.90:
            self.leave(name, kind)
        elif choice < 0.91:
            self.depart(name)
        elif choice < 0.94:
            self.machine.store.reap(rng.randrange(1, 40))
        elif choice < 0.96:
            self.idle()
        elif choice < 0.985:
            self.administer(name, kind)
        else:
            self.start()

    def owner(self, name: str, kind: int) -> str:
        return "" if kind in UUIDS else name

    def forget(self, condition: Callable[[Key], bool]) -> None:
        self.pages = {key: value for key, value in self.pages.items() if not condition(key)}

    def page(self) -> bytes:
        """A page that tells which put it is of, unless it is one that may be shared or filled."""
        self.version += 1
        choice = self.random.random()
        if choice < 0.1:
            return struct.pack("<Q", self.version) * 512
        if choice < 0.3:
            return random.Random(self.version % 7).randbytes(PAGE_BYTES)
        body = self.random.randbytes(self.random.choice((8, 900, 1900, 3000, 4000)))
        mark = struct.pack("<Q", self.version)
        return (mark + body).ljust(PAGE_BYTES - 8, b"\0") + mark

    def put(self, name: str, kind: int, oid: int, index: int, count: int, slot: int) -> None:
        pages = [self.page() for _ in range(count)]
        window = self.windows[name]
        for at, page in enumerate(pages):
            window.slot(slot + at)[:] = page
        flags = self.random.choice((0, 0, CallFlag.LOW, CallFlag.HIGH, CallFlag.ACTIVE))
        pool = self.ids[name, kind]
        reply = self.call(name, Op.PUT_PAGE, pool, oid, index, count, slot, flags)
        refused = reply.reason in (Reason.SHARED_DENIED, Reason.NOT_WRITER)
        for at, page in enumerate(pages):
            key = (self.owner(name, kind), kind, oid, index + at)
            if reply.map >> at & 1:
                self.pages[key] = page
            elif not refused and self.pages.pop(key, None) is not None and kind in (1, 3):
                if reply.reason in (Reason.FROZEN, Reason.NO_OBJECT_SLOT):
                    raise Mismatch(f"a refused put dropped {key}: {reply}")

    def get(self, name: str, kind: int, oid: int, index: int, count: int, slot: int) -> None:
        keep = kind == 0 and self.random.random() < 0.3
        flags = CallFlag.KEEP if keep else 0
        pool = self.ids[name, kind]
        reply = self.call(name, Op.GET_PAGE, pool, oid, index, count, slot, flags)
        if reply.reason == Reason.SHARED_DENIED:
            return
        for at in range(count):
            key = (self.owner(name, kind), kind, oid, index + at)
            if reply.map >> at & 1:
                found = bytes(self.windows[name].slot(slot + at))
                if found != self.pages.get(key):
                    raise Mismatch(f"{key} is wrong, stale or foreign")
                if kind == 0 and not keep:
                    del self.pages[key]
            elif self.pages.pop(key, None) is not None and kind in (1, 3):
                raise Mismatch(f"a persistent page is lost: {key}")

    def flush(self, name: str, kind: int, oid: int, index: int, count: int) -> None:
        reply = self.call(name, Op.FLUSH_PAGE, self.ids[name, kind], oid, index, count)
        if reply.status == Status.DONE:
            owner = self.owner(name, kind)
            self.forget(lambda key: key[:3] == (owner, kind, oid) and 0 <= key[3] - index < count)

    def leave(self, name: str, kind: int) -> None:
        self.call(name, Op.DESTROY_POOL, self.ids.pop((name, kind)))
        self.after_leaving(name, [kind])

    def depart(self, name: str) -> None:
        kinds = [kind for kind in KINDS if self.ids.pop((name, kind), None) is not None]
        self.machine.depart(self.machine.clients[name])
        self.after_leaving(name, kinds)
        self.join(name)

    def after_leaving(self, name: str, kinds: list[int]) -> None:
        for kind in kinds:
            owner = self.owner(name, kind)
            if kind not in UUIDS or not any(one == kind for _, one in self.ids):
                self.forget(lambda key, owner=owner, kind=kind: key[:2] == (owner, kind))  # type: ignore[misc]

    def idle(self) -> None:
        contents = self.machine.store.contents
        contents.compact(self.random.randrange(1, 40))
        contents.recompress(self.machine.store.sequence, self.random.randrange(50), 8)

    def administer(self, name: str, kind: int) -> None:
        rng = self.random
        choice = rng.randrange(8)
        if choice == 0:
            self.ask(verb=rng.choice(("freeze", "thaw", "thaw")), guest=name)
        elif choice == 1:
            self.ask(verb="set", guest=name, compress=rng.random() < 0.5, weight=rng.randrange(300))
        elif choice == 2:
            group = rng.choice(("", "red", "blue"))
            scope = rng.choice(("off", "guest", "group", "all"))
            self.ask(verb="set", guest=name, sharing=scope, group=group)
        elif choice == 3:
            cap = rng.choice((0, 0, 60, 200)) * PAGE_BYTES
            reserve = rng.choice((0, 10, 40)) * PAGE_BYTES
            self.ask(verb="set", guest=name, cap_bytes=cap, reserve_bytes=reserve)
        elif choice == 4 and kind in UUIDS:
            uuid = UUIDS[kind].hex()
            role = self.grants.role(UUIDS[kind], name)
            if role is not None and rng.random() < 0.5:
                self.ask(verb="auth", action="deny", guest=name, uuid=uuid)
            else:
                new_role = rng.choice(("reader", "writer", "writer"))
                self.ask(verb="auth", action="allow", guest=name, uuid=uuid, role=new_role)
        elif choice == 5:
            self.ask(verb="schedule", mode=rng.choice(("greedy", "static", "scheduled")))
        elif choice == 6:
            self.ask(verb="flush", guest=rng.choice((None, name)), size_bytes=rng.randrange(1 << 17))
        else:
            self.ask(verb="list")
            self.ask(verb="pools")
            self.ask(verb="freeable")
