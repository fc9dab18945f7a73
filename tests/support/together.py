"""Plugin: tests of a module that share one expensive thing stay in one worker of pytest-xdist.

Its own groups (`--dist=loadgroup`, the marker xdist_group) are written into a test's node id, which
pytest 9.2 does not let it do any more: such tests went to any worker, and each made the thing anew.
Here the module is looked up by its path. Larger units are begun first.
"""

from __future__ import annotations

from typing import Any

import pytest

MODULES = frozenset(
    f"tests/{name}.py"
    for name in (
        "t2_machine/test_hostile_defects",
        "t2_machine/test_hostile_expulsion",
        "t2_machine/test_hostile_floods",
        "t2_machine/test_hostile_latent",
        "t2_machine/test_hostile_window",
        "t2_machine/test_hostile_xsa15",
        "t5_cluster/test_administration",
        "t5_cluster/test_background",
        "t5_cluster/test_measured_run",
        "t6_tools/test_classic",
    )
)


def unit_of(nodeid: str) -> str:
    """What is given to a worker as a whole: the module, or the test alone."""
    module = nodeid.partition("::")[0]
    return module if module in MODULES else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A scheduler with our units in the place of its groups."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    scheduler = LoadGroupScheduling(config, log)
    scheduler._split_scope = unit_of
    return scheduler
