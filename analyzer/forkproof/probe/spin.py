"""Does a thread spin on a lock by looking at its word, and for ever? One round of its loop, instruction by instruction.

Owns: both claims. Many locks are looked at until they are free and only then tried: who waits comes to no acquire site.
Takes: a stopped thread, which addresses are the lock's. Gives: yes or no; the thread has gone on by some instructions.
Must never: take a loop that does something for one that waits: a round that writes to memory other than the stack,
      that enters the kernel for anything but a pause, or does an atomic operation, is none. Nor one that counts its
      rounds, or reads a clock, for one that goes round for ever.
Wrong where: a round is longer than `_ROUND` instructions, or counts in a vector register. A loop that writes with
      a store-exclusive, which fails when it is stepped through, is not said to go round for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from forkproof.code import lift_aarch64, lift_x86_64
from forkproof.code.conventions import CONVENTIONS
from forkproof.code.decode import listing
from forkproof.code.operations import Atomic, Compare, Memory, Operation, Reserve, Set, Syscall, Test
from forkproof.elf.image import Machine
from forkproof.probe import syscalls
from forkproof.probe.ptrace import Registers
from forkproof.probe.stage import Stage
from forkproof.probe.tracee import Thread

_ROUND: Final = 128
_LONGEST: Final = 15
"""Bytes of an instruction."""
_CLOCKS: Final = frozenset({"rdtsc", "rdtscp", "rdpmc", "rdrand", "rdseed", "mrs"})
"""Instructions that give something else each time, of which nothing may be left when the round is over."""
_STRINGS: Final = frozenset({"movs", "stos", "ins"})
"""Instructions that write where no operand of the lifter's says so."""
_FRAME: Final = 4096
"""Bytes above the stack pointer in which a loop may keep its variables."""
_RED_ZONE: Final = 128
"""Bytes below it that x86-64's ABI leaves to a function that calls nothing."""


def spins_on(stage: Stage, thread: Thread, is_lock: Callable[[int], bool]) -> bool:
    """The thread comes back to where it is, and has done nothing on the way but look at the lock."""
    begin, has_looked = thread.registers, False
    for _ in range(_ROUND):
        here = thread.registers
        step = _decoded(stage, thread, here)
        if step is None:
            return False
        size, _, operations = step
        for operation in operations:
            if _does_something(stage, operation, here, here.pc + size):
                return False
        has_looked = has_looked or any(is_lock(a) for a in _looks(operations, here, here.pc + size))
        if not stage.session.step(thread):
            return False
        if (thread.registers.pc, thread.registers.sp) == (begin.pc, begin.sp):
            return has_looked
    return False


def repeats(stage: Stage, thread: Thread) -> bool:
    """The thread comes back to where it is, with everything as it was: it goes round for ever, if nobody changes it."""
    process = thread.process
    begin, frame = thread.registers, _frame(thread)
    for _ in range(_ROUND):
        here = thread.registers
        step = _decoded(stage, thread, here)
        if step is None or not stage.modules.address(process, here.pc).object.startswith("/"):
            return False  # the kernel's own code, [vdso], reads clocks where no instruction shows it
        size, mnemonic, operations = step
        if mnemonic in _CLOCKS:
            return False
        cells = [_address(o.cell, here, here.pc + size) for o in operations if isinstance(o, Atomic)]
        if any(isinstance(o, Reserve) or _changes(stage, o, here, here.pc + size) for o in operations):
            return False
        before = [process.memory.word(cell, 4) if cell is not None else None for cell in cells]
        if None in before or not stage.session.step(thread):
            return False
        if [process.memory.word(cell, 4) for cell in cells if cell is not None] != before:
            return False
        if (thread.registers.pc, thread.registers.sp) == (begin.pc, begin.sp):
            return _general(thread.registers) == _general(begin) and _frame(thread) == frame
    return False


def _changes(stage: Stage, operation: Operation, here: Registers, end: int) -> bool:
    """A system call, a pause too, tells something of the time; an atomic operation may change nothing."""
    return isinstance(operation, Syscall) or (
        not isinstance(operation, Atomic) and _does_something(stage, operation, here, end)
    )


def _frame(thread: Thread) -> bytes:
    return thread.process.memory.read(thread.registers.sp - _RED_ZONE, _RED_ZONE + _FRAME)


def _general(registers: Registers) -> list[int]:
    """Without the flags, which single steps change, and what only the kernel keeps."""
    return [registers[name] for name in registers.machine.dwarf]


def _decoded(stage: Stage, thread: Thread, here: Registers) -> tuple[int, str, tuple[Operation, ...]] | None:
    """Size, name and operations of the instruction at which a thread is."""
    machine = Machine(stage.machine)
    rows = listing(thread.process.memory.read(here.pc, _LONGEST), here.pc, machine)
    if not rows:
        return None
    _, size, mnemonic, operands = rows[0]
    if machine is Machine.X86_64 and mnemonic.split()[-1].rstrip("bwdq") in _STRINGS and "xmm" not in operands:
        return None
    lift = lift_x86_64.lift if machine is Machine.X86_64 else lift_aarch64.lift
    return size, mnemonic, lift(mnemonic, operands)


def _does_something(stage: Stage, operation: Operation, here: Registers, end: int) -> bool:
    match operation:
        case Atomic():
            return True
        case Syscall():
            number = here[CONVENTIONS[Machine(stage.machine)].syscall_number]
            return not syscalls.is_pause(stage.machine, number)
        case Set(destination=Memory() as cell):
            address = _address(cell, here, end)
            return address is None or not -_RED_ZONE <= address - here.sp < _FRAME
    return False


def _looks(operations: tuple[Operation, ...], here: Registers, end: int) -> Iterator[int]:
    for operation in operations:
        match operation:
            case Set(source=Memory() as cell) | Reserve(cell=cell):
                found = [cell]
            case Compare(left=left, right=right) | Test(left=left, right=right):
                found = [o for o in (left, right) if isinstance(o, Memory)]
            case _:
                found = []
        yield from (a for cell in found if (a := _address(cell, here, end)) is not None)


def _address(cell: Memory, here: Registers, end: int) -> int | None:
    if cell.indexed:
        return None
    base = 0 if cell.base is None else end if cell.base == "pc" else here[cell.base]
    return (base + cell.displacement) & 0xFFFF_FFFF_FFFF_FFFF
