"""Wait statuses, decoded once: ptrace(2), "Stopped states"."""

from __future__ import annotations

import signal

import pytest

from forkproof.probe import syscalls
from forkproof.probe.ptrace import MACHINES, Event, Kind, Registers, Status, decode


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (0x0000, Kind.EXITED, 0),
        (0x0300, Kind.EXITED, 3),
        (0x0009, Kind.KILLED, signal.SIGKILL),
        (0x008B, Kind.KILLED, signal.SIGSEGV),
        (0x857F, Kind.SYSCALL, 0),
        (0x057F, Kind.SIGNAL, signal.SIGTRAP),
        (0x0B7F, Kind.SIGNAL, signal.SIGSEGV),
        (0x1057F, Kind.EVENT, Event.FORK),
        (0x2057F, Kind.EVENT, Event.VFORK),
        (0x3057F, Kind.EVENT, Event.CLONE),
        (0x4057F, Kind.EVENT, Event.EXEC),
        (0x80057F, Kind.EVENT, Event.STOP),
        (0x80137F, Kind.GROUP_STOP, signal.SIGSTOP),
        (0x80147F, Kind.GROUP_STOP, signal.SIGTSTP),
    ],
)
def test_decode(status: int, kind: Kind, code: int) -> None:
    assert decode(7, status) == Status(7, kind, code)


def test_only_the_end_is_an_end() -> None:
    assert decode(7, 0x0009).is_end
    assert not decode(7, 0x4057F).is_end
    assert decode(7, 0x4057F).event is Event.EXEC


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda m: m.name)
def test_pc_and_sp_are_where_the_kernel_has_them(machine: object) -> None:
    from forkproof.probe.ptrace import Machine

    assert isinstance(machine, Machine)
    values = Registers(machine, tuple(range(len(machine.registers))))
    assert values.pc == machine.registers.index(machine.pc)
    assert values.with_pc(77).pc == 77
    assert values.with_pc(77).sp == values.sp


class TestSyscalls:
    def test_futex_wait_names_its_word(self) -> None:
        assert syscalls.futex_wait("x86_64", 202, (0x1000, 0x80, 2, 0, 0, 0)) == 0x1000
        assert syscalls.futex_wait("aarch64", 98, (0x1000, 0, 2, 0, 0, 0)) == 0x1000

    @pytest.mark.parametrize(("number", "operation"), [(202, 0x81), (202, 10), (98, 0)])
    def test_what_does_not_wait(self, number: int, operation: int) -> None:
        assert syscalls.futex_wait("x86_64", number, (0x1000, operation, 2, 0, 0, 0)) is None

    def test_text(self) -> None:
        text = syscalls.text("x86_64", 202, (0x7F00, 0x80, 2, 0, 0, 0))
        assert text == "futex(0x7f00, FUTEX_WAIT_PRIVATE, 2)"
        assert syscalls.text("aarch64", 57, (3, 0, 0, 0, 0, 0), -9) == "close(3) = -1 EBADF"

    def test_unknown_number(self) -> None:
        assert syscalls.name_of("x86_64", 9999) == "syscall_9999"
