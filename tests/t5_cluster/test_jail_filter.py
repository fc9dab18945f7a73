"""The filters of system calls, run for every number there is."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from guests.jail import CALLS, NODE_CALLS
from hypervisor.jail import calls as hypervisor_calls
from ipc.jail.seccomp import ALLOW, KILL, REFUSE, Call, program
from ipc.jail.syscalls import AARCH64, NUMBERS, X32_BIT, X86_64, Architecture, number
from tests.support.bpf import answer

NUMBERS_END = 1024
"""Linux 6.18 has 470."""
PID = 4711
POLICIES = {
    "guest": CALLS,
    "node": (*CALLS, *NODE_CALLS),
    "hypervisor": hypervisor_calls(PID),
}
EPERM = REFUSE | errno.EPERM
FORBIDDEN = """
    execve fork vfork clone clone3 ptrace process_vm_readv kill mount chroot setuid setresuid bpf
    keyctl userfaultfd io_uring_setup pidfd_getfd prctl seccomp shmget bind listen
    landlock_create_ruleset
"""
"""What nobody of ours may call under any condition."""

policies = pytest.mark.parametrize("policy", POLICIES)
machines = pytest.mark.parametrize("machine", [X86_64, AARCH64], ids=lambda machine: machine.name)


def _fitting(call: Call) -> list[int]:
    """Arguments that meet all conditions, with every other bit set."""
    arguments = [0xFFFF_FFFF_FFFF_FFFF] * 6
    for position, mask, value in call.arguments:
        arguments[position] = (arguments[position] & ~mask) | value
    return arguments


@policies
@machines
def test_what_is_not_on_the_list_is_refused(policy: str, machine: Architecture) -> None:
    """With all argument bits set, so that no condition is met by chance."""
    calls = POLICIES[policy]
    filtering = program(calls, machine)
    listed = {number(call.name, machine) for call in calls} - {None}
    free = {number(call.name, machine) for call in calls if not call.arguments} - {None}

    for one in range(NUMBERS_END):
        got = answer(filtering, machine.audit, one, [0xFFFF_FFFF_FFFF_FFFF] * 6)
        if one in free:
            assert got == ALLOW, one
        elif one not in listed:
            assert got == EPERM, one


@policies
@machines
def test_each_call_is_allowed_under_its_conditions_and_no_others(
    policy: str, machine: Architecture
) -> None:
    """Each bit that a condition looks at is turned over in turn."""
    calls = POLICIES[policy]
    filtering = program(calls, machine)

    for call in calls:
        found = number(call.name, machine)
        if found is None:
            continue
        fitting = _fitting(call)
        assert answer(filtering, machine.audit, found, fitting) == ALLOW, call
        others = [one for one in calls if one.name == call.name and one is not call]
        for position, mask, _value in call.arguments:
            for bit in (bit for bit in range(32) if mask >> bit & 1):
                spoilt = list(fitting)
                spoilt[position] ^= 1 << bit
                if not any(_meets(one, spoilt) for one in others):
                    assert answer(filtering, machine.audit, found, spoilt) == EPERM, (call, bit)


def _meets(call: Call, arguments: list[int]) -> bool:
    return all(arguments[position] & mask == value for position, mask, value in call.arguments)


@policies
def test_numbers_of_another_architecture_are_death(policy: str) -> None:
    """32-bit calls from a 64-bit process, and x32's."""
    filtering = program(POLICIES[policy], X86_64)

    for one in range(NUMBERS_END):
        assert answer(filtering, 0x40000003, one) == KILL, "i386"
        assert answer(filtering, AARCH64.audit, one) == KILL
        assert answer(filtering, X86_64.audit, X32_BIT | one) == KILL
    assert answer(filtering, X86_64.audit, 0xFFFF_FFFF) == KILL


@policies
def test_nothing_dangerous_is_on_a_list(policy: str) -> None:
    """The lists may grow; not by these."""
    names = {call.name for call in POLICIES[policy]}

    assert not names & set(FORBIDDEN.split())
    assert all(call.reason for call in POLICIES[policy])
    if policy == "guest":
        assert not names & {"open", "openat", "unlink", "pidfd_open", "pidfd_send_signal"}


@policies
def test_a_filter_fits_the_kernel(policy: str) -> None:
    """At most 4096 instructions, whose jumps are a byte."""
    assert len(program(POLICIES[policy], X86_64)) <= 4096
    assert all(
        max(if_true, if_false) < 256
        for _, if_true, if_false, _ in program(POLICIES[policy], X86_64)
    )


def test_signals_go_where_they_may() -> None:
    """A node kills and does nothing else; the hypervisor wakes itself."""
    node = program(POLICIES["node"], X86_64)
    hypervisor = program(POLICIES["hypervisor"], X86_64)

    assert answer(node, X86_64.audit, 424, [3, 9]) == ALLOW
    assert answer(node, X86_64.audit, 424, [3, 15]) == EPERM
    assert answer(hypervisor, X86_64.audit, 234, [PID, 5, 23]) == ALLOW
    assert answer(hypervisor, X86_64.audit, 234, [PID + 1, 5, 23]) == EPERM


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", X86_64.column),
        ("/usr/include/asm-generic/unistd.h", AARCH64.column),
    ],
)
def test_numbers_are_the_kernels(header: str, column: int) -> None:
    """As the kernel's own headers have them."""
    if not Path(header).exists():
        pytest.skip(f"no {header}")
    # The generic table has numbers for fcntl and its like under the names of both word sizes.
    pattern = re.compile(r"#define __NR(?:3264)?_(\w+)\s+(\d+)")
    theirs = {name: int(found) for name, found in pattern.findall(Path(header).read_text())}
    if column == AARCH64.column:
        theirs |= {"newfstatat": theirs["fstatat"]}
        theirs.pop("sync_file_range2", None)

    ours = {name: found[column] for name, found in NUMBERS.items() if found[column] is not None}
    assert {name: theirs.get(name, found) for name, found in ours.items()} == ours
    absent = {name for name, found in NUMBERS.items() if found[column] is None}
    assert not absent & set(theirs)
