"""What is known at one point of a function: registers, the frame, flags, and what attempts at locks are open.

Owns: the state of the interpretation, how two states meet, and the elements of arrays that a loop walks.
Takes: values. Gives: `State`, `Flags`, `Attempt`, `Joins`.
Must never: keep a value where two ways disagree: it gets the name of the block, or is some element of an array.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import Final, NamedTuple

from forkproof.code.conventions import Convention
from forkproof.code.operations import Condition
from forkproof.locks.values import (
    DEEPEST,
    ZERO,
    Base,
    Content,
    Element,
    Entry,
    Masked,
    Named,
    Object,
    Thread,
    Value,
    depth,
)


class Attempt(NamedTuple):
    """An atomic operation that may acquire; `by_status` if a store-exclusive's status tells its success."""

    address: Value
    kind: str
    expected: int = 0
    by_status: bool = False
    bits: Value | None = None
    """The mask that is set: what it found of that tells its success, and its own does not."""
    was: Value | None = None
    """What a compare-and-swap expects, where that is a word of which it sets bits; without `bits`, they are clear."""
    is_looked_at: bool = False
    """That was seen at a branch: its other side fails; a word that has changed is no failure."""
    drawn: Value = ZERO
    """Of a ticket: the word that it was drawn from."""
    is_token: bool = True
    """The result alone tells success. Not so where a pointer is swapped in, or a ticket drawn."""

    def is_told_by(self, other: Value) -> bool:
        """It is a compare-and-swap that has got the lock if it found this."""
        return self.was is not None and self.bits is None and not self.by_status and other == self.was


class Flags(NamedTuple):
    """What the flags were made by: cmp, test, won (an attempt's own), bit (the carry is the old bit)."""

    kind: str
    left: Value
    right: Value
    bits: int
    site: int = 0
    before: Flags | None = None
    """For a conditional comparison: what was compared before it,"""
    condition: Condition = Condition.UNKNOWN
    """the condition under which it was made,"""
    zero: bool = False
    """and whether the flags say equal otherwise."""


@cache
def entry(register: str) -> Value:
    """What a register held when the function was entered."""
    return Value(Entry(register), 0)


@dataclass(slots=True)
class State:
    """One point of one way through a function."""

    registers: dict[str, Value] = field(default_factory=dict)
    frame: dict[Value, Value] = field(default_factory=dict)
    flags: Flags | None = None
    known: dict[int, Value] = field(default_factory=dict)
    """What exclusive loads were found to have given."""
    reserved: int = 0
    """Site of the last exclusive load."""
    failed: int = 0
    """Site of a call that has just come back without the lock that it may return with."""
    facts: frozenset[Value] = frozenset()
    """Flags of the thread that are known here (`Flag`), where they are followed."""
    clear: frozenset[Masked] = frozenset()
    """Words that were looked at, of which bits are clear here."""
    pending: int = 0
    """Site of an attempt of which the code has not yet looked whether it succeeded."""

    def register(self, name: str) -> Value:
        """What a register holds: what it held on entry, if nothing has set it."""
        return self.registers.get(name) or entry(name)

    def replace(self, value: Value, known: Value) -> None:
        """Registers that hold a value hold what it is known to be."""
        for name, held in self.registers.items():
            if held == value:
                self.registers[name] = known

    def copy(self) -> State:
        copied = State(dict(self.registers), dict(self.frame), self.flags, dict(self.known), self.reserved)
        copied.pending, copied.clear = self.pending, self.clear
        return copied


@lru_cache(maxsize=1 << 15)
def _named(position: int, name: str) -> Value:
    """The name that a block gives: functions are followed again for each lock, and one object is compared quickest."""
    return Value(Named(-1 - position, name), 0)


class _Phi(NamedTuple):
    """A name that was given where ways meet."""

    value: Value
    met: set[Value]
    """What it was given to."""


class Joins:
    """Meeting of states, by one machine's convention."""

    def __init__(self, convention: Convention) -> None:
        self.arguments = frozenset(convention.arguments)
        self.names: dict[int, dict[str, _Phi]] = {}

    def met(self, wanted: Iterable[Value]) -> dict[Value, tuple[Value, ...]]:
        """What each of the names that these values lead to was given to."""
        known = self._phis
        found: dict[Value, tuple[Value, ...]] = {}
        pending = [value for value in wanted if value in known]
        while pending:
            each = pending.pop()
            if each not in found:
                found[each] = tuple(known[each])
                pending += [value for value in found[each] if value in known]
        return found

    @cached_property
    def _phis(self) -> dict[Value, set[Value]]:
        """What each name was given to; asked for when nothing meets any more."""
        return {phi.value: phi.met for names in self.names.values() for phi in names.values() if phi.met}

    def is_pointer(self, base: Base) -> bool:
        """What may point to an array: a word of memory, or a parameter."""
        return isinstance(base, Content) or (isinstance(base, Entry) and base.register in self.arguments)

    def join(self, old: State, new: State, position: int, *, keep: bool) -> bool:
        """Let `old` know only what `new` knows too; whether that changes it. Without `keep` all is named anew.

        The inner loop of the interpretation: most arrivals teach nothing, and what has its name already keeps it.
        """
        changed = False
        mine, theirs = old.registers, new.registers
        if not (keep and mine == theirs):
            names = self.names.setdefault(position, {})
            theirs_only = theirs.keys() - mine.keys()
            for name, a in mine.items():
                b = theirs.get(name)
                if b is a and keep:
                    continue
                phi = names.get(name)
                if phi is not None and phi.value is a:
                    if b is not a:
                        other = b or entry(name)
                        if other != a:
                            phi.met.add(other)
                    continue
                joined = self._joined(a, b or entry(name), position, name, keep=keep)
                if joined is not a and joined != a:
                    mine[name] = joined
                    changed = True
            for name in theirs_only:
                a = entry(name)
                joined = self._joined(a, theirs[name], position, name, keep=keep)
                if joined != a:
                    mine[name] = joined
                    changed = True
        if old.frame != new.frame:
            changed |= self._join_frames(old, new, position, keep=keep)
        if old.flags is not None and old.flags != new.flags:
            old.flags = None
            changed = True
        if old.clear and not old.clear <= new.clear:
            old.clear &= new.clear
            changed = True
        if old.known != new.known:
            old.known = {k: v for k, v in old.known.items() if new.known.get(k) == v}
        return changed

    def _join_frames(self, old: State, new: State, position: int, *, keep: bool) -> bool:
        changed = False
        for cell, a in list(old.frame.items()):
            other = new.frame.get(cell)
            if other is None:
                del old.frame[cell]
                changed = True
            elif a is not other and a != other:
                joined = self._joined(a, other, position, str(cell.offset), keep=keep)
                if joined != a:
                    old.frame[cell] = joined
                    changed = True
        return changed

    def _joined(self, a: Value, b: Value, position: int, name: str, *, keep: bool) -> Value:
        """What two values have in common: themselves, an array that both are elements of, or a new name."""
        if a == b and (keep or _is_settled(a.base)):
            return a
        names = self.names.setdefault(position, {})
        found = names.get(name)
        if found is None:
            found = names[name] = _Phi(_named(position, name), set())
        phi = found.value
        joined = phi if not keep or a == phi else self._in_common(a, b, phi, position, name)
        if joined is phi:
            if a is not phi and a != phi:
                found.met.add(a)
            if b is not phi and b != phi:
                found.met.add(b)
        return joined

    def _in_common(self, a: Value, b: Value, phi: Value, position: int, name: str) -> Value:
        """An array that two values are elements of, or else the new name."""
        if isinstance(a.base, Content) and isinstance(b.base, Content) and a.offset == b.offset:
            # What two elements of a table hold is what some element of it holds.
            cell = self._joined(Value(*a.base), Value(*b.base), position, name, keep=True)
            is_element = isinstance(cell.base, Element) and depth(cell.base) < DEEPEST
            return Value(Content(*cell), a.offset) if is_element else phi
        if isinstance(a.base, Element):
            base = a.base
            if (base.base, base.stride) == (b.base, 0) or (b.base == base.base and base.stride):
                step = b.offset - base.offset - a.offset
                return a if base.stride and step % base.stride == 0 else phi
            if isinstance(b.base, Element) and b.base[:2] == base[:2]:
                step = b.base.stride or b.offset - a.offset
                return a if step == 0 or (base.stride and step % base.stride == 0) else phi
            return phi
        if isinstance(b.base, Element) and a.base == b.base.base and b.base.stride:
            # The first element, where another way has been round a loop.
            return b if (a.offset - b.base.offset - b.offset) % b.base.stride == 0 else phi
        if a.base == b.base and (isinstance(a.base, Object) or self.is_pointer(a.base)):
            return Value(Element(a.base, a.offset, abs(b.offset - a.offset)), 0)
        return phi


_SETTLED: Final = (Object, Element, Entry, Thread)


def _is_settled(base: Base) -> bool:
    """A value that no round of a loop has changed: a number, an address, or what some element of an array holds."""
    is_some = isinstance(base, Content) and isinstance(base.base, Element)
    return is_some or base is None or isinstance(base, _SETTLED)
