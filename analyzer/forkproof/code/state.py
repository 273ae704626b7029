"""What is known before an instruction: registers, words of memory, flags.

Owns: the state that an exploration carries, how two of them meet, and what flags decide.
Takes: values. Gives: states, answers about conditions.
Must never: know what an instruction does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from forkproof.code import vectors
from forkproof.code.operations import Condition
from forkproof.code.values import Behind, Cell, Entry, Held, Pointer, Success, Value, as_signed


class FlagKind(NamedTuple):
    """What the flags were made by, and whether the carry tells unsigned order."""

    is_test: bool
    carry: bool


Flags = tuple[FlagKind, Value | None, Value | None, int]


@dataclass(slots=True)
class State:
    """What is known before an instruction. An absent register or cell has an unknown value of its own."""

    registers: dict[str, Value | None] = field(default_factory=dict)
    cells: dict[Cell, Held | None] = field(default_factory=dict)
    flags: Flags | None = None

    def copy(self) -> State:
        """An independent copy."""
        return State(dict(self.registers), dict(self.cells), self.flags)

    def register(self, name: str) -> Value | None:
        """The value of a register; untouched ones hold their entry value (vectors: none that is known)."""
        if name == "?":
            return None
        return self.registers[name] if name in self.registers else _entry(name)


# Tuples: hashing a member of an enumeration takes longer than comparing it with four.
_EQUALITY: Final = Condition.EQ, Condition.NE
_TESTS: Final[Mapping[Condition, Callable[[int, int, int], bool]]] = {
    Condition.EQ: lambda a, b, _: a == b,
    Condition.NE: lambda a, b, _: a != b,
    Condition.LT: lambda a, b, _: a < b,
    Condition.GE: lambda a, b, _: a >= b,
    Condition.GT: lambda a, b, _: a > b,
    Condition.LE: lambda a, b, _: a <= b,
    Condition.BELOW: lambda a, b, _: a < b,
    Condition.ABOVE_EQ: lambda a, b, _: a >= b,
    Condition.ABOVE: lambda a, b, _: a > b,
    Condition.BELOW_EQ: lambda a, b, _: a <= b,
    Condition.NEGATIVE: lambda a, b, bits: as_signed(a - b, bits) < 0,
    Condition.NOT_NEGATIVE: lambda a, b, bits: as_signed(a - b, bits) >= 0,
}
_NULL: Final = Value(None, 0)
_UNSIGNED: Final = Condition.BELOW, Condition.ABOVE_EQ, Condition.ABOVE, Condition.BELOW_EQ


def _masked(left: Value | None, right: Value | None) -> Value | None:
    """left & right, when that is known."""
    if left is not None and left == right:
        return left
    if left is not None and right is not None and left.base is None and right.base is None:
        return Value(None, left.offset & right.offset)
    return None


def holds(condition: Condition, state: State) -> bool | None:
    """Whether a condition holds for the flags, or None when the values do not decide it."""
    if state.flags is None:
        return None
    kind, left, right, bits = state.flags
    if not kind.carry and condition in _UNSIGNED:
        return None
    if kind.is_test:
        left, right = _masked(left, right), Value(None, 0)
    return compared(condition, left, right, bits)


def compared(condition: Condition, left: Value | None, right: Value | None, bits: int) -> bool | None:
    """The outcome of a comparison, or None when the values do not decide it."""
    if left is None or right is None or condition not in _TESTS or isinstance(left.base, Behind):
        return None
    if isinstance(left.base, Success) and left.offset == 0 and right.base is None:
        return _compare_success(condition, as_signed(right.offset, bits))
    if left.base != right.base:
        is_null = condition in _EQUALITY and right == _NULL and left.offset == 0 and isinstance(left.base, Pointer)
        return condition is Condition.NE if is_null else None
    if left.base is not None and condition not in _EQUALITY:
        return None
    a, b = as_signed(left.offset, bits), as_signed(right.offset, bits)
    if condition in _UNSIGNED:
        mask = (1 << bits) - 1
        a, b = a & mask, b & mask
    return _TESTS[condition](a, b, bits)


_NOT_BELOW_ZERO: Final[Mapping[Condition, bool]] = {
    Condition.LT: False,
    Condition.GE: True,
    Condition.NEGATIVE: False,
    Condition.NOT_NEGATIVE: True,
}
_ABOVE_NEGATIVE: Final[Mapping[Condition, bool]] = {
    Condition.EQ: False,
    Condition.NE: True,
    Condition.LT: False,
    Condition.GE: True,
    Condition.GT: True,
    Condition.LE: False,
    # As unsigned numbers the negative ones are the largest: `cmp $-4096, %rax; ja error`.
    Condition.BELOW: True,
    Condition.ABOVE_EQ: False,
    Condition.ABOVE: False,
    Condition.BELOW_EQ: True,
}


def _compare_success(condition: Condition, constant: int) -> bool | None:
    """The outcome of comparing a number that is not negative with a constant."""
    if constant > 0:
        return None
    return (_NOT_BELOW_ZERO if constant == 0 else _ABOVE_NEGATIVE).get(condition)


_UNREAD: Final = Held(Value(None, 0), 0)
"""Stands for a cell that was never written: it agrees with nothing that was."""
_ENTRIES: Final[dict[str, Value | None]] = dict.fromkeys(vectors.NAMES)
"""What registers held at entry: of vectors, nothing that is followed."""


def _entry(name: str) -> Value | None:
    """What a register held at entry."""
    if name not in _ENTRIES:
        _ENTRIES[name] = Value(Entry(name), 0)
    return _ENTRIES[name]


def joined(states: Iterable[State | None]) -> State | None:
    """What all of these agree on; None if there are none."""
    result: State | None = None
    for state in states:
        if result is None:
            result = state and state.copy()
        elif state is not None:
            absorb(result, state, keep=True)
    return result


def absorb(old: State, new: State, *, keep: bool) -> bool:
    """Join `new` into `old`, which keeps only what both agree on; nothing that either mentions unless `keep`.

    A register absent from one holds its entry value there. True when `old` changed. This is the inner
    loop of every exploration.
    """
    changed = False
    mine, theirs = old.registers, new.registers
    cells, others = old.cells, new.cells
    if old.flags is None or old.flags == new.flags:  # most arrivals teach nothing: these tests run in C
        if keep:
            if mine == theirs and cells == others:
                return False
        elif not (any(mine.values()) or any(cells.values())) and (
            theirs.keys() <= mine.keys() and others.keys() <= cells.keys()
        ):
            return False
    # One object on both sides is what most places hold, and comprehensions tell it quickest.
    for name in [n for n, value in mine.items() if value is not None and (theirs.get(n) is not value or not keep)]:
        after = theirs[name] if name in theirs else _entry(name)
        if not keep or mine[name] != after:
            mine[name] = None
            changed = True
    for name in [n for n in theirs if n not in mine]:
        if not (keep and theirs[name] == _entry(name)):
            mine[name] = None
            changed = True
    for cell in [c for c, held in cells.items() if held is not None and (others.get(c) is not held or not keep)]:
        if not (keep and cells[cell] == others.get(cell, _UNREAD)):
            cells[cell] = None
            changed = True
    for cell in [c for c in others if c not in cells]:
        cells[cell] = None
        changed = True
    if old.flags is not None and old.flags != new.flags:
        old.flags = None
        changed = True
    return changed
