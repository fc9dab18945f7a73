"""Xen's spellings: the text records of `xl tmem-list`, for eyes and scripts that know them.

A record is a line: a letter, `=`, and fields of two letters, a colon and a value.  Their order is
Xen's: `G=` once, `S=` for each shared pool, `C=` for each guest and behind it `P=` for each of its
pools.  Of one guest there are only its `C=` and `P=`.  The fields that have a counterpart here:

    G= Tt calls  Ta free frames  Et pages evicted  Fp pools destroyed by guests
       long: Ec ephemeral pages  Oc objects  Pc pages  Fc frames in use
    S= SI number  PT kind  U0 U1 uuid  SC a guest in it, once each        long: Pc pages  Oc objects
    C= CI guest  ww weight  co compress  fr frozen                        long: Ec ephemeral pages
    P= CI guest  PI pool id  PT kind  U0 U1 uuid (0 if private)           long: Pc pages  Oc objects

U0 and U1 are the uuid's two little-endian words, as Xen printed them.

Left out, because nothing here counts the same thing: Te (calls with an error; here refusals are
pages, by reason), Cf Af Pf (nothing is allocated from a host), Lm Rt Ra Rx (nobody makes us
relinquish), Ea, Tc and the record T= (cycles; here nanoseconds, in `tmem list --json`), Ge Pp Gp Ep
Gd (here gets and puts are counted for all kinds of pool together), all maxima (Em Om Nm Pm Fm Sm),
Nc (no radix nodes), Sc Zt Gz cp cb cn cm (see `savings` in `tmem list --json`), and the counts of a
pool ps pt pd pr px gs gt fs ft os ot (here counted by guest and operation).  ca (cap) went from
Xen's own records in 2016.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from ipc.codec import Record


def records(
    listed: Record, pooled: Record, stats: Record, guest: str | None, *, long: bool = True
) -> Iterator[str]:
    """Lines from the answers to `list`, `pools` and `stats`; of one guest or of everything."""
    if guest is None:
        yield _line("G", _global(pooled, stats, long=long))
        for pool in pooled["pools"]:
            if pool["type"].endswith("S"):
                yield _line("S", _shared(pool, listed["guests"], long=long))
    for client in listed["guests"].values():
        yield _line("C", _client(client, long=long))
        for pool in client["pools"]:
            yield _line("P", _pool(client["id"], pool, long=long))


def _line(letter: str, fields: list[tuple[str, Any]]) -> str:
    return f"{letter}=" + ",".join(f"{key}:{value}" for key, value in fields)


def _global(pooled: Record, stats: Record, *, long: bool) -> list[tuple[str, Any]]:
    arena = stats["arena"]
    everybody = [*stats["guests"].values(), stats["departed"]]
    destroyed = sum(
        guest["operations"].get("destroy_pool", {}).get("calls", 0) for guest in everybody
    )
    fields = [
        ("Tt", stats["hypercalls"]),
        ("Ta", arena["free_frames"]),
        ("Et", stats["evictions"]),
        ("Fp", destroyed),
    ]
    if long:
        fields += [
            ("Ec", arena["ephemeral_pages"]),
            ("Oc", sum(pool["objects"] for pool in pooled["pools"])),
            ("Pc", sum(pool["pages"] for pool in pooled["pools"])),
            ("Fc", arena["frames"] - arena["free_frames"]),
        ]
    return fields


def _shared(pool: Record, guests: Record, *, long: bool) -> list[tuple[str, Any]]:
    fields = [("SI", pool["number"]), ("PT", pool["type"]), *_words(pool)]
    fields += [("SC", guests[name]["id"]) for name in _sharers(pool) if name in guests]
    return fields + (_sizes(pool) if long else [])


def _sharers(pool: Record) -> list[str]:
    # A guest may be in a pool twice, under two ids.
    return list(dict.fromkeys(member["guest"] for member in pool["members"]))


def _client(client: Record, *, long: bool) -> list[tuple[str, Any]]:
    fields = [
        ("CI", client["id"]),
        ("ww", client["weight"]),
        ("co", int(client["compress"])),
        ("fr", int(client["frozen"])),
    ]
    return fields + ([("Ec", client["ephemeral_pages"])] if long else [])


def _pool(client_id: int, pool: Record, *, long: bool) -> list[tuple[str, Any]]:
    fields = [("CI", client_id), ("PI", pool["id"]), ("PT", pool["type"]), *_words(pool)]
    return fields + (_sizes(pool) if long else [])


def _sizes(pool: Record) -> list[tuple[str, Any]]:
    return [("Pc", pool["pages"]), ("Oc", pool["objects"])]


def _words(pool: Record) -> list[tuple[str, Any]]:
    words = struct.unpack("<QQ", bytes.fromhex(pool["uuid"] or "00" * 16))
    return [("U0", f"{words[0]:x}"), ("U1", f"{words[1]:x}")]
