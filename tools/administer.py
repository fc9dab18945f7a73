"""The administrator's side of the control socket: ask, ask again, and show what was said.

`Administrator` speaks the verbs of `hypervisor.administration` to the hypervisor of one cluster.
Names are checked here and not there: settings may be made for a guest that has not attached yet,
so the hypervisor takes any name, and a slip of the fingers would be kept for ever.  Whom there is
to name is written in the roster (`ipc.attach.enrol`).

A flush is done in slices, so that the hypervisor serves its guests in between; Xen's did it in one
go, and for all guests only.

A guest may also be called by its number, as Xen's hands do; a guest of that name goes first.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from ipc.codec import Record
from ipc.errors import Disconnected, ExitCode, OperatorError
from tools.config import ClusterConfig
from tools.control import ask
from tools.rundir import ClusterDirectory, ClusterRecord
from tools.units import PAGE_BYTES, format_size
from tools.uuids import format_uuid

_LOOK_SECONDS: Final = 0.02
_GUEST_SECONDS: Final = 2.0
_FRUITLESS_SLICES_MAX: Final = 100
"""Slices of a flush in a row that may free nothing; each drops pages that share a frame."""


class Flushed(NamedTuple):
    """What a flush has done in all its slices: pages dropped, bytes of whole frames that became
    free by it, and what of them the host has back."""

    flushed_pages: int
    freed_bytes: int
    released_bytes: int


class Administrator:
    """The hypervisor of one live cluster, as its administrator talks to it."""

    def __init__(self, directory: ClusterDirectory, record: ClusterRecord) -> None:
        if not record.arena_bytes:
            raise OperatorError(
                f"{directory.path}: this cluster runs without tmem (the first half of a measured "
                "run); wait for the second half",
                ExitCode.UNAVAILABLE,
            )
        self._directory = directory

    def ask(self, verb: str, **fields: Any) -> Record:
        """The answer; fields that are None are left out.  Raises OperatorError for a no."""
        question = {
            "verb": verb,
            **{key: value for key, value in fields.items() if value is not None},
        }
        return ask_politely(self._directory, question, ExitCode.USAGE)

    def names(self) -> list[str]:
        """Everybody who may attach or has attached."""
        roster = self._directory.path / "guests"
        enrolled = os.listdir(roster) if roster.is_dir() else []
        attached = self.ask("list")["guests"]
        return sorted({name for name in enrolled if not name.startswith(".")} | set(attached))

    def guest(self, text: str) -> str:
        """The name of the guest that a person means by its name or number."""
        names = self.names()
        if text in names:
            return text
        if text.isdecimal():
            for name, guest in self.ask("list")["guests"].items():
                if str(guest["id"]) == text:
                    return str(name)
        known = f"there are {', '.join(names)}" if names else "none has attached yet"
        raise OperatorError(f"there is no guest {text!r}; {known}", ExitCode.USAGE)

    def flush(self, guest: str | None, size_bytes: int) -> Flushed:
        """Drop ephemeral pages until so many bytes are free that were not, or none may go.

        From all guests nothing is taken that is within a reservation, from one guest everything.
        """
        pages = freed_bytes = released_bytes = fruitless = 0
        while fruitless < _FRUITLESS_SLICES_MAX:
            # Once enough is free there is still memory to be handed over, slice by slice.
            left_bytes = max(0, size_bytes - freed_bytes)
            answer = self.ask("flush", guest=guest, size_bytes=left_bytes)
            pages += answer["flushed_pages"]
            freed_bytes += answer["freed_bytes"]
            released_bytes += answer["released_bytes"]
            fruitless = 0 if answer["freed_bytes"] or not left_bytes else fruitless + 1
            if not answer["more"]:
                break
        return Flushed(pages, freed_bytes, released_bytes)

    def balloons(self, names: list[str]) -> dict[str, Record]:
        """What those guests that answer say of their balloons, in pages."""
        found: dict[str, Record] = {}
        for name in names:
            try:
                status = ask(
                    self._directory.guest_socket(name),
                    {"verb": "status"},
                    timeout_seconds=_GUEST_SECONDS,
                )
            except Disconnected:
                continue
            found[name] = status["counters"]["balloon"]
        return found

    def quarantine(self, guest: str, *, also_deny: bool) -> Record:
        """Disown what a guest has put into shared pools, and wait until its memory is free."""
        answer = self.ask("quarantine", guest=guest, also_deny=also_deny)
        while self.ask("quarantined")["more"]:
            time.sleep(_LOOK_SECONDS)
        return answer


def ask_politely(directory: ClusterDirectory, question: Record, exit_code: ExitCode) -> Record:
    """The hypervisor's answer; its "error" becomes an OperatorError with this exit code."""
    whom = question.get("guest", "hypervisor")
    answer = ask(directory.hypervisor_socket, question)
    if "error" in answer:
        raise OperatorError(f"{whom}: {answer['error']}", exit_code)
    return answer


def questions(config: ClusterConfig) -> Iterator[Record]:
    """What a new hypervisor is told before its guests start, so that the first page obeys."""
    for name, guest in config.guests():
        settings = guest.settings()
        if settings:
            yield {"verb": "set", "guest": name, **settings}
    for pool in config.shared_pool:
        for role, names in (("writer", pool.writers), ("reader", pool.readers)):
            for name in names:
                yield {
                    "verb": "auth",
                    "action": "allow",
                    "guest": name,
                    "uuid": pool.uuid,
                    "role": role,
                }


# --- tables -------------------------------------------------------------------------------------

GUESTS_HEADER: Final = (
    "NAME",
    "ID",
    "STATE",
    "WEIGHT",
    "CAP",
    "RESERVE",
    "COMPR",
    "PRIORITY",
    "SHARING",
    "RAM",
    "EPH",
    "PERS",
    "COST",
    "TARGET",
)
POOLS_HEADER: Final = (
    "POOL",
    "TYPE",
    "UUID",
    "PRIORITY",
    "GUEST",
    "ID",
    "ROLE",
    "PAGES",
    "COST",
    "TARGET",
)
PAGES_HEADER: Final = (
    "POOL",
    "TYPE",
    "UUID",
    "PUT BY",
    "PID",
    "NOT BEFORE",
    "NOT AFTER",
    "TOKEN",
    "STORED",
    "STATE",
)
BALLOON_HEADER: Final = ("NAME", "RAM", "TARGET", "LEAST", "MOST")
GRANTS_HEADER: Final = ("UUID", "GUEST", "ROLE")
LEGEND: Final = (
    "RAM: lent out of the arena; EPH, PERS: pages; COST: bytes of the arena that it pays for; "
    "TARGET: what it should have"
)
TYPES: Final = "EP, PP: ephemeral and persistent, private; ES, PS: shared; COST: bytes of the arena"


def guests_table(answer: Record) -> list[tuple[str, ...]]:
    """A row for each guest of a `list` answer."""
    return [
        (
            name,
            str(guest["id"]),
            state(guest),
            str(guest["weight"]),
            _bound(guest["cap_bytes"]),
            _bound(guest["reserve_bytes"]),
            "on" if guest["compress"] else "off",
            guest["priority"],
            sharing(guest),
            _bound(guest["lent_pages"] * PAGE_BYTES),
            f"{guest['ephemeral_pages']:,}",
            f"{guest['persistent_pages']:,}",
            format_size(guest["cost_bytes"]),
            format_size(guest["target_bytes"]),
        )
        for name, guest in answer["guests"].items()
    ]


def pools_table(answer: Record) -> list[tuple[str, ...]]:
    """A row for each guest in each pool of a `pools` answer."""
    return [
        (
            str(pool["number"]),
            pool["type"],
            format_uuid(pool["uuid"]) or "-",
            pool["priority"],
            member["guest"],
            str(member["id"]),
            "writer" if member["writer"] else "reader",
            f"{member['pages']:,}",
            format_size(member["cost_bytes"]),
            format_size(member["target_bytes"]),
        )
        for pool in answer["pools"]
        for member in pool["members"]
    ]


def pages_table(answer: Record) -> list[tuple[str, ...]]:
    """A row for each pool that has the page of a `page` answer."""
    return [
        (
            str(page["pool"]),
            page["type"],
            format_uuid(page["uuid"]) or "-",
            page["guest"] + (" (left)" if page["left"] else ""),
            str(page["pid"]),
            _moment(page["after_ns"]),
            _moment(page["before_ns"]),
            "-" if page["token"] is None else format_token(page["token"]),
            page["stored"],
            _page_state(page),
        )
        for page in answer["pages"]
    ]


def format_token(token: int) -> str:
    """EPOCH.NUMBER, as lock managers make them and `tmem locks` has them."""
    return f"{token >> 32}.{token & 0xFFFFFFFF}"


def _page_state(page: Record) -> str:
    if page["disowned"]:
        return "quarantined"
    if page["right"] is False:
        return "damaged"
    return "verified" if page["right"] else "-"


def _moment(since_epoch_ns: int) -> str:
    if not since_epoch_ns:
        return "-"
    time_ = datetime.datetime.fromtimestamp(since_epoch_ns / 1e9, datetime.UTC)
    return time_.isoformat(timespec="seconds").replace("+00:00", "Z")


def balloon_table(answer: Record, names: list[str]) -> list[tuple[str, ...]]:
    """A row for each of these guests, of a `balloon` answer and what guests said themselves."""

    def row(name: str) -> tuple[str, ...]:
        said = answer["guests"].get(name, {})
        size, least, most = (
            _bound(said.get(f"{key}_pages", 0) * PAGE_BYTES) for key in ("size", "floor", "maximum")
        )
        return name, size, _bound(answer["balloon_bytes"].get(name, 0)), least, most

    return [row(name) for name in names]


def grants_table(answer: Record) -> list[tuple[str, ...]]:
    """A row for each grant of an `auth` answer."""
    return [
        (format_uuid(grant["uuid"]), grant["guest"], grant["role"]) for grant in answer["grants"]
    ]


def headlines(answer: Record) -> Iterator[str]:
    """The arena of a `list` answer and what was saved in it, a line each."""
    arena = answer["arena"]
    lent = f"{arena['lent_frames']:,} lent as RAM, " if arena["lent_frames"] else ""
    yield (
        f"arena {format_size(arena['bytes'])}: {arena['free_frames']:,} of {arena['frames']:,} "
        f"frames free, {lent}{arena['ephemeral_pages']:,} ephemeral pages, "
        f"{arena['persistent_pages']:,} persistent; scheduling {answer['scheduling']}, "
        f"eviction {answer['eviction']}"
    )
    saved = [
        f"{kind} {saving['pages']:,} pages ({format_size(saving['bytes_saved'])})"
        for kind, saving in answer["savings"].items()
        if saving["pages"]
    ]
    if saved:
        yield f"saved: {', '.join(saved)}"


def settings_line(name: str, guest: Record) -> str:
    """A guest's settings after `set`, in the words that `set` takes."""
    cap, reserve = _bound(guest["cap_bytes"]), _bound(guest["reserve_bytes"])
    return (
        f"{name}: weight {guest['weight']}, cap {cap.replace('-', 'none')}, "
        f"reserve {reserve.replace('-', 'none')}, compress {'on' if guest['compress'] else 'off'}, "
        f"borrow {'on' if guest['borrow'] else 'off'}, priority {guest['priority']}, "
        f"sharing {sharing(guest)}"
    )


def balloon_line(name: str, answer: Record) -> str:
    """What a guest was told, after `balloon`."""
    target_bytes = answer["balloon_bytes"].get(name)
    if target_bytes is None:
        return f"{name}: no balloon target"
    line = f"{name}: balloon target {format_size(target_bytes)}"
    said = answer["guests"].get(name)
    if said is None:
        return f"{line}; it does not answer"
    least_bytes, most_bytes = (said[f"{key}_pages"] * PAGE_BYTES for key in ("floor", "maximum"))
    if target_bytes < least_bytes:
        return f"{line}; it keeps {format_size(least_bytes)}, less it can't have"
    if target_bytes > most_bytes:
        return f"{line}; it has {format_size(most_bytes)} at most"
    return line


def pool_line(name: str, guest: Record, pool_id: int) -> str:
    """The settings of one pool of a guest after `set`."""
    for pool in guest["pools"]:
        if pool["id"] == pool_id:
            return f"{name} pool {pool_id}: weight {pool['weight']}, priority {pool['priority']}"
    return f"{name} pool {pool_id}: gone meanwhile"


def state(guest: Record) -> str:
    """Attached, frozen (and attached), detached, or both of the last."""
    if not guest["attached"]:
        return "detached,frozen" if guest["frozen"] else "detached"
    return "frozen" if guest["frozen"] else "attached"


def sharing(guest: Record) -> str:
    """With whom equal pages may be one: off, guest, all, group:NAME, or - for an unnamed group,
    which is nobody's."""
    if guest["sharing"] != "group":
        return str(guest["sharing"])
    return f"group:{guest['group']}" if guest["group"] else "-"


def _bound(size_bytes: int) -> str:
    return format_size(size_bytes) if size_bytes else "-"
