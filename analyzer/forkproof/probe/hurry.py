"""Waits with a time limit end at once: a thread that waits for a bounded time is seen to give up, instead of being
taken for one that waits for ever.

Owns: the change of one system call: its time is read from a place that says 0. Takes: a thread stopped at the entry of
      a call, later at its exit. Gives: whether that was done.
Must never: leave a register changed when the call has returned, or write where the program keeps anything: the zeros
      are well below the stack pointer, and its red zone.
Wrong where: a thread tells by a clock, and not by its calls, how long it has waited: that takes as long as it takes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from forkproof.probe import syscalls
from forkproof.probe.ptrace import Registers, SyscallStop
from forkproof.probe.tracee import Thread

_REGISTERS: Final = {"x86_64": ("rdi", "rsi", "rdx", "r10", "r8", "r9"), "aarch64": tuple(f"x{n}" for n in range(6))}
"""Arguments of a system call: syscall(2)."""
_BELOW: Final = 1024
"""Bytes below the stack pointer."""
_TIMESPEC: Final = 16


class Hurry:
    """The calls of one run that were changed."""

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self._changed: dict[int, tuple[str, int]] = {}
        """By thread: the register, and what was in it."""

    def shorten(self, thread: Thread, call: SyscallStop) -> bool:
        """The thread is at the entry of a call: if it has a time limit, that is over as soon as it begins."""
        index = syscalls.time_argument(self.machine, call.number)
        if index is None or not call.arguments[index]:
            return False
        zeros = (thread.registers.sp - _BELOW) & ~(_TIMESPEC - 1)
        memory = thread.process.memory
        for word in (zeros, zeros + 8):
            if memory.word(word, 8) != 0 and not memory.set_word(word, 0, 8):
                return False
        name = _REGISTERS[self.machine][index]
        self._changed[thread.tid] = name, thread.registers[name]
        thread.set_registers(_with(thread.registers, name, zeros))
        return True

    def restore(self, thread: Thread) -> None:
        """The thread is at the exit of a call: nothing is left of the change. A result may be where an argument was."""
        name, value = self._changed.pop(thread.tid, ("", 0))
        if name and name != thread.registers.machine.result:
            thread.set_registers(_with(thread.registers, name, value))


def _with(registers: Registers, name: str, value: int) -> Registers:
    values = list(registers.values)
    values[registers.machine.registers.index(name)] = value
    return replace(registers, values=tuple(values))
