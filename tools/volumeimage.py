"""Volumes of a cluster: OCFS2 images with a copy of a real tree, made by our own mkfs and our own
file system, cached by their content as the guests' own images are (`tools.image`).

The tree, its manifest and its digest are as there.  The volume has room for a slot and a journal of
each node, and for what nodes write.  One whose nodes verify pages has checksums of its files, and
the feature that files of any size need for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Final

from fs.block.device import BLOCK_BYTES
from fs.block.file import FileDevice
from fs.directpages import DirectPages
from fs.errors import ImageError
from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.mkfs import Parameters, blocks_needed, make_volume
from fs.vfs import Vfs
from ipc.errors import ExitCode, OperatorError
from tools.image import Image, choose_tree, close_cache, hash_file

_FORMAT: Final = 1
_ROOM_BYTES: Final = 16 * 2**20
"""Free space for what nodes write."""


def build_volume(
    tree: str, limit_bytes: int, seed: str, slots: int, cache: Path, *, verify: bool = False
) -> Image:
    """The volume of a tree for so many nodes, from the cache or made now."""
    folder, files = choose_tree(tree, limit_bytes, seed)
    manifest = {file.name: hash_file(folder / file.name) for file in files}
    text = json.dumps(manifest, sort_keys=True, indent=0)
    content = f"ocfs2 {_FORMAT} {slots}{' verify 2' if verify else ''}\n{text}".encode()
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
            made = Path(scratch, "volume")
            _make(made, folder, list(manifest), slots, bytes.fromhex(digest), verify)
            made.rename(image.path)
            written = Path(scratch, "manifest")
            written.write_text(text)
            written.rename(image.manifest)
    except (OSError, ImageError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OperatorError(
            f"can't build a volume in {cache}: {reason}", ExitCode.UNAVAILABLE
        ) from None
    return image


def _make(
    path: Path, folder: Path, names: list[str], slots: int, uuid: bytes, keep_checksums: bool
) -> None:
    parameters = Parameters(
        slots=slots,
        uuid=uuid,
        generation=int.from_bytes(uuid[:4], "little") | 1,
        now_s=int(time.time()),
        label=b"tmem",
        attributes=keep_checksums,
    )
    blocks = blocks_needed(parameters) + _ROOM_BYTES // BLOCK_BYTES
    parents = {parent for name in names for parent in Path(name).parents}
    blocks += sum(-(-(folder / name).stat().st_size // BLOCK_BYTES) + 1 for name in names)
    # A directory and its inode, and again as much for the groups of the inode allocators.
    blocks += 2 * len(parents) + len(names) // 2
    with path.open("xb") as file:
        file.truncate(blocks * BLOCK_BYTES)
    device = FileDevice(path)
    try:
        make_volume(device, parameters, fresh=True)
        fs = Ocfs2(device, clock_ns=time.time_ns, keep_checksums=keep_checksums)
    except BaseException:
        device.close()
        raise
    pages = DirectPages(fs, fs.checksums)
    fs.attach_pages(pages)
    vfs = Vfs(fs, pages)
    try:
        for parent in sorted(parents - {Path()}):
            vfs.mkdir(f"/{parent.as_posix()}")
        for name in names:
            handle = vfs.open(f"/{name}", os.O_CREAT | os.O_WRONLY)
            vfs.write(handle, (folder / name).read_bytes())
            vfs.close(handle)
    finally:
        vfs.unmount()
