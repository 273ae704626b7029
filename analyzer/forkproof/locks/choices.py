"""Locks that a condition chooses: `c ? &a : &b`.

Owns: what a value may be that was chosen by a conditional move, or where ways meet.
Takes: the data of a function, and what met. Gives: acquisitions and arguments, one for each address.
Must never: choose among more than `_MOST` addresses, or among such as do not all begin at globals.
Wrong where: two choices depend on one condition (they are taken to be independent).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from forkproof.locks.data import Data
from forkproof.locks.runs import Acquire, Held
from forkproof.locks.state import Joins
from forkproof.locks.values import Named, Object, Value, root, substituted

_MOST: Final = 4


class Choices:
    """The choices of one function."""

    def __init__(self, data: Data, joins: Joins) -> None:
        self.data, self.joins = data, joins
        self._known: dict[Value, tuple[Value, ...]] = {}

    def of(self, value: Value) -> tuple[Value, ...]:
        """The addresses that a value may be; itself where nothing chooses."""
        found = self._known.get(value)
        if found is None:
            found = self._known[value] = self._find(value)
        return found

    def _find(self, value: Value) -> tuple[Value, ...]:
        base = root(value.base)
        if not isinstance(base, Named):
            return (value,)
        begin = Value(base, 0)
        meant = self.data.choices.get(begin) or self.joins.met([begin]).get(begin, ())
        found = {self._in(value, base, self.data.address_of(one)) for one in meant}
        is_told = 1 < len(found) <= _MOST and all(isinstance(root(v.base), Object) for v in found)
        return tuple(sorted(found, key=repr)) if is_told else (value,)

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
