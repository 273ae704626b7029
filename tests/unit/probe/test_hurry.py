"""A wait with a time limit is over at once, and nothing is left of the change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from forkproof.probe import syscalls
from forkproof.probe.hurry import Hurry
from forkproof.probe.ptrace import MACHINES, Registers, SyscallStop
from forkproof.probe.tracee import Thread

SP, TIME = 0x7000, 0x6F00
CALLS = [("x86_64", 202, 3, "r10"), ("x86_64", 230, 2, "rdx"), ("aarch64", 98, 3, "x3"), ("aarch64", 115, 2, "x2")]
"""futex and clock_nanosleep: number, which argument is the time, where it is."""


class Memory:
    def __init__(self) -> None:
        self.words: dict[int, int] = {}

    def word(self, address: int, _size: int) -> int:
        return self.words.get(address, 7)

    def set_word(self, address: int, value: int, _size: int) -> bool:
        self.words[address] = value
        return True


def thread(machine: str, **values: int) -> Thread:
    known = MACHINES[machine]
    registers = Registers(known, tuple(values.get(name, 0) for name in known.registers))
    made = SimpleNamespace(tid=1, registers=registers, process=SimpleNamespace(memory=Memory()))
    made.set_registers = lambda wanted: setattr(made, "registers", wanted)
    return cast("Thread", made)


def call(number: int, index: int, value: int) -> SyscallStop:
    return SyscallStop(True, number, tuple(value if n == index else 1 for n in range(6)), 0)


@pytest.mark.parametrize(("machine", "number", "index", "register"), CALLS)
def test_there_and_back(machine: str, number: int, index: int, register: str) -> None:
    hurry, one = Hurry(machine), thread(machine, **{MACHINES[machine].sp: SP, register: TIME})
    before = one.registers
    assert hurry.shorten(one, call(number, index, TIME))
    zeros = one.registers[register]
    assert zeros < SP - 128
    assert (one.process.memory.word(zeros, 8), one.process.memory.word(zeros + 8, 8)) == (0, 0)
    hurry.restore(one)
    assert one.registers == before


@pytest.mark.parametrize(("machine", "number", "index", "register"), CALLS)
def test_a_wait_without_a_limit_is_left_alone(machine: str, number: int, index: int, register: str) -> None:
    one = thread(machine, **{MACHINES[machine].sp: SP, register: 0})
    before = one.registers
    assert not Hurry(machine).shorten(one, call(number, index, 0))
    assert one.registers == before


@pytest.mark.parametrize(("machine", "number", "restarts"), [("x86_64", 219, 37), ("aarch64", 128, 103)])
def test_what_a_call_is(machine: str, number: int, restarts: int) -> None:
    assert syscalls.is_restart(machine, number)
    assert not syscalls.is_restart(machine, None)
    timer = 38 if machine == "x86_64" else restarts
    assert syscalls.sets_timer(machine, timer, (0, 0x1000, 0, 0, 0, 0))
    assert not syscalls.sets_timer(machine, timer, (0, 0, 0, 0, 0, 0))
