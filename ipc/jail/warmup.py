"""What the standard library would open a file for later, done before a jail is shut.

Importing this imports every text encoding: Python sources name theirs, and one is a module each,
which is first looked for when it is needed.  It takes 40 ms, so a fork server does it once for all.
"""

from __future__ import annotations

import contextlib
import encodings
import hashlib
import pkgutil
from importlib import import_module

import ipc.jail.lazily  # noqa: F401

for _module in pkgutil.iter_modules(encodings.__path__):
    # Those of Windows are there and can't be imported.
    with contextlib.suppress(ImportError):
        import_module(f"encodings.{_module.name}")

# OpenSSL reads its configuration at the first digest.
hashlib.sha256()
