"""Random file operations of a guest against a plain dictionary of bytes.

The hypervisor evicts, dies before or after any call, stays away, and comes back with or without its
memory.  Whatever it does, every read is right, the page budget is kept, and the image is clean.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guests.kernel import Kernel
from ipc.local import Fault
from tests.t4_guest.worlds import (
    PAGE,
    LocalHypervisor,
    Time,
    assert_clean,
    check_pages,
    make_image,
    read_file,
    running_kernel,
    write_file,
)

NAMES = [f"/f{number}" for number in range(8)]
FILE_BYTES_MAX = 60 * PAGE


class World:
    """One kernel, one hypervisor, and what each file should hold."""

    def __init__(self, kernel: Kernel, hypervisor: LocalHypervisor, time: Time, seed: int) -> None:
        self.kernel = kernel
        self.hypervisor = hypervisor
        self.time = time
        self.random = random.Random(seed)
        self.files: dict[str, bytearray] = {}
        self.trouble = 0.0
        hypervisor.draw_fault = self.draw_fault

    def draw_fault(self) -> Fault:
        if self.random.random() >= self.trouble:
            return Fault.NONE
        return self.random.choice((Fault.LOSE_REQUEST, Fault.LOSE_REPLY))

    def step(self) -> None:
        rng = self.random
        self.time.seconds += rng.choice((0.0, 0.0, 0.1, 0.6))
        name = rng.choice(NAMES)
        choice = rng.random()
        if choice < 0.04:
            self.disturb()
        elif name not in self.files:
            self.create(name)
        elif choice < 0.50:
            self.read(name)
        elif choice < 0.72:
            self.write(name)
        elif choice < 0.82:
            self.truncate(name)
        elif choice < 0.88:
            self.remove(name)
        elif choice < 0.92:
            target = rng.choice(NAMES)
            if target != name:
                self.kernel.vfs.rename(name, target)
                self.files[target] = self.files.pop(name)
        elif choice < 0.97:
            handle = self.kernel.vfs.open(name)
            self.kernel.vfs.fsync(handle)
            self.kernel.vfs.close(handle)
        else:
            self.kernel.vfs.sync()

    def disturb(self) -> None:
        choice = self.random.random()
        if choice < 0.4:
            self.hypervisor.kill(arena_lost=self.random.random() < 0.3)
        elif choice < 0.8:
            self.hypervisor.start()
        else:
            self.trouble = self.random.choice((0.0, 0.0, 0.02, 0.3))

    def span(self, size: int) -> tuple[int, int]:
        """Where and how much: often at pages' borders."""
        rng = self.random
        offset = rng.randrange(FILE_BYTES_MAX)
        if rng.random() < 0.4:
            offset -= offset % PAGE
        if size and rng.random() < 0.5:
            offset = min(offset, size)
        return offset, rng.choice((1, 100, PAGE, 3 * PAGE, rng.randrange(1, 20 * PAGE)))

    def create(self, name: str) -> None:
        data = self.random.randbytes(self.random.choice((0, 10, PAGE, 30 * PAGE, 55 * PAGE)))
        write_file(self.kernel, name, data)
        self.files[name] = bytearray(data)

    def read(self, name: str) -> None:
        content = self.files[name]
        offset, size = self.span(len(content))
        if self.random.random() < 0.3:
            offset, size = 0, FILE_BYTES_MAX * 2
        assert read_file(self.kernel, name, offset, size) == content[offset : offset + size]

    def write(self, name: str) -> None:
        content = self.files[name]
        offset, size = self.span(len(content))
        data = self.random.randbytes(size)
        handle = self.kernel.vfs.open(name, 2)
        assert self.kernel.vfs.pwrite(handle, data, offset) == size
        self.kernel.vfs.close(handle)
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + size] = data

    def truncate(self, name: str) -> None:
        content = self.files[name]
        size, _ = self.span(len(content))
        self.kernel.vfs.truncate(name, size)
        content.extend(bytes(max(0, size - len(content))))
        del content[size:]

    def remove(self, name: str) -> None:
        """Sometimes while it is open: its content lives until the last close."""
        content = self.files.pop(name)
        handle = self.kernel.vfs.open(name)
        self.kernel.vfs.unlink(name)
        if self.random.random() < 0.5:
            assert self.kernel.vfs.pread(handle, FILE_BYTES_MAX * 2, 0) == content
        self.kernel.vfs.close(handle)

    def check_all(self) -> None:
        for name, content in self.files.items():
            assert read_file(self.kernel, name) == content


@settings(
    max_examples=30,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32), steps=st.integers(30, 200))
def test_every_read_is_right_whatever_the_hypervisor_does(
    tmp_path_factory: pytest.TempPathFactory,
    expect_warning: Callable[[str], None],
    seed: int,
    steps: int,
) -> None:
    """A failure prints the seed that replays it."""
    expect_warning("(tmem|cleancache) event=(disconnected|not-attached)")
    image = make_image(tmp_path_factory.mktemp("model") / "image", mib=4)
    play(image, seed, steps)


def play(image: Path, seed: int, steps: int) -> None:
    """Run one random history."""
    time = Time()
    hypervisor = LocalHypervisor(512 * 1024)
    with running_kernel(image, hypervisor, time=time) as kernel:
        world = World(kernel, hypervisor, time, seed)
        for _ in range(steps):
            world.step()
            check_pages(kernel.pages)
        world.check_all()
        world.trouble = 0.0
        hypervisor.start()
        world.time.seconds += 10
        world.check_all()
        hypervisor.check()
    assert_clean(image)
    with running_kernel(image) as kernel:
        world.kernel = kernel
        world.check_all()
