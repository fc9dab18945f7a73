"""RAM that is lent to a guest out of the memory that tmem uses."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from guests.attachment import RETRY_SECONDS
from guests.hostmemory import ASK_AGAIN_SECONDS
from guests.hypercall import Hypercalls
from guests.kernel import Kernel
from guests.process import ProcessKilled
from hypervisor.arena import layout
from ipc.abi import REQUEST, Op, oid_from_int
from ipc.channel import Channel
from ipc.errors import ExitCode, OperatorError
from ipc.local import Fault, LocalChannel
from ipc.window import Window
from tests.t4_guest.test_processes import swap_file
from tests.t4_guest.worlds import (
    PAGE,
    SMALL_MEMORY_BYTES,
    LocalHypervisor,
    Time,
    assert_clean,
    check_pages,
    check_programs,
    read_file,
    running_kernel,
    write_file,
)

SMALL = SMALL_MEMORY_BYTES // PAGE
MEMORY_BYTES = 400 * PAGE


class Host(LocalHypervisor):
    """A hypervisor that lends, of so many frames, and another guest on it.

    Whenever the guest speaks of its RAM it was lent as much as it has, or gets there: `short` says
    that the memory of the hypervisor was lost.
    """

    def __init__(self, frames: int) -> None:
        super().__init__(layout(frames).end, lends=True)
        self.kernel: Kernel | None = None
        self.short = False
        self.asked: list[int] = []
        """The sizes that the guest has asked for."""

    def _execute(self, request: bytes, window: Window) -> bytes:
        reply = super()._execute(request, window)
        _, op, _, _, _, pages, *_ = REQUEST.unpack(request)
        if op == Op.LEND:
            self.asked.append(pages)
            if self.kernel is not None and not self.short:
                assert self.lent >= min(size(self.kernel), pages)
        return reply

    @property
    def lent(self) -> int:
        """Pages that the guest was lent."""
        return len(self.machine.clients["guest"].lent)

    @property
    def free(self) -> int:
        """Frames that nobody has."""
        return self.machine.store.frames.free

    def other(self) -> Hypercalls:
        """Another guest, with a pool of each kind: 0 ephemeral, 1 persistent."""
        client = self.machine.attach("other", 2, 2, 0)
        assert client is not None
        calls = Hypercalls(LocalChannel(lambda call, w: self.machine.execute(client, call, w)))
        for persist in (False, True):
            calls.new_pool(persist=persist)
        return calls


def fill(calls: Hypercalls, pool: int, number: int, pages: int) -> int:
    """Put so many pages that don't shrink; how many were taken."""
    content = random.Random(number).randbytes(PAGE)
    taken = 0
    for index in range(pages):
        calls.channel.window.slot(0)[:] = content
        taken += calls.put(pool, oid_from_int(number), index, 1).map
    return taken


def size(kernel: Kernel) -> int:
    """What the guest has."""
    return kernel.userland.balloon.size_pages


def aim(kernel: Kernel, pages: int) -> None:
    """As self-ballooning does."""
    kernel.userland._set_own_target(pages)


def settle(kernel: Kernel, time: Time, rounds: int = 12) -> None:
    """Time goes by."""
    for _ in range(rounds):
        time.seconds += ASK_AGAIN_SECONDS
        kernel.idle()


def test_a_guest_has_what_it_was_lent(image: Path) -> None:
    """From the start, and gives it back when it ends."""
    host = Host(1000)
    with running_kernel(image, host, memory_bytes=MEMORY_BYTES) as kernel:
        assert host.lent == size(kernel) == 400
        assert host.free == 600
        assert kernel.counters()["balloon"]["lent_pages"] == 400
    host.machine.depart(host.machine.clients["guest"])
    host.machine.store.reap()
    assert host.free == 1000


def test_large_guests_need_several_calls(image: Path) -> None:
    """One call does a bounded amount of work."""
    host = Host(4000)
    with running_kernel(image, host, memory_bytes=3000 * PAGE) as kernel:
        assert host.lent == size(kernel) == 3000
        assert host.asked == [3000] * 3


def test_what_one_gives_back_another_puts_into(image: Path, tmp_path: Path) -> None:
    """And the other way round: ephemeral pages go for RAM, persistent ones don't."""
    time, host = Time(), Host(500)
    other = host.other()
    with running_kernel(
        image, host, time=time, memory_bytes=MEMORY_BYTES, swap=swap_file(tmp_path)
    ) as kernel:
        host.kernel = kernel
        process = kernel.userland.processes.spawn("program")
        content = random.Random(1).randbytes(150 * PAGE)
        address = process.map(len(content))
        process.write(address, content)
        assert host.lent == 400
        assert fill(other, 0, 1, 300) == 300
        assert other.get(0, oid_from_int(1), 0, 1).map == 0, "it went for a younger one"

        aim(kernel, 250)
        settle(kernel, time)
        assert host.lent == size(kernel) == 250
        assert fill(other, 0, 2, 230) == 230
        assert fill(other, 1, 3, 100) == 100
        held = host.machine.clients["other"].pages(persistent=False)
        assert held > 100

        aim(kernel, 1000)
        settle(kernel, time, 40)
        assert host.lent == size(kernel)
        assert size(kernel) == 400 - kernel.counters()["frontswap"]["curr_pages"] > 300
        assert host.machine.clients["other"].pages(persistent=False) < held
        assert other.get(1, oid_from_int(3), 0, 64).map.bit_count() == 64
        assert process.read(address, len(content)) == content
        check_programs(kernel)
        check_pages(kernel.pages)
        host.check()


def test_a_guest_starts_smaller_and_grows_when_there_is_room(image: Path) -> None:
    """With less than its size; it asks now and then, and not all the time."""
    time, host = Time(), Host(400)
    other = host.other()
    assert fill(other, 1, 1, 150) == 150
    with running_kernel(image, host, time=time, memory_bytes=MEMORY_BYTES) as kernel:
        host.kernel = kernel
        assert host.lent == size(kernel) == 250
        assert (
            kernel.memory.free_pages + kernel.memory.given_back_pages == kernel.memory.budget.frames
        )
        write_file(kernel, "/f", b"f" * 300 * PAGE)
        assert read_file(kernel, "/f") == b"f" * 300 * PAGE
        asked = len(host.asked)
        for _ in range(50):
            time.seconds += ASK_AGAIN_SECONDS / 50
            kernel.idle()
        assert len(host.asked) <= asked + 3

        other.flush_object(1, oid_from_int(1))
        settle(kernel, time)
        assert host.lent == size(kernel) == 400
        assert read_file(kernel, "/f") == b"f" * 300 * PAGE
        host.check()


def test_a_guest_that_can_not_have_its_floor_does_not_start(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line and an exit code; nothing stays lent, and the image is clean."""
    host = Host(300)
    assert fill(host.other(), 1, 1, 140) == 140
    channels: list[Channel] = []
    connect = host.connect

    def noted() -> Channel:
        channels.append(connect())
        return channels[-1]

    monkeypatch.setattr(host, "connect", noted)
    with (
        pytest.raises(OperatorError, match="the host can lend 655360 bytes") as refusal,
        running_kernel(image, host, memory_bytes=MEMORY_BYTES),
    ):
        pass
    assert refusal.value.exit_code is ExitCode.UNAVAILABLE
    assert "\n" not in str(refusal.value)
    assert_clean(image)
    (channel,) = channels
    assert channel.hypervisor_is_gone(), "it has said good-bye"


def test_without_a_hypervisor_a_guest_shrinks_and_does_not_grow(
    image: Path, expect_warning: Callable[[str], None]
) -> None:
    """What happened meanwhile is told when it is back."""
    expect_warning("event=(disconnected|not-attached)")
    time, host = Time(), Host(600)
    with running_kernel(image, host, time=time, memory_bytes=MEMORY_BYTES) as kernel:
        host.kernel = kernel
        kernel.idle()
        host.kill()
        aim(kernel, 300)
        assert kernel.userland.balloon.step() > 0
        assert kernel.attachment is not None
        assert kernel.attachment.calls is None, "nobody else need find out"
        settle(kernel, time)
        assert size(kernel) == 300
        aim(kernel, 350)
        settle(kernel, time)
        assert size(kernel) == 300
        aim(kernel, 320)

        host.start()
        asked = len(host.asked)
        settle(kernel, time, 40)
        assert host.asked[asked] == 300
        assert host.lent == size(kernel) == 320
        host.check()


def test_frames_that_were_free_a_moment_ago_can_be_used_all_the_same(
    image: Path, tmp_path: Path, expect_warning: Callable[[str], None]
) -> None:
    """A read has made sure of frames, asks tmem, attaches to a hypervisor without memory, and gives
    its free frames back: it takes them again."""
    expect_warning("event=(disconnected|not-attached)")
    content = random.Random(1).randbytes(32 * PAGE)
    with running_kernel(image) as kernel:
        write_file(kernel, "/f", content)
    time, host = Time(), Host(450)
    with running_kernel(
        image, host, time=time, memory_bytes=MEMORY_BYTES, swap=swap_file(tmp_path)
    ) as kernel:
        process = kernel.userland.processes.spawn("program")
        pages = kernel.memory.budget.frames - 40
        address = process.map(pages * PAGE)
        process.write(address, b"p" * pages * PAGE)
        host.kernel, host.short = kernel, True
        host.kill(arena_lost=True)
        host.start()
        rival = host.other
        connect = host.connect

        def after_a_rival() -> LocalChannel:
            channel = connect()
            assert fill(rival(), 1, 1, 200) == 200
            assert isinstance(channel, LocalChannel)
            return channel

        attachment = kernel.attachment
        assert attachment is not None
        assert attachment.calls is not None
        attachment._connect = after_a_rival
        attachment.lose(attachment.calls)
        time.seconds += RETRY_SECONDS
        assert read_file(kernel, "/f") == content
        assert host.lent < size(kernel)
        check_pages(kernel.pages)
        check_programs(kernel)


def test_a_hypervisor_that_lost_its_memory_has_less_to_lend(
    image: Path, tmp_path: Path, expect_warning: Callable[[str], None]
) -> None:
    """The guest shrinks to what it is lent, kills nobody, and is its old self when it can be."""
    expect_warning("event=(disconnected|not-attached)")
    time, host = Time(), Host(450)
    with running_kernel(
        image, host, time=time, memory_bytes=MEMORY_BYTES, swap=swap_file(tmp_path)
    ) as kernel:
        host.kernel, host.short = kernel, True
        process = kernel.userland.processes.spawn("program")
        content = random.Random(1).randbytes(250 * PAGE)
        address = process.map(len(content))
        process.write(address, content)
        host.kill(arena_lost=True)
        host.start()
        rival: list[Hypercalls] = []
        connect = host.connect

        def after_a_rival() -> LocalChannel:
            channel = connect()
            if not rival:
                rival.append(host.other())
                assert fill(rival[0], 1, 1, 200) == 200
            assert isinstance(channel, LocalChannel)
            return channel

        attachment = kernel.attachment
        assert attachment is not None
        assert attachment.calls is not None
        attachment._connect = after_a_rival
        attachment.lose(attachment.calls)
        settle(kernel, time, 40)
        assert host.lent == size(kernel) == 250
        assert process.read(address, len(content)) == content
        assert not kernel.userland.processes.kills
        rival[0].flush_object(1, oid_from_int(1))
        settle(kernel, time, 40)
        assert host.lent == size(kernel) == 400
        assert process.read(address, len(content)) == content
        check_programs(kernel)
        host.check()


def test_a_hypervisor_that_does_not_lend_leaves_a_guest_its_ram(
    image: Path, hypervisor: LocalHypervisor, expect_warning: Callable[[str], None]
) -> None:
    """It asks once an attachment, and grows with or without a hypervisor."""
    expect_warning("event=(disconnected|not-attached)")
    time = Time()
    with running_kernel(image, hypervisor, time=time) as kernel:
        calls = hypervisor.machine.clients["guest"].account.operations[Op.LEND]
        aim(kernel, SMALL - 2)
        settle(kernel, time)
        assert size(kernel) == SMALL - 2
        hypervisor.kill()
        aim(kernel, SMALL)
        settle(kernel, time)
        assert size(kernel) == SMALL
        assert kernel.counters()["balloon"]["lent_pages"] == 0
        assert calls.calls == 1


def test_a_random_history_with_a_hypervisor_that_dies(
    image: Path, tmp_path: Path, expect_warning: Callable[[str], None]
) -> None:
    """Requests and replies are lost at any call; what is lent is what the guest has, whenever both
    are there, and every byte is right."""
    expect_warning("event=(killed|disconnected|not-attached|no-pool|refused|lost)")
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    time, host = Time(), Host(520)
    other = host.other()
    trouble = [0.0]
    due = [True]
    """One fault at least, however the dice fall."""

    def fault() -> Fault:
        lost = rng.random() < trouble[0] or bool(trouble[0] and due)
        due[:] = due if not lost else []
        return rng.choice((Fault.LOSE_REQUEST, Fault.LOSE_REPLY)) if lost else Fault.NONE

    host.draw_fault = fault
    with running_kernel(
        image,
        host,
        time=time,
        memory_bytes=MEMORY_BYTES,
        swap=swap_file(tmp_path, 600),
        sleep=time.sleep,
    ) as kernel:
        host.kernel = kernel
        process = kernel.userland.processes.spawn("program")
        content = bytearray(220 * PAGE)
        address = process.map(len(content))
        for step in range(300):
            trouble[0] = 0.03 if step // 40 % 2 else 0.0
            choice = rng.randrange(6)
            start = rng.randrange(200) * PAGE
            if choice == 0:
                aim(kernel, rng.randrange(SMALL, 420))
            elif choice == 1:
                data = rng.randbytes(12 * PAGE)
                process.write(address + start, data)
                content[start : start + len(data)] = data
            elif choice == 2:
                assert process.read(address + start, 8 * PAGE) == content[start : start + 8 * PAGE]
            elif choice == 3 and host.is_up:
                other = host.other() if "other" not in host.machine.clients else other
                number = rng.randrange(4)
                if rng.randrange(2):
                    fill(other_calls(host), number & 1, number, rng.randrange(60))
                else:
                    other_calls(host).flush_object(number & 1, oid_from_int(number))
            time.seconds += rng.choice((0.0, ASK_AGAIN_SECONDS, RETRY_SECONDS))
            kernel.idle()
            if not step % 20:
                check_programs(kernel)
                host.check()
        trouble[0] = 0.0
        aim(kernel, 300)
        settle(kernel, time, 40)
        assert host.lent == size(kernel) <= 300
        try:
            assert process.read(address, len(content)) == content
        except ProcessKilled:
            pytest.fail("no memory was lost, and swap is large enough")
        host.check()


def other_calls(host: Host) -> Hypercalls:
    """The other guest's calls, whichever life the hypervisor is in."""
    client = host.machine.clients["other"]
    machine = host.machine
    return Hypercalls(LocalChannel(lambda call, window: machine.execute(client, call, window)))
