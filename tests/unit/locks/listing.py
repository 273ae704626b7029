"""Functions written down as text, and what their calls do: the lock analysis without a file.

A listing has an instruction a line, as objdump -M intel prints it; `name:` marks the next line and `{name}` in an
operand is its address. Instructions are four bytes long each, from address 0 on. `call NAME` calls a function that
`Callees`
knows; numbers from `DATA` on are addresses in the object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from forkproof.code import lift_aarch64, lift_x86_64
from forkproof.code.conventions import CONVENTIONS
from forkproof.code.decode import Body, Instruction
from forkproof.code.operations import Atomic
from forkproof.elf.image import Machine
from forkproof.locks.interpret import interpret
from forkproof.locks.runs import NOTHING, Effect, Exit, Held, Run
from forkproof.locks.values import Object, Value
from forkproof.signature_values import LockFunction, LockOp, Origin

DATA: Final = 0x4000
LOCK: Final = Value(Object(0), DATA)
OTHER: Final = Value(Object(0), DATA + 0x40)


def mutex(op: LockOp, *, bounded: bool = False) -> LockFunction:
    """A lock function whose first argument is the lock."""
    return LockFunction(f"mutex_{op}", op, "mutex", 0, Origin("POSIX", "none"), bounded=bounded)


@dataclass
class Callees:
    """What an interpretation is told of the functions that a listing calls."""

    library: Mapping[str, LockFunction] = field(default_factory=dict)
    effects: Mapping[str, Effect] = field(default_factory=dict)
    waiting: frozenset[str] = frozenset()
    clocks: frozenset[str] = frozenset()
    noted: frozenset[str] = frozenset()
    ending: frozenset[str] = frozenset()
    pointers: Mapping[Value, tuple[str, ...]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    sites: dict[int, str] = field(default_factory=dict)

    def number(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)


class _Calls:
    def __init__(self, callees: Callees) -> None:
        self.callees = callees

    def targets(self, site: int) -> tuple[int, ...]:
        name = self.callees.sites.get(site)
        return () if name is None else (self.callees.number(name),)

    def _name(self, target: int) -> str:
        return self.callees.names[target]

    def comes_back(self, site: int) -> bool:
        return self.callees.sites.get(site) not in self.callees.ending

    def keeps(self, site: int) -> frozenset[str]:
        del site
        return frozenset()

    def is_lock(self, semaphore: Value) -> bool:
        del semaphore
        return False

    def library(self, target: int) -> LockFunction | None:
        return self.callees.library.get(self._name(target))

    def helper(self, target: int) -> Atomic | None:
        del target
        return None

    def effect(self, target: int, arguments: tuple[Value, ...]) -> Effect | None:
        del arguments
        return self.callees.effects.get(self._name(target))

    def is_relevant(self, target: int) -> bool:
        return self._name(target) in self.callees.noted

    def parameters(self, target: int) -> frozenset[int]:
        del target
        return frozenset({0})

    def chosen(self, pointer: Value) -> tuple[int, ...]:
        return tuple(self.callees.number(n) for n in self.callees.pointers.get(pointer, ()))

    def given(self, target: int) -> Value | None:
        del target
        return None

    def gives_thread_cell(self, target: int) -> bool:
        return self._name(target) == "__tls_get_addr"

    def is_descriptor(self, address: int) -> bool:
        return address == DATA + 0x800

    def waits(self, target: int) -> bool:
        return self._name(target) in self.callees.waiting

    def tells_time(self, target: int) -> bool:
        return self._name(target) in self.callees.clocks

    def enters_wait(self) -> bool:
        return True

    def slot(self, address: int) -> Value | None:
        del address
        return None

    def is_data(self, address: int) -> bool:
        return DATA <= address < DATA + 0x1000


def body(text: str, machine: Machine, callees: Callees) -> Body:
    """A listing as instructions."""
    lift = lift_x86_64.lift if machine is Machine.X86_64 else lift_aarch64.lift
    lines = [line.strip() for line in text.strip().splitlines()]
    labels: dict[str, str] = {}
    code: list[str] = []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = hex(4 * len(code))
        else:
            code.append(line)
    found = []
    for number, written in enumerate(code):
        line = written
        called = re.match(r"(call|bl|jmp|b) (\w+)$", line)
        if called and not called[2].startswith("0x") and called[2] not in _REGISTERS:
            callees.sites[4 * number] = called[2]
            callees.number(called[2])
            line = f"{called[1]} 0x{0x9000 + callees.number(called[2]) * 16:x}"
        split = re.match(r"((?:lock |rep )?\S+)\s*(.*)$", line)
        assert split is not None
        operands = split[2].format(**labels)
        found.append(Instruction(4 * number, 4, lift(split[1], operands)))
    return Body(0, tuple(found), ((0, 4 * len(code)),))


_REGISTERS: Final = frozenset({"rax", "rbx", "rcx", "rdx", "x0", "x1", "x2"})


def follow(
    text: str,
    callees: Callees | None = None,
    machine: Machine = Machine.X86_64,
    held: Held = NOTHING,
    watched: Held | None = None,
    *,
    joined: bool = False,
    flagged: bool = False,
) -> Run:
    """Interpret a listing."""
    known = callees or Callees()
    calls = _Calls(known)
    return interpret(
        body(text, machine, known), CONVENTIONS[machine], 0, calls, held, watched, joined=joined, flagged=flagged
    )


def exits(*ways: tuple[Held, str | None]) -> tuple[Exit, ...]:
    return tuple(Exit(held, result) for held, result in ways)
