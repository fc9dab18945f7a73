"""What is built in an experiment: Python's own sources, as a tree of many files of moderate size.

A few modules of the standard library are as large as a hundred others (tables, most of them).  A
build with one of those in it measures that one, so they are left out.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

from ipc.errors import ExitCode, OperatorError
from tools.image import STDLIB, hash_file, list_tree, source_folder

SOURCE_BYTES_LEAST: Final = 1 << 10
SOURCE_BYTES_MOST: Final = 24 << 10


def source_tree(cache: Path) -> Path:
    """A folder with the sources, made once; raises OperatorError."""
    top = source_folder(STDLIB)
    names = [
        file.name
        for file in list_tree(top, standard_library=True)
        if file.name.endswith(".py") and SOURCE_BYTES_LEAST <= file.size_bytes <= SOURCE_BYTES_MOST
    ]
    folder = cache / f"sources-{hash_file(top / 'os.py')[:16]}"
    if folder.exists():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as scratch:
            made = Path(scratch, "tree")
            for name in names:
                target = made / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(top / name, target)
            made.rename(folder)
    except OSError as reason:
        raise OperatorError(
            f"can't copy sources to {cache}: {reason.strerror}", ExitCode.UNAVAILABLE
        ) from None
    return folder
