"""The project's own frame: packaging, gates, and the plugins that every test is under."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import together

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("ipc", "fs", "hypervisor", "guests", "tools")


def canonical(requirement: str) -> str:
    """A requirement's package name as PyPA's name normalisation writes it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def tracked_files() -> list[Path]:
    """What git knows of this tree, or every file of the rooms where there is no git."""
    try:
        answer = subprocess.run(
            ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        folders = (*ROOMS, "tests", ".ci")
        return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths = (ROOT / name for name in answer.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


# ---- packaging ----


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_locked_package_has_a_version_and_hashes(name: str) -> None:
    """Every entry of a lock file pins one version and at least one hash, and names no index."""
    logical_lines = (ROOT / name).read_text().replace("\\\n", " ").splitlines()

    entries = [line for line in logical_lines if line and not line.startswith("#")]

    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9.-]+==[^ ]+ .*--hash=sha256:[0-9a-f]{64}", entry), entry
        assert "://" not in entry
        assert not entry.startswith("-")


@pytest.mark.parametrize(
    ("name", "groups"),
    [("requirements.txt", ["build"]), ("requirements-dev.txt", ["build", "dev"])],
)
def test_every_dependency_is_locked(name: str, groups: list[str]) -> None:
    """What pyproject.toml asks for is in the lock file, so `make lock` was not forgotten."""
    wanted = list(PROJECT["project"]["dependencies"])
    for group in groups:
        wanted += PROJECT["dependency-groups"][group]

    locked = {
        canonical(line)
        for line in re.findall(r"^[^\s#]+==", (ROOT / name).read_text(), re.MULTILINE)
    }

    assert {canonical(requirement) for requirement in wanted} <= locked


def test_make_help_lists_every_target() -> None:
    """`make help` shows each target that the Makefile declares, with its explanation."""
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None

    answer = subprocess.run(
        ["make", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=clean_environment(),
    )

    shown = dict(re.findall(r"^  make ([a-z-]+) +(\S.*)$", answer.stdout, re.MULTILINE))
    assert set(phony[1].split()) == set(shown)


def test_gates_run_in_their_order() -> None:
    """`make test` runs format, lint, contracts, types and then the tests."""
    answer = subprocess.run(
        ["make", "--dry-run", "test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=clean_environment(),
    )

    gates = ["ruff format --check", "ruff check", "lint-imports", "mypy --strict", "pytest -n"]
    places = [answer.stdout.find(gate) for gate in gates]
    assert -1 not in places
    assert sorted(places) == places


def clean_environment() -> dict[str, str]:
    """Our environment without what an outer make passes to an inner one."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }


def test_ci_script_works_from_anywhere_and_passes_the_outcome_on(tmp_path: Path) -> None:
    """.ci/run calls `make test` in the checkout from any directory and ends with its exit code."""
    fake_make = tmp_path / "make"
    fake_make.write_text('#!/bin/sh\necho "$PWD $*"\nexit 3\n')
    fake_make.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    answer = subprocess.run(
        [ROOT / ".ci/run"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )

    assert answer.stdout == f"{ROOT} test\n"
    assert answer.returncode == 3


def test_setup_without_a_usable_python_says_what_to_install(tmp_path: Path) -> None:
    """A machine with no Python of 3.11 or newer gets one line that says so, and no environment."""
    tree = tmp_path / "tree"
    (tree / "tools").mkdir(parents=True)
    for name in ("tools/setup.sh", "requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        shutil.copy2(ROOT / name, tree / name)

    answer = subprocess.run(
        [tree / "tools/setup.sh", "demo"],
        env={**os.environ, "PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert answer.returncode == 69
    assert answer.stderr.startswith("setup: /bin/false: no CPython 3.11 or newer; install one")
    assert len(answer.stderr.splitlines()) == 1
    assert not (tree / ".venv").exists()


def test_no_module_is_too_long() -> None:
    """A module of more than 600 lines wants to be two."""
    long = [
        path.relative_to(ROOT)
        for path in tracked_files()
        if path.suffix == ".py" and len(path.read_text().splitlines()) > 600
    ]

    assert long == []


def test_a_guest_process_imports_nothing_of_tools() -> None:
    """Importing every module of guests loads nothing of tools or of another room's libraries."""
    script = (
        "import importlib, pkgutil, sys, guests\n"
        "for module in pkgutil.walk_packages(guests.__path__, 'guests.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )

    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )

    loaded = set(answer.stdout.split())
    assert "guests" in loaded
    assert not loaded & {"tools", "hypervisor", "typer", "rich", "pydantic", "lz4", "xxhash"}


# ---- the plugins ----


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project of its own whose tests are under the same plugins, run in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in [name for name in os.environ if name.startswith("PYTEST_") or name == "CI"]:
        monkeypatch.delenv(name)
    names = ["tests.support.leaks", "tests.support.logs", "tests.support.skips"]
    pytester.makeconftest(f"pytest_plugins = {names}")
    return pytester


LEAKS = {
    "shared-memory segment /tmem-tmain-": """
        import posix_ipc
        def test_it(cluster_name):
            name = f"/tmem-{cluster_name}-x"
            posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=4096).close_fd()
        """,
    "file descriptor": """
        import os
        def test_it():
            os.open("/dev/null", os.O_RDONLY)
        """,
    "process": """
        import os, time
        def test_it():
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
        """,
    "process (grandchild)": """
        import subprocess
        def test_it():
            subprocess.run(["sh", "-c", "sleep 60 >/dev/null 2>&1 &"], check=True)
        """,
    "file descriptor (of a module's fixture)": """
        import os, pytest
        @pytest.fixture(scope="module")
        def opened():
            return os.open("/dev/null", os.O_RDONLY)
        def test_it(opened):
            pass
        """,
    "message queue /tmem-tmain-": """
        import posix_ipc
        def test_it(cluster_name, tmp_path):
            name = f"tmem-{cluster_name}-x"
            queue = posix_ipc.MessageQueue(
                f"/{name}", posix_ipc.O_CREX, max_messages=1, max_message_size=64
            )
            queue.close()
            (tmp_path / "registry").mkdir()
            (tmp_path / "registry" / f"queue:{name}").touch()
        """,
}


def test_a_leaking_test_fails_and_the_leak_is_named(inner: pytest.Pytester) -> None:
    """Each kind of leak fails its test, is named, and is gone before the next test."""
    for number, code in enumerate(LEAKS.values()):
        inner.makepyfile(
            **{f"test_{number}_leak": code, f"test_{number}_next": "def test_next(): pass"}
        )

    result = inner.runpytest_subprocess()

    result.assert_outcomes(passed=2 * len(LEAKS), errors=len(LEAKS))
    leaked = [f"*leaked {kind.partition(' (')[0]}*" for kind in LEAKS]
    result.stdout.fnmatch_lines(
        [line for leak in leaked for line in ("*ERROR at teardown of test_it*", leak)]
    )


def test_a_test_that_cleans_up_passes(inner: pytest.Pytester) -> None:
    """What a test or a fixture of any scope makes and removes is no leak."""
    inner.makepyfile(
        """
        import os, subprocess
        import posix_ipc, pytest

        @pytest.fixture(scope="module")
        def sleeper(new_cluster_name):
            name = f"/tmem-{new_cluster_name()}-x"
            segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=4096)
            with subprocess.Popen(["sleep", "60"]) as process:
                yield
                process.kill()
            segment.close_fd()
            segment.unlink()

        def test_first(sleeper, cluster_name, expect_warning):
            queue = posix_ipc.MessageQueue(
                f"/tmem-{cluster_name}-x", posix_ipc.O_CREX, max_messages=1, max_message_size=64
            )
            queue.close()
            queue.unlink()

        def test_second(sleeper):
            os.close(os.open("/dev/null", os.O_RDONLY))
        """
    )

    inner.runpytest_subprocess().assert_outcomes(passed=2)


def test_names_of_clusters_tell_workers_apart(new_cluster_name: object, cluster_name: str) -> None:
    """A cluster's name holds this worker and this process, and no two are the same."""
    assert callable(new_cluster_name)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")

    assert re.fullmatch(rf"t{worker}-{os.getpid()}-\d+", cluster_name)
    assert new_cluster_name() != cluster_name


LOGGING = {
    "nothing": ("", "", True),
    "undeclared": ("", "queue is full", False),
    "declared": ("queue .* full", "queue is full", True),
    "another": ("queue .* full", "disk is full", False),
    "never_came": ("queue .* full", "", False),
}
"""What is declared, what is logged, and whether that passes."""


def test_only_declared_warnings_pass(inner: pytest.Pytester) -> None:
    """A record of level WARNING passes just when it was declared, and a declared one must come."""
    tests = [
        f"""
def test_{name}(expect_warning):
    logging.getLogger("x").info("not a warning")
    if {declared!r}:
        expect_warning({declared!r})
    if {logged!r}:
        logging.getLogger("x").warning({logged!r})
"""
        for name, (declared, logged, _) in LOGGING.items()
    ]
    inner.makepyfile("\n".join(["import logging", *tests]))

    result = inner.runpytest_subprocess()

    wrong = [f"test_{name}" for name, (_, _, passes) in LOGGING.items() if not passes]
    result.assert_outcomes(passed=len(LOGGING), errors=len(wrong))
    assert re.findall(r"ERROR at teardown of (\w+)", str(result.stdout)) == wrong


def test_modules_that_share_something_stay_together() -> None:
    """They exist, and their tests are one unit for pytest-xdist; others go out one by one."""
    for module in together.MODULES:
        assert 'scope="module"' in (ROOT / module).read_text()
        for name in ("test_a", "test_b[x]"):
            assert together.unit_of(f"{module}::{name}") == module
    alone = "tests/t0_ipc/test_codec.py::test_a"
    assert together.unit_of(alone) == alone


SKIPPING = {
    "test": """
        from tests.support.tools import need_tool
        def test_other(): pass
        def test_it(): need_tool("no-such-tool")
        """,
    "module": """
        import pytest
        pytest.skip("no-such-tool is not installed", allow_module_level=True)
        """,
}


@pytest.mark.parametrize("what", SKIPPING)
def test_a_skip_fails_under_ci(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """With CI=true a skip fails the run, and the reason is shown."""
    inner.makepyfile(SKIPPING[what])
    monkeypatch.setenv("CI", "true")

    result = inner.runpytest_subprocess()

    assert result.ret != 0
    result.stdout.fnmatch_lines("*skipped although CI=true: no-such-tool is not installed*")
    assert "skipped" not in result.parseoutcomes()


def test_a_skip_elsewhere_names_the_tool(inner: pytest.Pytester) -> None:
    """Without CI a missing tool skips its tests by name."""
    inner.makepyfile(SKIPPING["test"])

    result = inner.runpytest_subprocess("-rs")

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines("*no-such-tool is not installed*")


@pytest.mark.parametrize("options", [[], ["-n", "1"]])
def test_a_run_without_a_verdict_fails(inner: pytest.Pytester, options: list[str]) -> None:
    """No tests at all, or nothing but skipped ones, is not a passed run."""
    assert inner.runpytest_subprocess(*options).ret == pytest.ExitCode.NO_TESTS_COLLECTED

    inner.makepyfile("import pytest\ndef test_it(): pytest.skip('never')")
    result = inner.runpytest_subprocess(*options)

    result.assert_outcomes(skipped=1)
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
