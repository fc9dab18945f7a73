"""ABI.md says what the code does."""

from __future__ import annotations

import dataclasses
import struct
from enum import IntEnum, IntFlag

import pytest

from ipc import abi
from ipc.abi import REQUEST, Op, oid_from_int
from ipc.errors import GuestFault
from ipc.wire import decode_request
from tools.abi_document import (
    ABI_DOCUMENT,
    abi_document,
    enum_members,
    module_strings,
    operation_uses,
    struct_fields,
)

STRUCTS = {name: made for name, made in vars(abi).items() if isinstance(made, struct.Struct)}


@dataclasses.dataclass
class RequestFields:
    """REQUEST as a client fills it; the fields that an operation needs are set by `least`."""

    sequence: int = 1
    op: int = 0
    flags: int = 0
    count: int = 0
    pool: int = 0
    index: int = 0
    oid: bytes = bytes(24)
    slot: int = 0
    token: int = 0
    reserved: int = 0

    def message(self) -> bytes:
        return REQUEST.pack(*dataclasses.astuple(self))


def least(op: Op) -> RequestFields:
    """The smallest request of an operation."""
    return RequestFields(op=op, count=1 if "count" in operation_uses(op) else 0)


NONZERO = {
    "count": 2,
    "pool": 1,
    "index": 1,
    "oid": oid_from_int(1),
    "slot": 1,
    "token": 1,
}


def test_the_document_is_fresh() -> None:
    """`python -m tools.abi_document` was run after the last change."""
    assert abi_document() == ABI_DOCUMENT.read_text(), "run python -m tools.abi_document"


@pytest.mark.parametrize("op", Op, ids=lambda op: op.name)
@pytest.mark.parametrize("field", NONZERO)
def test_an_operation_uses_the_fields_that_the_document_lists(op: Op, field: str) -> None:
    """A field that is listed may be set; one that is not faults."""
    request = least(op)
    decode_request(request.message())
    setattr(request, field, NONZERO[field])

    if field in operation_uses(op):
        decode_request(request.message())
    else:
        with pytest.raises(GuestFault):
            decode_request(request.message())


@pytest.mark.parametrize("op", Op, ids=lambda op: op.name)
@pytest.mark.parametrize(("field", "value"), [("flags", 16), ("flags", 128), ("reserved", 1)])
def test_no_operation_uses_reserved_fields(op: Op, field: str, value: int) -> None:
    """They are room for later revisions, so they must be 0 now."""
    request = least(op)
    setattr(request, field, value)

    with pytest.raises(GuestFault):
        decode_request(request.message())


@pytest.mark.parametrize("name", STRUCTS)
def test_a_struct_is_explained_field_by_field(name: str) -> None:
    """As many names as fields, none without a meaning, no gap between them."""
    fields = struct_fields(STRUCTS[name], module_strings(abi)[name])

    assert [field.name for field in fields if not field.text] == []
    ends = [field.offset + field.width_bytes for field in fields]
    assert [field.offset for field in fields] == [0, *ends[:-1]]
    assert STRUCTS[name].size == ends[-1]


@pytest.mark.parametrize(
    "enumeration",
    [
        value
        for value in vars(abi).values()
        if isinstance(value, type)
        and issubclass(value, IntEnum | IntFlag)
        and value.__module__ == abi.__name__
    ],
    ids=lambda enumeration: enumeration.__name__,
)
def test_every_number_is_explained(enumeration: type[IntEnum | IntFlag]) -> None:
    """An enum member without a comment or a string would be a row without a meaning."""
    assert [member.name for member in enum_members(enumeration) if not member.text] == []
