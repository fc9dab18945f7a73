"""The three modes in which a node may hold a lock, and which of them go together.

VMS gave the world six modes; OCFS2's o2dlm uses three of them, with the same numbers, and so do
we. CR, CW and PW (1, 2, 4) are left out on purpose: no operation of the file system wants them.
"""

from __future__ import annotations

import enum


class Mode(enum.IntEnum):
    """What a holder may do; a greater number allows more."""

    NL = 0
    """Interest only: stands in nobody's way and keeps the right to convert."""
    PR = 3
    """Protected read: with other readers."""
    EX = 5
    """Exclusive: alone."""


def compatible(one: Mode, other: Mode) -> bool:
    """Two nodes may hold these modes at the same time."""
    return one == Mode.NL or other == Mode.NL or one == other == Mode.PR


def highest_beside(mode: Mode) -> Mode:
    """The most that another node may hold beside `mode`: what a holder is asked to go down to."""
    if mode == Mode.EX:
        return Mode.NL
    return Mode.PR if mode == Mode.PR else Mode.EX
