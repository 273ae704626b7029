"""Which lock an address is: comparing addresses, and naming them as the source does where symbols allow.

Owns: the sameness of two symbolic addresses, exact or assumed, how far arrays of locks reach, and the report's `Lock`.
Takes: values of `forkproof.locks.values`. Gives: `Match`es and `model.Lock`s.
Must never: put a run-time address into a name.
Wrong where: two structures of different types have a field at the same large offset (then a match is assumed that
      is none); where a lock lies a whole number of steps behind an array without a symbol, and no code names anything
      between the two (then it is taken for an element).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np

from forkproof.columns import unique
from forkproof.elf.demangle import demangle
from forkproof.elf.image import I64
from forkproof.locks.values import TELLING, Content, Element, Entry, Foreign, Made, Object, Value, chain, root
from forkproof.model import Lock
from forkproof.program import Function, Program

_ARRAY_REACH: Final = 1 << 20
"""Bytes after the start of an array within which a lock a whole number of steps away is one of its elements."""


class Match(IntEnum):
    """How sure it is that two addresses are one lock."""

    NO = 0
    ASSUMED = 1
    """The same field of objects that may be of one type; one or both are reached from something unknown."""
    EXACT = 2


def is_resolved(value: Value) -> bool:
    """The lock can be found from a global: it is one, an element of an array, or a field that a global leads to.

    An object that a function hands to others counts as one.
    """
    return isinstance(root(value.base), Object | Made) and not _is_anywhere(value)


def is_element(value: Value) -> bool:
    """Some element of the one table that a variable points to: which one, and how large they are, is not known."""
    base = value.base
    if not isinstance(base, Element) or not isinstance(base.base, Content):
        return False
    return _is_anywhere(value) and isinstance(base.base.base, Object)


def _is_anywhere(value: Value) -> bool:
    """Somewhere in a heap object, at a distance that the code computes."""
    base = value.base
    return isinstance(base, Element) and not isinstance(base.base, Object) and base.offset == 0 and base.stride == 0


def same(a: Value, b: Value) -> Match:
    """Whether two addresses are the same lock, or elements of the same array of locks."""
    if _is_anywhere(a) or _is_anywhere(b):
        return _same_place(a, b)
    if a == b:
        return Match.EXACT if is_resolved(a) or isinstance(root(a.base), Entry) else Match.ASSUMED
    if _array_of(a) is not None or _array_of(b) is not None:
        return _same_array(a, b)
    return _same_field(a, b)


def _same_place(a: Value, b: Value) -> Match:
    """Computed places of one object, the lock at one offset of what lies there."""
    one, two = a.base, b.base
    if not isinstance(one, Element) or not isinstance(two, Element) or a.offset != b.offset:
        return Match.NO
    return Match.ASSUMED if one.base == two.base or Foreign(-1) in (root(one), root(two)) else Match.NO


def _array_of(value: Value) -> tuple[object, int, int] | None:
    """(what it begins at, offset of the lock in the first element, stride) of an element of a global's array."""
    base = value.base
    if isinstance(base, Element) and isinstance(base.base, Object):
        return base.base, base.offset + value.offset, base.stride
    return None


def _same_array(a: Value, b: Value) -> Match:
    first = _array_of(a) or (a.base, a.offset, 0)
    second = _array_of(b) or (b.base, b.offset, 0)
    if first[0] != second[0]:
        return _same_field(a, b)
    stride = first[2] or second[2]
    distance = abs(first[1] - second[1])
    if distance == 0 or (stride and distance % stride == 0 and distance < _ARRAY_REACH):
        return Match.EXACT
    return Match.NO


class Arrays:
    """Sameness where a program tells how far its arrays reach: what lies behind one is no element of it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._referred: dict[int, I64] = {}
        self._known: dict[tuple[int, int, int, int], bool] = {}

    def same(self, a: Value, b: Value) -> Match:
        """As `same`, but an element must lie within its array."""
        match = same(a, b)
        one, two = _array_of(a), _array_of(b)
        if match is not Match.EXACT or (one is None and two is None):
            return match
        first, second = one or (a.base, a.offset, 0), two or (b.base, b.offset, 0)
        low, high = sorted((first[1], second[1]))
        base, stride = first[0], first[2] or second[2]
        assert isinstance(base, Object)
        return match if low == high or self._reaches(base.number, low, high, stride) else Match.NO

    def _reaches(self, obj: int, first: int, last: int, stride: int) -> bool:
        key = obj, first, last, stride
        if key not in self._known:
            self._known[key] = self._find_reaches(*key)
        return self._known[key]

    def _find_reaches(self, obj: int, first: int, last: int, stride: int) -> bool:
        """The variable says so; without one, nothing else begins between that code refers to.

        Code refers to the fields of the first element; a field of a later one is at the same place in it.
        """
        if (variable := self.program.names[obj].variable_at(first)) is not None:
            return last < variable[0] + variable[2]
        referred = self._addresses(obj)
        inside = set((referred[(referred >= first) & (referred < first + stride)] - first).tolist())
        between = (referred[(referred >= first + stride) & (referred < last)] - first) % stride
        return inside.union({0}).issuperset(between.tolist())

    def _addresses(self, obj: int) -> I64:
        """What an object's code forms the addresses of, or loads."""
        if obj not in self._referred:
            sites = self.program.codes[obj].sites
            self._referred[obj] = unique(np.concatenate([sites.data_target, sites.loaded_address]))
        return self._referred[obj]


def _same_field(a: Value, b: Value) -> Match:
    """The last fields of two chains agree, and tell enough."""
    one, two = chain(a), chain(b)
    if isinstance(a.base, Object) or isinstance(b.base, Object):
        return Match.NO
    length = min(len(one), len(two), 2)
    if one[:length] != two[:length]:
        return Match.NO
    tells = abs(one[0]) >= TELLING or (length == 2 and abs(one[1]) >= TELLING)
    return Match.ASSUMED if tells else Match.NO


def lock_of(program: Program, value: Value, home: int) -> Lock:
    """The lock as a report names it; `home` is the object whose code takes it."""
    begin = root(value.base)
    owner = begin.number if isinstance(begin, Object) else home
    name = program.closure.objects[owner].name
    if isinstance(value.base, Object):
        return Lock(name, _symbol(program, owner, value.offset), value.offset, "global")
    if (array := _array_of(value)) is not None:
        return Lock(name, f"{_symbol(program, owner, array[1])}[]", array[1], "array")
    if isinstance(begin, Object):
        return Lock(name, _chain_name(program, owner, value), None, "field")
    if isinstance(begin, Made):
        maker = demangle(program.name_of(Function(begin.function)) or "a function")
        if begin.site < 0:
            return Lock(name, f"a local variable of {maker}", None, "field")
        return Lock(name, f"{_field_name(value)} of an object that {maker} makes", None, "field")
    if isinstance(begin, Entry | Foreign):
        return Lock(name, _field_name(value), None, "field")
    return Lock(name, "a lock whose address is not known", None, "unknown")


def _field_name(value: Value) -> str:
    offsets = chain(value)
    text = f"field {offsets[0]:+#x}"
    return text if len(offsets) == 1 else f"{text} of what field {offsets[1]:+#x} points to"


def _chain_name(program: Program, obj: int, value: Value) -> str:
    base = value.base
    if isinstance(base, Object):
        return _symbol(program, obj, value.offset)
    assert isinstance(base, Content | Element)
    inner = _chain_name(program, obj, Value(base.base, base.offset))
    text = f"(*{inner})" if isinstance(base, Content) else f"{inner}[]"
    return f"{text}{value.offset:+#x}" if value.offset else text


def _symbol(program: Program, obj: int, address: int) -> str:
    """The variable at an address, or object+address."""
    variable = program.names[obj].variable_at(address)
    if variable is None:
        return f"{program.closure.objects[obj].name}+{address:#x}"
    start, name, _ = variable
    return demangle(name) if start == address else f"{demangle(name)}+{address - start:#x}"
