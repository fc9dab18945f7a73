"""Guest code that is up to no good, and how it is run: in a guest, from inside of its jail.

An adversary is a Python module, by habit in `guests.adversaries`, with one function:

    def run(cell: Cell) -> Iterator[None]:
        cell.report["attempts"] = cell.report["succeeded"] = 0
        for _ in range(cell.count("calls", 1000, 1, 10**6)):
            cell.channel.call(request)              # raw: whatever bytes it likes
            cell.report["attempts"] += 1
            yield                                   # lets the guest answer its control socket

`GuestSpec.adversary` names the module, and the guest then has one workload more, `adversary`:

    {"verb": "run", "workload": "adversary", "seed": 1, "parameters": {...}}     begins it
    {"verb": "status"}      -> "state", "done", "total", "error", and "report": what it has written

What a module takes is what its text asks for: names of parameters stand there literally, as in the
call of `count` above, so `parameters` can tell them before anything has run.

The module is read and compiled while the guest may still open files, and so is whatever its text
imports; its own code, the top of the module included, runs when the workload begins, after the jail
is shut (`guests.jail`).  What it raises ends the workload with `error` and does the guest no harm.
It need not yield: then the guest is deaf meanwhile, and its supervisor will have to kill it.

With `jail = "off"` the same module does the same with all the rights of the user.
"""

from __future__ import annotations

import ast
import errno
import importlib.util
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Final

from fs.errors import error
from guests.kernel import GuestSpec, Kernel
from guests.node import Node
from guests.process import ProcessKilled
from guests.workloads.job import BadParameters, Job
from ipc.abi import UUID_BYTES
from ipc.channel import Channel
from ipc.errors import Disconnected, ExitCode, OperatorError

log = logging.getLogger(__name__)

WORKLOAD: Final = "adversary"
KINDS: Final = ("text", "uuid", "number", "count")
"""Of parameters, by the methods of `Cell` that take them."""


class Cell:
    """All that an adversary has: the guest that it runs in, and what it was asked to do.

    `report` is told to whoever asks for the guest's status: numbers and texts under text keys.
    """

    def __init__(self, job: Job, kernel: Kernel, spec: GuestSpec) -> None:
        self.job = job
        self.kernel = kernel
        self.spec = spec
        """Name, run directory, token, image: what a guest knows of itself."""
        self.random = job.random
        self.text = job.text
        self.number = job.number
        self.count = job.count
        self.report: dict[str, Any] = job.report

    def uuid(self, name: str, default: str | None = None) -> bytes:
        """A parameter that is the uuid of a shared pool: 32 hex digits."""
        text = self.text(name, default)
        try:
            uuid = bytes.fromhex(text)
        except ValueError:
            uuid = b""
        if len(uuid) != UUID_BYTES:
            raise BadParameters(f"parameter {name} must be 32 hex digits, not {text!r}")
        return uuid

    @property
    def node(self) -> Node:
        """The node that this guest is; BadParameters if it is none."""
        node = self.kernel.node
        if node is None:
            raise BadParameters("this guest is no node of a volume; by hand: --nodes 2")
        return node

    def check_node(self) -> None:
        """BadParameters if this guest is no node."""
        _ = self.node

    @property
    def channel(self) -> Channel:
        """To the hypervisor, below everything that a well-behaved kernel would do; Disconnected."""
        attachment = self.kernel.attachment
        if attachment is None or attachment.calls is None:
            raise Disconnected("there is no hypervisor")
        return attachment.calls.channel


def parameters(module: str) -> dict[str, str]:
    """What a module asks its cell for: by name one of `KINDS`.  Raises OperatorError if there is no
    such module."""
    tree, _ = _parsed(module)
    return {
        node.args[0].value: node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in KINDS
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }


def load(module: str) -> CodeType:
    """The compiled text of a module, none of which has run; what it imports is imported.

    Raises OperatorError if there is no such module.
    """
    tree, origin = _parsed(module)
    for name in _imported(tree):
        try:
            import_module(name)
        except ImportError as reason:
            log.warning("adversary=%s event=not-imported why=%s", module, reason)
    return compile(tree, origin, "exec", dont_inherit=True)


def _parsed(module: str) -> tuple[ast.Module, str]:
    """The text of a module, and where it lies."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None:
        raise OperatorError(
            f"there is no adversary {module!r}; name a Python module", ExitCode.NO_INPUT
        )
    try:
        return ast.parse(Path(found.origin).read_bytes(), found.origin), found.origin
    except (OSError, SyntaxError, ValueError) as reason:
        raise OperatorError(f"the adversary {module}: {reason}", ExitCode.NO_INPUT) from None


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            yield node.module
            # A name may be a module, too.
            for alias in node.names:
                try:
                    submodule = importlib.util.find_spec(f"{node.module}.{alias.name}")
                except (ImportError, ValueError):
                    submodule = None
                if submodule is not None:
                    yield f"{node.module}.{alias.name}"


def workload(
    module: str, code: CodeType, kernel: Kernel, spec: GuestSpec
) -> Callable[[Job], Iterator[None]]:
    """What the kernel begins when it is asked for the workload `adversary`."""

    def begin(job: Job) -> Iterator[None]:
        namespace = ModuleType(module)
        begun = False
        try:
            exec(code, vars(namespace))
            for _ in namespace.run(Cell(job, kernel, spec)):
                yield
                begun = True
        except BadParameters as reason:
            if not begun:
                raise
            # Only at the start does the kernel expect that.
            raise error(errno.EINVAL, str(reason)) from reason
        except (OSError, ProcessKilled):
            raise
        except Exception as reason:
            log.exception("adversary=%s event=failed", module)
            raise error(errno.EIO, f"{type(reason).__name__}: {reason}") from reason

    return begin
