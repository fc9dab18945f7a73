"""The two ways in which a file system says no.

An image that can't be used at all raises `ImageError`: one line for the person who named the
image. Everything that can go wrong on a mounted file system is an `OSError` with an errno, as a
program expects: `eio`-like damage is `corrupt()` (EUCLEAN), which Linux uses for the same
purpose.
"""

from __future__ import annotations

import errno
import os


class ImageError(Exception):
    """An image can't be used. The text is one line: which image, what is wrong, what to do."""


def error(code: int, what: str = "") -> OSError:
    """An `OSError` with the system's text for `code` and `what` it is about."""
    return OSError(code, f"{os.strerror(code)}: {what}" if what else os.strerror(code))


def corrupt(what: str) -> OSError:
    """The metadata on the disk contradicts itself: EUCLEAN, "structure needs cleaning"."""
    return error(errno.EUCLEAN, what)
