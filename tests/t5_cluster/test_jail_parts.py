"""Each part of a jail by itself, in a child of the test's process."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import posix_ipc
import pytest

from guests.jail import GuestJail
from guests.kernel import GuestSpec
from hypervisor.jail import HypervisorJail
from ipc.errors import ExitCode, OperatorError
from ipc.jail import JailSpec, check_strict, landlock, limits, seccomp
from ipc.jail.cgroup import MemoryGroups, enter, remove
from ipc.jail.landlock import Access, Rule
from ipc.jail.seccomp import Argument, Call
from ipc.jail.syscalls import call
from tests.support.children import in_child
from tests.support.jailprobe import outcome

landlocked = pytest.mark.skipif(landlock.level() == 0, reason="this kernel has no Landlock")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives user ids")
NOBODY = 0x7FFF_FF00
READ_WRITE = Access.READ_FILE | Access.WRITE_FILE
PLAIN = "read write close fstat newfstatat lseek mmap munmap brk futex exit_group rt_sigaction"
"""What Python needs to say how it went."""


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A folder inside and one outside, with a file each."""
    made = tmp_path / "inside", tmp_path / "outside"
    for folder in made:
        folder.mkdir()
        (folder / "file").write_text("text")
    return made


def _plain() -> list[Call]:
    return [Call(name, "of this test") for name in PLAIN.split()]


# --- before it is shut


def test_what_a_disk_makes_a_guest_do_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    """It is mounted before the jail is shut."""
    image = tmp_path / "image"
    image.touch()
    spec = GuestSpec("red", image, 1 << 20, tmp_path, jail=JailSpec("auto"))

    def work() -> tuple[str, str]:
        GuestJail(spec).step_down()
        taken = [outcome(partial(mmap.mmap, -1, mib << 20)) for mib in (64, 512)]
        return taken[0], taken[1]

    assert in_child(work) == ("done", "ENOMEM")


# --- Landlock


@landlocked
def test_landlock_refuses_what_no_rule_allows(places: tuple[Path, Path]) -> None:
    """Reading, writing, cutting, making, removing, listing, linking and executing."""
    inside, outside = places
    held = os.open(outside / "file", os.O_RDONLY)
    every = landlock.handled(landlock.level())

    def work() -> dict[str, str]:
        limits.no_new_privileges()
        landlock.enter([Rule(inside, every & ~(Access.EXECUTE | Access.MAKE_SYM))])
        return {
            "inside": outcome((inside / "new").touch),
            "inside list": outcome(lambda: list(inside.iterdir())),
            "kept open": outcome(lambda: os.read(held, 1)),
            "read": outcome((outside / "file").read_text),
            "write": outcome(lambda: os.open(outside / "file", os.O_WRONLY)),
            "truncate": outcome(lambda: os.truncate(outside / "file", 0)),
            "make": outcome((outside / "new").touch),
            "remove": outcome((outside / "file").unlink),
            "list": outcome(lambda: list(outside.iterdir())),
            "link": outcome(lambda: os.link(inside / "file", outside / "link")),
            "move": outcome(lambda: (inside / "file").rename(outside / "moved")),
            "symlink": outcome(lambda: (inside / "symlink").symlink_to("/etc/passwd")),
            "listen": outcome(lambda: _listen(str(outside / "socket"))),
            "execute": outcome(lambda: os.execv("/bin/true", ["true"])),
        }

    try:
        got = in_child(work)
    finally:
        os.close(held)
    allowed = {"inside", "inside list", "kept open"}
    across = {"link", "move"} if landlock.level() < 2 else set()
    later = {"truncate"} if landlock.level() < 3 else set()
    assert {name for name, how in got.items() if how == "done"} - later == allowed
    assert {how for name, how in got.items() if name not in allowed | across | later} == {"EACCES"}


def _listen(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)


@landlocked
def test_a_rule_for_a_file_is_for_that_file(places: tuple[Path, Path]) -> None:
    """Not for its neighbours; one that is not there needs none."""
    inside, _ = places
    (inside / "neighbour").write_text("text")

    def work() -> list[str]:
        limits.no_new_privileges()
        landlock.enter([Rule(inside / "file", READ_WRITE), Rule(inside / "absent", READ_WRITE)])
        return [
            outcome((inside / "file").read_text),
            outcome((inside / "neighbour").read_text),
        ]

    assert in_child(work) == ["done", "EACCES"]


@landlocked
def test_queues_take_a_rule() -> None:
    """mq_open(3) goes by no path, and is refused all the same."""
    queues = landlock.open_queues()
    if queues is None:
        pytest.skip("no /dev/mqueue, and only root can do without")

    def work(rules: list[Rule]) -> str:
        limits.no_new_privileges()
        landlock.enter(rules)
        return outcome(_use_queue)

    try:
        assert in_child(lambda: work([])) == "EACCES"
        assert in_child(lambda: work([Rule(queues, READ_WRITE)])) == "done"
    finally:
        os.close(queues)


def _use_queue() -> None:
    queue = posix_ipc.MessageQueue(None, posix_ipc.O_CREX, max_messages=1, max_message_size=8)
    queue.unlink()
    queue.close()


@pytest.mark.skipif(landlock.level() < 6, reason="Linux 6.12")
@pytest.mark.parametrize("signals_out", [False, True])
def test_landlock_holds_signals_and_sockets(signals_out: bool) -> None:
    """Level 4 TCP, level 6 signals and abstract sockets."""
    parent = os.getpid()
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind("\0tmem-test-jail-parts")
        abstract.listen()

        def work() -> list[str]:
            limits.no_new_privileges()
            landlock.enter([], signals_out=signals_out)
            return [
                outcome(lambda: os.kill(parent, 0)),
                outcome(lambda: os.kill(os.getpid(), 0)),
                outcome(lambda: _connect(socket.AF_INET, tcp.getsockname())),
                outcome(lambda: _connect(socket.AF_UNIX, abstract.getsockname())),
            ]

        assert in_child(work) == ["done" if signals_out else "EPERM", "done", "EACCES", "EPERM"]


def _connect(family: int, address: object) -> None:
    with socket.socket(family) as connection:
        connection.connect(address)  # type: ignore[arg-type]


@landlocked
def test_nobody_outside_can_be_looked_into() -> None:
    """Not even by root: memory, environment and descriptors of the parent.

    CAP_PERFMON alone would open the environment (Linux 6.18), so capabilities go first.
    """
    parent = os.getpid()

    def work() -> list[str]:
        limits.keep_capabilities()
        limits.no_new_privileges()
        landlock.enter([Rule(Path("/proc"), Access.READ_FILE | Access.READ_DIR)])
        return [
            outcome(Path(f"/proc/{parent}/stat").read_text),
            outcome(lambda: os.open(f"/proc/{parent}/mem", os.O_RDONLY)),
            outcome(Path(f"/proc/{parent}/environ").read_bytes),
            outcome(Path(f"/proc/{parent}/fd/0").readlink),
            outcome(lambda: call("ptrace", 0x4206, parent, 0, 0)),
        ]

    got = in_child(work)
    assert got[0] == "done"
    assert set(got[1:]) <= {"EACCES", "EPERM"}


@pytest.mark.parametrize("level", range(12))
def test_no_kernel_is_asked_for_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    """A right of a later level is EINVAL, and then there would be no jail at all."""
    asked: list[tuple[int, int, int, int]] = []

    def pretend(name: str, *arguments: object) -> int:
        if name == "landlock_create_ruleset":
            shape, size = arguments[0], arguments[1]
            if shape is None:
                return level
            ruleset = shape.contents  # type: ignore[attr-defined]
            rights = ruleset.handled_access_fs, ruleset.handled_access_net, ruleset.scoped
            assert isinstance(size, int)
            asked.append((*rights, size))
            return os.open("/dev/null", os.O_RDONLY)
        return 0

    monkeypatch.setattr(landlock, "call", pretend)
    missing = landlock.enter([])

    if level == 0:
        assert missing is not None
        assert asked == []
        return
    ((files, net, scoped, size),) = asked
    bits = [13, 14, 15, 15, 16, 16, 16, 16, 17]
    assert files == (1 << bits[min(level, 9) - 1]) - 1
    assert net == (3 if level >= 4 else 0)
    assert scoped == (3 if level >= 6 else 0)
    assert size == (8 if level < 4 else 16 if level < 6 else 24)


# --- the filter


def test_a_filter_refuses_and_lets_through() -> None:
    """Conditions on arguments, and what is not on the list."""
    reading = Call("openat", "of this test", (Argument(2, os.O_ACCMODE | os.O_CREAT, os.O_RDONLY),))

    def work() -> list[str]:
        limits.no_new_privileges()
        assert seccomp.enter([*_plain(), reading]) is None
        return [
            outcome(lambda: os.close(os.open("/dev/null", os.O_RDONLY))),
            outcome(lambda: os.close(os.open("/dev/null", os.O_WRONLY))),
            outcome(os.fork),
            outcome(lambda: os.kill(os.getpid(), 0)),
        ]

    assert in_child(work) == ["done", "EPERM", "EPERM", "EPERM"]


def test_a_filter_needs_no_privilege_and_no_new_ones() -> None:
    """Without no-new-privileges only an administrator may set one (EACCES)."""

    def work() -> str:
        limits.keep_capabilities()
        return outcome(lambda: seccomp.enter(_plain()))

    assert in_child(work) == "EACCES"


# --- ids and limits


@as_root
def test_another_user_without_any_right() -> None:
    """Ids, groups and capabilities are gone and don't come back."""

    def work() -> list[object]:
        limits.become(NOBODY, NOBODY)
        limits.no_new_privileges()
        return [
            os.getresuid(),
            os.getresgid(),
            os.getgroups(),
            limits.capabilities_of(),
            outcome(lambda: os.setresuid(0, 0, 0)),
            outcome(lambda: os.open("/etc/shadow", os.O_RDONLY)),
            outcome(lambda: os.kill(1, 0)),
        ]

    ids = (NOBODY,) * 3
    assert in_child(work) == [ids, ids, [], 0, "EPERM", "EACCES", "EPERM"]


@as_root
def test_what_is_kept_of_root() -> None:
    """A hypervisor can give files away and do nothing else that root can."""

    def work() -> list[object]:
        limits.keep_capabilities(frozenset({limits.Capability.CHOWN}))
        return [limits.capabilities_of(), outcome(lambda: os.chroot("/"))]

    assert in_child(work) == [1, "EPERM"]


@as_root
def test_nodes_may_signal_one_another_by_their_real_user() -> None:
    """And nobody who has not that user."""
    ready, told = os.pipe()
    victim = os.fork()
    if victim == 0:
        limits.become(NOBODY, NOBODY, real=NOBODY + 9)
        os.write(told, b".")
        signal.pause()
    try:
        os.read(ready, 1)

        def work(real: int) -> str:
            limits.become(NOBODY + 1, NOBODY, real=real)
            return outcome(lambda: os.kill(victim, 0))

        assert in_child(lambda: work(NOBODY + 9)) == "done"
        assert in_child(lambda: work(NOBODY + 1)) == "EPERM"
    finally:
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        os.close(ready)
        os.close(told)


def test_not_dumpable_is_untouchable_for_its_like() -> None:
    """Neither traced nor read by another process of the same user."""

    def work() -> bool:
        limits.forbid_dump()
        return limits.is_dumpable()

    assert in_child(limits.is_dumpable)
    assert not in_child(work)


def test_sizes_have_bounds() -> None:
    """Memory, a file's length, descriptors; a bound that is lower already stays."""

    def work() -> list[object]:
        limits.limit(
            {
                resource.RLIMIT_AS: limits.mapped_bytes() + (64 << 20),
                resource.RLIMIT_NOFILE: 64,
                resource.RLIMIT_CORE: 0,
            }
        )
        limits.limit({resource.RLIMIT_NOFILE: 4096})
        return [
            outcome(lambda: bytearray(32 << 20)),
            outcome(lambda: bytearray(256 << 20)),
            resource.getrlimit(resource.RLIMIT_NOFILE),
        ]

    assert in_child(work) == ["done", "ENOMEM", (64, 64)]


# --- control groups


@pytest.fixture
def hierarchy(tmp_path: Path) -> Callable[..., MemoryGroups]:
    """A hierarchy of version 2 out of plain files, and what is written about it."""
    root = tmp_path / "cgroup"
    own = root / "user.slice"
    own.mkdir(parents=True)
    mounts = tmp_path / "mounts"
    membership = tmp_path / "membership"

    def make(
        controllers: str = "cpu memory", handed_down: str = "memory", kind: str = "cgroup2"
    ) -> MemoryGroups:
        mounts.write_text(f"none / ext4 rw 0 0\ncgroup {root} {kind} rw 0 0\n")
        membership.write_text("4:memory:/x\n0::/user.slice\n")
        (own / "cgroup.controllers").write_text(controllers)
        (own / "cgroup.subtree_control").write_text(handed_down)
        return MemoryGroups(mounts, membership)

    return make


def test_a_memory_group_is_made_below_ones_own(hierarchy: Callable[..., MemoryGroups]) -> None:
    """Its limit is written, and whoever enters is in it."""
    groups = hierarchy()

    group = groups.make("web-red", 64 << 20)

    assert groups.missing is None
    assert group is not None
    assert group.name == "tmem-web-red"
    assert group.parent.name == "user.slice"
    assert (group / "memory.max").read_text() == str(64 << 20)
    enter(group)
    assert (group / "cgroup.procs").read_text() == "0"
    assert not remove(group), "a group with something in it"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"kind": "cgroup"}, "no hierarchy of version 2"),
        ({"controllers": "cpu"}, "no memory controller"),
        ({"handed_down": "cpu"}, "does not hand its memory controller down"),
    ],
)
def test_no_memory_group_is_explained(
    hierarchy: Callable[..., MemoryGroups], fields: dict[str, str], why: str
) -> None:
    """What is not there is named, and no group is made."""
    groups = hierarchy(**fields)

    assert groups.missing is not None
    assert why in groups.missing
    assert groups.make("web-red", 1 << 20) is None


# --- strictness


def test_strict_wants_all_of_it() -> None:
    """One line, and the exit code of a machine that can't."""
    check_strict([])
    with pytest.raises(OperatorError, match="no Landlock; no filter; use jail auto") as refusal:
        check_strict(["Landlock", "filter"])
    assert refusal.value.exit_code == ExitCode.UNAVAILABLE


# --- the hypervisor's policy


@landlocked
def test_hypervisors_policy_leaves_it_its_run_directory(places: tuple[Path, Path]) -> None:
    """Nothing else can be opened; sockets, children and programs neither."""
    run_directory, outside = places
    segment = posix_ipc.SharedMemory(None, posix_ipc.O_CREX, size=4096)
    try:

        def work() -> dict[str, str]:
            jail = HypervisorJail(JailSpec("auto"), run_directory)
            jail.shut()
            jail.filter()
            return {
                "settings": outcome(lambda: (run_directory / "settings").write_text("x")),
                "queues": outcome(_use_queue),
                "start of a guest": outcome(Path(f"/proc/{os.getppid()}/stat").read_text),
                "read": outcome((outside / "file").read_text),
                "write": outcome(lambda: os.open(outside / "file", os.O_WRONLY)),
                "shadow": outcome(Path("/etc/shadow").read_text),
                "modules": outcome(Path(os.__file__).read_text),
                "segment": outcome(lambda: posix_ipc.SharedMemory(segment.name)),
                "segments": outcome(lambda: os.listdir("/dev/shm")),
                "memory": outcome(lambda: os.open(f"/proc/{os.getppid()}/mem", os.O_RDONLY)),
                "socket": outcome(lambda: socket.socket(socket.AF_INET)),
                "signal": outcome(lambda: os.kill(os.getppid(), 0)),
                "fork": outcome(os.fork),
                "execute": outcome(lambda: os.execv("/bin/true", ["true"])),
            }

        got = in_child(work)
    finally:
        segment.unlink()
        segment.close_fd()
    allowed = {"settings", "queues", "start of a guest"}
    assert {name for name, how in got.items() if how == "done"} == allowed
    refused = {how for name, how in got.items() if name not in allowed}
    assert refused <= {errno.errorcode[code] for code in (errno.EACCES, errno.EPERM)}
