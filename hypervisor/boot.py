"""The hypervisor as a process: find or make the arena, recover, go to jail, serve, clean up.

The file `arena` in the run directory holds the segment's name.  It is written once the segment is
formatted and removed before the segment goes, so a hypervisor that is started again after SIGKILL
finds its arena by it and nothing else.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from hypervisor.arena import Arena, format_arena
from hypervisor.jail import HypervisorJail
from hypervisor.machine import Machine
from hypervisor.recovery import recover
from hypervisor.server import FAULTS_MAX, Server
from hypervisor.settings import Administered, load, save
from ipc.errors import ExitCode, OperatorError
from ipc.jail import JailSpec
from ipc.logfile import log_to
from ipc.names import Registry, object_name
from ipc.ring import memory_order_suffices
from ipc.segment import create_segment, open_segment, remove_segment

log = logging.getLogger(__name__)

ARENA_FILE = "arena"


@dataclass(frozen=True)
class HypervisorSpec:
    """What a hypervisor process is started with.  It ends with its supervisor, if one is named."""

    cluster: str
    run_directory: Path
    arena_bytes: int
    eviction: str = "clock"
    supervisor_pid: int | None = None
    transport: str = "auto"
    """`ring` for guests that ask for one, `mqueue` for everybody, `auto` as the machine allows."""
    scheduling: str = "scheduled"
    admission: bool = True
    checksums: bool = False
    """Each page has one, so that an arena that changes by itself gives nobody wrong bytes.  Of an
    arena that is found it holds what it was made with."""
    lend: bool = False
    """The guests' RAM comes out of the arena, too."""
    faults_max: int = FAULTS_MAX
    """Broken rules after which a guest is detached."""
    jail: JailSpec = field(default_factory=JailSpec)
    """Its `gid` is the group of all guests."""


def run(spec: HypervisorSpec) -> None:
    """Serve until told to stop; then remove the arena.  Exits with an `ExitCode`."""
    log_to(spec.run_directory / "log" / "hypervisor.log")
    try:
        _serve(spec)
    except OperatorError as error:
        log.error("%s", error)
        sys.stderr.write(f"hypervisor: {error}\n")
        sys.exit(error.exit_code)
    except Exception:
        log.critical("event=bug", exc_info=True)
        sys.exit(ExitCode.HYPERVISOR_BUG)


def _serve(spec: HypervisorSpec) -> None:
    jail = HypervisorJail(spec.jail, spec.run_directory)
    ring = _choose_transport(spec.transport)
    registry = Registry(spec.run_directory)
    registry.add_process(os.getpid())
    name, arena = _open_arena(spec, registry)
    administered = load(spec.run_directory)
    try:
        machine = _machine(spec, arena, administered)
        recovered = recover(machine)
    except Exception:
        if not arena.checksums:
            raise
        # So much of it is damaged that nothing can be made of it: guests are better off without.
        log.critical("event=arena-given-up segment=%s", name, exc_info=True)
        (spec.run_directory / ARENA_FILE).unlink()
        remove_segment(name, registry)
        name, arena = _open_arena(spec, registry)
        machine = _machine(spec, arena, administered)
        recovered = recover(machine)
    log.info(
        "event=start generation=%d frames=%d guests=%d pools=%d objects=%d persistent=%d "
        "ephemeral=%d freed=%d lent=%d damaged=%d",
        machine.generation,
        arena.frames_count,
        *recovered,
        machine.store.damaged_pages,
    )

    def keep() -> None:
        administered.scheduling = machine.balance.mode
        save(spec.run_directory, administered)

    jail.shut()
    server = Server(
        machine,
        spec.run_directory,
        spec.cluster,
        registry,
        ring=ring,
        supervisor_pid=spec.supervisor_pid,
        faults_max=spec.faults_max,
        changed=keep,
        guests_gid=spec.jail.gid,
    )
    try:
        jail.filter()
        server.run()
    finally:
        server.close()
    (spec.run_directory / ARENA_FILE).unlink(missing_ok=True)
    remove_segment(name, registry)
    registry.remove_process(os.getpid())
    log.info("event=stop")


def _machine(spec: HypervisorSpec, arena: Arena, administered: Administered) -> Machine:
    return Machine(
        arena,
        policy=spec.eviction,
        scheduling=administered.scheduling or spec.scheduling,
        admission=spec.admission,
        lends=spec.lend,
        settings=administered.settings,
        grants=administered.grants,
        secret=os.urandom(8),
        now_ns=time.thread_time_ns,
        clock_ns=time.monotonic_ns,
    )


def _choose_transport(transport: str) -> bool:
    """Whether guests may have rings; said once in the log."""
    suffices = memory_order_suffices()
    if transport == "ring" and not suffices:
        raise OperatorError(
            f"the ring needs x86-64 and this is {platform.machine()}; use transport mqueue or auto",
            ExitCode.UNAVAILABLE,
        )
    ring = suffices and transport != "mqueue"
    why = "asked" if transport != "auto" else f"memory-order-of-{platform.machine()}"
    log.info("event=transport transport=%s why=%s", "ring" if ring else "mqueue", why)
    return ring


def _open_arena(spec: HypervisorSpec, registry: Registry) -> tuple[str, Arena]:
    path = spec.run_directory / ARENA_FILE
    if path.exists():
        name = path.read_text().strip()
        mapping = open_segment(name)
        if mapping is not None:
            return name, Arena(mapping)
        log.error("event=arena-lost segment=%s", name)
    name = object_name(spec.cluster, "arena", os.urandom)
    segment = create_segment(name, spec.arena_bytes, registry)
    arena = format_arena(segment, checksums=spec.checksums)
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(name + "\n")
    temporary.rename(path)
    return name, arena
