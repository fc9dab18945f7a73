"""Programs that tests want and that may be missing on this machine."""

import os
import shutil

import pytest

# Debian keeps mke2fs and its like out of an ordinary user's PATH.
_SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def need_tool(name: str) -> str:
    """The path of a program; skips the test by name when it is not installed."""
    search = os.pathsep.join((os.environ.get("PATH", os.defpath), *_SYSTEM_DIRECTORIES))
    path = shutil.which(name, path=search)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path
