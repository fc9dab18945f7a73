"""Plugin: a test that logs a WARNING or worse without having said so has failed.

`expect_warning(regex)` declares one; a declared warning that never comes fails the test too.
"""

import logging
import re
from collections.abc import Callable, Generator

import pytest


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self.expected: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    def complaints(self) -> list[str]:
        """One line for each undeclared record and each declared one that never came."""
        lines = [
            f"undeclared log record: {message}"
            for message in self.messages
            if not any(re.search(pattern, message) for pattern in self.expected)
        ]
        lines += [
            f"a log record was declared and never came: {pattern}"
            for pattern in self.expected
            if not any(re.search(pattern, message) for message in self.messages)
        ]
        return lines


_KEY = pytest.StashKey[_Records]()


@pytest.fixture
def expect_warning(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Declare a log record of level WARNING or above; the regex is searched in its line."""
    records: _Records = request.node.stash[_KEY]
    return records.expected.append


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Begin to listen."""
    records = item.stash[_KEY] = _Records()
    logging.getLogger().addHandler(records)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Judge what was heard, fixtures' teardown included."""
    records = item.stash[_KEY]
    try:
        yield
    finally:
        logging.getLogger().removeHandler(records)
    complaints = records.complaints()
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)
