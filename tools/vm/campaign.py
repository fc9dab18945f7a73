"""The checks of `make vm-check`, each a story on one image that Linux and ours take turns with.

    fresh      our mkfs made it, nobody wrote: Linux mounts it, works and leaves
    written    our mkfs, our tree: Linux reads every byte, works and leaves; ours reads all that,
               works on Linux's files; Linux reads that
    theirs     the same on a volume of mkfs.ocfs2
    killed     our node is killed: Linux replays its journal, finds what was synced, works, leaves
    returned   our node is killed: Linux takes the same node number and slot
    power-cut  Linux's power is cut: ours recovers its slot, finds what was synced, works; Linux
               reads that
    reclaimed  Linux's power is cut: ours takes the same node number and slot
    chain      ours dies, Linux replays it and dies, ours recovers that and dies, Linux replays
    cut        Linux's power is cut in the middle of its work, at steps that the seed chooses, and
               ours recovers it each time
    guests     a cluster of four guests of ours loses its power: Linux takes the slot of one and
               replays the other three; ours reads that
    again      a cluster of four guests of ours loses its power and comes again; Linux reads that
    survivors  Linux's power is cut: a cluster of four guests takes its slot over and finds what was
               synced; Linux reads that
    control    damage that Linux, fsck and the listings must each find

After each turn that ends with an unmount `fsck.ocfs2 -fn` must be clean by what it prints, no slot
taken and no journal dirty; after each turn of Linux its kernel must have had nothing to complain
about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from fs.block.device import BLOCK_BYTES
from fs.ocfs2.format import FIRST_GROUP_BLOCK, GROUP_BITMAP_OFFSET, SLOT_ENTRY
from tools.vm import volume
from tools.vm.guests import NAMES
from tools.vm.story import SLOTS, Story


def fresh(story: Story) -> None:
    """An empty volume of ours."""
    story.make(cluster="tmem")
    story.linux(0)
    story.ours("read", 0)


def written(story: Story) -> None:
    """Ours writes, Linux writes, each reads the other's."""
    story.make()
    _take_turns(story)


def theirs(story: Story) -> None:
    """The same on a volume of mkfs.ocfs2."""
    story.make_theirs()
    _take_turns(story)


def _take_turns(story: Story) -> None:
    story.ours("fill", 0)
    story.linux(1)
    story.ours("read", 2)
    story.ours("change", 0, folder="by-linux")
    story.linux(3, work=False)
    story.ours("read", 0)


def killed(story: Story) -> None:
    """Linux replays the journal of a node of ours."""
    story.make()
    story.ours("fill", 0)
    story.ours_dies(1, "killed")
    story.linux(2, replays=1)
    story.ours("read", 0)


def returned(story: Story) -> None:
    """Linux comes as the node of ours that was killed."""
    story.make()
    story.ours("fill", 0)
    story.ours_dies(1, "killed")
    story.linux(1)
    story.ours("read", 0)


def power_cut(story: Story) -> None:
    """Ours takes over the slot of a dead Linux."""
    story.make()
    story.ours("fill", 0)
    story.linux(1, crash=True)
    story.ours_recovers(2, dead_node=1)
    story.ours("change", 2, folder="by-linux")
    story.linux(0, work=False)


def reclaimed(story: Story) -> None:
    """Ours comes as the Linux that lost power."""
    story.make_theirs()
    story.ours("fill", 0)
    story.linux(1, crash=True)
    story.ours("read", 1)
    story.linux(1, work=False)


def chain(story: Story) -> None:
    """Whoever recovers dies in its turn."""
    story.make()
    story.ours("fill", 0)
    story.ours_dies(1, "killed")
    story.linux(2, crash=True, replays=1)
    story.ours_dies(0, "killed-too")
    story.linux(3, work=False, replays=1)
    story.ours("read", 0)


def cut(story: Story) -> None:
    """Ours recovers a Linux that lost power anywhere."""
    story.make()
    story.ours("fill", 0)
    for _ in range(2):
        story.linux_is_cut(1)
        story.ours_recovers(2, dead_node=1)
        story.ours("clear", 0)
    story.linux(3, work=False)


def guests(story: Story) -> None:
    """Linux recovers four guests of ours at once."""
    sums = story.guests_die()
    story.linux_finds_files(1, sums, replays=len(NAMES) - 1)
    story.ours("read", 0)


def again(story: Story) -> None:
    """Ours recovers four guests of ours at once."""
    sums = story.guests_die()
    story.guests_find_files(sums)
    story.linux_finds_files(1, sums)
    story.ours("read", 0)


def survivors(story: Story) -> None:
    """Guests of ours recover a dead Linux."""
    story.make()
    story.linux(9, crash=True)
    sums = story.files()
    story.guests_find_files(sums)
    story.linux_finds_files(0, sums, work=False)


def control(story: Story) -> None:
    """The judge finds what it is there for."""
    story.make()
    sound = story.image.read_bytes()
    free_cluster = 32_000
    offset = FIRST_GROUP_BLOCK * BLOCK_BYTES + GROUP_BITMAP_OFFSET + free_cluster // 8
    story.damage(offset, b"\xff")
    story.linux_finds("clusters that nobody owns", "fsck.ocfs2: ")
    story.image.write_bytes(sound)
    root = volume.first_block(story.image, "/")
    story.damage(root * BLOCK_BYTES + 8, b"\1\1")
    story.linux_finds("a root directory that makes no sense", "kernel: ")
    story.image.write_bytes(sound)
    story.ours_dies(1, "killed")
    slot_map = volume.first_block(story.image, "//slot_map")
    story.damage(slot_map * BLOCK_BYTES, bytes(SLOTS * SLOT_ENTRY.size))
    story.linux_finds("a dirty journal of no node", "belongs to no node")


CHECKS: Final[Mapping[str, Callable[[Story], None]]] = {
    "fresh": fresh,
    "written": written,
    "theirs": theirs,
    "killed": killed,
    "returned": returned,
    "power-cut": power_cut,
    "reclaimed": reclaimed,
    "chain": chain,
    "cut": cut,
    "guests": guests,
    "again": again,
    "survivors": survivors,
    "control": control,
}
