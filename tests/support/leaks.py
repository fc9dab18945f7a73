"""Plugin: a test that leaks a segment, a queue, a file descriptor or a process has failed.

Compared are the moments before a test's first fixture and after its last one. What a fixture of
wider scope (class, module, session) sets up belongs to that fixture, and must be gone when it is
finalised. What leaked is named and then removed, so that one leak fails one test. After a failed
test nothing is judged, since its traceback keeps things alive; leftovers are removed all the same.
"""

import gc
import itertools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from tests.support import kernel_objects
from tests.support.kernel_objects import WORKER_CLUSTERS, Leak

_FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def new_cluster_name() -> Callable[[], str]:
    """Cluster names that no other test on this machine has: t<worker>-<pid>-<n>."""
    numbers = itertools.count(1)
    return lambda: f"{WORKER_CLUSTERS}{next(numbers)}"


@pytest.fixture
def cluster_name(new_cluster_name: Callable[[], str]) -> str:
    """A cluster name of this test's own; the leak check looks only at such names."""
    return new_cluster_name()


class LeakCheck:
    """The check of one pytest process (under xdist: of one worker)."""

    def __init__(self, mqueue: int | None) -> None:
        self._mqueue = mqueue
        self._before: set[Leak] = set()
        self._owned: dict[int, set[Leak]] = {}

    def _now(self, run_directories: Path | None = None) -> set[Leak]:
        return (
            kernel_objects.segments()
            | kernel_objects.queues(self._mqueue, run_directories)
            | kernel_objects.descriptors()
            | kernel_objects.processes()
        )

    def _owned_by_fixtures(self) -> set[Leak]:
        return set[Leak]().union(*self._owned.values())

    def _leaks(self, run_directories: Path | None) -> list[Leak]:
        known = self._before | self._owned_by_fixtures()
        if not self._now(run_directories) - known:
            return []
        # A process that is on its way out may hold other things; a reference cycle may, too.
        kernel_objects.wait_for_exits(known)
        gc.collect()
        return sorted(self._now(run_directories) - known)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None, None, None]:
        """Look before the first fixture."""
        # What a wider fixture owns stays known only for as long as that fixture lives.
        self._before = self._now() - self._owned_by_fixtures()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any]
    ) -> Generator[None, object, object]:
        """Note what a fixture of wider scope makes."""
        if fixturedef.scope == "function":
            return (yield)
        before = self._now()
        try:
            return (yield)
        finally:
            # What another fixture made meanwhile, on this one's behalf, is that one's.
            self._owned[id(fixturedef)] = self._now() - before - self._owned_by_fixtures()

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """Forget what the fixture owned: if it is still there, it has leaked."""
        self._owned.pop(id(fixturedef), None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Remember that a test failed."""
        report = yield
        item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        """Look after the last fixture, name what leaked and remove it."""
        run_directories = getattr(item, "funcargs", {}).get("tmp_path")
        finished = False
        try:
            yield
            finished = True
        finally:
            leaks = self._leaks(run_directories)
            kernel_objects.end(leaks)
        if leaks and finished and not item.stash.get(_FAILED, False):
            pytest.fail("\n".join(f"leaked {leak}" for leak in leaks), pytrace=False)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Check in the processes that run tests; under xdist that is every one but the controller."""
    config = session.config
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        kernel_objects.become_subreaper()
        config.pluginmanager.register(LeakCheck(kernel_objects.detached_mqueue()))
