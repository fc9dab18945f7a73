"""An adversary that tries what a jail is there to refuse, and reports how each attempt ended.

`report` maps the name of an attempt to `done`, or to the name of the errno.  None of them does harm
where it succeeds: signals are signal 0, what is made is removed, a child ends at once.

With `sibling_door` it only knocks there.  As a node (parameter `node` 1) it tries what only a node
may, on whom it may not, and last of all on its sibling, another node of its volume, which ends by
it.

Parameters: `sibling` and `hypervisor` (process ids), `image` (of the sibling), `folder` (the run
directory), `segment` and `queue` (names of somebody's), `port` (of a listener on 127.0.0.1).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import posix_ipc

from guests.adversary import Cell
from ipc.jail.syscalls import call

_MIB = 2**20
_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207
_PTRACE_DETACH = 17
_WALL = 0x4000_0000
_KEYCTL_GET_KEYRING_ID = 0
_FALLOC_KEEP_SIZE = 1


def run(cell: Cell) -> Iterator[None]:
    """All attempts, in one step each."""
    sibling_door = cell.text("sibling_door", "")
    attempts = (
        {"knock at a node": lambda: _connect(socket.AF_UNIX, socket.SOCK_SEQPACKET, sibling_door)}
        if sibling_door
        else of_node(cell)
        if cell.count("node", 0, 0, 1)
        else {
            **files(cell),
            **processes(cell),
            **sockets(cell),
            **privileges(cell),
            **sizes(cell),
        }
    )
    for name, attempt in attempts.items():
        cell.report[name] = outcome(attempt)
        yield
    cell.report["uid"] = os.geteuid()
    cell.report["real_uid"] = os.getuid()
    cell.job.done = len(attempts)


def of_node(cell: Cell) -> dict[str, Callable[[], object]]:
    """Fencing, and what comes with it."""
    hypervisor, stranger, sibling = (
        cell.count(who, 0, 1, 2**22) for who in ("hypervisor", "stranger", "sibling")
    )
    return {
        "read /etc/shadow": lambda: _open("/etc/shadow"),
        "ask the administrator's socket": lambda: _connect(
            socket.AF_UNIX, socket.SOCK_STREAM, "control.sock"
        ),
        "read what everybody may": lambda: _open("/etc/passwd"),
        "write into /proc": lambda: _open("/proc/sys/kernel/core_pattern", os.O_WRONLY),
        "read the stranger's stat": lambda: _open(f"/proc/{stranger}/stat"),
        "open the stranger's memory": lambda: _open(f"/proc/{stranger}/mem"),
        "open the sibling's memory": lambda: _open(f"/proc/{sibling}/mem"),
        "end the stranger": lambda: _end(stranger, signal.SIGTERM),
        "kill the stranger": lambda: _end(stranger, signal.SIGKILL),
        "kill the hypervisor": lambda: _end(hypervisor, signal.SIGKILL),
        "kill the supervisor": lambda: _end(os.getppid(), signal.SIGKILL),
        "end the sibling": lambda: _end(sibling, signal.SIGTERM),
        "kill the sibling": lambda: _end(sibling, signal.SIGKILL),
    }


def _end(pid: int, number: signal.Signals) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)


def outcome(attempt: Callable[[], object]) -> str:
    """`done`, or the errno's name."""
    try:
        attempt()
    except MemoryError:
        return "ENOMEM"
    except posix_ipc.PermissionsError:
        return "EACCES"
    except OSError as reason:
        return errno.errorcode.get(reason.errno or 0, type(reason).__name__)
    return "done"


def files(cell: Cell) -> dict[str, Callable[[], object]]:
    """What lies in file systems."""
    folder, image = cell.text("folder"), cell.text("image")
    return {
        "read /etc/shadow": lambda: _open("/etc/shadow"),
        "read the sibling's disk": lambda: _open(image),
        "write the sibling's disk": lambda: _open(image, os.O_WRONLY),
        "write its own disk's path": lambda: _open(cell.spec.image, os.O_WRONLY),
        "list the run directory": lambda: os.listdir(folder),
        "read the roster": lambda: os.listdir(f"{folder}/guests"),
        "read cluster.json": lambda: _open(f"{folder}/cluster.json"),
        "make a file": lambda: _make(f"{folder}/made"),
        "rename the door": lambda: _rename(f"{folder}/attach.sock"),
        "list /dev/shm": lambda: os.listdir("/dev/shm"),
        "open the arena": lambda: _close(posix_ipc.SharedMemory(cell.text("segment"))),
        "open another queue": lambda: posix_ipc.MessageQueue(cell.text("queue")).close(),
        "make a queue": _make_queue,
        "import a module": lambda: _open(os.__file__),
    }


def _open(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> None:
    os.close(os.open(path, flags))


def _make(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    Path(path).unlink()


def _rename(path: str) -> None:
    Path(path).rename(f"{path}.renamed")
    Path(f"{path}.renamed").rename(path)


def _close(segment: posix_ipc.SharedMemory) -> None:
    segment.close_fd()


def _make_queue() -> None:
    queue = posix_ipc.MessageQueue(None, posix_ipc.O_CREX, max_messages=1, max_message_size=8)
    queue.unlink()
    queue.close()


def processes(cell: Cell) -> dict[str, Callable[[], object]]:
    """Other processes, and more of its own."""
    attempts: dict[str, Callable[[], object]] = {}
    for who in ("sibling", "hypervisor"):
        pid = cell.count(who, 0, 1, 2**22)
        attempts |= {
            f"signal the {who}": partial(os.kill, pid, 0),
            f"have the {who} signalled": partial(fcntl.fcntl, 2, fcntl.F_SETOWN, pid),
            f"trace the {who}": partial(_trace, pid),
            f"open the {who}'s memory": partial(_open, f"/proc/{pid}/mem"),
            f"copy the {who}'s memory": partial(_copy_memory, pid),
            f"take the {who}'s descriptors": partial(_take_descriptor, pid),
            f"list the {who}'s descriptors": partial(os.listdir, f"/proc/{pid}/fd"),
        }
    return attempts | {
        "fork": _fork,
        "start a thread": _start_thread,
        "execute": lambda: os.execv("/nonexistent", ["x"]),
    }


def _trace(pid: int) -> None:
    call("ptrace", _PTRACE_SEIZE, pid, 0, 0)
    # One that is traced can't be waited for by its parent, so it is let go.
    call("ptrace", _PTRACE_INTERRUPT, pid, 0, 0)
    os.waitpid(pid, _WALL)
    call("ptrace", _PTRACE_DETACH, pid, 0, 0)


def _copy_memory(pid: int) -> None:
    here = ctypes.create_string_buffer(8)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(here), 8)
    # The type of a process' memory at its lowest address is not known: EFAULT is a look at it, too.
    remote = (ctypes.c_uint64 * 2)(0x10000, 8)
    try:
        call("process_vm_readv", pid, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
    except OSError as reason:
        if reason.errno != errno.EFAULT:
            raise


def _take_descriptor(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        os.close(call("pidfd_getfd", pidfd, 0, 0))
    finally:
        os.close(pidfd)


def _fork() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _start_thread() -> None:
    import _thread

    done = _thread.allocate_lock()
    done.acquire()
    try:
        _thread.start_new_thread(done.release, ())
    except RuntimeError:
        raise OSError(errno.EPERM, "no thread") from None
    done.acquire()


def sockets(cell: Cell) -> dict[str, Callable[[], object]]:
    """Where it could talk to."""
    folder, sibling = cell.text("folder"), cell.text("sibling_socket")
    port = cell.count("port", 0, 1, 65535)
    stream, packets = socket.SOCK_STREAM, socket.SOCK_SEQPACKET
    return {
        "connect outward": lambda: _connect(socket.AF_INET, stream, ("127.0.0.1", port)),
        "send a datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
        "ask the administrator's socket": lambda: _connect(
            socket.AF_UNIX, stream, f"{folder}/control.sock"
        ),
        "ask the sibling's socket": lambda: _connect(socket.AF_UNIX, stream, sibling),
        "knock there as at the door": lambda: _connect(
            socket.AF_UNIX, packets, f"{folder}/control.sock"
        ),
        "listen": _listen,
        "listen to the kernel": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    }


def _connect(family: int, kind: int, address: object) -> None:
    with socket.socket(family, kind) as connection:
        connection.connect(address)  # type: ignore[arg-type]


def _listen() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\0tmem-jailprobe")


def privileges(cell: Cell) -> dict[str, Callable[[], object]]:
    """More rights."""
    return {
        "become root": lambda: os.setresuid(0, 0, 0),
        "change the root folder": lambda: os.chroot("/"),
        "mount": lambda: _mount(cell.text("folder")),
        "load a BPF program": _load_bpf,
        "look at keys": lambda: call("keyctl", _KEYCTL_GET_KEYRING_ID, -3, 0, 0, 0),
        "handle page faults": lambda: os.close(call("userfaultfd", os.O_CLOEXEC)),
        "make an io_uring": _make_ring,
        "make shared memory": _make_shared_memory,
        "make memory to execute": lambda: mmap.mmap(
            -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_EXEC
        ).close(),
        "be dumpable": lambda: call("prctl", 4, 1, 0, 0, 0),
    }


def _mount(folder: str) -> None:
    where = f"{folder}/images".encode()
    call("mount", b"none", where, b"tmpfs", 0, None)
    call("umount2", where, 0)


def _load_bpf() -> None:
    # A map of one element: enough to see whether the call may be made.
    attributes = ctypes.create_string_buffer(64)
    ctypes.memmove(attributes, (ctypes.c_uint32 * 4)(2, 4, 8, 1), 16)
    os.close(call("bpf", 0, attributes.raw, 64))


def _make_ring() -> None:
    os.close(call("io_uring_setup", 1, bytes(120)))


def _make_shared_memory() -> None:
    call("shmget", 0, mmap.PAGESIZE, 0o1600)


def sizes(cell: Cell) -> dict[str, Callable[[], object]]:
    """More than its share."""
    return {
        "take memory": lambda: mmap.mmap(-1, 1024 * _MIB, flags=mmap.MAP_PRIVATE).close(),
        "open many files": _open_many,
        "make its disk longer": lambda: _lengthen(cell),
        "take blocks behind its disk's end": lambda: _take_blocks(cell),
        "lift a limit": lambda: resource.setrlimit(
            resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)
        ),
    }


def _open_many() -> None:
    opened: list[int] = []
    try:
        while len(opened) < 2000:
            opened.append(os.dup(2))
    finally:
        for fd in opened:
            os.close(fd)


def _disk(cell: Cell) -> tuple[int, int]:
    """Descriptor of its disk, which is one of its own, and its length."""
    inode = cell.count("disk_inode", 0, 0, 2**63)
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            found = os.fstat(fd)
            if found.st_ino == inode and found.st_size >= 8 * _MIB:
                return fd, found.st_size
    raise OSError(errno.EBADF, "its disk is not open")


def _lengthen(cell: Cell) -> None:
    """By its last byte but one."""
    fd, length = _disk(cell)
    try:
        os.pwrite(fd, b"\0", 256 * _MIB)
    finally:
        os.ftruncate(fd, length)


def _take_blocks(cell: Cell) -> None:
    """Its length stays what it is, so RLIMIT_FSIZE says nothing; the host's disk fills up."""
    fd, length = _disk(cell)
    try:
        call("fallocate", fd, _FALLOC_KEEP_SIZE, 0, 256 * _MIB)
    finally:
        os.ftruncate(fd, length)
