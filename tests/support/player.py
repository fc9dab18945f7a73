"""The commands of golden scripts (`scripts` has the language): the administrator's, and those that
show what is there; `playing` has those of guests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypervisor.entries import FILLED, KIND_MASK, SLAB, frame_location, location_place
from hypervisor.frames import KINDS
from hypervisor.slab import BACK_BYTES
from ipc.abi import PAGE_BYTES, Reason, oid_from_int
from tests.support.notation import guest_of, handles, split, uuid_of
from tests.support.playing import Playing


class Player(Playing):
    """A machine, and all the commands that drive it."""

    # --- the administrator

    def _ask(self, **record: Any) -> dict[str, Any]:
        return self.administration.answer(
            {key: value for key, value in record.items() if value is not None}
        )

    def do_set(self, words: list[str]) -> Iterator[str]:
        (target,), options = split(words)
        guest, _, pool = target.partition("/")
        record: dict[str, Any] = {}
        for key, value in options.items():
            if key in ("cap", "reserve"):
                record[f"{key}_bytes"] = int(value) * PAGE_BYTES
            elif key == "compress":
                record[key] = value == "on"
            else:
                record[key] = int(value) if value.isdigit() else value
        pool_id = self.ids[target] if pool else None
        answer = self._ask(verb="set", guest=guest, pool=pool_id, **record)
        said = ", ".join(f"{key} {value}" for key, value in options.items())
        yield f"{target} {answer.get('error', said)}"

    def do_balloon(self, words: list[str]) -> Iterator[str]:
        guest, pages = words or (None, None)
        size_bytes = None if pages is None else int(float(pages) * PAGE_BYTES)
        answer = self._ask(verb="balloon", guest=guest, size_bytes=size_bytes)
        if "error" in answer:
            yield f"{guest} {answer['error']}"
            return
        targets = answer["balloon_bytes"].items()
        said = [f"{name} {target_bytes // PAGE_BYTES} pages" for name, target_bytes in targets]
        yield f"targets: {', '.join(said) or 'none'}"

    def do_freeze(self, words: list[str]) -> Iterator[str]:
        answer = self._ask(verb="freeze", guest=words[0] if words else None)
        yield f"frozen: {', '.join(answer['frozen']) or 'nobody'}"

    def do_thaw(self, words: list[str]) -> Iterator[str]:
        answer = self._ask(verb="thaw", guest=words[0] if words else None)
        yield f"frozen: {', '.join(answer['frozen']) or 'nobody'}"

    def do_schedule(self, words: list[str]) -> Iterator[str]:
        answer = self._ask(verb="schedule", mode=words[0])
        yield f"scheduling: {answer.get('scheduling', answer.get('error'))}"

    def do_allow(self, words: list[str]) -> Iterator[str]:
        guest, uuid, *role = words
        role_name = role[0] if role else None
        answer = self._ask(
            verb="auth", action="allow", guest=guest, uuid=uuid_of(uuid).hex(), role=role_name
        )
        yield answer.get("error", f"{guest} may {'read' if role else 'write'} {uuid}")

    def do_deny(self, words: list[str]) -> Iterator[str]:
        guest, uuid = words
        answer = self._ask(verb="auth", action="deny", guest=guest, uuid=uuid_of(uuid).hex())
        yield answer.get("error", f"{guest} may not share {uuid}").replace(
            uuid_of(uuid).hex(), uuid
        )

    def do_quarantine(self, words: list[str]) -> Iterator[str]:
        guest, *deny = words
        answer = self._ask(verb="quarantine", guest=guest, also_deny=bool(deny))
        if "error" in answer:
            yield answer["error"]
            return
        kept = answer["persistent_pages"]
        denied = len(answer["denied"])
        yield (
            f"{guest}: {answer['pages']} pages in {answer['pools']} pools"
            + f", {kept} persistent ones stay" * bool(kept)
            + f", {denied} grants taken back" * bool(denied)
        )

    def do_quarantined(self, _words: list[str]) -> Iterator[str]:
        answer = self._ask(verb="quarantined")
        freed = [f"{name} {pages}" for name, pages in sorted(answer["pages"].items())]
        yield f"freed: {', '.join(freed) or 'nothing'}{', more' * answer['more']}"

    def do_whence(self, words: list[str]) -> Iterator[str]:
        """Who put a page, when and under which token."""
        label, where = words
        oid, _, index = where.partition(":")
        client, member = self._client(guest_of(label)), None
        member = client.members[self._id(label)]
        for page in self._ask(
            verb="page", guest=client.name, oid=oid_from_int(int(oid)).hex(), index=int(index)
        )["pages"]:
            if page["pool"] != member.pool.number:
                continue
            token = "" if page["token"] is None else f" token {page['token']}"
            after, before = (page[f"{end}_ns"] / 1e9 for end in ("after", "before"))
            yield (
                f"{label} {where} put by {page['guest']}{' (left)' * page['left']}, "
                f"{after:g} s to {f'{before:g} s' if before else 'now'},{token} {page['stored']}"
                + ", quarantined" * page["disowned"]
                + ", damaged" * (page["right"] is False)
            )
            return
        yield f"{label} {where} is not there"

    def do_rot(self, words: list[str]) -> Iterator[str]:
        """A bit of a page flips where the page lies, in whatever form."""
        label, where = words
        oid, _, index = where.partition(":")
        pool = self._client(guest_of(label)).members[self._id(label)].pool
        found = pool.objects.get(oid_from_int(int(oid)))
        assert found is not None
        store = self.machine.store
        number = found.find(int(index))
        entry = number >= store.entries.base
        location = store.entries.location(number) if entry else frame_location(number)
        place, kind = location_place(location), location & KIND_MASK
        if kind == FILLED:
            store.arena.words[store.entries.at(number) + 3] ^= 1
        elif kind == SLAB:
            byte = store.contents.slabs.read(place, 1, BACK_BYTES + 9)[0] ^ 1
            store.contents.slabs.write(place, bytes([byte]), BACK_BYTES + 9)
        else:
            store.arena.data[(place >> 8) * PAGE_BYTES] ^= 1
        yield f"{label} {where} rots"

    def do_grants(self, _words: list[str]) -> Iterator[str]:
        for grant in self._ask(verb="auth", action="list")["grants"]:
            name = bytes.fromhex(grant["uuid"]).rstrip(b"\0").decode()
            yield f"{name}: {grant['guest']} {grant['role']}"

    def do_freeable(self, _words: list[str]) -> Iterator[str]:
        answer = self._ask(verb="freeable")
        free, freeable = (answer[f"{name}_bytes"] // PAGE_BYTES for name in ("free", "freeable"))
        yield f"free {free} pages, freeable {freeable}"

    def do_host_flush(self, words: list[str]) -> Iterator[str]:
        *guest, pages = words
        answer = self._ask(
            verb="flush", guest=guest[0] if guest else None, size_bytes=int(pages) * PAGE_BYTES
        )
        if "error" in answer:
            yield answer["error"]
            return
        more = ", more" if answer["more"] else ""
        freed = answer["freed_bytes"] // PAGE_BYTES
        yield f"flushed {answer['flushed_pages']} pages, {freed} frames came free{more}"

    def do_host_destroy(self, words: list[str]) -> Iterator[str]:
        guest, _, pool = words[0].partition("/")
        pool_id = self.ids[words[0]] if pool else None
        answer = self._ask(verb="destroy", guest=guest, pool=pool_id)
        yield answer.get("error", f"destroyed {answer.get('destroyed_pools')} pools")

    # --- what is there

    def do_pages(self, words: list[str]) -> Iterator[str]:
        (label,) = words
        found = handles((oid, index) for name, oid, index in self._pages() if name == label)
        yield f"{label} holds {found or 'nothing'}"

    def do_window(self, words: list[str]) -> Iterator[str]:
        """What a guest reads in its shared info page."""
        (guest,) = words
        info = self.windows[guest].info()
        yield (
            f"{guest} notified {info.notifications} times: balloon target "
            f"{info.balloon_target_pages} pages, writeback {info.writeback_pages} pages"
        )

    def do_writeback(self, words: list[str]) -> Iterator[str]:
        """What was asked of a guest, and what it did."""
        record = self._ask(verb="list", guest=words[0])["guests"][words[0]]
        asked, done, wanted = (
            record[f"writeback_{what}_pages"] for what in ("asked", "done", "wanted")
        )
        over = record["persistent_over_bytes"]
        yield f"{words[0]} {over} bytes over: asked {asked}, done {done}, wanted {wanted}"

    def do_charges(self, _words: list[str]) -> Iterator[str]:
        for client, member in self._members():
            if member.pages:
                pays = f"{client.name} inherited " if member.heir else ""
                yield (
                    f"{pays}{self._name(member)}: {member.pages} pages, {member.cost_bytes} bytes"
                )

    def do_targets(self, _words: list[str]) -> Iterator[str]:
        for name, client in sorted(self.machine.clients.items()):
            parts = "".join(
                f", {self._name(member)} {member.target_bytes // PAGE_BYTES}"
                for member in client.members.values()
                if member.policy is not None
            )
            yield f"{name}: allotment {client.allotment_bytes // PAGE_BYTES} pages{parts}"

    def do_sharers(self, words: list[str]) -> Iterator[str]:
        (label,) = words
        pool = self._client(guest_of(label)).members[self._id(label)].pool
        for slot, member in sorted(pool.members.items()):
            role = "writer" if member.writer and member.may_get else "reader"
            if not member.may_get:
                role = "denied"
            if member.heir:
                role = f"left, {member.client.name} pays"
            yield f"slot {slot}: {self._name(member)} {role}, {member.pages} pages"

    def do_tokens(self, words: list[str]) -> Iterator[str]:
        label, *oids = words
        tokens = self._client(guest_of(label)).members[self._id(label)].pool.tokens
        if tokens is None:
            yield f"{label} has no tokens"
            return
        needed = ", ".join(f"{oid} needs {tokens.needed(oid_from_int(int(oid)))}" for oid in oids)
        yield f"{label} newest {tokens.newest}, stale {tokens.stale}{': ' * bool(oids)}{needed}"

    def do_frames(self, _words: list[str]) -> Iterator[str]:
        frames = self.machine.store.frames
        yield ", ".join(
            f"{name} {frames.count_kind(kind)}"
            for kind, name in enumerate(KINDS)
            if frames.count_kind(kind)
        )

    def do_savings(self, _words: list[str]) -> Iterator[str]:
        for kind, saving in self.machine.store.contents.savings().items():
            if saving["pages"]:
                yield f"{kind} {saving['pages']} pages, saves {saving['bytes_saved']} bytes"

    def do_counts(self, words: list[str]) -> Iterator[str]:
        account = self._client(words[0]).account
        yield ", ".join(f"{name} {n}" for name, n in account.cleancache().items())
        faults = account.faults.items()
        if faults:
            yield ", ".join(f"{Reason(reason).name} {n}" for reason, n in sorted(faults))
