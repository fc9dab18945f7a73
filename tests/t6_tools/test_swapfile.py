"""`tmem mkswap`, and the swap of the guests of a cluster file."""

from __future__ import annotations

import os
import re
import resource
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fs.errors import ImageError
from guests.swapdisk import open_swap
from guests.swapheader import make_swap, owner_uuid
from ipc.errors import ExitCode, OperatorError
from tests.support.clusters import short_folder, write_tree
from tests.support.tools import need_tool
from tools.cli import main
from tools.cluster import Cluster
from tools.config import ClusterConfig, read_config, validate
from tools.demo import Disk, copy_disks, plan_cluster, prepare_disks
from tools.interrupts import Interrupts
from tools.rundir import ClusterDirectory
from tools.swapfile import prepare_swap

UUID = "00112233-4455-6677-8899-aabbccddeeff"


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, output and error output of a command."""
    code = main([str(word) for word in words])
    output, errors = capsys.readouterr()
    return code, output, errors


def swap_file(path: Path, *, guest: str | None = None, blocks: int = 20) -> Path:
    """A swap file of nobody in particular, or of a guest."""
    path.write_bytes(bytes(blocks * 4096))
    make_swap(path, uuid=bytes(16) if guest is None else owner_uuid(guest))
    return path


# ---- the command


def test_made_without_holes_and_for_its_owner_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest of the last page is left out; blkid finds the label and the uuid."""
    path = tmp_path / "swap"
    code, output, errors = run(
        capsys, "mkswap", path, "--size", str(2**20 + 5), "--label", "x", "--uuid", UUID
    )
    assert (code, errors) == (0, "")
    assert output == f"{path}: a swap area of 1020.0 KiB, uuid {UUID}, label x\n"
    status = path.stat()
    assert (status.st_size, stat.S_IMODE(status.st_mode)) == (2**20, 0o600)
    assert status.st_blocks * 512 >= 2**20
    words = [need_tool("blkid"), "-p", "-o", "export", str(path)]
    answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert {"TYPE=swap", "LABEL=x", f"UUID={UUID}"} <= set(answer.split())


def test_uuid_is_random_and_of_no_guest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files have two."""
    uuids = set()
    for name in ("a", "b"):
        assert run(capsys, "mkswap", tmp_path / name, "--size", "40K")[0] == 0
        disk = open_swap(tmp_path / name)
        uuids.add(disk.uuid)
        disk.close()
        assert prepare_swap("web1", None, str(tmp_path / name)) is not None
    assert len(uuids) == 2


def test_what_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless it is a swap area that nobody uses, or --force says otherwise."""
    path = tmp_path / "swap"
    path.write_bytes(os.urandom(1 << 20))
    before = path.read_bytes()
    for words in ([], ["--size", "2M"]):
        code, output, errors = run(capsys, "mkswap", path, *words)
        assert (code, output) == (64, "")
        assert errors == (
            f"tmem: image {path}: there is something in this file; overwrite it with --force\n"
        )
        assert path.read_bytes() == before
    assert run(capsys, "mkswap", path, "--force", "--label", "one")[0] == 0
    assert path.stat().st_size == 1 << 20
    assert run(capsys, "mkswap", path, "--size", "2M", "--label", "two")[0] == 0
    assert path.stat().st_size == 2 << 20

    for words in (["--size", "36K"], ["--size", "1M", "--label", "sixteen bytes ii"]):
        assert run(capsys, "mkswap", path, *words)[0] == 64
        assert path.stat().st_size == 2 << 20

    disk = open_swap(path)
    code, output, errors = run(capsys, "mkswap", path, "--force")
    assert (code, output) == (64, "") and "is in use by another guest" in errors
    disk.close()
    disk = open_swap(path)
    assert (disk.label, disk.slots) == ("two", 511)
    disk.close()

    with path.open("r+b") as file:
        file.seek(4086)
        file.write(b"S1SUSPEND\0")
    assert run(capsys, "mkswap", path)[0] == 64
    assert run(capsys, "mkswap", path, "--force")[0] == 0


def test_empty_file_is_free_to_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a size, or with the one that it has."""
    path = tmp_path / "swap"
    path.touch()
    code, _, errors = run(capsys, "mkswap", path)
    assert code == 64 and "only 0 bytes long; make it again with tmem mkswap" in errors
    assert run(capsys, "mkswap", path, "--size", "64K")[0] == 0
    path.write_bytes(bytes(1 << 20))
    assert run(capsys, "mkswap", path)[0] == 0
    assert path.stat().st_size == 1 << 20


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no such file; say how large it shall be with --size"),
        (["--size", "much"], "'much' is no size"),
        (["--size", "39K"], "has 10 to 4294967296 pages of 4 KiB, not 9"),
        (["--size", "64K", "--label", "sixteen bytes ii"], "has 16 bytes; take at most 15"),
        (["--size", "64K", "--uuid", "7"], "'7' is no uuid"),
    ],
)
def test_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    """And no file is left behind."""
    path = tmp_path / "swap"
    code, output, errors = run(capsys, "mkswap", path, *words)
    assert (code, output) == (64, "")
    assert says in errors and errors.count("\n") == 1
    assert not path.exists()


@pytest.fixture
def files_are_small() -> Iterator[None]:
    """No file of this process can be larger than a MiB: as near to a full disk as a test gets."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("files_are_small")
def test_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is one line for the command and for a cluster, and leaves nothing behind."""
    code, output, errors = run(capsys, "mkswap", tmp_path / "swap", "--size", "2M")
    assert (code, output) == (66, "")
    assert errors == f"tmem: image {tmp_path / 'swap'}: can't be written: File too large\n"

    swap = prepare_swap("web1", 2 << 20, None)
    assert swap is not None
    with pytest.raises(OperatorError, match=r"^web1: can't make a swap file of 2.0 MiB") as caught:
        swap.make(tmp_path)
    assert caught.value.exit_code == ExitCode.UNAVAILABLE
    assert list(tmp_path.iterdir()) == []


# ---- clusters


def complaints(*guests: dict[str, Any]) -> list[str]:
    """What is said about a cluster of these guests."""
    try:
        validate({"guest": list(guests)}, "c.toml")
    except OperatorError as error:
        return str(error).splitlines()
    return []


def test_keys_of_the_cluster_file(tmp_path: Path) -> None:
    """Sizes as everywhere, paths relative to the file, and all of it gets to a supervisor."""
    (tmp_path / "c.toml").write_text(
        '[[guest]]\nname = "web"\ncount = 2\nswap = "64M"\n'
        '[[guest]]\nname = "db"\nswap_image = "db.swap"\n[[guest]]\nname = "none"\n'
    )
    config = read_config(tmp_path / "c.toml")
    config = ClusterConfig.model_validate_json(config.model_dump_json())
    assert [(guest.swap, guest.swap_image) for _, guest in config.guests()] == [
        (64 << 20, None),
        (64 << 20, None),
        (None, str(tmp_path / "db.swap")),
        (None, None),
    ]


@pytest.mark.parametrize(
    ("guest", "says"),
    [
        ({"swap": "much"}, "guest[0].swap: 'much' is no size"),
        ({"swap": 100_000}, "guest[0].swap: 100000 bytes are no whole number of pages"),
        ({"swap": "36K"}, "guest[0].swap: a swap area of 36864 bytes can't be made; it has 40.0 K"),
        ({"swap": "32T"}, "guest[0].swap: a swap area of 35184372088832 bytes can't be made"),
        ({"swap": "1M", "swap_image": "x"}, "guest[0].swap_image: there is the key swap too"),
        ({"count": 2, "swap_image": "x"}, "guest[0].swap_image: x is in use by another guest"),
        ({"image": "x", "swap_image": "x"}, "guest[0].swap_image: x is in use by another guest"),
    ],
)
def test_wrong_value_is_one_line(guest: dict[str, Any], says: str) -> None:
    """With the file's name and the key's path."""
    (line,) = complaints({"name": "red"} | guest)
    assert line.startswith(f"c.toml: {says}")


def test_two_guests_have_not_one_swap_image() -> None:
    """Nor is the disk of one the swap of the other."""
    (line,) = complaints(
        {"name": "red", "swap_image": "/swap"}, {"name": "blue", "swap_image": "/swap"}
    )
    assert line.startswith("c.toml: guest[1].swap_image: /swap is in use by another guest")


def test_every_guest_gets_a_swap_file_of_its_own(tmp_path: Path) -> None:
    """New for each start, with its guest's uuid; nodes of one disk have one each too."""
    names = ["web1", "web2", "db", "none"]
    image = swap_file(tmp_path / "db.swap")
    config = validate(
        {
            "guest": [
                {"name": "web", "count": 2, "swap": "1M"},
                {"name": "db", "swap_image": str(image)},
                {"name": "none"},
            ]
        },
        "c.toml",
    )
    swaps = [prepare_swap(name, guest.swap, guest.swap_image) for name, guest in config.guests()]
    # As if all had one disk.
    disks = {
        name: Disk("disk", image, None, copied=True, swap=swap)
        for name, swap in zip(names, swaps, strict=True)
    }
    directory = ClusterDirectory(tmp_path / "run")
    for label in ("first start", "second start"):
        copy_disks(disks, directory)
        plan = {guest.name: guest for guest in plan_cluster(config, disks, directory, "on").guests}
        for name in ("web1", "web2"):
            path = plan[name].swap
            assert path == directory.images / f"{name}.swap"
            disk = open_swap(path, uuid=owner_uuid(name))
            assert (disk.label, disk.slots, disk.uuid) == (name, 255, plan[name].swap_uuid)
            at = disk.allocate(1)
            into = bytearray(4096)
            disk.read(at[0], 1, memoryview(into))
            assert not any(into), label
            disk.write(at, memoryview(b"x" * 4096))
            disk.close()
        with pytest.raises(ImageError, match="belongs to another guest"):
            open_swap(directory.images / "web1.swap", uuid=plan["web2"].swap_uuid)
        assert (plan["db"].swap, plan["db"].swap_uuid) == (image, bytes(16))
        assert (plan["none"].swap, plan["none"].swap_uuid) == (None, None)


def test_swap_image_that_can_not_be_used(tmp_path: Path) -> None:
    """Is told before any image is built, with the guest's name and the file's."""
    short = swap_file(tmp_path / "short")
    os.truncate(short, 10 * 4096)
    other = swap_file(tmp_path / "other", guest="web2")
    noise = tmp_path / "noise"
    noise.write_bytes(b"noise" * 10_000)
    for path, says in (
        (tmp_path / "missing", "no such file; make it with tmem mkswap"),
        (short, "is too short for its swap header"),
        (other, "belongs to another guest"),
        (noise, "holds no swap area"),
    ):
        config = validate({"guest": [{"name": "web1", "swap_image": str(path)}]}, "c.toml")
        with pytest.raises(OperatorError, match=f"^web1: image {path}: {says}") as caught:
            prepare_disks(config, tmp_path / "cache")
        assert caught.value.exit_code == ExitCode.NO_INPUT
    assert not (tmp_path / "cache").exists()
    own = prepare_swap("web2", None, str(other))
    assert own is not None and own.uuid == owner_uuid("web2")
    disk = open_swap(other)
    with pytest.raises(OperatorError, match="is in use by another guest"):
        prepare_swap("web2", None, str(other))
    disk.close()


@pytest.mark.cluster
def test_guest_has_the_swap_of_the_cluster_file_and_no_other(cluster_name: str) -> None:
    """A real guest says how much it is; a file that was exchanged since the check is refused."""
    need_tool("mke2fs")
    with short_folder() as folder, Interrupts() as interrupts:
        tree = write_tree(folder / "tree", files=3)
        guest = {"name": "red", "memory": "1M", "tree": str(tree), "swap": "1M"}
        config = validate({"name": cluster_name, "guest": [guest]}, "c.toml")
        disks = prepare_disks(config, folder / "cache")
        directory = ClusterDirectory(folder / "off")
        plan = plan_cluster(config, disks, directory, "off")
        copy_disks(disks, directory)
        with Cluster(plan, directory, interrupts) as cluster:
            question = {"verb": "exec", "argv": ["cat", "/proc/meminfo"]}
            answer = cluster.ask_guest("red", question)
            assert re.search(rb"^SwapTotal: +1020 kB$", answer["stdout"], re.MULTILINE)

        swap_file(directory.images / "red.swap", guest="blue")
        refusal = r"^red: image .*red\.swap: belongs to another guest"
        with pytest.raises(OperatorError, match=refusal), Cluster(plan, directory, interrupts):
            pass
