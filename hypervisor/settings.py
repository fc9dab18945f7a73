"""What the administrator has set, kept in the run directory across restarts of the hypervisor.

The file `settings` is one msgpack record: settings by guest name, grants, and how memory is
scheduled.  It is written to a second file and renamed after each change, so it is whole or as it
was.  Guests come and go under a name; what was set for the name stays.

Xen kept all of this in the hypervisor's heap: weights, caps and grants were lost with a migration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hypervisor.auth import Grants, Role
from hypervisor.pools import Settings
from hypervisor.sharing import Sharing
from ipc.abi import Priority
from ipc.codec import BadRecord, decode, encode, split_frame
from ipc.errors import ExitCode, OperatorError

SETTINGS_FILE: Final = "settings"


@dataclass
class Administered:
    """Everything that the file holds; `scheduling` is None until it was changed by hand."""

    settings: dict[str, Settings] = field(default_factory=dict)
    grants: Grants = field(default_factory=Grants)
    scheduling: str | None = None


def load(directory: Path) -> Administered:
    """What was set before; nothing if there is no file.  Raises OperatorError for a damaged one."""
    path = directory / SETTINGS_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Administered()
    try:
        frame = split_frame(data)
        if frame is None or frame[1]:
            raise BadRecord("cut short")
        return _from_record(decode(frame[0]))
    except (BadRecord, KeyError, TypeError, ValueError) as error:
        raise OperatorError(
            f"{path} is damaged ({error}); remove it, and set weights and grants again",
            ExitCode.BAD_CONFIG,
        ) from None


def save(directory: Path, administered: Administered) -> None:
    """Write the file anew."""
    record = {
        "scheduling": administered.scheduling,
        "grants": [[uuid.hex(), guest, role.value] for uuid, guest, role in administered.grants],
        "settings": {
            name: {
                **vars(settings),
                "priority": int(settings.priority),
                "sharing": settings.sharing.value,
            }
            for name, settings in administered.settings.items()
            if settings != Settings()
        },
    }
    path = directory / SETTINGS_FILE
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_bytes(encode(record))
    temporary.rename(path)


def _from_record(record: dict[str, Any]) -> Administered:
    administered = Administered(scheduling=record["scheduling"])
    for uuid, guest, role in record["grants"]:
        administered.grants.allow(bytes.fromhex(uuid), guest, Role(role))
    for name, fields in record["settings"].items():
        administered.settings[name] = Settings(
            **{
                **fields,
                "priority": Priority(fields["priority"]),
                "sharing": Sharing(fields["sharing"]),
            }
        )
    return administered
