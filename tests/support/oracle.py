"""Random histories of a machine with several guests, against an oracle.

`step` does one random thing that a guest, the administrator or fate may do.  Whoever drives it
decides when to walk the invariants.
"""

from __future__ import annotations

from dataclasses import replace

from ipc.abi import (
    PAGE_BYTES,
    CallFlag,
    Op,
    Priority,
)
from ipc.limits import WINDOW_SLOTS
from tests.support.checked import CheckedMachine
from tests.support.expectations import (
    GUESTS,
    INDEX_LAST,
    KIND_OF,
    PARTS,
    UUIDS,
    Entry,
    Handle,
    Intent,
)

_TOKEN_STEPS = (*(0,) * 28, 1, 1, 1, 1, -1, -1, -1, -5, -5, -5, 40_000, 1 << 40)
"""Now and then one so large that it needs a base, or has an object begin anew (`pagetokens`)."""


class World(CheckedMachine):
    """`step` is what this is for."""

    def step(self) -> None:
        rng = self.random
        name = rng.choice(GUESTS)
        part = rng.choice((0, 0, 0, 1, 1, 2, 2, 3, 3, 4))
        choice = rng.random()
        if self.lends and rng.random() < 0.05:
            self.lend(name, self.wanted_ram(name))
        elif (name, part) not in self.ids:
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

    def wanted_ram(self, name: str) -> int:
        """What a guest wants: mostly little, or nothing would be left for pages."""
        rng = self.random
        had = self.ram.lent[name]
        wanted = rng.choice((0, 0, had // 2, rng.randrange(60), had + rng.randrange(20), 2000))
        self.say(f"{name} has {had} frames as RAM and wants {wanted}")
        return wanted

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
            # Few objects, so that steps meet; now and then one of many, so that numbers run out.
            oid = rng.randrange(6) if rng.random() < 0.9 else rng.randrange(400)
            index = rng.choice(
                (rng.randrange(100), rng.randrange(100), INDEX_LAST - rng.randrange(99))
            )
        return oid, min(max(index, 0), INDEX_LAST + 1 - count)

    def token(self, name: str, part: int, oid: int) -> int:
        """Mostly that which the object needs; where none is looked at, any."""
        known = self.pool(name, part)
        if not known.fenced:
            return self.random.randrange(4)
        return max(0, known.needed(oid) + self.random.choice(_TOKEN_STEPS))

    def step_of_guest(self, name: str, part: int, choice: float) -> None:
        rng = self.random
        count = rng.choice((1, 1, 1, 3, 8, 32, 64))
        oid, index = self.somewhere(name, part, count)
        slot = rng.randrange(WINDOW_SLOTS - count + 1)
        token = self.token(name, part, oid)
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
        elif choice < 0.905:
            self.flush_object(name, part, oid, token)
        elif choice < 0.92:
            self.report(name, part, oid, index, slot)
        else:
            op = rng.choice((Op.PUT_BATCH, Op.GET_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH))
            entries = []
            for _ in range(min(count, 8)):
                one = rng.choice(PARTS)
                flags = {
                    Op.PUT_BATCH: rng.choice((0, CallFlag.LOW)),
                    Op.GET_BATCH: rng.choice((0, CallFlag.KEEP)),
                }.get(op, 0)
                oid, index = self.somewhere(name, one, 1)
                token = self.token(name, one, oid)
                entries.append(Entry(one, oid, index, rng.randrange(12), int(flags), token))
            self.batch(name, op, entries)

    def step_to_death(self, name: str, part: int) -> None:
        rng = self.random
        number = int(2 ** rng.uniform(0, 12))
        count = rng.choice((1, 3, 8, 64))
        oid, index = self.somewhere(name, part, count)
        owner, kind = "" if KIND_OF[part] in UUIDS else name, KIND_OF[part]
        choice = rng.randrange(9 + self.lends)
        self.say(f"death {choice} at {number}: {name} {part} {oid}:{index}+{count}")
        token = self.token(name, part, oid)
        extent = Intent(owner, kind, oid, index, count, token=token)
        if choice < 3:
            pages = [self.page() for _ in range(count)]
            extent = replace(extent, pages=pages)
            self.die(
                number, lambda: self.put(name, part, oid, index, pages, 0, token=token), extent
            )
        elif choice == 3:
            self.die(number, lambda: self.get(name, part, oid, index, count, 0), extent)
        elif choice == 4:
            self.die(number, lambda: self.flush(name, part, oid, index, count, token), extent)
        elif choice == 5:
            everything = Intent(owner, kind, oid, 0, INDEX_LAST + 1, token=token)
            self.die(number, lambda: self.flush_object(name, part, oid, token), everything)
        elif choice == 6:
            self.die(number, lambda: self.leave(name, part))
        elif choice == 7:
            self.die(number, lambda: self.depart(name))
        elif choice == 9:
            wanted = self.wanted_ram(name)
            self.ram.intent = name, wanted
            self.die(number, lambda: self.lend(name, wanted))
            self.ram.intent = None
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
        choice = rng.randrange(12)
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
            self.bound(name, cap, reserve)
        elif choice in (5, 10) and kind in UUIDS:
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
        elif choice == 11:
            self.balloon(name, rng.choice((0, 1, 50, 0xFFFF_FFFF)))
        else:
            self.list_guests()
            self.ask(verb="pools")
            self.ask(verb="freeable")
