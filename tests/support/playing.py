"""What guests do in golden scripts (`scripts` has the language, `player` the other commands)."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any

from hypervisor.administration import Administration
from hypervisor.arena import Arena, format_arena, layout
from hypervisor.auth import Grants
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pools import Client, Member, Pool, Settings
from hypervisor.pressure import shared_info
from hypervisor.provenance import report_words
from hypervisor.recovery import recover
from hypervisor.residents import Report
from ipc.abi import (
    INVALID_OID,
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
from tests.support.notation import (
    ScriptError,
    guest_of,
    handles,
    page_of,
    spans,
    split,
    uuid_of,
    words_of,
)

Page = tuple[str, int, int]
"""pool, object, index."""

_CLAIMED = ("pool", "uuid", "object", "index")
"""Of a report: what its guest says."""


class Playing:
    """A machine, and the commands of its guests."""

    def __init__(self) -> None:
        self.options: dict[str, str] = {}
        self.settings: dict[str, Settings] = {}
        self.grants = Grants()
        self.windows: dict[str, Window] = {}
        self.now_ns = 0
        self.labels: dict[tuple[int, int], str] = {}
        """(pool, slot) -> the name of a member."""
        self.ids: dict[str, int] = {}
        """Its pool id."""
        self.words: dict[bytes, str] = {}
        self.heard: list[str] = []
        """What the audit log says of the report that is being made."""
        self.mapping: mmap.mmap | None = None
        self._commands: dict[str, Callable[[list[str]], Iterator[str]]] = {
            name.removeprefix("do_").replace("_", "-"): getattr(self, name)
            for name in dir(self)
            if name.startswith("do_")
        }

    def play(self, line: str) -> list[str]:
        """The trace of one line."""
        words = line.split()
        if not words or line.startswith("#"):
            return []
        if words[0] == "quiet":
            self.play(line.removeprefix("quiet "))
            return []
        if words[0] == "repeat":
            rest = line.split(maxsplit=2)[2]
            return [
                out
                for number in range(int(words[1]))
                for out in self.play(rest.replace("{n}", str(number)))
            ]
        if words[0] == "machine":
            self.options = split(words[1:])[1]
            return []
        if self.mapping is None:
            self._format()
        handler = self._commands.get(words[0])
        if handler is None:
            raise ScriptError(f"no command {words[0]!r}")
        before, evictions = self._pages(), self.machine.store.evictions
        self._touched: set[Page] = set()
        trace = list(handler(words[1:]))
        check(self.machine)
        if words[0] != "restart" and self.machine.store.evictions != evictions:
            trace += self._evicted(before)
        return trace

    def _evicted(self, before: set[Page]) -> Iterator[str]:
        gone = before - self._pages() - self._touched
        for label in sorted({page[0] for page in gone}):
            found = handles((oid, index) for one, oid, index in gone if one == label)
            yield f"  evicted {label} {found}"

    # --- the machine

    def _format(self) -> None:
        frames = int(self.options.get("frames", "64"))
        self.checksums = self.options.get("checksums") == "on"
        self.mapping = mmap.mmap(-1, layout(frames, checksums=self.checksums).end)
        format_arena(self.mapping, checksums=self.checksums)
        self._boot()

    def _boot(self) -> str:
        assert self.mapping is not None
        self.machine = Machine(
            Arena(self.mapping),
            policy=self.options.get("policy", "clock"),
            scheduling=self.options.get("scheduling", "static"),
            admission=self.options.get("admission", "on") == "on",
            lends=self.options.get("lend") == "on",
            settings=self.settings,
            grants=self.grants,
            secret=b"a script",
            clock_ns=lambda: self.now_ns,
        )
        self.machine.pressure.notify = self._notify
        self.machine.hear = self._hear
        self.administration = Administration(self.machine)
        found = recover(self.machine)._asdict()
        for client in self.machine.clients.values():
            self._welcome(client)
        return ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in found.items() if n)

    def _welcome(self, client: Client) -> None:
        window = self.windows[client.name]
        window.publish_info(self.machine.generation, **shared_info(client))

    def _notify(self, client: Client) -> None:
        self.windows[client.name].notify(**shared_info(client))

    def _hear(self, client: Client, report: Report) -> None:
        words = report_words(self.machine, report)
        told = (f"{key} {words[key]}" for key in words if key not in _CLAIMED)
        self.heard.append(f"{client.name} is heard: " + ", ".join(told))

    def do_wait(self, words: list[str]) -> Iterator[str]:
        """Seconds go by."""
        self.now_ns += round(float(words[0]) * 1e9)
        self.machine.moments.note(self.machine.store.sequence, self.now_ns)
        yield f"{words[0]} s later"

    def do_restart(self, words: list[str]) -> Iterator[str]:
        """The hypervisor is killed and started again on its arena."""
        if words:
            self.options["scheduling"] = words[0]
        yield f"restarted: {self._boot() or 'nothing'}"

    def do_reap(self, words: list[str]) -> Iterator[str]:
        yield f"reaped {self.machine.store.reap(*map(int, words))} pages"

    def do_compact(self, words: list[str]) -> Iterator[str]:
        yield f"moved {self.machine.store.contents.compact(int(words[0]) if words else 64)}"

    def do_recompress(self, _words: list[str]) -> Iterator[str]:
        contents = self.machine.store.contents
        before = contents.recompressed.pages
        tries = contents.recompress(self.machine.store.sequence, 0, 1000)
        yield f"tried {tries}, made {contents.recompressed.pages - before} smaller"

    # --- guests

    def _client(self, name: str) -> Client:
        try:
            return self.machine.clients[name]
        except KeyError:
            raise ScriptError(f"no guest {name!r}") from None

    def do_guest(self, words: list[str]) -> Iterator[str]:
        (name,) = words
        self.windows.setdefault(name, anonymous_window())
        client = self.machine.attach(name, 1, 1, 0)
        if client is not None:
            self._welcome(client)
        yield f"{name} attached" if client is not None else f"{name} is turned away"

    def do_depart(self, words: list[str]) -> Iterator[str]:
        (name,) = words
        self.machine.depart(self._client(name))
        yield f"{name} departed"

    def do_pool(self, words: list[str]) -> Iterator[str]:
        (label, kind), options = split(words)
        guest = guest_of(label)
        shared = options.get("shared")
        word = pool_flag_word(
            persist={"ephemeral": False, "persistent": True}[kind],
            shared=shared is not None,
            priority=Priority[options.get("priority", "normal").upper()],
        )
        uuid = uuid_of(shared or "none") + bytes(8)
        reply = self._call(guest, Op.NEW_POOL, pool=word, oid=uuid)
        if reply.status != Status.DONE:
            yield f"{label} {self._why(reply)}"
            return
        member = self._client(guest).members[reply.value]
        self.labels[member.pool.number, member.slot] = label
        self.ids[label] = reply.value
        extra = "".join(
            f", {flag.name.lower()}"
            for flag in (ReplyFlag.JOINED, ReplyFlag.READER)
            if reply.flags & flag and flag.name
        )
        yield f"{label} is pool {reply.value}{extra}"

    def do_destroy(self, words: list[str]) -> Iterator[str]:
        (label,) = words
        reply = self._call(guest_of(label), Op.DESTROY_POOL, pool=self._id(label))
        yield f"{label} {'destroyed' if reply.status == Status.DONE else self._why(reply)}"

    def _id(self, label: str) -> int:
        _, _, name = label.partition("/")
        if name.startswith("#"):
            return int(name[1:])
        if label not in self.ids:
            raise ScriptError(f"no pool {label!r}")
        return self.ids[label]

    def _message(self, op: int, **fields: Any) -> bytes:
        oid = fields.get("oid", 0)
        return REQUEST.pack(
            1,
            op,
            fields.get("flags", 0),
            fields.get("count", 0),
            fields.get("pool", 0),
            fields.get("index", 0),
            oid_from_int(oid) if isinstance(oid, int) else oid,
            fields.get("slot", 0),
            fields.get("token", 0),
            fields.get("reserved", 0),
        )

    def _call(self, guest: str, op: int, **fields: Any) -> Reply:
        return self._raw(guest, self._message(op, **fields))

    def _raw(self, guest: str, message: bytes) -> Reply:
        client = self._client(guest)
        return decode_reply(self.machine.execute(client, message, self.windows[guest]))

    def _why(self, reply: Reply) -> str:
        names = [Status(reply.status).name]
        if reply.reason:
            names.append(Reason(reply.reason).name)
        return " ".join(names)

    # --- pages

    def _extent(self, text: str) -> tuple[int, int, int]:
        """Of OBJECT:INDEX+COUNT."""
        oid, _, rest = text.partition(":")
        index, _, count = rest.partition("+")
        return int(oid), int(index), int(count or 1)

    def _put_words(self, guest: str, slot: int, words: list[str], count: int) -> None:
        if len(words) == 1 and count > 1:
            words = [f"{words[0]}{number}" for number in range(count)]
        if len(words) != count:
            raise ScriptError(f"{len(words)} words for {count} pages")
        for at, word in enumerate(words):
            page = page_of(word)
            self.words[page] = word
            self.windows[guest].slot(slot + at)[:] = page

    def _word(self, guest: str, slot: int) -> str:
        page = bytes(self.windows[guest].slot(slot))
        return self.words.get(page, "???")

    def _is_there(self, label: str, oid: int, index: int) -> bool:
        member = self._client(guest_of(label)).members.get(self._id(label))
        found = None if member is None else member.pool.objects.get(oid_from_int(oid))
        return found is not None and found.find(index) >= 0

    def _touch(self, label: str, oid: int, first: int, count: int) -> None:
        member = self._client(guest_of(label)).members.get(self._id(label))
        for name in [] if member is None else self._names(member.pool):
            self._touched |= {(name, oid, index) for index in range(first, first + count)}

    def _names(self, pool: Pool) -> list[str]:
        return [self._name(member) for member in pool.members.values()]

    def _name(self, member: Member) -> str:
        return self.labels[member.pool.number, member.slot]

    def do_put(self, words: list[str]) -> Iterator[str]:
        (label, where, *contents), options = split(words)
        guest = guest_of(label)
        oid, index, count = self._extent(where)
        hints = options.get("hints", "none").upper().split(",")
        flags = sum(CallFlag[name] for name in hints)
        self._put_words(guest, 0, contents, count)
        was = [self._is_there(label, oid, index + at) for at in range(count)]
        self._touch(label, oid, index, count)
        reply = self._call(
            guest,
            Op.PUT_PAGE,
            pool=self._id(label),
            oid=oid,
            index=index,
            count=count,
            flags=flags,
            token=int(options.get("token", "0")),
        )
        outcomes = [self._put_outcome(label, oid, index, at, was, reply) for at in range(count)]
        yield f"{label} {self._listed(oid, index, outcomes)}{self._unless_done(reply)}"

    def _put_outcome(
        self, label: str, oid: int, index: int, at: int, was: list[bool], reply: Reply
    ) -> str:
        if reply.map >> at & 1:
            return "replaced" if was[at] else "stored"
        if was[at] and not self._is_there(label, oid, index + at):
            return "dropped"
        return "refused"

    def _listed(self, oid: int, index: int, outcomes: list[str]) -> str:
        """`7:0..1 stored, 7:2 refused`."""
        parts: list[list[Any]] = []
        for at, outcome in enumerate(outcomes):
            if parts and parts[-1][2] == outcome:
                parts[-1][1] = index + at
            else:
                parts.append([index + at, index + at, outcome])
        return ", ".join(f"{oid}:{spans(range(a, b + 1))} {what}" for a, b, what in parts)

    def _unless_done(self, reply: Reply) -> str:
        if reply.status in (Status.DONE, Status.MISS):
            return ""
        needs = f", needs {reply.value}" if reply.reason == Reason.STALE_TOKEN else ""
        return f": {self._why(reply)}{needs}"

    def do_get(self, words: list[str]) -> Iterator[str]:
        label, where, *rest = words
        guest = guest_of(label)
        oid, index, count = self._extent(where)
        flags = CallFlag.KEEP if rest == ["keep"] else 0
        self._touch(label, oid, index, count)
        reply = self._call(
            guest, Op.GET_PAGE, pool=self._id(label), oid=oid, index=index, count=count, flags=flags
        )
        parts: list[str] = []
        at = 0
        while at < count:
            end = at + 1
            hit = reply.map >> at & 1
            while end < count and reply.map >> end & 1 == hit:
                end += 1
            what = "miss"
            if hit:
                what = f"hit {words_of([self._word(guest, slot) for slot in range(at, end)])}"
            parts.append(f"{oid}:{spans(range(index + at, index + end))} {what}")
            at = end
        yield f"{label} {', '.join(parts)}{self._unless_done(reply)}"

    def do_flush(self, words: list[str]) -> Iterator[str]:
        (label, where), options = split(words)
        guest = guest_of(label)
        token = int(options.get("token", "0"))
        if ":" not in where:
            reply = self._call(
                guest, Op.FLUSH_OBJECT, pool=self._id(label), oid=int(where), token=token
            )
            done = f"flushed {reply.value} pages"
            yield f"{label} {where} {done if reply.status == Status.DONE else self._why(reply)}"
            return
        oid, index, count = self._extent(where)
        reply = self._call(
            guest,
            Op.FLUSH_PAGE,
            pool=self._id(label),
            oid=oid,
            index=index,
            count=count,
            token=token,
        )
        if reply.status != Status.DONE:
            yield f"{label} {where} {self._why(reply)}"
            return
        outcomes = ["flushed" if reply.map >> at & 1 else "absent" for at in range(count)]
        yield f"{label} {self._listed(oid, index, outcomes)}"

    def do_report(self, words: list[str]) -> Iterator[str]:
        """A guest says that a page is wrong."""
        label, where, *page = words
        oid, index, _ = self._extent(where)
        self._put_words(guest_of(label), 9, page, 1)
        self.heard.clear()
        reply = self._call(
            guest_of(label), Op.REPORT, pool=self._id(label), oid=oid, index=index, slot=9
        )
        yield f"{label} {where} {self._why(reply)}"
        yield from (f"  {line}" for line in self.heard)

    def do_batch(self, words: list[str]) -> Iterator[str]:
        guest, verb, *rest = words
        op = {"put": Op.PUT_BATCH, "get": Op.GET_BATCH, "flush": Op.FLUSH_BATCH}[verb]
        table = []
        wanted = []
        for slot, entry in enumerate(" ".join(rest).split(";")):
            (name, where, *contents), options = split(entry.split())
            oid, index, _ = self._extent(where)
            label = f"{guest}/{name}"
            if op == Op.PUT_BATCH:
                self._put_words(guest, slot, contents, 1)
            flags = CallFlag.KEEP if contents == ["keep"] else 0
            place = 0 if op == Op.FLUSH_BATCH else slot
            token = int(options.get("token", "0"))
            table.append((self._id(label), index, place, int(flags), oid_from_int(oid), token))
            wanted.append((label, oid, index))
            self._touch(label, oid, index, 1)
        self.windows[guest].write_table(table)
        reply = self._call(guest, op, count=len(table))
        for slot, (label, oid, index) in enumerate(wanted):
            served = reply.map >> slot & 1
            if op == Op.GET_BATCH:
                what = f"hit {self._word(guest, slot)}" if served else "miss"
            elif op == Op.PUT_BATCH:
                what = "stored" if served else "refused"
            else:
                what = "flushed" if served else "absent"
            yield f"{label} {oid}:{index} {what}"
        needs = f", needs {reply.value}" if reply.reason == Reason.STALE_TOKEN else ""
        yield f"{guest} {self._why(reply)}{needs}"

    def do_call(self, words: list[str]) -> Iterator[str]:
        (guest, op), options = split(words)
        fields: dict[str, Any] = {}
        for key, value in options.items():
            if key == "uuid":
                fields["oid"] = uuid_of(value) + bytes(8)
            elif value == "invalid":
                fields[key] = INVALID_OID
            else:
                fields[key] = int(value, 0)
        number = Op[op] if op.isupper() else int(op)
        reply = self._call(guest, number, **fields)
        yield f"{guest} {self._told(reply)}"

    def do_message(self, words: list[str]) -> Iterator[str]:
        guest, length = words
        yield f"{guest} {self._told(self._raw(guest, bytes(int(length))))}"

    def _told(self, reply: Reply) -> str:
        fault = "fault: " if reply.flags & ReplyFlag.FAULT else ""
        more = "".join(
            f" {name}={value:#x}"
            for name, value in (("map", reply.map), ("value", reply.value))
            if value
        )
        return f"{fault}{self._why(reply)}{more}"

    def do_lend(self, words: list[str]) -> Iterator[str]:
        """A guest wants so many pages as RAM."""
        guest, pages = words
        reply = self._call(guest, Op.LEND, index=int(pages))
        if reply.status == Status.DONE:
            yield f"{guest} has {reply.value} pages as RAM"
        else:
            yield f"{guest} {self._why(reply)}"

    def do_version(self, words: list[str]) -> Iterator[str]:
        reply = self._call(words[0], Op.VERSION)
        yield f"spec {reply.value >> 32}, revision {reply.value & 0xFFFFFFFF}"

    # --- what is there

    def _members(self) -> Iterator[tuple[Client, Member]]:
        for _, client in sorted(self.machine.clients.items()):
            for member in client.charged():
                yield client, member

    def _pages(self) -> set[Page]:
        store = self.machine.store
        return {
            (
                self._name(store.member_of(pool, number)),
                int.from_bytes(oid, "little"),
                leaf_number * 64 + place,
            )
            for pool in self.machine.memberships.all_pools(self.machine.clients)
            for oid, found in pool.objects.items()
            for leaf_number, leaf in found.leaves()
            for place, number in enumerate(leaf)
            if number >= 0
        }
