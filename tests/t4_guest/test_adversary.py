"""Code that is up to no good as a workload: when it runs, and that it ends alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guests import adversary
from guests.kernel import GuestSpec, Kernel
from guests.workloads.job import BadParameters
from ipc.errors import ExitCode, OperatorError
from tests.t4_guest.worlds import SMALL_MEMORY_BYTES, make_image, running_kernel

Begin = Callable[..., dict[str, Any]]


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    """A guest without a hypervisor."""
    image = make_image(tmp_path / "image")
    with running_kernel(image, memory_bytes=SMALL_MEMORY_BYTES) as kernel:
        yield kernel


@pytest.fixture
def begin(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Runs a text as an adversary to its end; the guest's status."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(text: str, **parameters: object) -> dict[str, Any]:
        (tmp_path / "mallory.py").write_text(text)
        code = adversary.load("mallory")
        spec = GuestSpec("g", tmp_path / "image", SMALL_MEMORY_BYTES, tmp_path)
        kernel.workloads["adversary"] = adversary.workload("mallory", code, kernel, spec)
        kernel.start("adversary", 7, parameters)
        while kernel.is_running:
            kernel.work()
        return kernel.status()

    return run


def test_it_runs_when_it_is_begun_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading runs none of it, but imports what it will import: in the jail that is too late."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mallory.py").write_text("import accomplice\nfrom accomplice import x\n1 / 0\n")
    (tmp_path / "accomplice.py").write_text("x = 1\n")

    adversary.load("mallory")

    assert "accomplice" in sys.modules
    assert "mallory" not in sys.modules
    del sys.modules["accomplice"]


def test_it_reports_and_takes_parameters(begin: Begin) -> None:
    """By the status of its guest."""
    status = begin(
        "def run(cell):\n"
        "    cell.report['who'] = cell.spec.name\n"
        "    cell.report['calls'] = cell.count('calls', 1, 1, 100)\n"
        "    yield\n",
        calls=17,
    )

    assert status["error"] is None
    assert status["report"] == {"who": "g", "calls": 17}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise ValueError('no')", "ValueError: no"),
        ("raise OSError(13, 'denied')", "denied"),
        ("cell.channel", "Disconnected: there is no hypervisor"),
        ("raise SystemError", "SystemError"),
    ],
)
def test_what_it_raises_ends_it_alone(
    begin: Begin, kernel: Kernel, expect_warning: Callable[[str], None], body: str, says: str
) -> None:
    """The guest goes on, and the next one can be begun."""
    expect_warning("mallory event=failed|workload=adversary event=failed")
    status = begin(f"def run(cell):\n    cell.report['x'] = 1\n    yield\n    {body}\n")

    assert says in status["error"]
    assert status["report"] == {"x": 1}
    assert begin("def run(cell):\n    yield\n")["error"] is None


def test_bad_parameters_are_a_no(begin: Begin) -> None:
    """As for any workload."""
    with pytest.raises(BadParameters, match="calls"):
        begin("def run(cell):\n    cell.count('calls', 1, 1, 9)\n    yield\n", calls=10)


@pytest.mark.parametrize("name", ["there.is.none", "", "..", "sys"])
def test_a_module_that_is_not_there_is_one_line(name: str) -> None:
    """Before the guest starts."""
    with pytest.raises(OperatorError, match="adversary") as refusal:
        adversary.load(name)
    assert refusal.value.exit_code == ExitCode.NO_INPUT


def test_a_module_that_is_no_python_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likewise."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mallory.py").write_text("def def\n")
    with pytest.raises(OperatorError, match="mallory"):
        adversary.load("mallory")
