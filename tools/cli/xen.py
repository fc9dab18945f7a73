"""tmem-list, tmem-freeze, tmem-thaw, tmem-set, tmem-shared-auth, tmem-freeable, as `xl` takes them.

They are commands of `tmem`, and programs of their own name too.  Options mean what they meant to
xl(1), where that is known:

* a guest, by name or number, or -a for all; tmem-list prints text records (`tools.xen`).
* -w weight; -p 1 compresses and -p 0 does not; -c cap, whose unit Xen never said (and whose value
  it never used): here MiB for a bare number, like what tmem-freeable prints, 0 for no cap.
* -u uuid; -A 0|1 as the program had it, or -a 0|1 as its man page had it.  1 allows; the man page
  said "0=auth,1=deauth" until 2017 and the code did the opposite.  Whom it allows may put and get.

For Xen, -a of tmem-shared-auth without a number meant "anybody at all"; here it is everybody who
is known now, because nobody may join a shared pool unasked.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ipc.codec import Record
from ipc.errors import ExitCode, OperatorError
from tools.cli.admin import administrator, size_of, uuid_of
from tools.cli.common import RunOption

PANEL = "Xen's spellings"

Domain = Annotated[
    str | None, typer.Argument(metavar="[DOMAIN]", help="Name or number of the guest.")
]
All = Annotated[bool, typer.Option("-a", help="All guests.")]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for name, command in (
        ("tmem-list", tmem_list),
        ("tmem-freeze", tmem_freeze),
        ("tmem-thaw", tmem_thaw),
        ("tmem-set", tmem_set),
        ("tmem-freeable", tmem_freeable),
    ):
        app.command(name, rich_help_panel=PANEL)(command)
    # What it does not know, -a with its two meanings, is left to the command.
    app.command(
        "tmem-shared-auth",
        rich_help_panel=PANEL,
        context_settings={"ignore_unknown_options": True},
    )(tmem_shared_auth)


def main() -> int:
    """The program called `tmem-list` (or one of the others) is `tmem tmem-list`."""
    from tools.cli import main as tmem

    return tmem([Path(sys.argv[0]).name, *sys.argv[1:]])


def tmem_list(
    domain: Domain = None,
    everybody: All = False,
    long: Annotated[bool, typer.Option("-l", help="All figures.")] = False,
    run: RunOption = None,
) -> int:
    """List guests and their pools as Xen's text records."""
    from tools.xen import records

    _check_domain("tmem-list", domain, everybody=everybody)
    admin = administrator(run)
    name = None if domain is None else admin.guest(domain)
    answers = admin.ask("list", guest=name), admin.ask("pools", guest=name), admin.ask("stats")
    for line in records(*answers, name, long=long):
        print(line)
    return ExitCode.OK


def tmem_freeze(domain: Domain = None, everybody: All = False, run: RunOption = None) -> int:
    """Take no new pages."""
    return _set_frozen("freeze", domain, run, everybody=everybody)


def tmem_thaw(domain: Domain = None, everybody: All = False, run: RunOption = None) -> int:
    """Take new pages again."""
    return _set_frozen("thaw", domain, run, everybody=everybody)


def _set_frozen(verb: str, domain: str | None, run: Path | None, *, everybody: bool) -> int:
    _check_domain(f"tmem-{verb}", domain, everybody=everybody)
    admin = administrator(run)
    admin.ask(verb, guest=None if domain is None else admin.guest(domain))
    return ExitCode.OK


def tmem_set(
    domain: Domain = None,
    everybody: All = False,
    weight: Annotated[int | None, typer.Option("-w", help="Weight.", min=1)] = None,
    cap: Annotated[
        str | None, typer.Option("-c", help="Cap in MiB, or with K, M or G; 0 for none.")
    ] = None,
    compress: Annotated[int | None, typer.Option("-p", help="Compress: 0|1.", min=0, max=1)] = None,
    run: RunOption = None,
) -> int:
    """Change weight, cap and compression."""
    _check_domain("tmem-set", domain, everybody=everybody)
    settings: Record = {
        "weight": weight,
        "cap_bytes": _cap(cap),
        "compress": None if compress is None else bool(compress),
    }
    if all(value is None for value in settings.values()):
        raise OperatorError("tmem-set: say what to set: -w, -c or -p", ExitCode.USAGE)
    admin = administrator(run)
    for name in admin.names() if domain is None else [admin.guest(domain)]:
        admin.ask("set", guest=name, **settings)
    return ExitCode.OK


def tmem_shared_auth(
    words: Annotated[list[str] | None, typer.Argument(metavar="[DOMAIN] [-a]")] = None,
    uuid: Annotated[str | None, typer.Option("-u", help="Uuid of the shared pool.")] = None,
    auth: Annotated[str | None, typer.Option("-A", help="0|1: 1 allows. Or -a 0|1.")] = None,
    run: RunOption = None,
) -> int:
    """Allow (1) or deny (0) a guest, or with -a all guests, to join a shared pool."""
    rest, everybody = [], False
    given = iter(words or [])
    for word in given:
        if word in ("-a0", "-a1"):
            auth = word[2:]
        elif word != "-a":
            rest.append(word)
        elif (value := next(given, None)) in ("0", "1"):
            auth = value
        else:
            everybody = True
            rest += [] if value is None else [value]
    unknown = [word for word in rest if word.startswith("-")]
    if unknown or len(rest) > 1:
        raise OperatorError(
            f"tmem-shared-auth: {(unknown or rest[1:])[0]!r} makes no sense here; write "
            "DOMAIN -u UUID -A 0|1",
            ExitCode.USAGE,
        )
    domain = rest[0] if rest else None
    _check_domain("tmem-shared-auth", domain, everybody=everybody)
    if uuid is None or auth not in ("0", "1"):
        raise OperatorError(
            "tmem-shared-auth: give -u UUID, and -A 1 to allow or -A 0 to deny", ExitCode.USAGE
        )
    digits = uuid_of(uuid)
    admin = administrator(run)
    if domain is not None:
        names = [admin.guest(domain)]
    elif auth == "1":
        names = admin.names()
    else:
        granted = admin.ask("auth", action="list", uuid=digits)["grants"]
        names = [grant["guest"] for grant in granted]
    action, role = ("allow", "writer") if auth == "1" else ("deny", None)
    for name in names:
        admin.ask("auth", action=action, guest=name, uuid=digits, role=role)
    return ExitCode.OK


def tmem_freeable(run: RunOption = None) -> int:
    """Print whole MiB that are free or would be without ephemeral pages."""
    print(administrator(run).ask("freeable")["freeable_bytes"] >> 20)
    return ExitCode.OK


def _check_domain(command: str, domain: str | None, *, everybody: bool) -> None:
    if (domain is None) != everybody:
        raise OperatorError(f"{command}: give -a or a domain, one of them", ExitCode.USAGE)


def _cap(text: str | None) -> int | None:
    if text is None:
        return None
    return size_of("-c", f"{text}M" if text.isdecimal() else text)
