"""Disk images of guests: real trees made into ext2 images by mke2fs, cached by their content.

An image is a copy of files of a real folder, by default of the running Python's standard library.
`stdlib` leaves out bytecode, installed packages, build files and the interpreter's own tests, since
Linux distributions ship different parts of those.  When a tree is larger than its limit, each guest
takes the top-level entries in an order of its own (seeded by its name), so guests differ.

The manifest, {path in the image: sha256 of the source file}, is made from the source tree and never
from the image: it is what every byte that a guest reads is compared with.

A cached image is named by a digest of the manifest, its size and this module's format number; it is
built beside its place and renamed, so a killed build leaves no broken image.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sysconfig
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ipc.errors import ExitCode, OperatorError
from tools.units import format_size

STDLIB: Final = "stdlib"
BLOCK_BYTES: Final = 4096
_FORMAT: Final = 1
_LEFT_OUT: Final = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
_LOG_ROOM_BYTES: Final = 8 * 2**20
"""Free space in an image for what workloads write."""
_SPARE_INODES: Final = 256


@dataclass(frozen=True)
class Image:
    """An image in the cache with its manifest; `tree_bytes` counts the files' own bytes."""

    path: Path
    manifest: Path
    files: int
    tree_bytes: int


@dataclass(frozen=True)
class TreeFile:
    """A file of a source tree, by its path in the tree."""

    name: str
    size_bytes: int


def find_program(name: str) -> str | None:
    """A program's path; the sbin folders are searched even when $PATH leaves them out."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return shutil.which(name, path=path)


def source_folder(tree: str) -> Path:
    """The folder that a guest's `tree` names; raises OperatorError if there is none."""
    folder = Path(sysconfig.get_path("stdlib")) if tree == STDLIB else Path(tree)
    if not folder.is_dir():
        raise OperatorError(
            f"the tree {tree} is no folder; name an existing one, or '{STDLIB}'", ExitCode.NO_INPUT
        )
    return folder


def list_tree(folder: Path, *, standard_library: bool) -> list[TreeFile]:
    """Regular files below a folder, sorted by path; links and special files are left out."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not standard_library or not (name in _LEFT_OUT or name.startswith("config-"))
        )
        for name in names:
            path = Path(parent, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
                found.append(TreeFile(path.relative_to(folder).as_posix(), status.st_size))
    return sorted(found, key=lambda file: file.name)


def choose(files: list[TreeFile], limit_bytes: int, seed: str) -> list[TreeFile]:
    """Files whose blocks fit `limit_bytes`; top-level entries are taken in an order by `seed`."""
    groups: dict[str, list[TreeFile]] = {}
    for file in files:
        groups.setdefault(file.name.partition("/")[0], []).append(file)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    chosen: list[TreeFile] = []
    room = limit_bytes
    for entry in order:
        for file in groups[entry]:
            size = _rounded(file.size_bytes)
            if size <= room:
                chosen.append(file)
                room -= size
    return sorted(chosen, key=lambda file: file.name)


def choose_tree(tree: str, limit_bytes: int, seed: str) -> tuple[Path, list[TreeFile]]:
    """The folder of a tree, and the files of it that are taken; raises OperatorError if none is."""
    folder = source_folder(tree)
    files = choose(list_tree(folder, standard_library=tree == STDLIB), limit_bytes, seed)
    if not files:
        raise OperatorError(
            f"no file of the tree {tree} fits in {format_size(limit_bytes)}; raise tree_limit",
            ExitCode.NO_INPUT,
        )
    return folder, files


def build_image(tree: str, limit_bytes: int, seed: str, cache: Path) -> Image:
    """The image of a guest, from the cache or made now."""
    folder, files = choose_tree(tree, limit_bytes, seed)
    manifest = {file.name: hash_file(folder / file.name) for file in files}
    text = json.dumps(manifest, sort_keys=True, indent=0)
    content = f"{_FORMAT}\n{text}".encode()
    digest = hashlib.sha256(content).hexdigest()[:32]
    image = Image(
        cache / f"{digest}.img",
        cache / f"{digest}.json",
        len(files),
        sum(file.size_bytes for file in files),
    )
    try:
        close_cache(cache)
        if image.path.exists() and image.manifest.exists():
            return image
        with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as scratch:
            stage = Path(scratch, "tree")
            for name in manifest:
                target = stage / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(folder / name, target)
            made = Path(scratch, "image")
            make_file_system(stage, made, uuid.UUID(hex=digest))
            made.rename(image.path)
            written = Path(scratch, "manifest")
            written.write_text(text)
            written.rename(image.manifest)
    except OSError as error:
        raise OperatorError(
            f"can't build an image in {cache}: {error.strerror}", ExitCode.UNAVAILABLE
        ) from None
    return image


def close_cache(cache: Path) -> None:
    """The folder, made if it is not there, for this user alone: in an image lies a tree that nobody
    else may read, and disks are made of what lies here.  OperatorError if it is somebody else's."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = cache.stat().st_uid
    if owner == os.geteuid():
        cache.chmod(0o700)
    elif owner != 0:
        raise OperatorError(
            f"the images in {cache} belong to user {owner}, and disks would be made of them: "
            "remove that folder, or choose another directory with --run",
            ExitCode.UNAVAILABLE,
        )


def make_file_system(tree: Path, image: Path, identity: uuid.UUID) -> None:
    """An ext2 image of 4 KiB blocks that holds `tree`, with room for logs."""
    program = find_program("mke2fs")
    if program is None:
        raise OperatorError(
            "mke2fs is missing and images can't be made; install the package e2fsprogs",
            ExitCode.UNAVAILABLE,
        )
    paths = list(tree.rglob("*"))
    content_bytes = sum(_rounded(path.lstat().st_size) for path in paths)
    # A fifth more than the files' blocks holds the inode tables, directories and indirect blocks.
    blocks = (content_bytes * 6 // 5 + _LOG_ROOM_BYTES) // BLOCK_BYTES + 64
    command = [program, "-q", "-F", "-t", "ext2", "-b", str(BLOCK_BYTES), "-m", "0"]
    command += ["-N", str(len(paths) + _SPARE_INODES), "-U", str(identity), "-d", str(tree)]
    command += [str(image), str(blocks)]
    # In a session of its own: Ctrl-C is for us, and half an image is not left behind.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, start_new_session=True
    )
    if done.returncode:
        reason = " ".join(done.stderr.split())
        raise OperatorError(f"mke2fs failed: {reason}", ExitCode.UNAVAILABLE)


def copy_image(image: Path, target: Path) -> None:
    """A guest's own copy of a cached image."""
    try:
        shutil.copyfile(image, target)
    except OSError as error:
        raise OperatorError(
            f"can't copy an image to {target}: {error.strerror}", ExitCode.UNAVAILABLE
        ) from None


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as manifests have it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
