"""The message-queue arithmetic against the real kernel, and the lines that explain it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ipc.abi import REPLY_BYTES, REQUEST_BYTES
from ipc.limits import (
    GUESTS_MAX,
    REPLY_QUEUE_MESSAGES,
    REQUEST_QUEUE_MESSAGES,
    QueueLimits,
    explain_queue_limit,
    queue_bytes,
    queue_bytes_needed,
    read_queue_limits,
)
from tests.support.hypervisors import ROOT
from tests.support.tools import need_tool

DEBIAN = QueueLimits(rlimit_bytes=819_200, queues_max=256, messages_max=10, message_bytes_max=8192)

_MAKE_QUEUES = """
import resource, sys
import posix_ipc
prefix, limit, messages, message_bytes = sys.argv[1], *map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_MSGQUEUE, (limit, limit))
queues = []
try:
    while len(queues) < 40:
        queues.append(posix_ipc.MessageQueue(
            f"{prefix}-{len(queues)}", posix_ipc.O_CREX,
            max_messages=messages, max_message_size=message_bytes))
except OSError:
    pass
print(len(queues))
for queue in queues:
    queue.close()
    queue.unlink()
"""

_MAKE_PAIRS = """
import os, resource, sys, tempfile
from pathlib import Path
from ipc.errors import OperatorError
from ipc.limits import read_queue_limits
from ipc.mqueue import QueuePair
from ipc.names import Registry
from ipc.window import create_window
cluster, limit = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_MSGQUEUE, (limit, limit))
directory = tempfile.TemporaryDirectory()
registry = Registry(Path(directory.name))
pairs = []
print(read_queue_limits().guests_max)
try:
    while len(pairs) < 40:
        window = create_window()
        pairs.append(QueuePair(cluster, registry, window, os.urandom))
except OperatorError as error:
    print(len(pairs))
    print(error)
print(len(list(registry.entries())))
for pair in pairs:
    pair.close()
print(len(list(registry.entries())))
directory.cleanup()
"""


# The kernel counts bytes for each user of each user namespace, and queues for each IPC namespace:
# in new ones nobody else's queues count, and ours take nothing from other tests.
_ALONE = ["unshare", "--user", "--map-root-user", "--ipc"]


@pytest.fixture
def alone() -> list[str]:
    """Command that runs a program where no queue exists yet."""
    unshare = need_tool(_ALONE[0])
    command = [unshare, *_ALONE[1:]]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this kernel gives this user no user namespace, so others' queues count too")
    return command


def run(alone: list[str], program: str, *arguments: object) -> list[str]:
    """Standard output of a program, by lines."""
    words = [str(argument) for argument in arguments]
    command = [*alone, sys.executable, "-c", program, *words]
    return subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=60
    ).stdout.splitlines()


@pytest.mark.parametrize(
    ("messages", "message_bytes"), [(8, 64), (8, 32), (10, 128), (1, 8192), (10, 1), (3, 100)]
)
def test_a_queue_costs_what_queue_bytes_says(
    messages: int, message_bytes: int, cluster_name: str, alone: list[str]
) -> None:
    """With room for exactly five, five are made; with one byte less, four."""
    room = 5 * queue_bytes(messages, message_bytes)
    prefix = f"/tmem-{cluster_name}"

    for limit, expected in ((room, "5"), (room - 1, "4")):
        made = run(alone, _MAKE_QUEUES, prefix, limit, messages, message_bytes)
        assert [expected] == made


def test_as_many_guests_fit_as_computed_and_one_more_is_explained(
    cluster_name: str, alone: list[str]
) -> None:
    """The kernel says "too many open files"; a person is told about queues."""
    limit = queue_bytes_needed(4) - 1

    computed, made, line, registered, left = run(alone, _MAKE_PAIRS, cluster_name, limit)

    assert computed == made == "3"
    assert "the limits of this user allow 3 guests" in line
    assert "ulimit -q" in line
    assert (registered, left) == ("6", "0")


def test_a_guest_needs_one_queue_of_each_kind() -> None:
    """The sum that everything else divides by."""
    pair = queue_bytes(REQUEST_QUEUE_MESSAGES, REQUEST_BYTES)
    pair += queue_bytes(REPLY_QUEUE_MESSAGES, REPLY_BYTES)
    assert queue_bytes_needed(1) == pair
    assert queue_bytes_needed(7) == 7 * pair


@pytest.mark.parametrize(
    ("limits", "fit"),
    [
        (DEBIAN, 128),
        (DEBIAN._replace(rlimit_bytes=queue_bytes_needed(5)), 5),
        (DEBIAN._replace(rlimit_bytes=queue_bytes_needed(5) - 1), 4),
        (DEBIAN._replace(rlimit_bytes=0), 0),
        (DEBIAN._replace(rlimit_bytes=-1, queues_max=-1), GUESTS_MAX),
        (DEBIAN._replace(queues_max=9), 4),
    ],
)
def test_guests_max_is_the_tightest_bound(limits: QueueLimits, fit: int) -> None:
    """Bytes of the user, queues of the machine, records of the arena."""
    assert fit == limits.guests_max
    assert explain_queue_limit(fit, limits) is None
    assert explain_queue_limit(fit + 1, limits) is not None


@pytest.mark.parametrize(
    ("guests", "limits", "words"),
    [
        (129, DEBIAN, ["258 message queues", "queues_max is 256", "128 guests fit"]),
        (9, DEBIAN._replace(rlimit_bytes=20_000), ["9 guests need", "20000", "ulimit -q"]),
        (1, DEBIAN._replace(messages_max=7), ["msg_max is 7", "sysctl fs.mqueue.msg_max=10"]),
        (1, DEBIAN._replace(message_bytes_max=63), ["msgsize_max is 63", "sysctl"]),
        (GUESTS_MAX + 1, DEBIAN, [str(GUESTS_MAX)]),
    ],
)
def test_a_limit_is_explained_in_one_line_with_the_remedy(
    guests: int, limits: QueueLimits, words: list[str]
) -> None:
    """What was asked, what there is, what to do."""
    line = explain_queue_limit(guests, limits)

    assert line is not None
    assert "\n" not in line
    assert [word for word in words if word not in line] == []


def test_limits_that_are_not_readable_are_no_limits(tmp_path: Path) -> None:
    """A kernel without the files (or without message queues mounted) sets no bound here."""
    (tmp_path / "queues_max").write_text("17\n")
    (tmp_path / "msg_max").write_text("many\n")

    limits = read_queue_limits(tmp_path)

    assert limits[1:] == (17, -1, -1)
