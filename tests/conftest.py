"""The checks that every test is under; see the plugins' own docstrings."""

pytest_plugins = [
    "tests.support.leaks",
    "tests.support.logs",
    "tests.support.skips",
    "tests.support.together",
]
