"""What the administrator may ask of a hypervisor, beside `stats`, `ping` and `stop`.

    list {guest?}                      settings, charges, pools and counts of guests
    pools {guest?}                     pools, and who is in them
    freeze, thaw {guest?}              no new pages from a guest (from all); gets, flushes and
                                       duplicate puts go on
    set {guest, pool?, ...}            weight, cap_bytes, reserve_bytes, priority, compress, borrow,
                                       sharing, group; of a pool: weight, priority
    balloon {guest?, size_bytes?}      how much RAM a guest should have, 0 for no wish; the answer
                                       has the targets of all
    schedule {mode}                    greedy, static, scheduled
    freeable                           what is free, and what dropping ephemeral pages would free
    flush {guest?, size_bytes}         drop ephemeral pages and give the memory back to the host
    auth {action, guest?, uuid?, role?}  allow, deny, list: who may share which pool
    destroy {guest, pool?}             drop a guest's pools, persistent ones too
    page {oid, index, guest?}          who put this page into each pool that has it, when, and under
                                       which token
    quarantine {guest, also_deny?}     nobody may have the ephemeral pages that a guest has put into
                                       shared pools until now; their memory comes back in slices
    quarantined                        what of that is done
    reseed                             draw another seed for the hash that finds equal pages
    rotated what, guest or volume      nothing: a token or key is new, which the audit log shall say

A record is answered by a record; what can't be done by {"error": text}.  One answer does a bounded
amount of work: `flush` does a slice and says whether there is `more`.

Nothing in here can be reached from a guest: it is called by the control socket alone.  Xen's guests
could name other guests in two of these operations until 2017, and its "destroy" only thawed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Final

from hypervisor.auth import Role
from hypervisor.balance import MODES
from hypervisor.machine import Machine
from hypervisor.pools import Client, Settings
from hypervisor.provenance import pages_of, parse_oid
from hypervisor.sharing import Sharing
from hypervisor.snapshot import (
    arena_record,
    freeable_bytes,
    guest_record,
    pool_record,
    settings_record,
)
from ipc.abi import PAGE_BYTES, UUID_BYTES, Priority
from ipc.attach import is_guest_name
from ipc.codec import Record
from ipc.errors import OperatorError
from ipc.window import BALLOON_PAGES_MAX

FLUSH_SLICE_PAGES: Final = 4096
"""Pages dropped for one answer to `flush`: some milliseconds."""
WEIGHT_MAX: Final = 65535
BALLOON_BYTES_MAX: Final = BALLOON_PAGES_MAX * PAGE_BYTES
_GROUP_CHARACTERS_MAX: Final = 31


class Administration:
    """Answers records over one machine.  `changed` is called after every change that should outlive
    the hypervisor; `is_attached` tells whether a guest's process is there."""

    def __init__(
        self,
        machine: Machine,
        *,
        is_attached: Callable[[Client], bool] = lambda _client: True,
        changed: Callable[[], None] = lambda: None,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._random_bytes = random_bytes
        self._machine = machine
        self._is_attached = is_attached
        self._changed = changed
        self._verbs: dict[str, Callable[[Record], Record]] = {
            "list": self._list,
            "pools": self._pools,
            "freeze": lambda record: self._freeze(record, frozen=True),
            "thaw": lambda record: self._freeze(record, frozen=False),
            "set": self._set,
            "balloon": self._balloon,
            "schedule": self._schedule,
            "freeable": lambda _record: dict(freeable_bytes(machine)),
            "flush": self._flush,
            "auth": self._auth,
            "destroy": self._destroy,
            "page": self._page,
            "quarantine": self._quarantine,
            "quarantined": lambda _record: self._quarantined(),
            "reseed": lambda _record: self._reseed(),
            "rotated": self._rotated,
        }

    @property
    def verbs(self) -> list[str]:
        """What can be asked."""
        return list(self._verbs)

    def answer(self, record: Record) -> Record:
        """The answer; never raises for anything that a record can hold."""
        verb = record.get("verb")
        handler = self._verbs.get(verb) if isinstance(verb, str) else None
        if handler is None:
            return {"error": f"no verb {verb!r}; there are {', '.join(self._verbs)}"}
        try:
            return handler(record)
        except OperatorError as error:
            return {"error": str(error)}

    # --- looking

    def _list(self, record: Record) -> Record:
        machine = self._machine
        return {
            "guests": {
                client.name: guest_record(client, attached=self._is_attached(client))
                for client in self._guests(record)
            },
            "arena": arena_record(machine),
            "scheduling": machine.store.victims.mode,
            "eviction": machine.policy_name,
            "evictions": machine.store.evictions,
            "savings": machine.store.contents.savings(),
            "slab": machine.store.contents.slab_record(),
        }

    def _pools(self, record: Record) -> Record:
        guests = {id(client) for client in self._guests(record)}
        return {
            "pools": [
                pool_record(pool)
                for pool in self._machine.memberships.all_pools(self._machine.clients)
                if any(id(member.client) in guests for member in pool.members.values())
            ]
        }

    def _page(self, record: Record) -> Record:
        oid = parse_oid(record.get("oid"))
        index = _whole(record, "index", 0, (1 << 32) - 1)
        guests = {id(client) for client in self._guests(record)}
        pools = [
            pool
            for pool in self._machine.memberships.all_pools(self._machine.clients)
            if any(id(member.client) in guests for member in pool.members.values())
        ]
        return {"pages": pages_of(self._machine, pools, oid, index)}

    # --- settings

    def _freeze(self, record: Record, *, frozen: bool) -> Record:
        for client in self._guests(record):
            client.settings.frozen = frozen
            client.apply_settings()
        self._changed()
        every = self._machine.clients.values()
        return {"frozen": sorted(client.name for client in every if client.settings.frozen)}

    def _set(self, record: Record) -> Record:
        name = record.get("guest")
        if not isinstance(name, str) or not is_guest_name(name):
            raise OperatorError("set needs a guest")
        client = self._machine.clients.get(name)
        if record.get("pool") is not None:
            self._set_pool(self._guest(name), record)
            return {"guest": settings_record(self._guest(name).settings)}
        settings = self._machine.settings.setdefault(name, Settings())
        fresh = _merge(settings, record)
        others = sum(
            one.reserve_bytes for other, one in self._machine.settings.items() if other != name
        )
        store = self._machine.store
        arena_bytes = store.arena.frames_count * PAGE_BYTES
        lent_bytes = store.loans.lent * PAGE_BYTES
        if fresh.reserve_bytes > max(settings.reserve_bytes, arena_bytes - lent_bytes - others):
            lent = f", and {lent_bytes} are lent as RAM" if lent_bytes else ""
            raise OperatorError(
                f"{fresh.reserve_bytes} bytes can't be reserved: others reserve {others} of the "
                f"arena's {arena_bytes}{lent}"
            )
        # In place: clients hold this very record.
        for key, value in vars(fresh).items():
            setattr(settings, key, value)
        if client is not None:
            client.apply_settings()
        self._machine.balance.retarget()
        self._changed()
        return {"guest": settings_record(settings)}

    def _set_pool(self, client: Client, record: Record) -> None:
        pool_id = record["pool"]
        member = client.members.get(pool_id) if isinstance(pool_id, int) else None
        if member is None:
            ids = ", ".join(map(str, client.members)) or "none"
            raise OperatorError(f"guest {client.name} has no pool {pool_id!r}; there are {ids}")
        extra = set(record) - {"verb", "guest", "pool", "weight", "priority"}
        if extra:
            raise OperatorError(f"a pool has no {', '.join(sorted(extra))}")
        if "weight" in record:
            member.weight = _whole(record, "weight", 0, WEIGHT_MAX)
            client.settings.pool_weights[str(pool_id)] = member.weight
        if "priority" in record:
            self._machine.memberships.prioritise(member.pool, _priority(record))
        self._machine.balance.retarget()
        self._changed()

    def _balloon(self, record: Record) -> Record:
        name = record.get("guest")
        if name is not None:
            self._set_balloon(name, _whole(record, "size_bytes", 0, BALLOON_BYTES_MAX))
        return {
            "balloon_bytes": {
                one: settings.balloon_bytes
                for one, settings in sorted(self._machine.settings.items())
                if settings.balloon_bytes
            }
        }

    def _set_balloon(self, name: object, size_bytes: int) -> None:
        """As for `set`, the guest need not be there yet.  One that is hears of it whether or not
        that is news: it may have become larger or smaller by itself meanwhile."""
        if not isinstance(name, str) or not is_guest_name(name):
            raise OperatorError(f"{name!r} is no name of a guest")
        if 0 < size_bytes < PAGE_BYTES:
            raise OperatorError(f"{size_bytes} bytes are less than a page of {PAGE_BYTES}")
        settings = self._machine.settings.setdefault(name, Settings())
        settings.balloon_bytes = size_bytes // PAGE_BYTES * PAGE_BYTES
        client = self._machine.clients.get(name)
        if client is not None:
            self._machine.pressure.tell(client)
        self._changed()

    def _schedule(self, record: Record) -> Record:
        mode = record.get("mode")
        if mode not in MODES:
            raise OperatorError(f"no scheduling {mode!r}; choose one of {', '.join(MODES)}")
        self._machine.balance.set_mode(mode)
        self._changed()
        return {"scheduling": mode}

    # --- memory

    def _flush(self, record: Record) -> Record:
        """Drop pages of one guest, or of whoever is furthest over its share, until so many bytes
        are free that were not; then give free frames back to the host."""
        size_bytes = _whole(record, "size_bytes", 0, 1 << 62)
        store = self._machine.store
        client = None if record.get("guest") is None else self._guest(record["guest"])
        free_before = store.frames.free
        wanted = -(-size_bytes // PAGE_BYTES)
        flushed = 0
        exhausted = False
        store.begin_call()
        store.reap_until(lambda: store.frames.free - free_before >= wanted)
        while flushed < FLUSH_SLICE_PAGES and store.frames.free - free_before < wanted:
            if client is None:
                victim = store.victims.choose(None, store.state)
            else:
                victim = store.victims.choose_of(client)
            gone = 0
            if victim is not None:
                gone = store.evict(victim, min(64, wanted - (store.frames.free - free_before)))
            if not gone:
                exhausted = not store.doomed
                break
            flushed += gone
        freed = store.frames.free - free_before
        released = self._machine.balance.give_back(freed)
        return {
            "flushed_pages": flushed,
            "freed_bytes": freed * PAGE_BYTES,
            "released_bytes": released,
            "more": self._machine.balance.is_giving_back or (not exhausted and freed < wanted),
        }

    # --- sharing

    def _auth(self, record: Record) -> Record:
        grants = self._machine.memberships.grants
        action = record.get("action")
        guest = record.get("guest")
        uuid = None if record.get("uuid") is None else _uuid(record["uuid"])
        if action == "list":
            return {"grants": list(self._grants(guest, uuid))}
        if action not in ("allow", "deny"):
            raise OperatorError(f"no action {action!r}; there are allow, deny and list")
        if not isinstance(guest, str) or not is_guest_name(guest) or uuid is None:
            raise OperatorError(f"{action} needs a guest and a uuid")
        if action == "allow":
            role = record.get("role", Role.WRITER.value)
            if role not in [one.value for one in Role]:
                raise OperatorError(f"no role {role!r}; there are reader and writer")
            grants.allow(uuid, guest, Role(role))
        elif not grants.deny(uuid, guest):
            raise OperatorError(f"guest {guest} has no grant for {uuid.hex()}")
        self._apply_grants(guest, uuid)
        self._changed()
        return {"grants": list(self._grants(None, uuid))}

    def _apply_grants(self, guest: str, uuid: bytes) -> None:
        client = self._machine.clients.get(guest)
        for member in list(client.members.values()) if client is not None else []:
            if member.pool.shared and member.pool.uuid == uuid:
                self._machine.memberships.apply_grant(member)

    def _grants(self, guest: object, uuid: bytes | None) -> Iterator[dict[str, str]]:
        for one_uuid, name, role in self._machine.memberships.grants:
            if guest in (None, name) and uuid in (None, one_uuid):
                yield {"uuid": one_uuid.hex(), "guest": name, "role": role.value}

    def _quarantine(self, record: Record) -> Record:
        """Of a name, as grants are: a guest that has gone may have left pages.  Its private pools
        are left alone, nobody else reads them; persistent pages that it has put into shared pools
        stay, for others may have nothing but these, and are told."""
        name = record.get("guest")
        if not isinstance(name, str) or not is_guest_name(name):
            raise OperatorError("quarantine needs a guest")
        memberships = self._machine.memberships
        pages = persistent_pages = pools = 0
        for pool in list(memberships.shared.values()):
            for member in pool.members.values():
                if member.origin[0] != name or not member.pages:
                    continue
                if pool.persistent:
                    persistent_pages += member.pages
                else:
                    pages += member.pages
                    pools += 1
                    self._machine.store.disown(member)
        denied = self._deny_all(name) if record.get("also_deny") else []
        return {
            "pages": pages,
            "pools": pools,
            "persistent_pages": persistent_pages,
            "denied": denied,
        }

    def _deny_all(self, name: str) -> list[str]:
        """Take back every grant of a guest; the uuids."""
        grants = self._machine.memberships.grants
        uuids = [uuid for uuid, guest, _ in grants if guest == name]
        for uuid in uuids:
            grants.deny(uuid, name)
            self._apply_grants(name, uuid)
        self._changed()
        return [uuid.hex() for uuid in uuids]

    def _quarantined(self) -> Record:
        store = self._machine.store
        return {"pages": dict(store.quarantined), "more": store.is_sweeping}

    def _reseed(self) -> Record:
        seed = int.from_bytes(self._random_bytes(8), "little")
        self._machine.store.contents.shared.reseed(seed)
        return {"reseeded": True}

    def _rotated(self, record: Record) -> Record:
        if record.get("what") not in ("token", "key"):
            raise OperatorError(f"what: token or key, not {record.get('what')!r}")
        return {"noted": True}

    def _destroy(self, record: Record) -> Record:
        client = self._guest(record.get("guest"))
        pool_id = record.get("pool")
        if pool_id is not None and not (isinstance(pool_id, int) and pool_id in client.members):
            raise OperatorError(f"guest {client.name} has no pool {pool_id!r}")
        members = list(client.members.values())
        chosen = [member for member in members if pool_id in (None, member.pool_id)]
        for member in chosen:
            self._machine.memberships.leave(member)
        self._machine.balance.retarget()
        return {"destroyed_pools": len(chosen)}

    # --- who is meant

    def _guests(self, record: Record) -> list[Client]:
        if record.get("guest") is None:
            return list(self._machine.clients.values())
        return [self._guest(record["guest"])]

    def _guest(self, name: object) -> Client:
        client = self._machine.clients.get(name) if isinstance(name, str) else None
        if client is None:
            names = ", ".join(sorted(self._machine.clients)) or "none"
            raise OperatorError(f"there is no guest {name!r}; there are {names}")
        return client


def _merge(settings: Settings, record: Record) -> Settings:
    """The settings with what a record changes, all of it checked."""
    fields: dict[str, Any] = dict(vars(settings))
    for key in set(record) - {"verb", "guest", "pool"}:
        if key == "weight":
            fields[key] = _whole(record, key, 0, WEIGHT_MAX)
        elif key in ("cap_bytes", "reserve_bytes"):
            fields[key] = _whole(record, key, 0, 1 << 62)
        elif key in ("compress", "borrow"):
            if not isinstance(record[key], bool):
                raise OperatorError(f"{key} is true or false")
            fields[key] = record[key]
        elif key == "priority":
            fields[key] = _priority(record)
        elif key == "sharing":
            scopes = [scope.value for scope in Sharing]
            if record[key] not in scopes:
                raise OperatorError(
                    f"no sharing {record[key]!r}; choose one of {', '.join(scopes)}"
                )
            fields[key] = Sharing(record[key])
        elif key == "group":
            group = record[key]
            if not isinstance(group, str) or len(group) > _GROUP_CHARACTERS_MAX:
                raise OperatorError("a group is a text of at most 31 characters")
            fields[key] = group
        else:
            raise OperatorError(f"a guest has no setting {key!r}")
    cap, reserve = fields["cap_bytes"], fields["reserve_bytes"]
    if cap and reserve > cap:
        raise OperatorError(f"a reservation of {reserve} bytes is above the cap of {cap}")
    return Settings(**fields)


def _whole(record: Record, key: str, low: int, high: int) -> int:
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise OperatorError(f"{key} is a whole number from {low} to {high}")
    return value


def _priority(record: Record) -> Priority:
    name = record.get("priority")
    names = {one.name.lower(): one for one in Priority}
    if not isinstance(name, str) or name not in names:
        raise OperatorError(f"no priority {name!r}; there are low, normal and high")
    return names[name]


def _uuid(text: object) -> bytes:
    try:
        uuid = bytes.fromhex(text.replace("-", "")) if isinstance(text, str) else b""
    except ValueError:
        uuid = b""
    if len(uuid) != UUID_BYTES:
        raise OperatorError(f"{text!r} is no uuid: use 32 hex digits")
    return uuid
