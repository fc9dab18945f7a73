"""The workload `make`: compilers in turn, each with memory of its own."""

from __future__ import annotations

import hashlib
import json
import marshal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guests.kernel import Kernel
from guests.workloads.job import BadParameters
from tests.t4_guest.test_processes import swap_file
from tests.t4_guest.worlds import (
    LocalHypervisor,
    check_programs,
    make_image,
    read_file,
    running_kernel,
)

SOURCES = {
    "main.py": "import lib.parts\nfrom lib import tools\n" + "value = [1, 2, 3]\n" * 400,
    "lib/__init__.py": "",
    "lib/parts.py": "from . import tools\n" + "def part(x):\n    return x + 1\n" * 150,
    "lib/tools.py": "import os\n" + "class Tool:\n    name = 'tool'\n" * 200,
    "wrong.py": "def f(:\n",
    "notes.txt": "not a source\n",
}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Hashes of the tree, which is in `tree`."""
    for name, text in SOURCES.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    path = tmp_path / "manifest.json"
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in SOURCES.items()}
    path.write_text(json.dumps(hashes))
    return path


def build(kernel: Kernel, manifest: Path, **parameters: Any) -> dict[str, Any]:
    """Run it to its end; the status."""
    kernel.start("make", 3, {"manifest": str(manifest), **parameters})
    while kernel.is_running:
        kernel.work()
    return kernel.status()


def test_all_that_compiles_is_compiled_and_its_imports_are_read(
    tmp_path: Path, manifest: Path
) -> None:
    """Objects are what Python makes of the sources; each compiler reads what it needs."""
    image = make_image(tmp_path / "image", tree=tmp_path / "tree")
    with running_kernel(image) as kernel:
        status = build(kernel, manifest, jobs=2, memory_pages=8, objects="made")

        assert status["state"] == "idle", status
        assert status["done"] == status["total"] == 5
        found = status["counters"]
        assert (found["compiled_files"], found["uncompilable_files"]) == (4, 1)
        assert (found["mismatches"], found["killed_programs"]) == (0, 0)
        # Five sources; main needs the three of lib, parts and tools two; four objects.
        assert found["files_verified"] == 5 + 2 + 1 + 4
        name = "/made/lib.tools.pyc"
        code = compile(SOURCES["lib/tools.py"], "/lib/tools.py", "exec", dont_inherit=True)
        assert read_file(kernel, name) == marshal.dumps(code)
        assert len(kernel.userland.processes) == 0


def test_more_compilers_than_memory_swap_and_all_pages_are_right(
    tmp_path: Path, manifest: Path
) -> None:
    """Through a swap disk and tmem."""
    image = make_image(tmp_path / "image", tree=tmp_path / "tree")
    hypervisor = LocalHypervisor()
    with running_kernel(image, hypervisor, swap=swap_file(tmp_path)) as kernel:
        found = build(kernel, manifest, jobs=4, memory_pages=80)["counters"]

        assert (found["compiled_files"], found["killed_programs"]) == (4, 0)
        assert found["mismatches"] == 0
        assert found["frontswap"]["loads"] > 0
        check_programs(kernel, hypervisor)


def test_killed_compilers_are_counted_and_the_build_goes_on(
    tmp_path: Path, manifest: Path, expect_warning: Callable[[str], None]
) -> None:
    """Without swap there is not memory for all."""
    expect_warning("Out of memory: Killed process .* [(]cc /")
    image = make_image(tmp_path / "image", tree=tmp_path / "tree")
    with running_kernel(image) as kernel:
        status = build(kernel, manifest, jobs=4, memory_pages=60)

        found = status["counters"]
        assert status["state"] == "idle"
        assert found["killed_programs"] == found["anonymous"]["oom_kills"] > 0
        assert found["compiled_files"] + found["killed_programs"] >= 4
        assert found["mismatches"] == 0


def test_a_page_that_is_not_what_was_written_is_a_mismatch(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong byte in the memory of a compiler is found."""
    image = make_image(tmp_path / "image", tree=tmp_path / "tree")
    with running_kernel(image) as kernel:
        read = kernel.userland.anonymous.read

        def spoil(*arguments: Any) -> memoryview | None:
            page = read(*arguments)
            if page is not None:
                page[100] ^= 1
            return page

        monkeypatch.setattr(kernel.userland.anonymous, "read", spoil)
        found = build(kernel, manifest, jobs=1, memory_pages=2)["counters"]

        assert found["mismatches"] > 0
        assert any(path.startswith("cc /") for path in found["mismatch_paths"])


@pytest.mark.parametrize("wrong", [{"jobs": 0}, {"memory_pages": 0}, {"objects": 7}])
def test_bad_parameters_are_refused(tmp_path: Path, manifest: Path, wrong: dict[str, Any]) -> None:
    """Before anything is done."""
    image = make_image(tmp_path / "image", tree=tmp_path / "tree")
    with running_kernel(image) as kernel, pytest.raises(BadParameters):
        build(kernel, manifest, **wrong)
