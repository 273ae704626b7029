"""The system call by which a thread is about to create a process.

Owns: telling fork, vfork, clone and clone3 with their flags from each other and from the creation of threads.
Takes: a thread in a system call. Gives: `ForkCall`.
Must never: be asked of a thread outside a system call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from forkproof.probe.tracee import CLONE_VM, FORKS, Thread

_CLONE_THREAD: Final = 0x10000
_CLONE_VFORK: Final = 0x4000


@dataclass(frozen=True, slots=True)
class ForkCall:
    """A call that makes a process, with what decides what its child can inherit."""

    name: str
    flags: int

    @property
    def is_thread(self) -> bool:
        """It makes a thread, not a process."""
        return bool(self.flags & _CLONE_THREAD)

    @property
    def shares_memory(self) -> bool:
        """The child has no copy of the locks, but the locks themselves."""
        return bool(self.flags & CLONE_VM) or self.name == "vfork"

    @property
    def copies_memory(self) -> bool:
        """A fork in the sense of the hazard."""
        return not self.is_thread and not self.shares_memory


def fork_call(thread: Thread) -> ForkCall | None:
    """The call that a stopped thread is in, if it creates something."""
    registers = thread.registers
    machine = registers.machine
    arguments: tuple[int, ...]
    if thread.syscall is not None and thread.syscall.is_entry:
        number, arguments = thread.syscall.number, thread.syscall.arguments
    elif machine.name == "x86_64":
        number, arguments = registers["orig_rax"], (registers["rdi"],)
    else:
        number, arguments = registers["x8"], (registers["x0"],)
    name = FORKS[machine.name].get(number)
    match name:
        case None:
            return None
        case "clone3":
            return ForkCall(name, thread.process.memory.word(arguments[0]) or 0)
        case "clone":
            return ForkCall(name, arguments[0])
    return ForkCall(name, CLONE_VM if name == "vfork" else 0)
