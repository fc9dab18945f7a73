"""A client in C, written from ABI.md alone, against a real hypervisor; 64 and 32 bits."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.ring import memory_order_suffices
from tests.support.hypervisors import RunningHypervisor, running_hypervisor
from tests.support.tools import need_tool

SOURCE = Path(__file__).with_name("client.c")
FLAGS = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion", "-Werror"]


@pytest.fixture
def hypervisor(cluster_name: str, tmp_path: Path) -> Iterator[RunningHypervisor]:
    """One that already answers: this client does not wait for the socket to appear."""
    with running_hypervisor(cluster_name, tmp_path) as running:
        running.attach("first").detach()
        yield running


def compiled_client(directory: Path, bits: int) -> Path:
    """The client's program; skips where there is no compiler (or no 32-bit one)."""
    client = directory / f"client{bits}"
    build = [need_tool("gcc"), f"-m{bits}", "-o", os.fspath(client)]
    probe = subprocess.run(
        [*build, "-xc", "-"],
        input=b"#include <stdio.h>\nint main(void) { return 0; }\n",
        capture_output=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip(f"gcc -m{bits} can't build a program (Debian: gcc-multilib)")
    subprocess.run([*build, *FLAGS, os.fspath(SOURCE), "-lrt"], check=True)
    return client


def run_client(
    client: Path, run_directory: Path, token: bytes, *, ring: bool = False
) -> tuple[int, list[str]]:
    """Exit code and lines."""
    finished = subprocess.run(
        [client, run_directory, "c", *(["ring"] if ring else [])],
        env={**os.environ, "TMEM_TOKEN": token.hex()},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    return finished.returncode, finished.stdout.splitlines()


@pytest.mark.parametrize("ring", [False, True] if memory_order_suffices() else [False])
@pytest.mark.parametrize("bits", [64, 32])
def test_a_c_client_is_served(
    bits: int, hypervisor: RunningHypervisor, tmp_path: Path, ring: bool
) -> None:
    """Every operation, each with what it answers; all lines are ok and none is missing."""
    client = compiled_client(tmp_path, bits)

    exit_code, lines = run_client(client, tmp_path, hypervisor.enrol("c"), ring=ring)

    assert [line for line in lines if not line.startswith("ok ")] == ["passed"]
    assert len(lines) > 60
    assert exit_code == 0
    assert "c" not in hypervisor.ask("stats")["guests"]


def test_a_c_client_with_a_wrong_token_is_refused(
    hypervisor: RunningHypervisor, tmp_path: Path
) -> None:
    """The reason is in WELCOME, for any language to print."""
    client = compiled_client(tmp_path, 64)
    hypervisor.enrol("c")

    exit_code, lines = run_client(client, tmp_path, bytes(32))

    assert lines == ["BAD refused: guest c is not enrolled with this token"]
    assert exit_code == 1
