"""Plugin: with CI=true a skipped test has failed; a run in which no test ran has failed anywhere.

A skip says that this machine lacks a tool. Whoever sets CI promises that nothing is lacking, so a
skip there is a check that silently stopped being made.
"""

import os
from collections.abc import Generator
from typing import Any

import pytest


def _skip_reason(longrepr: object) -> str:
    # A skip is reported as (path, line, "Skipped: reason").
    reason = str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
    return reason.removeprefix("Skipped: ")


def _fail_a_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped although CI=true: {_skip_reason(report.longrepr)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the report of a skipped test into a failure."""
    report = yield
    _fail_a_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn the report of a module that skips itself into a failure."""
    report = yield
    _fail_a_skip(report)
    return report


class _Count:
    """How many tests ran to a verdict; seen by the process that reports, also under xdist."""

    def __init__(self) -> None:
        self.verdicts = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.verdicts += (report.when == "call" and not report.skipped) or report.failed

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        config: Any = session.config
        is_worker = hasattr(config, "workerinput")
        if not (is_worker or self.verdicts or config.option.collectonly):
            if session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_configure(config: pytest.Config) -> None:
    """Count verdicts in this run."""
    config.pluginmanager.register(_Count())
