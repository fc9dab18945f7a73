"""Debian's Linux kernel: fetched as a package, unpacked into a cache, never installed.

    .cache/vm/linux-6.1.0-56-amd64/
        vmlinuz
        modules.dep
        kernel/...     the modules that are wanted and what they need, as in the package

The rest of the package (400 MB of drivers) is thrown away. A folder in which anything is missing
is made again. It is built beside its place and renamed, so a killed fetch leaves nothing half.

The full kernel is needed: Debian's kernel for clouds has no OCFS2. Linux 6.1 is what the checks
were made with; where the archive has moved on its newest is taken.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ipc.errors import ExitCode, OperatorError
from tools.vm import modules
from tools.vm.programs import need

CACHE: Final = Path(".cache", "vm")
_META_PACKAGE: Final = "linux-image-amd64"
_PACKAGE: Final = re.compile(r"linux-image-(\d+\.\d+\.\d+(?:-\d+|\+deb\d+)-amd64)(?![\w-])")
_PATIENCE_SECONDS: Final = 600


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel; `version` is what `uname -r` says in it."""

    version: str
    folder: Path

    @property
    def image(self) -> Path:
        """What QEMU boots."""
        return self.folder / "vmlinuz"

    @property
    def module_files(self) -> list[Path]:
        """The modules that are wanted, in loading order."""
        text = (self.folder / "modules.dep").read_text()
        return [self.folder / file for file in modules.load_order(text, modules.WANTED)]

    @property
    def complete(self) -> bool:
        """Whether everything is there."""
        try:
            return self.image.is_file() and all(path.is_file() for path in self.module_files)
        except (OSError, OperatorError):
            return False


def get_kernel(cache: Path = CACHE) -> Kernel:
    """The newest kernel in the cache, fetched first when there is none."""
    cached = [
        kernel
        for folder in cache.glob("linux-*-amd64")
        if (kernel := Kernel(folder.name.removeprefix("linux-"), folder)).complete
    ]
    if cached:
        return max(cached, key=lambda kernel: _order(kernel.version))
    return _fetch(cache)


def newest_package(depends: str, search: str) -> str | None:
    """The kernel package to take: what the meta package depends on, else the newest on offer.

    `depends` is what `apt-cache depends` said, `search` what `apt-cache search` said.
    """
    for text in (depends, search):
        versions = sorted(set(_PACKAGE.findall(text)), key=_order)
        if versions:
            return f"linux-image-{versions[-1]}"
    return None


def _order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _fetch(cache: Path) -> Kernel:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as text:
        work = Path(text)
        package = _download(work)
        version = package.removeprefix("linux-image-")
        _run(["dpkg-deb", "-x", str(next(work.glob("*.deb")).absolute()), "root"], work)
        # Where /lib and /usr/lib are one, a package may name either.
        if not (work / "root" / "lib").exists():
            (work / "root" / "lib").symlink_to("usr/lib")
        _run(["depmod", "-b", "root", version], work)
        built = work / f"linux-{version}"
        _keep_wanted(work / "root", built, version)
        place = cache / built.name
        if place.exists():
            shutil.rmtree(place)
        built.rename(place)
    return Kernel(version, place)


def _download(work: Path) -> str:
    """Fetch the package into `work` and return its name; lists of the archive are renewed once."""
    problem = ""
    for attempt in range(2):
        if attempt:
            _run(["apt-get", "-qq", "update"], work)
        package = newest_package(
            _ask(["apt-cache", "depends", _META_PACKAGE]),
            _ask(["apt-cache", "search", "--names-only", r"^linux-image-[0-9.-]+-amd64$"]),
        )
        if package is None:
            problem = "the archive that apt knows has no linux-image package for amd64"
            continue
        try:
            _run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package], work)
            return package
        except OperatorError as reason:
            problem = str(reason)
    raise OperatorError(f"no kernel: {problem}", ExitCode.INCONCLUSIVE)


def _keep_wanted(root: Path, folder: Path, version: str) -> None:
    source = root / "lib" / "modules" / version
    dependencies = (source / "modules.dep").read_text()
    for file in modules.load_order(dependencies, modules.WANTED):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).rename(folder / file)
    (folder / "modules.dep").write_text(dependencies)
    (root / "boot" / f"vmlinuz-{version}").rename(folder / "vmlinuz")


def _run(command: list[str], folder: Path) -> None:
    command = [need(command[0]), *command[1:]]
    try:
        answer = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise OperatorError(f"'{' '.join(command)}' took too long", ExitCode.INCONCLUSIVE) from None
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        raise OperatorError(f"'{' '.join(command)}' failed: {lines[-1]}", ExitCode.INCONCLUSIVE)


def _ask(command: list[str]) -> str:
    """What a query prints; nothing where it fails."""
    program = need(command[0])
    return subprocess.run(
        [program, *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
        check=False,
    ).stdout
