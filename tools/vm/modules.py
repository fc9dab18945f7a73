"""Kernel modules: which ones a machine needs, in the order in which they can be loaded.

`modules.dep` names for each module all others that it needs, the nearest first; so the files that
come last must be loaded first. Names in it are files; a module's own name is the file's without
suffixes, with `_` where the file may have `-`.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ipc.errors import ExitCode, OperatorError

WANTED: Final = (
    "virtio_pci",
    "virtio_blk",
    "crc32c_generic",  # by jbd2, by name at run time: no dependency in modules.dep
    "ocfs2",
    "ocfs2_stack_o2cb",
)
_SUFFIXES: Final = (".ko", ".ko.xz")


def module_name(file: str) -> str:
    """The name of the module in a file, without suffix and folder."""
    return file.rpartition("/")[2].partition(".")[0].replace("-", "_")


def load_order(modules_dep: str, wanted: Iterable[str]) -> list[str]:
    """The files to load for `wanted`, each once, every one after those that it needs."""
    needs: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    for line in modules_dep.splitlines():
        file, colon, rest = line.partition(":")
        if colon:
            needs[file] = rest.split()
            files[module_name(file)] = file
    order: list[str] = []
    for name in wanted:
        wanted_file = files.get(module_name(name))
        if wanted_file is None:
            raise OperatorError(
                f"the kernel package has no module {name}; only a full kernel will do",
                ExitCode.INCONCLUSIVE,
            )
        for file in [*reversed(needs[wanted_file]), wanted_file]:
            if file not in order:
                order.append(file)
    return order


def read_module(path: Path) -> bytes:
    """The bytes of a module as `insmod` of busybox takes them: not compressed."""
    if not path.name.endswith(_SUFFIXES):
        raise OperatorError(
            f"{path} is compressed in a way that is not known here; "
            f"known are {', '.join(_SUFFIXES)}",
            ExitCode.INCONCLUSIVE,
        )
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data
