"""Writes `ipc/ABI.md` from the code, so that the document can't say anything else than the code.

    python -m tools.abi_document [--check]

Values and layouts come from the imported modules; the words come from their docstrings, from the
strings after constants, enum members and structs, and from the comments behind enum members.
`--check` writes nothing and exits with 1 if the file is stale.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import struct
import sys
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ipc import abi, attach, channel, limits, mqueue, ring, window
from ipc.errors import ExitCode

ABI_DOCUMENT = Path(inspect.getfile(abi)).with_name("ABI.md")

_WIDTHS = {"B": "u8", "H": "u16", "I": "u32", "i": "i32", "Q": "u64"}
_USES = re.compile(r"^uses: (.+)$", re.MULTILINE)

# --- the words in the source --------------------------------------------------------------------


class Member(NamedTuple):
    """An enum member and what the source says about it."""

    name: str
    value: int
    text: str


class Field(NamedTuple):
    """A field of a message; `offset` and `width_bytes` in bytes."""

    name: str
    type_name: str
    offset: int
    width_bytes: int
    text: str


def strings_after(body: list[ast.stmt]) -> dict[str, str]:
    """Name -> the string statement that follows its assignment."""
    found = {}
    for statement, following in pairwise(body):
        name = _assigned(statement)
        if name and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            found[name] = inspect.cleandoc(str(following.value.value))
    return found


def module_strings(module: ModuleType) -> dict[str, str]:
    """`strings_after` of a module's top level."""
    return strings_after(ast.parse(inspect.getsource(module)).body)


def enum_members(enumeration: type[IntEnum | IntFlag]) -> list[Member]:
    """Every member with the string after it or the comment behind it."""
    source = inspect.getsource(enumeration)
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    strings = strings_after(definition.body)
    lines = source.splitlines()
    members = []
    for statement in definition.body:
        name = _assigned(statement)
        if name:
            comment = lines[statement.lineno - 1].partition("#")[2].strip()
            members.append(Member(name, int(enumeration[name]), strings.get(name, comment)))
    return members


def operation_uses(operation: abi.Op) -> frozenset[str]:
    """Fields of REQUEST that an operation reads, besides `sequence` and `op`."""
    text = next(member.text for member in enum_members(abi.Op) if member.value == operation)
    match = _USES.search(text)
    assert match is not None, f"{operation.name} does not say what it uses"
    return frozenset(match[1].split()) - {"nothing"}


def struct_fields(layout: struct.Struct, text: str) -> list[Field]:
    """The fields of a little-endian struct, named and explained by the string after it."""
    names, _, rest = text.partition(".")
    explained = dict(re.findall(r"^([\w ]+): (.+)$", rest, re.MULTILINE))
    fields = []
    offset = 0
    codes = re.findall(r"(\d*)([a-zA-Z])", layout.format.removeprefix("<"))
    for name, (count, code) in zip(names.replace("\n", " ").split(", "), codes, strict=True):
        width_bytes = struct.calcsize(f"<{count}{code}")
        type_name = f"u8[{count}]" if code == "s" else _WIDTHS[code]
        fields.append(Field(name, type_name, offset, width_bytes, explained.get(name, "")))
        offset += width_bytes
    assert offset == layout.size
    return fields


def _assigned(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id
    return None


# --- Markdown -----------------------------------------------------------------------------------


def prose(text: str) -> str:
    """A docstring as Markdown: indented blocks that belong to no list become code blocks."""
    output: list[str] = []
    in_list = in_code = False
    for line in inspect.cleandoc(text).splitlines():
        indented = line.startswith("  ") and not in_list
        if line and indented != in_code:
            blank = bool(output) and not output[-1]
            if in_code and blank:
                output.pop()
            output += ["```", ""] if in_code else [*([] if blank else [""]), "```text"]
            in_code = indented
        if line.startswith("* "):
            in_list = True
        elif line and not line.startswith(" "):
            in_list = False
        output.append(line)
    return "\n".join([*output, "```"] if in_code else output)


def table(*rows: tuple[object, ...]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def enum_table(enumeration: type[IntEnum | IntFlag]) -> str:
    """Value, name and meaning of each member."""
    rows = [(member.value, f"`{member.name}`", member.text) for member in enum_members(enumeration)]
    return table(("value", "name", "meaning"), *rows)


def struct_table(name: str, module: ModuleType = abi) -> str:
    """Offset, width, type, name and meaning of each field."""
    layout = getattr(module, name)
    rows = [
        (field.offset, field.width_bytes, f"`{field.type_name}`", f"`{field.name}`", field.text)
        for field in struct_fields(layout, module_strings(module)[name])
    ]
    return table(("offset", "bytes", "type", "field", "meaning"), *rows)


def constant_table(module: ModuleType, names: str) -> str:
    """Name, value and meaning of constants."""
    strings = module_strings(module)
    rows = [
        (f"`{name}`", _value(getattr(module, name)), " ".join(strings.get(name, "").split()))
        for name in names.split()
    ]
    return table(("name", "value", "meaning"), *rows)


def _value(value: object) -> str:
    if isinstance(value, bytes):
        if value.isascii():
            return f"`{value.decode()}`"
        assert set(value) == {0xFF}
        return f"{len(value)} bytes 0xff"
    if isinstance(value, int) and value > 0xFFFF:
        return hex(value)
    return str(value)


def _operations() -> Iterator[str]:
    for member in enum_members(abi.Op):
        text, _, facts = member.text.partition("uses: ")
        uses, *answers = facts.splitlines()
        yield f"### {member.value} `{member.name}`\n\n{text.strip()}\n"
        fields = ", ".join(f"`{name}`" if name != "nothing" else name for name in uses.split())
        yield f"Uses {fields}.\n"
        rows = []
        for answer in answers:
            name, _, meaning = answer.partition(": ")
            rows.append((f"`{name}`", meaning))
        yield table(("answer", "meaning"), *rows) + "\n"


# --- the document -------------------------------------------------------------------------------


def _documented(thing: object) -> str:
    text = inspect.getdoc(thing)
    assert text
    return prose(text)


def _sections() -> Iterator[str]:
    yield "# The tmem hypercall ABI"
    yield (
        "Generated from `ipc/` by `python -m tools.abi_document`; don't edit. All integers are "
        "little-endian, no struct has padding, and all widths are the same for 32-bit clients."
    )
    yield _documented(abi)
    yield constant_table(
        abi, "SPEC_VERSION ABI_REVISION PAGE_BYTES EXTENT_PAGES_MAX OID_BYTES UUID_BYTES"
    )

    yield "## Attach"
    yield _documented(attach)
    yield "### HELLO"
    yield struct_table("HELLO")
    yield enum_table(abi.HelloFlag)
    yield "A guest name: " + _documented(attach.is_guest_name)
    yield "### WELCOME"
    yield struct_table("WELCOME")
    yield enum_table(abi.WelcomeFlag)
    yield "### CONFIRM and BYE"
    yield struct_table("CONFIRM")
    yield constant_table(abi, "HELLO_MAGIC WELCOME_MAGIC CONFIRM_MAGIC BYE_MAGIC")
    yield constant_table(limits, "HANDSHAKE_SECONDS HANDSHAKES_MAX")

    yield "## Message queues"
    yield _documented(mqueue)
    queues = ("REQUEST_QUEUE_MESSAGES", "REPLY_QUEUE_MESSAGES", "PATIENCE_SECONDS")
    yield constant_table(limits, " ".join(queues))

    yield "## The window"
    yield _documented(window)
    yield constant_table(
        limits,
        "WINDOW_BYTES WINDOW_SLOTS WINDOW_TABLE_OFFSET WINDOW_CALL_OFFSET "
        "WINDOW_COMPLETION_OFFSET WINDOW_SLOTS_OFFSET BATCH_TABLE_BYTES",
    )
    yield "### Shared info page"
    yield struct_table("SHARED_INFO", window)

    yield "## The ring"
    yield _documented(ring)
    yield f"### CALL_BLOCK, {abi.CALL_BLOCK.size} bytes"
    yield struct_table("CALL_BLOCK")
    yield f"### COMPLETION_BLOCK, {abi.COMPLETION_BLOCK.size} bytes"
    yield struct_table("COMPLETION_BLOCK")
    yield constant_table(
        limits, "YIELDS_MAX SLOW_YIELD_NS BACK_OFF_CALLS_MIN BACK_OFF_CALLS_MAX PATIENCE_SECONDS"
    )

    yield "## Calls"
    yield _documented(channel)
    yield f"### REQUEST, {abi.REQUEST_BYTES} bytes"
    yield struct_table("REQUEST")
    yield f"### REPLY, {abi.REPLY_BYTES} bytes"
    yield struct_table("REPLY")
    yield f"### BATCH_ENTRY, {abi.BATCH_ENTRY_BYTES} bytes"
    yield struct_table("BATCH_ENTRY")

    yield "## Operations"
    yield _documented(abi.Op)
    yield "\n".join(_operations()).rstrip()

    yield "## Flags and sentinels"
    for flags in (abi.CallFlag, abi.ReplyFlag, abi.PoolFlag):
        yield f"### {flags.__name__}"
        yield _documented(flags)
        yield enum_table(flags)
    names = "POOL_PAGE_SIZE_SHIFT POOL_PAGE_SIZE_MASK POOL_VERSION_SHIFT POOL_RESERVED_BITS"
    yield constant_table(abi, names)
    yield (
        f"So an ephemeral pool of 4 KiB pages has the flag word {abi.pool_flag_word():#010x}, a "
        f"persistent one {abi.pool_flag_word(persist=True):#010x}."
    )
    yield constant_table(abi, "ANY_UUID INVALID_OID FIRST_FAULT_REASON")

    yield "## Status"
    yield _documented(abi.Status)
    yield enum_table(abi.Status)
    yield "## Reason"
    yield _documented(abi.Reason)
    yield enum_table(abi.Reason)


def abi_document() -> str:
    """The whole of ABI.md."""
    return "\n\n".join(_sections()) + "\n"


def main() -> None:
    """Write the document, or check it."""
    parser = argparse.ArgumentParser(prog="python -m tools.abi_document", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the file is stale")
    arguments = parser.parse_args()
    text = abi_document()
    if not arguments.check:
        ABI_DOCUMENT.write_text(text)
    elif not ABI_DOCUMENT.exists() or ABI_DOCUMENT.read_text() != text:
        print(f"{ABI_DOCUMENT.name} is stale: run python -m tools.abi_document", file=sys.stderr)
        sys.exit(ExitCode.VIOLATED)


if __name__ == "__main__":
    main()
