"""The power goes at every write of commit, checkpoint and recovery (the long form: `campaign`)."""

from __future__ import annotations

import random

import pytest

from fs.block.memory import MemoryDevice
from fs.block.writelog import LoggingDevice, PowerCut, PowerCuts, power_cuts
from tests.t3_fs.jbd2.campaign import Campaign
from tests.t3_fs.jbd2.journals import FORMS


@pytest.mark.parametrize(("seed", "form"), [*enumerate(FORMS)], ids=str)
def test_power_cut_at_every_write(form: str, seed: int) -> None:
    """What was committed is there, what was freed and reused is not overwritten."""
    campaign = Campaign(form, seed)
    assert campaign.run(subset_writes_max=4, samples=10, again_every=15) > 300


def test_a_state_is_found_again_by_its_id() -> None:
    """The id in a failure message gives the same state."""
    device = LoggingDevice(MemoryDevice.empty(4))
    for number in range(3):
        device.write(number, 2, bytes([number + 1]) * 8192)
        if number == 1:
            device.flush()
    before = MemoryDevice.empty(4)
    states = PowerCuts(before, device.epochs)
    seen = set()
    for cut in power_cuts(device.epochs, random.Random(1)):
        assert PowerCut.from_id(str(cut)) == cut
        contents = states.state(cut).contents
        assert PowerCuts(before, device.epochs).state(cut).contents == contents
        seen.add(tuple(contents))
    # 4 writes give 16 subsets; the second write over block 1 hides the first in four of them.
    assert len(seen) > 16
    Campaign("plain", 1).replay("3:1")
    Campaign("plain", 1).replay("3:1/0:1")
