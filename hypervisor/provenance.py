"""Where a page comes from: who put it, when, and under which fencing token.

Asked for by the administrator who wants to know how a wrong page came into a shared pool, and told
in the audit log when a guest reports one; nothing here is on a page's way.  All of it is in the
segment, so that a restart forgets nothing:

  who     the slot in the page's state word, and the origin of that slot's member record: the guest
          that put it, also when it has gone and another one pays
  when    the sequence in the state word, between two `moments`
  token   beside the page (`pagetokens`)
"""

from __future__ import annotations

import struct
from typing import Any, Final

from hypervisor.arena import SEQUENCE_SHIFT
from hypervisor.audit import stamp
from hypervisor.entries import FILLED, KIND_MASK, SLAB
from hypervisor.objects import TmemObject
from hypervisor.pools import Pool
from hypervisor.residents import Report, Residents
from hypervisor.store import Store
from ipc.abi import OID_BYTES
from ipc.errors import OperatorError

_INODE: Final = struct.Struct("<QI")
_INODE_CHARACTERS_MAX: Final = 31
"""20 digits, a point and 10 digits."""


def parse_oid(text: object) -> bytes:
    """An object id as a person writes it: the hex digits of its bytes, zeros at the end left out,
    as the audit log has them; or INODE.GENERATION of a file, in decimal."""
    # Python makes no number of thousands of digits.
    if isinstance(text, str) and text.count(".") == 1 and len(text) <= _INODE_CHARACTERS_MAX:
        inode, _, generation = text.partition(".")
        if inode.isdecimal() and generation.isdecimal():
            numbers = int(inode), int(generation)
            if numbers[0] < 1 << 64 and numbers[1] < 1 << 32:
                return _INODE.pack(*numbers).ljust(OID_BYTES, b"\0")
    try:
        oid = bytes.fromhex(text) if isinstance(text, str) else None
    except ValueError:
        oid = None
    if oid is None or len(oid) > OID_BYTES:
        raise OperatorError(
            f"{text!r} is no object id: use the hex digits of its bytes, as in the audit log, or "
            "INODE.GENERATION of a file"
        )
    return oid.ljust(OID_BYTES, b"\0")


def format_oid(oid: bytes) -> str:
    """As `parse_oid` takes it."""
    return oid.rstrip(b"\0").hex() or "00"


def pages_of(machine: Residents, pools: list[Pool], oid: bytes, index: int) -> list[dict[str, Any]]:
    """What is known of the page of this handle in each of these pools that has one."""
    store = machine.store
    found = []
    for pool in pools:
        owner = pool.objects.get(oid)
        number = -1 if owner is None else owner.find(index)
        if owner is None or number < 0:
            continue
        state = store.state(number)
        member = store.member_of(pool, number)
        after_ns, before_ns = machine.moments.around(state >> SEQUENCE_SHIFT)
        raw = number < store.entries.base
        name, pid = member.origin
        found.append(
            {
                "pool": pool.number,
                "type": pool.kind,
                "uuid": pool.uuid.hex() if pool.shared else "",
                "guest": name,
                "pid": pid,
                "payer": member.client.name,
                "left": member.heir,
                "sequence": state >> SEQUENCE_SHIFT,
                "after_ns": after_ns,
                "before_ns": before_ns,
                "token": None if pool.tokens is None else _token(store, owner, number),
                "needed_token": None if pool.tokens is None else pool.tokens.needed(oid),
                "stored": "raw" if raw else _stored(store.entries.location(number)),
                "disowned": state >> SEQUENCE_SHIFT <= member.disowned,
                "right": store.is_right(owner, number, index) if store.beside.sums else None,
            }
        )
    return found


def report_words(machine: Residents, report: Report) -> dict[str, object]:
    """What the audit log says of a page that a guest reports: its name, which is the guest's word,
    and who put it, which is not.  `page` is "there", "disowned" (nobody can have it any more),
    "replaced" by another one, or "gone"; of these two it is not known who put what the guest got.
    """
    pool = report.pool
    words: dict[str, object] = {"pool": pool.number}
    if pool.shared:
        words["uuid"] = pool.uuid.hex()
    words |= {"object": format_oid(report.oid), "index": report.page_index, "page": "gone"}
    for page in pages_of(machine, [pool], report.oid, report.page_index):
        if not report.is_there:
            words["page"] = "replaced"
            break
        words["page"] = "disowned" if page["disowned"] else "there"
        words |= {"put_by": page["guest"], "pid": page["pid"]}
        for word, time_ns in (("after", page["after_ns"]), ("before", page["before_ns"])):
            if time_ns:
                words[word] = stamp(time_ns / 1e9)
        if page["token"] is not None:
            words["token"] = f"{page['token']:#x}"
    return words


def _token(store: Store, owner: TmemObject, number: int) -> int | None:
    if number < store.entries.base:
        return store.beside.tokens.of_frame(owner, number)
    beside = store.entries.read_beside(number)
    return None if beside is None else beside[0]


def _stored(location: int) -> str:
    kind = location & KIND_MASK
    return "filled" if kind == FILLED else "compressed" if kind == SLAB else "shared"
