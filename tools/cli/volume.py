"""mkfs, mkswap, fsck, locks, fs stat: OCFS2 volumes, in image files and in a running cluster."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Annotated

import typer

from ipc.errors import ExitCode, OperatorError
from tools.cli.admin import size_of, uuid_of
from tools.cli.common import JsonOption, RunOption, print_json, print_table


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(mkfs)
    app.command()(mkswap)
    app.command()(fsck)
    app.command()(locks)
    files = typer.Typer(help="File systems of the guests.", no_args_is_help=True)
    files.command("stat")(stat)
    app.add_typer(files, name="fs")


def mkfs(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file to make.")],
    size: Annotated[
        str | None,
        typer.Option(help="Size of a new image, for example 256M (default: what is there)."),
    ] = None,
    slots: Annotated[int, typer.Option(help="Guests that can mount it at once.")] = 4,
    label: Annotated[str, typer.Option(help="Label of the volume.")] = "",
    uuid: Annotated[
        str | None, typer.Option(help="Uuid (default: a random one).", show_default=False)
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="Name of the o2cb cluster, kept in the volume.")
    ] = "",
    journal: Annotated[str, typer.Option(help="Size of each slot's journal.")] = "4M",
    verify: Annotated[
        bool,
        typer.Option("--verify", help="For guests that verify: checksums of files of any size."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> int:
    """Make an OCFS2 volume that several guests (and Linux) can mount together."""
    from tools.volume import make_image

    made = make_image(
        image,
        size_bytes=None if size is None else size_of("--size", size),
        slots=slots,
        label=label.encode(),
        uuid=secrets.token_bytes(16) if uuid is None else bytes.fromhex(uuid_of(uuid)),
        cluster=cluster.encode(),
        journal_bytes=size_of("--journal", journal),
        verify=verify,
        generation=secrets.randbits(32) or 1,
        now_s=int(time.time()),
        force=force,
    )
    print(made)
    return ExitCode.OK


def mkswap(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Swap file to make.")],
    size: Annotated[
        str | None,
        typer.Option(help="Size of a new file, for example 64M (default: what is there)."),
    ] = None,
    label: Annotated[str, typer.Option(help="Label, at most 15 bytes.")] = "",
    uuid: Annotated[
        str | None, typer.Option(help="Uuid (default: a random one).", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> int:
    """Make a swap file for a guest (or for Linux), as mkswap does."""
    from uuid import uuid4

    from tools.swapfile import make_swap_file

    made = make_swap_file(
        path,
        size_bytes=None if size is None else size_of("--size", size),
        label=label,
        uuid=uuid4().bytes if uuid is None else bytes.fromhex(uuid_of(uuid)),
        force=force,
    )
    print(made)
    return ExitCode.OK


def fsck(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image of an OCFS2 volume.")],
    json: JsonOption = False,
) -> int:
    """Check an OCFS2 volume that nobody has mounted. Nothing is changed; 1 when there are problems.

    Other file systems have their own: for ext2, ext3 and ext4 use e2fsck -fn.
    """
    from fs.errors import ImageError
    from tools.volume import check_image

    try:
        problems = check_image(image)
    except ImageError as reason:
        raise OperatorError(str(reason), ExitCode.NO_INPUT) from None
    pending = sum(problem.pending for problem in problems)
    if json:
        print_json(
            {
                "image": str(image),
                "clean": not problems,
                "damaged": len(problems) > pending,
                "problems": [
                    {
                        "code": problem.code,
                        "place": problem.place,
                        "text": problem.text,
                        "pending": problem.pending,
                    }
                    for problem in problems
                ],
            }
        )
    else:
        for problem in problems:
            print(problem)
        print(_verdict(image, len(problems) - pending, pending))
    return ExitCode.VIOLATED if problems else ExitCode.OK


def _verdict(image: Path, damage: int, pending: int) -> str:
    if damage:
        return f"{image}: {damage} problems; repair it with fsck.ocfs2 -fy"
    if pending:
        return f"{image}: not damaged, but {pending} things wait for a mount to do them"
    return f"{image}: clean"


def locks(
    inode: Annotated[int | None, typer.Option(help="Only locks of this inode.", min=0)] = None,
    run: RunOption = None,
    json: JsonOption = False,
) -> int:
    """List the cluster locks of shared volumes: who masters, holds and waits for each."""
    import sys

    from tools import nodes
    from tools.rundir import find_live

    directory, record = find_live(run)
    rows, complaints = nodes.locks(directory, record, inode)
    if json:
        print_json(rows)
    else:
        print_table(nodes.LOCKS_HEADER, [nodes.lock_cells(row) for row in rows])
    for line in complaints:
        print(f"tmem: {line}", file=sys.stderr)
    return ExitCode.OK


def stat(
    image: Annotated[
        Path | None,
        typer.Argument(metavar="[IMAGE]", help="An image file, instead of what guests have."),
    ] = None,
    guest: Annotated[str | None, typer.Option(help="Only this guest's.")] = None,
    run: RunOption = None,
    json: JsonOption = False,
) -> int:
    """Show file systems: size, features, and each slot's node and journal.

    Those of the guests of a running cluster, or the one in an image file.
    """
    from tools import nodes
    from tools.rundir import find_live
    from tools.volume import stat_image

    if image is None:
        directory, record = find_live(run)
        found = nodes.volumes(directory, record, guest)
    elif guest is None:
        found = {str(image): stat_image(image)}
    else:
        raise OperatorError("name an image or a guest, not both", ExitCode.USAGE)
    if json:
        print_json(found)
        return ExitCode.OK
    rows = [nodes.volume_cells(name, volume) for name, volume in found.items()]
    print_table(("GUEST" if image is None else "IMAGE", *nodes.VOLUMES_HEADER), rows)
    if slots := nodes.slot_rows(found.values()):
        print()
        print_table(nodes.SLOTS_HEADER, slots)
    return ExitCode.OK
