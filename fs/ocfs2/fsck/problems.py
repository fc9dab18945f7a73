"""What the checker found.

Codes are those of fsck.ocfs2.checks(8) where that program looks at the same thing. Our own:

    SUPERBLOCK            the superblock contradicts itself; nothing else was checked
    READ_ERROR            a block can't be read
    SYSTEM_FILE           a system file is missing or is not what it must be
    INODE_MODE            an inode of no known kind, or a special file with clusters
    INODE_FLAGS           an inode that is in use and not marked valid, or has a foreign feature
    INODE_DUPLICATE       an inode that two allocators have
    GROUP_BITS            a group of another size than it must have, or without its own bit
    EB_ALLOC              a block of an extent allocator is in use and no tree has it, or inverse
    EB_DUPLICATE          two trees, or two places of one, have the same extent block
    EB_NEXT_LEAF          the leaves of a tree are not linked in their order
    SLOT_MAP              an entry of the slot map that can't be
    TOO_MANY              the list was cut here

What recovery will do by itself is listed too, marked as `pending`: JOURNAL_DIRTY, SLOT_IN_USE,
INODE_ORPHANED, LALLOC_IN_USE, TRUNCATE_LOG_IN_USE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PROBLEMS_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `text` is a sentence about `place`."""

    code: str
    place: str
    text: str
    pending: bool = False
    """True when nothing is damaged: a mount or a survivor's recovery does away with it."""

    def __str__(self) -> str:
        """One line for a person."""
        return f"[{self.code}] {self.place}: {self.text}"


class Findings:
    """The list, which stops growing at PROBLEMS_MAX."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []
        self._more = 0

    def add(self, code: str, place: str, text: str, *, pending: bool = False) -> None:
        """Something is wrong."""
        if len(self._problems) < PROBLEMS_MAX:
            self._problems.append(Problem(code, place, text, pending))
        else:
            self._more += 1

    def all(self) -> list[Problem]:
        """What was found, in the order of the passes."""
        if not self._more:
            return self._problems
        last = Problem("TOO_MANY", "volume", f"there are {self._more} more problems.")
        return [*self._problems, last]
