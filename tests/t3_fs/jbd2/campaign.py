"""Power cuts at every write of commit, checkpoint and recovery: `python -m` for the long form.

Each state is recovered and compared with what was promised; then recovery itself is cut at every
write and done again. A state that fails is named `FORM/SEED/CUT[/CUT]`, and `--state` does it
again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

from fs.block.memory import MemoryDevice
from fs.block.writelog import LoggingDevice, PowerCut, PowerCuts, power_cuts
from fs.jbd2.recovery import recover
from tests.t3_fs.jbd2.journals import FORMS, History, area_of, new_device, work

JOURNAL_BLOCKS = 24


class Campaign:
    """One workload on one form of journal, and all its power cuts."""

    def __init__(self, form: str, seed: int, *, commits: int = 12, images_max: int = 4) -> None:
        self.name = f"{form}/{seed}"
        self._seed = seed
        self._before = new_device(form, JOURNAL_BLOCKS, started=seed % 2 == 0)
        rng = random.Random(seed)
        for _ in range(seed % 3):  # earlier lives, each ended by a power cut
            device = LoggingDevice(self._before.copy())
            work(device, JOURNAL_BLOCKS, rng, commits=rng.randrange(1, 8), images_max=images_max)
            cuts = [*power_cuts(device.epochs, rng, subset_writes_max=4, samples=10)]
            self._before = PowerCuts(self._before, device.epochs).state(rng.choice(cuts))
        self._device = LoggingDevice(self._before.copy())
        self.history: History = work(
            self._device, JOURNAL_BLOCKS, rng, commits=commits, images_max=images_max
        )
        self.writes = sum(len(epoch.writes) for epoch in self._device.epochs)

    def run(self, *, subset_writes_max: int = 10, samples: int = 200, again_every: int = 1) -> int:
        """Check all states, each `again_every`-th with cuts in recovery too; how many."""
        rng = random.Random(self._seed)
        epochs = self._device.epochs
        states = PowerCuts(self._before, epochs)
        count = 0
        for cut in power_cuts(epochs, rng, subset_writes_max=subset_writes_max, samples=samples):
            disk = states.state(cut)
            recovered = self._check(cut, disk.copy(), str(cut))
            count += 1
            if count % again_every == 0:
                count += self._cut_again(cut, disk, recovered, rng, min(subset_writes_max, 4))
        return count

    def replay(self, state: str) -> None:
        """Check one state by its id."""
        first, *second = state.split("/")
        cut = PowerCut.from_id(first)
        disk = PowerCuts(self._before, self._device.epochs).state(cut)
        if second:
            log = _recovery_log(disk)
            disk = PowerCuts(disk, log.epochs).state(PowerCut.from_id(second[0]))
        self._check(cut, disk, state)

    def _check(self, cut: PowerCut, disk: MemoryDevice, state: str) -> MemoryDevice:
        promised = max([0, *map(_number, self._device.epochs[cut.epoch].marks)])
        recover(area_of(disk, JOURNAL_BLOCKS))
        last = len(self.history.steps) - 1
        allowed = range(promised, min(promised + 1, last) + 1)
        fits = any(self.history.allows(step, disk) for step in allowed) or (
            self._is_data_write(promised, disk)
        )
        assert fits, f"{self.name}/{state}: not what was promised (step {promised})"
        again = recover(area_of(disk, JOURNAL_BLOCKS))
        assert again.transactions == 0, f"{self.name}/{state}: the log isn't empty"
        return disk

    def _is_data_write(self, step: int, disk: MemoryDevice) -> bool:
        """True when all is well but for a block whose contents were open, and which is torn."""
        steps = self.history.steps
        return step + 1 < len(steps) and all(
            expected is None or steps[step][block] is None or disk.contents[block] == expected
            for block, expected in steps[step + 1].items()
        )

    def _cut_again(
        self,
        cut: PowerCut,
        disk: MemoryDevice,
        recovered: MemoryDevice,
        rng: random.Random,
        subset_writes_max: int,
    ) -> int:
        log = _recovery_log(disk)
        states = PowerCuts(disk, log.epochs)
        count = 0
        for second in power_cuts(
            log.epochs, rng, subset_writes_max=subset_writes_max, samples=4, torn_each=1
        ):
            half = states.state(second)
            recover(area_of(half, JOURNAL_BLOCKS))
            assert half.contents == recovered.contents, (
                f"{self.name}/{cut}/{second}: recovery that was cut gives something else"
            )
            count += 1
        return count


def _recovery_log(disk: MemoryDevice) -> LoggingDevice:
    device = LoggingDevice(disk.copy())
    recover(area_of(device, JOURNAL_BLOCKS))
    return device


def _number(mark: object) -> int:
    assert isinstance(mark, int)
    return mark


def campaigns(seeds: int) -> Iterator[tuple[str, int]]:
    """Forms and seeds of the long form."""
    for seed in range(seeds):
        for form in FORMS:
            yield form, seed


def main() -> None:
    """Run the long form, or one state."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="workloads for each form")
    parser.add_argument("--state", help="check one state again: FORM/SEED/CUT[/CUT]")
    arguments = parser.parse_args()
    if arguments.state:
        form, seed, state = arguments.state.split("/", 2)
        Campaign(form, int(seed)).replay(state)
        print(f"{arguments.state}: holds")
        return
    total = 0
    for form, seed in campaigns(arguments.seeds):
        campaign = Campaign(form, seed)
        count = campaign.run()
        total += count
        print(f"{campaign.name}: {campaign.writes} writes, {count} states hold", flush=True)
    print(f"{total} states hold")


if __name__ == "__main__":
    main()
