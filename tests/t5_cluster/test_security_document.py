"""hypervisor/SECURITY.md promises nothing that no test holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "hypervisor/SECURITY.md"


def _promises() -> dict[int, tuple[str, list[str]]]:
    """Number, text and tests of each row of the table of promises."""
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {
        int(number): (text, re.findall(r"`(tests/[\w/]+\.py::\w+)`", tests))
        for number, text, tests in rows
    }


def test_every_promise_names_tests_that_exist() -> None:
    """By file and function; numbers are 1, 2, 3, since people refer to them."""
    promises = _promises()

    assert list(promises) == list(range(1, len(promises) + 1))
    assert len(promises) >= 18
    for number, (text, tests) in promises.items():
        assert tests, f"promise {number} names no test: {text}"
        for test in tests:
            path, _, name = test.partition("::")
            tree = ast.parse((ROOT / path).read_text())
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"promise {number}: there is no {test}"


def test_the_readme_leads_to_it() -> None:
    """Who looks for it starts there."""
    assert "(hypervisor/SECURITY.md)" in (ROOT / "README.md").read_text()
