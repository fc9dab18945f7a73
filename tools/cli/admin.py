"""list, pools, freeze, thaw, set, balloon, schedule, freeable, flush, auth, quarantine, destroy:
the administrator's.

Xen's spellings of them (`tmem-list -a` and so on) are in `tools.cli.xen`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ipc.codec import Record
from ipc.errors import ExitCode, OperatorError
from ipc.window import BALLOON_PAGES_MAX
from tools.cli.common import JsonOption, RunOption, print_json, print_table
from tools.units import PAGE_BYTES, format_size, parse_size
from tools.uuids import parse_uuid

if TYPE_CHECKING:
    from tools.administer import Administrator

PANEL = "Administration"

GuestArgument = Annotated[str, typer.Argument(help="Name or number of the guest.")]
OneGuestArgument = Annotated[
    str | None, typer.Argument(help="Name or number of one guest (default: all).")
]
SomeGuestArgument = Annotated[str | None, typer.Argument(help="Name or number of the guest.")]
AllOption = Annotated[bool, typer.Option("-a", "--all", help="All guests.")]
UuidArgument = Annotated[str, typer.Argument(help="Uuid of the shared pool, 32 hex digits.")]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for name, command in (
        ("list", list_guests),
        ("pools", pools),
        ("freeze", freeze),
        ("thaw", thaw),
        ("set", change),
        ("balloon", balloon),
        ("schedule", schedule),
        ("freeable", freeable),
        ("flush", flush),
        ("quarantine", quarantine),
        ("destroy", destroy),
    ):
        app.command(name, rich_help_panel=PANEL)(command)
    auth = typer.Typer(help="Who may join which shared pool.", no_args_is_help=True)
    auth.command("allow")(allow)
    auth.command("deny")(deny)
    auth.command("list")(grants)
    app.add_typer(auth, name="auth", rich_help_panel=PANEL)


def administrator(run: Path | None) -> Administrator:
    """Of the live cluster that a command means."""
    from tools.administer import Administrator
    from tools.rundir import find_live

    return Administrator(*find_live(run))


def list_guests(
    guest: OneGuestArgument = None,
    long: Annotated[
        bool, typer.Option("-l", "--long", help="Xen's text records with all their figures.")
    ] = False,
    run: RunOption = None,
    json: JsonOption = False,
) -> int:
    """List guests: their settings, and what they hold."""
    from tools import administer as view
    from tools.xen import records

    admin = administrator(run)
    name = None if guest is None else admin.guest(guest)
    answer = admin.ask("list", guest=name)
    if long:
        for line in records(answer, admin.ask("pools", guest=name), admin.ask("stats"), name):
            print(line)
    elif json:
        print_json(answer)
    else:
        print_table(view.GUESTS_HEADER, view.guests_table(answer))
        for line in (view.LEGEND, *view.headlines(answer)):
            print(line)
    return ExitCode.OK


def pools(
    guest: OneGuestArgument = None,
    page: Annotated[
        str | None,
        typer.Option(
            help="Say instead who put this page, when, and under which token. OID is hex digits as "
            "in the audit log, or INODE.GENERATION of a file.",
            metavar="OID:INDEX",
        ),
    ] = None,
    run: RunOption = None,
    json: JsonOption = False,
) -> int:
    """List pools, a line for each guest in each of them."""
    from tools import administer as view

    admin = administrator(run)
    name = None if guest is None else admin.guest(guest)
    if page is not None:
        return _show_page(admin, name, page, json=json)
    answer = admin.ask("pools", guest=name)
    if json:
        print_json(answer)
    else:
        print_table(view.POOLS_HEADER, view.pools_table(answer))
        print(view.TYPES)
    return ExitCode.OK


def _show_page(admin: Administrator, name: str | None, page: str, *, json: bool) -> int:
    """Exit code 1 if no pool has this page."""
    from tools import administer as view

    oid, _, index = page.rpartition(":")
    if not oid or not index.isdecimal() or len(index) > 10 or int(index) >= 1 << 32:
        raise OperatorError(
            f"--page {page}: say OID:INDEX, for example 2a:0 or 42.1:0", ExitCode.USAGE
        )
    answer = admin.ask("page", guest=name, oid=oid, index=int(index))
    if json:
        print_json(answer)
    else:
        print_table(view.PAGES_HEADER, view.pages_table(answer))
    if not answer["pages"]:
        print(f"tmem: no pool has page {page}", file=sys.stderr)
        return ExitCode.VIOLATED
    return ExitCode.OK


def freeze(
    guest: SomeGuestArgument = None, everybody: AllOption = False, run: RunOption = None
) -> int:
    """Take no new pages of a guest; gets, flushes and replacing pages go on."""
    return _set_frozen("freeze", guest, run, everybody=everybody)


def thaw(
    guest: SomeGuestArgument = None, everybody: AllOption = False, run: RunOption = None
) -> int:
    """Take new pages of a guest again."""
    return _set_frozen("thaw", guest, run, everybody=everybody)


def _set_frozen(verb: str, guest: str | None, run: Path | None, *, everybody: bool) -> int:
    if (guest is None) != everybody:
        raise OperatorError(f"say whom to {verb}: a guest's name, or --all", ExitCode.USAGE)
    admin = administrator(run)
    answer = admin.ask(verb, guest=None if guest is None else admin.guest(guest))
    print(f"frozen: {', '.join(answer['frozen']) or 'nobody'}")
    return ExitCode.OK


def change(
    guest: GuestArgument,
    pool: Annotated[
        int | None, typer.Option(help="One pool of the guest, by its ID in 'tmem pools'.", min=0)
    ] = None,
    weight: Annotated[
        int | None, typer.Option(help="Share of the arena beside the others' weights.", min=1)
    ] = None,
    cap: Annotated[
        str | None, typer.Option(help="Most that it may hold: SIZE, or none.", metavar="SIZE|none")
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(help="What nobody else may take: SIZE, or none.", metavar="SIZE|none"),
    ] = None,
    compress: Annotated[
        Literal["on", "off"] | None, typer.Option(help="Compress its pages.")
    ] = None,
    borrow: Annotated[
        Literal["on", "off"] | None,
        typer.Option(help="Persistent pages beyond its share in idle memory; it must give back."),
    ] = None,
    priority: Annotated[
        Literal["low", "normal", "high"] | None, typer.Option(help="Whose pages go first.")
    ] = None,
    sharing: Annotated[
        Literal["off", "guest", "group", "all"] | None,
        typer.Option(help="With whom pages of the same content may be one."),
    ] = None,
    group: Annotated[str | None, typer.Option(help="Group for --sharing group.")] = None,
    run: RunOption = None,
    json: JsonOption = False,
) -> int:
    """Change settings of a guest or of one of its pools; they hold from now on."""
    from tools.administer import pool_line, settings_line

    settings: Record = {
        "pool": pool,
        "weight": weight,
        "cap_bytes": bound("--cap", cap),
        "reserve_bytes": bound("--reserve", reserve),
        "compress": None if compress is None else compress == "on",
        "borrow": None if borrow is None else borrow == "on",
        "priority": priority,
        "sharing": sharing,
        "group": group,
    }
    if all(value is None for key, value in settings.items() if key != "pool"):
        raise OperatorError(
            "say what to set: --weight, --cap, --reserve, --compress, --borrow, --priority, "
            "--sharing or --group",
            ExitCode.USAGE,
        )
    admin = administrator(run)
    name = admin.guest(guest)
    answer = admin.ask("set", guest=name, **settings)
    if json:
        print_json(answer)
    elif pool is None:
        print(settings_line(name, answer["guest"]))
    else:
        print(pool_line(name, admin.ask("list", guest=name)["guests"][name], pool))
    return ExitCode.OK


def balloon(
    guest: Annotated[
        str | None, typer.Argument(help="Name or number of the guest (default: list targets).")
    ] = None,
    size: Annotated[
        str | None,
        typer.Argument(help="How much RAM, for example 8M, or none.", metavar="SIZE|none"),
    ] = None,
    run: RunOption = None,
    json: JsonOption = False,
) -> int:
    """Tell a guest how much RAM it should have; it shrinks or grows to that when it can.

    Without a size: what guests have, what they were told, and between which bounds they can go.
    """
    from tools import administer as view

    size_bytes = None if size is None else _target_of(size)
    admin = administrator(run)
    name = None if guest is None else admin.guest(guest)
    names = admin.names() if name is None else [name]
    answer = admin.ask("balloon", guest=None if size is None else name, size_bytes=size_bytes)
    answer["guests"] = admin.balloons(names)
    if json:
        print_json(answer)
    elif name is not None and size is not None:
        print(view.balloon_line(name, answer))
    else:
        print_table(view.BALLOON_HEADER, view.balloon_table(answer, names))
    return ExitCode.OK


def _target_of(text: str) -> int:
    """Bytes of a balloon target; 0 for "none"."""
    if text == "none":
        return 0
    size_bytes = size_of("SIZE", text)
    if not PAGE_BYTES <= size_bytes <= BALLOON_PAGES_MAX * PAGE_BYTES:
        raise OperatorError(
            f"SIZE: {text!r} is no size of a guest's RAM, at least 4 KiB and less than 16 TiB; "
            "write 'none' for no target",
            ExitCode.USAGE,
        )
    return size_bytes


def schedule(
    mode: Annotated[
        Literal["greedy", "static", "scheduled"] | None,
        typer.Argument(help="The new way (default: say the present one)."),
    ] = None,
    run: RunOption = None,
) -> int:
    """Divide the arena: greedy (who comes first), static (by weight), scheduled (by use)."""
    admin = administrator(run)
    answer = admin.ask("list") if mode is None else admin.ask("schedule", mode=mode)
    print(answer["scheduling"])
    return ExitCode.OK


def freeable(run: RunOption = None, json: JsonOption = False) -> int:
    """Print how much of the arena is free, and how much would be without ephemeral pages."""
    answer = administrator(run).ask("freeable")
    if json:
        print_json(answer)
    else:
        print(
            f"{format_size(answer['freeable_bytes'])} freeable: "
            f"{format_size(answer['free_bytes'])} free, "
            f"{format_size(answer['ephemeral_bytes'])} ephemeral"
        )
    return ExitCode.OK


def flush(
    guest: Annotated[str, typer.Argument(help="Name or number of the guest, or 'all'.")],
    size: Annotated[str, typer.Argument(help="How much to set free, for example 4M.")],
    run: RunOption = None,
    json: JsonOption = False,
) -> int:
    """Drop ephemeral pages until SIZE more is free; persistent pages stay."""
    size_bytes = size_of("SIZE", size)
    admin = administrator(run)
    done = admin.flush(None if guest == "all" else admin.guest(guest), size_bytes)
    if json:
        print_json(done._asdict())
        return ExitCode.OK
    print(
        f"flushed {done.flushed_pages:,} pages, {format_size(done.freed_bytes)} set free, "
        f"{format_size(done.released_bytes)} given back to the host"
    )
    if done.freed_bytes < size_bytes:
        left = "persistent or reserved" if guest == "all" else "persistent"
        print(
            f"tmem: that is less than {format_size(size_bytes)}: all that is left is {left}",
            file=sys.stderr,
        )
    return ExitCode.OK


def quarantine(
    guest: GuestArgument,
    also_deny: Annotated[
        bool, typer.Option("--also-deny", help="Take back all its grants, so it can put no more.")
    ] = False,
    run: RunOption = None,
    json: JsonOption = False,
) -> int:
    """Drop all ephemeral pages that a guest has put into shared pools until now.

    From now on nobody gets one of them; their memory comes back slice by slice. Its private pools
    stay, and so do persistent pages in shared pools: others may have nothing but these.
    """
    admin = administrator(run)
    name = admin.guest(guest)
    answer = admin.quarantine(name, also_deny=also_deny)
    if json:
        print_json(answer)
        return ExitCode.OK
    print(
        f"{name}: {answer['pages']:,} pages in {answer['pools']} shared pools can't be had any more"
    )
    if answer["denied"]:
        grants = len(answer["denied"])
        print(f"{name}: {grants} grant{'s' * (grants != 1)} taken back")
    if answer["persistent_pages"]:
        print(
            f"tmem: {answer['persistent_pages']:,} persistent pages of it in shared pools stay; "
            f"'tmem destroy' of these pools would drop them",
            file=sys.stderr,
        )
    return ExitCode.OK


def allow(
    guest: GuestArgument,
    uuid: UuidArgument,
    reader: Annotated[bool, typer.Option("--reader", help="Gets only.")] = False,
    writer: Annotated[
        bool, typer.Option("--writer", help="Puts and flushes too (default).")
    ] = False,
    run: RunOption = None,
) -> int:
    """Allow a guest to join the shared pool of a uuid; without this it can't."""
    if reader and writer:
        raise OperatorError("a guest is a reader or a writer, not both", ExitCode.USAGE)
    role = "reader" if reader else "writer"
    digits = uuid_of(uuid)
    admin = administrator(run)
    name = admin.guest(guest)
    _print_grants(admin.ask("auth", action="allow", guest=name, uuid=digits, role=role))
    return ExitCode.OK


def deny(guest: GuestArgument, uuid: UuidArgument, run: RunOption = None) -> int:
    """Take it back: from now on the guest's calls to that pool are refused."""
    digits = uuid_of(uuid)
    admin = administrator(run)
    _print_grants(admin.ask("auth", action="deny", guest=admin.guest(guest), uuid=digits))
    return ExitCode.OK


def grants(guest: OneGuestArgument = None, run: RunOption = None, json: JsonOption = False) -> int:
    """List who may join which shared pool."""
    admin = administrator(run)
    name = None if guest is None else admin.guest(guest)
    answer = admin.ask("auth", action="list", guest=name)
    if json:
        print_json(answer)
    else:
        _print_grants(answer)
    return ExitCode.OK


def _print_grants(answer: Record) -> None:
    from tools.administer import GRANTS_HEADER, grants_table

    print_table(GRANTS_HEADER, grants_table(answer))


def destroy(
    guest: GuestArgument,
    pool: Annotated[
        int | None,
        typer.Option(help="One pool, by its ID in 'tmem pools' (default: all).", min=0),
    ] = None,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Don't ask.")] = False,
    run: RunOption = None,
) -> int:
    """Destroy a guest's pools with all their pages, persistent ones too."""
    admin = administrator(run)
    name = admin.guest(guest)
    if not yes and not _confirmed(admin, name, pool):
        print("tmem: nothing was destroyed", file=sys.stderr)
        return ExitCode.VIOLATED
    answer = admin.ask("destroy", guest=name, pool=pool)
    print(f"destroyed {answer['destroyed_pools']} pools of {name}")
    return ExitCode.OK


def _confirmed(admin: Administrator, name: str, pool: int | None) -> bool:
    what = "all pools" if pool is None else f"pool {pool}"
    if not sys.stdin.isatty():
        raise OperatorError(
            f"destroying {what} of {name} can't be undone and there is no terminal to ask on; "
            "say --yes if you mean it",
            ExitCode.USAGE,
        )
    guest = admin.ask("list", guest=name)["guests"].get(name, {"pools": []})
    doomed = [one for one in guest["pools"] if pool in (None, one["id"])]
    pages = sum(one["pages"] for one in doomed)
    kept = sum(one["pages"] for one in doomed if one["type"].startswith("P"))
    return typer.confirm(
        f"destroy {what} of {name} with {pages:,} pages, {kept:,} of them persistent?", err=True
    )


# --- what people write --------------------------------------------------------------------------


def bound(option: str, text: str | None) -> int | None:
    """Bytes of a cap or reservation; 0 for "none", None if it was not given."""
    if text is None:
        return None
    if text == "none":
        return 0
    size_bytes = size_of(option, text)
    if not size_bytes:
        raise OperatorError(
            f"{option} {text}: 0 says nothing; write 'none', or stop a guest with 'tmem freeze'",
            ExitCode.USAGE,
        )
    return size_bytes


def size_of(what: str, text: str) -> int:
    """Bytes of a size; raises OperatorError (usage)."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise OperatorError(f"{what}: {error}", ExitCode.USAGE) from None


def uuid_of(text: str) -> str:
    """32 hex digits; raises OperatorError (usage)."""
    try:
        return parse_uuid(text)
    except ValueError as error:
        raise OperatorError(str(error), ExitCode.USAGE) from None
