"""Exploring with certainty: only constants that nothing but the function itself can change decide a branch.

Owns: the exploration that answers "can this function come back, if it is given these constants?", and the constants
      that a call is plainly given.
Takes: a `Body`, registers that hold constants at its entry, and a judge of the calls that it makes.
Gives: whether a return is possible; constants by register.
Must never: believe what memory holds, or that two calls gave the same: `explore` does, since it looks for the result
      of a fork, and would take `int ok = 0; look(&ok); if (!ok) abort();` for a function that never comes back.
Wrong where: control falls off the end of the code, which is taken to be behind a call that does not come back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from forkproof.code.conventions import CONVENTIONS
from forkproof.code.decode import Body, Instruction
from forkproof.code.explore import CallEffect, Explorer, Words
from forkproof.code.operations import Memory, Operand
from forkproof.code.state import FlagKind, Flags, State
from forkproof.code.values import Cell, Value
from forkproof.elf.image import Machine

Constants = Mapping[str, int]
"""What registers hold."""
Judge = Callable[[int, Constants], bool]
"""Whether the call at a site comes back, given the constants in its argument registers."""


def comes_back(body: Body, machine: Machine, known: Constants, judge: Judge) -> bool:
    """The function can return to its caller when it is entered with these constants."""
    run = _Certain(body, machine, judge).run(body.entry, known)
    return run.returns or not run.complete


def constants_before(body: Body, machine: Machine, site: int) -> Constants:
    """The constants that the block of a call puts into argument registers."""
    position = body.position(site)
    if position is None:
        return {}
    explorer, state = _Certain(body, machine, lambda _, __: True), State()
    for here in range(body.block_start(position), position):
        explorer._instruction(body.instructions[here], here, state)  # noqa: SLF001  one class in two modules
    return _arguments(machine, state)


def never(body: Body, machine: Machine, words: Words) -> frozenset[int]:
    """Instructions that control would come to if it were not for what these words hold for good."""
    told, untold = (_Certain(body, machine, lambda _, __: True) for _ in range(2))
    told.words = words
    first = told.run(body.entry, {})
    return untold.run(body.entry, {}).visited - first.visited if told.has_read and first.complete else frozenset()


def _arguments(machine: Machine, state: State) -> Constants:
    values = ((name, state.registers.get(name)) for name in CONVENTIONS[machine].arguments)
    return {name: value.offset for name, value in values if value is not None and value.base is None}


class _Certain(Explorer):
    """Knows no memory, and compares nothing but constants."""

    def __init__(self, body: Body, machine: Machine, judge: Judge) -> None:
        super().__init__(body, machine, lambda _: CallEffect(), frozenset())
        self.machine, self.judge = machine, judge
        self.has_read = False

    def _effect(self, site: int, state: State) -> CallEffect:
        return CallEffect(returns=self.judge(site, _arguments(self.machine, state)))

    def _cell(self, instruction: Instruction, memory: Memory, state: State) -> Cell | None:
        del instruction, memory, state
        return None

    def _read(self, instruction: Instruction, operand: Operand, bits: int, state: State) -> Value | None:
        if isinstance(operand, Memory) and self.words is not None:
            cell = super()._cell(instruction, operand, state)
            known = self.words(cell[1], bits) if cell is not None and cell[0] is None else None
            self.has_read |= known is not None
            return None if known is None else Value(None, known)
        return super()._read(instruction, operand, bits, state)

    def _flags(
        self, kind: FlagKind, instruction: Instruction, operands: tuple[Operand, Operand], bits: int, state: State
    ) -> Flags:
        kind, left, right, bits = super()._flags(kind, instruction, operands, bits, state)
        return kind, _constant(left), _constant(right), bits


def _constant(value: Value | None) -> Value | None:
    return value if value is not None and value.base is None else None
