"""What in a cluster file is good by itself and does not fit the rest of it.

Looks at the file as it was written (`tools.config` checks each value), so that it can speak when
other values are wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ipc.attach import is_guest_name
from ipc.limits import GUEST_NAME_CHARACTERS_MAX, GUESTS_MAX
from tools.rundir import TAKEN_NAMES
from tools.units import format_size, parse_size
from tools.uuids import parse_uuid


def conflicts(fields: dict[str, Any], arena_default_bytes: int) -> Iterator[tuple[str, str]]:
    """(place, text) of each; the arena's size is that of a file that names none."""
    owners: dict[str, int] = {}
    images: set[Path] = set()
    for number, guest in enumerate(tables(fields.get("guest"))):
        name, count = guest.get("name"), guest.get("count")
        if isinstance(name, str) and (count is None or isinstance(count, int)):
            for one in guest_names(name, count):
                if not is_guest_name(one):
                    yield (
                        f"guest[{number}].name",
                        (
                            f"{one!r} is no guest name: use up to {GUEST_NAME_CHARACTERS_MAX} "
                            "lower-case letters, digits, dots, dashes and underscores"
                        ),
                    )
                    break
                if one in TAKEN_NAMES or one.endswith(".sock"):
                    yield (
                        f"guest[{number}].name",
                        f"{one!r} is the name of something else in a run directory: use another",
                    )
                    break
                if one in owners:
                    yield (
                        f"guest[{number}].name",
                        (f"{one!r} is already the name of guest[{owners[one]}]"),
                    )
                    break
                owners[one] = number
        for key in ("image", "swap_image"):
            image = guest.get(key)
            if isinstance(image, str):
                path = Path(image).resolve()
                if path in images or (isinstance(count, int) and count > 1):
                    yield (
                        f"guest[{number}].{key}",
                        f"{image} is in use by another guest; each guest needs an image of its own",
                    )
                images.add(path)
        if guest.get("swap") is not None and guest.get("swap_image") is not None:
            yield (
                f"guest[{number}].swap_image",
                "there is the key swap too; a guest has one of both",
            )
    for number, phase in enumerate(tables(fields.get("phase"))):
        work = phase.get("work")
        for name in work if isinstance(work, dict) else ():
            if name not in owners:
                names = ", ".join(owners)
                yield f"phase[{number}].work.{name}", f"no guest has this name; there are {names}"
    yield from _bad_volumes(fields, list(owners), images)
    yield from _useless_direct(fields)
    yield from _bad_shares(fields, arena_default_bytes)
    yield from _bad_grants(fields, list(owners))


def _bad_volumes(
    fields: dict[str, Any], names: list[str], images: set[Path]
) -> Iterator[tuple[str, str]]:
    """Shared disks that are there twice, or whose nodes are nobody or have another disk."""
    volumes: dict[str, int] = {}
    homes: dict[str, int] = {}
    for number, volume in enumerate(tables(fields.get("volume"))):
        name, image, nodes = volume.get("name"), volume.get("image"), volume.get("nodes")
        if isinstance(name, str) and volumes.setdefault(name, number) != number:
            yield f"volume[{number}].name", f"{name!r} is the name of volume[{volumes[name]}]"
        if isinstance(image, str):
            path = Path(image).resolve()
            if path in images:
                yield f"volume[{number}].image", f"{image} is in use by somebody else"
            images.add(path)
        for node in nodes if isinstance(nodes, list) else []:
            place = f"volume[{number}].nodes"
            if node not in names:
                yield place, f"no guest is called {node!r}; there are {', '.join(names)}"
            elif node in homes:
                yield place, f"{node!r} mounts volume[{homes[node]}]; a guest has one disk"
            else:
                homes[node] = number


def _useless_direct(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Guests whose only disk is one that nodes share, which is never used around the page cache."""
    nodes = [
        node
        for volume in tables(fields.get("volume"))
        for node in (volume["nodes"] if isinstance(volume.get("nodes"), list) else ())
    ]
    for number, guest in enumerate(tables(fields.get("guest"))):
        name, count = guest.get("name"), guest.get("count")
        if guest.get("direct") is not True or "swap" in guest or "swap_image" in guest:
            continue
        if not isinstance(name, str) or not (count is None or isinstance(count, int)):
            continue
        if any(one in nodes for one in guest_names(name, count)):
            yield (
                f"guest[{number}].direct",
                "is for disks of its own, and it has a shared volume and no swap; leave it out",
            )


def _bad_shares(fields: dict[str, Any], arena_default_bytes: int) -> Iterator[tuple[str, str]]:
    """Memory settings that can't all be kept."""
    hypervisor = fields.get("hypervisor")
    hypervisor = hypervisor if isinstance(hypervisor, dict) else {}
    arena_bytes = _size(hypervisor.get("arena", arena_default_bytes))
    reserved_bytes = 0
    for number, guest in enumerate(tables(fields.get("guest"))):
        count = guest.get("count")
        guests = count if isinstance(count, int) else 1
        cap_bytes, reserve_bytes = _size(guest.get("cap")), _size(guest.get("reserve"))
        reserved_bytes += guests * (reserve_bytes or 0)
        if cap_bytes and reserve_bytes and reserve_bytes > cap_bytes:
            yield (
                f"guest[{number}].reserve",
                f"{format_size(reserve_bytes)} is more than its cap of {format_size(cap_bytes)}",
            )
        if guest.get("sharing") == "group" and "group" not in guest:
            yield f"guest[{number}].sharing", "which group? add the key group"
    if arena_bytes is not None and reserved_bytes > arena_bytes:
        yield (
            "guest",
            (
                f"all reserves together are {format_size(reserved_bytes)} and the arena has "
                f"{format_size(arena_bytes)}"
            ),
        )


def _bad_grants(fields: dict[str, Any], names: list[str]) -> Iterator[tuple[str, str]]:
    """Shared pools that are there twice, or speak of a guest twice or of nobody."""
    pools: dict[str, int] = {}
    for number, pool in enumerate(tables(fields.get("shared_pool"))):
        with contextlib.suppress(ValueError):
            first = pools.setdefault(parse_uuid(pool.get("uuid")), number)
            if first != number:
                yield f"shared_pool[{number}].uuid", f"shared_pool[{first}] has it already"
        seen: set[str] = set()
        for role in ("writers", "readers"):
            listed = pool.get(role)
            for name in listed if isinstance(listed, list) else []:
                place = f"shared_pool[{number}].{role}"
                if name not in names:
                    yield place, f"no guest is called {name!r}; there are {', '.join(names)}"
                elif name in seen:
                    yield place, f"{name!r} stands here twice; a writer may read too"
                seen.add(name)


def _size(value: Any) -> int | None:
    """Bytes, None of what is no size: that is told elsewhere."""
    try:
        return parse_size(value)
    except ValueError:
        return None


def guest_names(name: str, count: int | None) -> list[str]:
    """Names of the guests that one entry stands for."""
    if count is None:
        return [name]
    return [f"{name}{number}" for number in range(1, min(count, GUESTS_MAX) + 1)]


def tables(value: Any) -> list[dict[str, Any]]:
    """The tables of an array of tables, without what is none."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
