"""Which byte ranges of a file the other nodes have locked: a question to each, an answer from each.

    question   0, id, inode block, generation
    answer     1, id, then per range: start, end, exclusive, owner

Who asks holds the file's range lock (`fs.ocfs2.filelocks`), so nobody takes more meanwhile, and
any answer that was given after the question is good. Messages get lost, so a question is asked
again until all have answered or are members no more; the id is new for each round of questions, so
what comes late is known to be late.

Whoever is asked answers at once, whatever he is waiting for: an answer takes no lock.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Collection, Sequence
from typing import Final

from fs.filelocks import END, RANGES_MAX, RangeLock
from fs.hooks import FileKey

log = logging.getLogger(__name__)

RETRY_NS: Final = 200_000_000
"""A question that was not answered for so long is asked again."""

_QUESTION: Final = struct.Struct("<BQQI")
_ANSWER: Final = struct.Struct("<BQ")
_RANGE: Final = struct.Struct("<QQ?q")
_ASKS: Final = 0
_ANSWERS: Final = 1


class RangeQueries:
    """One node's side of it."""

    def __init__(
        self,
        node: int,
        *,
        send: Callable[[int, bytes], None],
        members: Callable[[], Collection[int]],
        wait: Callable[[], None],
        now_ns: Callable[[], int],
        label: Callable[[int], str] = "node {}".format,
    ) -> None:
        """`wait` delivers what has come, or waits a little for it; it may raise to end a wait."""
        self.own: Callable[[int, int], Sequence[RangeLock]] = _none
        """What this node has locked of a file: inode block, generation."""
        self.malformed = 0
        """Messages that were none."""
        self._node = node
        self._send = send
        self._members = members
        self._wait = wait
        self._now_ns = now_ns
        self._label = label
        self._round = 0
        self._answers: dict[int, list[RangeLock]] = {}

    def ask(self, file: FileKey, nodes: Collection[int] | None) -> list[RangeLock]:
        """The ranges that these nodes have locked, None: all others."""
        self._round += 1
        self._answers = {}
        question = _QUESTION.pack(_ASKS, self._round, file.ino, file.generation)
        asked_ns: int | None = None
        while True:
            members = set(self._members()) - {self._node}
            missing = (members if nodes is None else members & set(nodes)) - self._answers.keys()
            if not missing:
                return [
                    lock
                    for node, locks in sorted(self._answers.items())
                    if node in members
                    for lock in locks
                ]
            now_ns = self._now_ns()
            if asked_ns is None or now_ns - asked_ns >= RETRY_NS:
                asked_ns = now_ns
                for node in sorted(missing):
                    self._send(node, question)
            self._wait()

    def deliver(self, node: int, untrusted_message: bytes) -> None:
        """A message of these has come from a node."""
        try:
            if untrusted_message[:1] == bytes([_ASKS]):
                _, number, ino, generation = _QUESTION.unpack(untrusted_message)
                answer = [_ANSWER.pack(_ANSWERS, number)]
                answer += [_RANGE.pack(*lock[:4]) for lock in self.own(ino, generation)]
                self._send(node, b"".join(answer))
            else:
                self._answered(node, untrusted_message)
        except (struct.error, ValueError) as reason:
            self.malformed += 1
            log.warning("event=bad-range-message from=%s why=%s", self._label(node), reason)

    def _answered(self, node: int, untrusted_message: bytes) -> None:
        kind, number = _ANSWER.unpack_from(untrusted_message)
        if kind != _ANSWERS:
            raise ValueError(f"kind {kind}")
        if number != self._round or node in self._answers:
            return
        locks = [
            RangeLock(start, end, exclusive, owner, node)
            for start, end, exclusive, owner in _RANGE.iter_unpack(
                untrusted_message[_ANSWER.size :]
            )
        ]
        if len(locks) > RANGES_MAX or not all(0 <= one.start < one.end <= END for one in locks):
            raise ValueError("ranges that can't be")
        self._answers[node] = locks


def _none(_ino: int, _generation: int) -> Sequence[RangeLock]:
    return ()
