"""Other secrets for a cluster that runs.

  secret       who knows it                       where it lies              drawn anew
  token        the guest, the hypervisor a        memory, the digest in      each start,
               digest                             guests/NAME                `rotate token`
  cluster key  the nodes of a volume              memory, keys/VOLUME after  each start,
                                                  `rotate key`               `rotate key`
  hash seed    the hypervisor                     memory                     each start,
                                                                             `rotate seed`

All of them come from the kernel (getrandom), go from process to process over pipes and sockets
that only their user can open, and are on no command line, in no environment and in no log.  Names
of kernel objects are random, too, but no secrets: their mode keeps others out.

Whoever has only the old secret
  token   can't attach any more.  Who is attached stays so: the guest itself was told, and a
          program that was enrolled by hand is out once it has to attach again.
  key     gets no link to a node that has the new one.  Links that are up go on (each has keys of
          its own), so nobody notices the change; a node that was not told is named, and the command
          is repeated when it answers.
  seed    can't tell which pages fall into one bucket.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import Final

from guests.node import NodeSpec
from ipc.abi import TOKEN_BYTES
from ipc.attach import enrol, enrolled_uid
from ipc.codec import Record
from ipc.errors import Disconnected, ExitCode, OperatorError
from tools.control import ask
from tools.rundir import ClusterDirectory, ClusterRecord

KEY_BYTES: Final = 32


def rotate_token(directory: ClusterDirectory, record: ClusterRecord, name: str) -> None:
    """Give a guest another token; raises OperatorError, and then nothing has changed."""
    roster = directory.path / "guests" / name
    uid = enrolled_uid(directory.path, name)
    if uid is None or name not in [guest.name for guest in record.guests]:
        raise OperatorError(
            f"there is no guest {name!r} that could be told its new token; a program of your own "
            "is enrolled anew instead",
            ExitCode.USAGE,
        )
    before = roster.read_bytes()
    token = os.urandom(TOKEN_BYTES)
    # First the roster: a guest that attaches in between is refused, and tries again.
    enrol(directory.path, name, token, uid)
    try:
        _tell(directory, name, {"token": token})
    except OperatorError:
        roster.write_bytes(before)
        raise
    _note(directory, {"what": "token", "guest": name})


def rotate_key(directory: ClusterDirectory, record: ClusterRecord, volume: str) -> list[str]:
    """Give the nodes of a volume another key; their names.  Raises OperatorError, which names those
    that were not told."""
    nodes, silent = _nodes(directory, record, volume)
    key = os.urandom(KEY_BYTES)
    path = directory.key_file(volume)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_bytes(key)
    temporary.rename(path)
    for name in nodes:
        try:
            _tell(directory, name, {"key": key})
        except OperatorError as error:
            silent.append(str(error))
    _note(directory, {"what": "key", "volume": volume})
    if silent:
        why = "; ".join(silent)
        raise OperatorError(
            f"volume {volume}: not every node has the new key ({why}); no new link comes up "
            "between one that has it and one that has not; repeat this when they answer",
            ExitCode.UNAVAILABLE,
        )
    return nodes


def with_present_key(directory: ClusterDirectory, node: NodeSpec) -> NodeSpec:
    """The node as it is to be started now."""
    try:
        return replace(node, key=directory.key_file(node.volume).read_bytes())
    except FileNotFoundError:
        return node


def _nodes(
    directory: ClusterDirectory, record: ClusterRecord, volume: str
) -> tuple[list[str], list[str]]:
    """The nodes of a volume, and what is wrong with guests that may be."""
    volumes: dict[str, list[str]] = {}
    silent = []
    for guest in record.guests:
        try:
            status = ask(directory.guest_socket(guest.name), {"verb": "status"})
        except Disconnected as error:
            silent.append(f"{guest.name} does not answer: {error}")
            continue
        if status.get("node"):
            volumes.setdefault(status["node"]["volume"], []).append(guest.name)
    if volume not in volumes:
        known = ", ".join(sorted(volumes)) or "none"
        raise OperatorError(
            f"no guest that answers has a volume {volume!r}; there are {known}", ExitCode.USAGE
        )
    return volumes[volume], silent


def _tell(directory: ClusterDirectory, name: str, secret: Record) -> None:
    try:
        answer = ask(directory.guest_socket(name), {"verb": "rekey", **secret})
    except Disconnected as error:
        raise OperatorError(f"{name} does not answer: {error}", ExitCode.UNAVAILABLE) from None
    if "error" in answer:
        raise OperatorError(f"{name}: {answer['error']}", ExitCode.UNAVAILABLE)


def _note(directory: ClusterDirectory, change: Record) -> None:
    """Have the audit log say that there is a new secret, and nothing of the secret.  Its keeper may
    be dead, and then the change holds all the same."""
    with contextlib.suppress(Disconnected):
        ask(directory.hypervisor_socket, {"verb": "rotated", **change})
