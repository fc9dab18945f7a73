"""Something done in a child of the test's process, for what can't be undone."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def in_child(work: Callable[[], Result]) -> Result:
    """What `work` returns in a forked child; what it raises is raised here."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            outcome: tuple[str, object] = ("returned", work())
        except BaseException as reason:  # noqa: BLE001 (it goes on in the parent)
            outcome = ("raised", reason)
        os.write(writing, pickle.dumps(outcome))
        # No handler of the parent runs here; a filter may know only one of the two exits.
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise AssertionError(f"the child ended by {signal.Signals(os.WTERMSIG(status)).name}")
    how, what = pickle.loads(told)
    if how == "raised":
        raise what
    return what  # type: ignore[no-any-return]
