"""Locks that a condition chooses: `c ? &a : &b`, or that are made if there is none: `p->lock ? p->lock : make(p)`.

Owns: what a value may be that was chosen by a conditional move, or where ways meet.
Takes: the data of a function, and what met. Gives: acquisitions and arguments, one for each address.
Must never: choose among more than `_MOST` addresses, or among such as do not all begin at globals; what a call has
      returned, and null, are left out: who makes a lock puts it where the next one looks.
Wrong where: two choices depend on one condition (they are taken to be independent); where what a call returns is
      another lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from forkproof.code.conventions import Convention
from forkproof.code.decode import Body
from forkproof.code.operations import Call
from forkproof.locks.data import Data
from forkproof.locks.runs import Acquire, Held
from forkproof.locks.state import Joins
from forkproof.locks.values import ZERO, Default, Entry, Named, Object, Value, root, substituted

_MOST: Final = 4
_DEEPEST: Final = 2
"""Choices among what another choice leads to; a pointer that a loop moves on chooses without end."""


class Choices:
    """The choices of one function."""

    def __init__(self, data: Data, joins: Joins, body: Body, convention: Convention) -> None:
        self.data, self.joins, self.body, self.convention = data, joins, body, convention
        self._known: dict[Value, tuple[Value, ...]] = {}

    def of(self, value: Value) -> tuple[Value, ...]:
        """The addresses that a value may be; itself where nothing chooses."""
        found = self._known.get(value)
        if found is None:
            found = self._known[value] = self._find(value, _DEEPEST)
        return found

    def _find(self, value: Value, depth: int) -> tuple[Value, ...]:
        base = root(value.base)
        if not isinstance(base, Named) or not depth:
            return (value,)
        begin = Value(base, 0)
        meant = self.data.choices.get(begin) or self.joins.met([begin]).get(begin, ())
        kept = [one for one in meant if not self._is_made(one)]
        found = {v for one in kept for v in self._find(self._in(value, base, self.data.address_of(one)), depth - 1)}
        given = {v for v in found if self._is_given(v)}
        if given:  # they come before a variable that stands in where a parameter is null
            found = self._with_default(given, found - given)
        is_told = 0 < len(found) <= _MOST and len(meant) > 1 and all(self._is_told(v) for v in found)
        return tuple(sorted(found, key=repr)) if is_told else (value,)

    @staticmethod
    def _with_default(given: set[Value], others: set[Value]) -> set[Value]:
        """A parameter and one variable are one choice, which callers make."""
        one, other = next(iter(given)), next(iter(others), None)
        if len(given) == len(others) == 1 and isinstance(one.base, Entry) and one.offset == 0 and other is not None:
            return {Value(Default(one.base, other), 0)}
        return given

    def _is_made(self, value: Value) -> bool:
        """Null, or what a call has returned."""
        base = value.base
        if value == ZERO or not isinstance(base, Named) or base.register != self.convention.result:
            return value == ZERO
        position = self.body.position(base.site)
        return position is not None and any(isinstance(o, Call) for o in self.body.instructions[position].operations)

    def _is_given(self, value: Value) -> bool:
        """It is reached from a parameter."""
        begin = root(value.base)
        return isinstance(begin, Entry) and begin.register in self.convention.arguments

    def _is_told(self, value: Value) -> bool:
        return isinstance(root(value.base), Object) or self._is_given(value)

    @staticmethod
    def _in(value: Value, name: Named, meant: Value) -> Value:
        return substituted(value, lambda base: meant if base == name else Value(base, 0))

    def acquired(self, acquire: Acquire) -> Iterator[Acquire]:
        """The acquisition of each lock that it may be."""
        for address in self.of(acquire.address):
            yield acquire._replace(address=address)

    def passed(self, arguments: tuple[Value, ...]) -> Iterator[tuple[Value, ...]]:
        """A call with each of the addresses that it may pass, one argument at a time."""
        places = [i for i, a in enumerate(arguments) if self.of(a) != (a,)]
        if not places:
            yield arguments
        for place in places:
            yield from ((*arguments[:place], v, *arguments[place + 1 :]) for v in self.of(arguments[place]))

    def held(self, held: Held) -> Held:
        """What is held, and what that may be: who asks for a chosen lock under a chosen lock asks by one condition."""
        return held.union(*(self.of(h) for h in held)) if held else held
