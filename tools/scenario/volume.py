"""A volume for several nodes on the stage: an OCFS2 image with a tree of known content.

The tree is larger than the RAM of a node, so that nodes that read it again and again have its pages
from the shared pool.  Every file that a victim reads is compared with the hash of its source.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fs.cluster.config import Timing
from guests.node import NodeSpec
from guests.shareddisk import read_layout
from tools.image import copy_image
from tools.scenario.stage import MIB, Grant, Player, Stage, adversary, write_tree
from tools.volumeimage import build_volume

FILES: Final = 24
FILE_BYTES: Final = 48 * 1024
_KEY_BYTES: Final = 32
TIMING: Final = Timing(
    heartbeat_interval_ns=200_000_000,
    dead_threshold=50,
    idle_timeout_ns=6_000_000_000,
    keepalive_ns=200_000_000,
    reconnect_ns=100_000_000,
)
"""A node that is silent for 10 s is dead: on a busy machine less would fence good ones."""


@dataclass(frozen=True)
class Volume:
    """`image` is what the nodes mount, `manifest` what its files must hold."""

    image: Path
    manifest: Path
    uuid: bytes
    names: tuple[str, ...]
    key: bytes
    timing: Timing

    def player(
        self, name: str, noun: str = "witness", *, verify: bool = False, **options: Any
    ) -> Player:
        """A node, with the adversary of this noun."""
        number = self.names.index(name)
        spec = NodeSpec("data", number, self.names, self.key, self.timing, verify=verify)
        return Player(
            name, adversary(noun), image=self.image, node=spec, cleancache=True, **options
        )

    def grants(self, **roles: str) -> list[Grant]:
        """All nodes may write into the pool of the volume, but for those with another role."""
        return [Grant(name, self.uuid, roles.get(name, "writer")) for name in self.names]

    def reading(self, passes: int) -> dict[str, Any]:
        """Parameters of the workload `read_all`."""
        return {"manifest": os.fspath(self.manifest), "passes": passes}


def make_volume(stage: Stage, *names: str, files: int = FILES, timing: Timing = TIMING) -> Volume:
    """A fresh copy of the volume, made once for all scenarios that need one like it.  It has
    checksums of its files, whether anybody looks at them or not."""
    tree = stage.cache / f"tree{files}"
    write_tree(tree, files, FILE_BYTES, seed=2)
    room_bytes = files * FILE_BYTES + MIB
    built = build_volume(str(tree), room_bytes, "data", len(names), stage.cache, verify=True)
    image = stage.folder / "data.img"
    copy_image(built.path, image)
    layout = read_layout(image)
    return Volume(image, built.manifest, layout.uuid, names, os.urandom(_KEY_BYTES), timing)
