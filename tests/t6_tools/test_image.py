"""Disk images from real trees: what is in them, and that equal trees give equal images."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from ipc.errors import ExitCode, OperatorError
from tests.support.clusters import write_tree
from tests.support.tools import need_tool
from tools import image as image_module
from tools.image import TreeFile, build_image, choose, list_tree, source_folder


def test_image_holds_the_tree_and_the_manifest_its_hashes(tmp_path: Path) -> None:
    """Debugfs, which we did not write, reads the same files; e2fsck has nothing to say."""
    need_tool("mke2fs")
    tree = write_tree(tmp_path / "tree", files=20)

    image = build_image(str(tree), 2**24, "red", tmp_path / "cache")

    manifest = json.loads(image.manifest.read_text())
    sources = [path for path in tree.rglob("*") if path.is_file()]
    assert manifest == {
        path.relative_to(tree).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sources
    }
    assert (image.files, image.tree_bytes) == (20, sum(path.stat().st_size for path in sources))
    for name in manifest:
        copy = tmp_path / "copy"
        subprocess.run(
            [need_tool("debugfs"), "-R", f"dump /{name} {copy}", str(image.path)],
            capture_output=True,
            check=True,
        )
        assert copy.read_bytes() == (tree / name).read_bytes()
    check = [need_tool("e2fsck"), "-fn", str(image.path)]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0


def test_cache_is_for_its_user_alone(tmp_path: Path) -> None:
    """One that was open to all is closed; one of somebody else is not used."""
    need_tool("mke2fs")
    tree = write_tree(tmp_path / "tree", files=1)
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o755)

    build_image(str(tree), 2**24, "red", cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    if os.geteuid() == 0:
        os.chown(cache, 54_321, -1)
        with pytest.raises(OperatorError, match="belong to user 54321"):
            build_image(str(tree), 2**24, "red", cache)


def test_cache_is_keyed_by_content(tmp_path: Path) -> None:
    """The same files are built once; a changed byte makes another image."""
    need_tool("mke2fs")
    tree = write_tree(tmp_path / "tree", files=5)
    cache = tmp_path / "cache"

    first = build_image(str(tree), 2**24, "red", cache)
    stamp = first.path.stat().st_mtime_ns
    again = build_image(str(tree), 2**24, "blue", cache)
    (tree / "new.txt").write_text("new")
    changed = build_image(str(tree), 2**24, "red", cache)

    assert again.path == first.path
    assert first.path.stat().st_mtime_ns == stamp
    assert changed.path != first.path
    assert {path.suffix for path in cache.iterdir()} == {".img", ".json"}


def test_choice_keeps_the_limit_and_differs_by_seed() -> None:
    """Whole blocks are counted; each guest gets other folders of a tree that is too large."""
    files = [TreeFile(f"d{number % 10}/f{number}", 5000) for number in range(100)]

    chosen = {seed: choose(files, 50 * 8192, seed) for seed in ("red", "blue")}

    assert {len(files) for files in chosen.values()} == {50}
    assert chosen["red"] != chosen["blue"]
    assert chosen["red"] == choose(files, 50 * 8192, "red")
    assert choose(files, 2**30, "red") == sorted(files, key=lambda file: file.name)


def test_standard_library_is_listed_without_what_distributions_change() -> None:
    """No bytecode, no installed packages; many real modules."""
    files = list_tree(source_folder("stdlib"), standard_library=True)

    names = {file.name for file in files}
    assert {"os.py", "json/decoder.py", "email/message.py"} <= names
    assert not [name for name in names if "__pycache__" in name or "site-packages/" in name]
    assert source_folder("stdlib") == Path(sysconfig.get_path("stdlib"))


def test_links_and_special_files_are_left_out(tmp_path: Path) -> None:
    """A manifest speaks of regular files only."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")

    assert list_tree(tmp_path, standard_library=False) == [TreeFile("file", 4)]


def test_missing_program_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without mke2fs the line says what to install, and no half image stays in the cache."""
    monkeypatch.setattr(image_module, "find_program", lambda _name: None)
    tree = write_tree(tmp_path / "tree", files=3)

    with pytest.raises(
        OperatorError, match=r"mke2fs is missing.*install the package e2fsprogs"
    ) as caught:
        build_image(str(tree), 2**24, "red", tmp_path / "cache")

    assert caught.value.exit_code == ExitCode.UNAVAILABLE
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("tree", ["nowhere", "file"])
def test_tree_that_is_no_folder_is_refused(tmp_path: Path, tree: str) -> None:
    """The line names what was asked for."""
    (tmp_path / "file").write_text("text")

    with pytest.raises(OperatorError, match="is no folder") as caught:
        build_image(str(tmp_path / tree), 2**20, "red", tmp_path / "cache")

    assert caught.value.exit_code == ExitCode.NO_INPUT


def test_empty_tree_is_refused(tmp_path: Path) -> None:
    """A guest without a file has nothing to do."""
    (tmp_path / "tree").mkdir()

    with pytest.raises(OperatorError, match="no file of the tree"):
        build_image(str(tmp_path / "tree"), 2**20, "red", tmp_path / "cache")
