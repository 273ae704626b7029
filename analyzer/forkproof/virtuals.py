"""Virtual calls of C++, and the functions that virtual tables hold for them.

Owns: what a virtual call looks like; the virtual tables of an object, and where the first base of their classes is.
Takes: a function's `Body` with the states before its calls; a linked program. Gives: slots; functions by slot.
Must never: tell one class from another: every class of an object may come to a call, which makes findings `low`.
Wrong where: there are no type descriptions (-fno-rtti): such classes are taken for the object's own.

A virtual call is `table = [A]; call [table + slot]` with A as its first argument (or as its second on x86-64, whose
first says where a large result goes). A virtual table is what code forms the address of, to put it into objects, where
a function's address stands, with the address of a type description before it, and before that how far the object begins
earlier, which is 0 or negative. A type description leads to that of the base; where the first of them is, the code is
that calls through the base. Classes that the C++ runtime knows are its own to call: `std::thread` hands its objects on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np

from forkproof.code.conventions import CONVENTIONS
from forkproof.code.decode import Body
from forkproof.code.operations import Memory, Register, Set
from forkproof.code.state import State
from forkproof.code.values import Behind, Value
from forkproof.columns import position_in, unique
from forkproof.elf.image import Machine
from forkproof.functors import Load, before, root
from forkproof.program import Columns, Function, Program
from forkproof.tables import function_pointers

_WORD: Final = 8
_HEAD: Final = 2
"""Words before what the pointer in an object points to."""
_FARTHEST: Final = 1 << 20
"""Bytes of an object before a part of it."""
_LONGEST: Final = 1 << 12
"""Bytes of a table that are looked at."""
_FIRST_BASES: Final = (2, 3)
"""Words of a type description in which the only base, or the first of several, is."""
_BASES: Final = 12
"""Classes that are derived from one another."""
_KINDS: Final = tuple(f"_ZTVN10__cxxabiv1{kind}_type_infoE" for kind in ("17__class", "20__si_class", "21__vmi_class"))
"""What type descriptions begin with,"""
_DELETE: Final = ("_ZdlPvm", "_ZdlPv")
"""and operator delete, which virtual destructors call: names that are not stripped where they are another object's."""

_Address = tuple[int, int]
"""An object, and an address in it."""


def virtual_slot(body: Body, site: int, load: Load, machine: Machine, states: Mapping[int, State]) -> int | None:
    """Where in an object's virtual table a call looks for its target; None for other calls."""
    convention, position = CONVENTIONS[machine], body.index[site]
    slot, table = load.cell.displacement, load.cell.base or ""
    if slot < 0 or slot % _WORD or slot > _LONGEST:
        return None
    arguments = convention.arguments[:2] if machine is Machine.X86_64 else convention.arguments[:1]
    place = _loaded(body, load.position, table)
    if place is not None and place.cell.base is not None:
        holder = root(body, place.position, place.cell.base, convention)
        if (holder[0], holder[1] + place.cell.displacement) in (root(body, position, a, convention) for a in arguments):
            return slot
    at = body.instructions[load.position].address
    value = states[at].register(table) if at in states and site in states else None
    if value is None or not isinstance(value.base, Behind) or value.offset:
        return None
    holders = (states[site].register(argument) for argument in arguments)
    return slot if Value(value.base.base, value.base.offset) in holders else None


def _loaded(body: Body, position: int, name: str) -> Load | None:
    """Where a register was loaded from behind a pointer."""
    for here in before(body, position):
        for o in body.instructions[here].operations:
            if getattr(o, "destination", None) == Register(name):
                if isinstance(o, Set) and o.bits == 64 and isinstance(o.source, Memory) and not o.source.indexed:
                    return Load(here, o.source)
                if not isinstance(o, Set) or not isinstance(o.source, Register):
                    return None
                name = o.source.name
    return None


class _Table(NamedTuple):
    """A virtual table: what stands in it, from the address that objects hold."""

    functions: tuple[Function, ...]
    home: int
    """The object that its class's first base is described in."""


class VirtualTables:
    """The virtual tables of a program, found when they are asked for."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[int, tuple[_Table, ...]] = {}

    def held(self, obj: int, slot: int) -> frozenset[Function]:
        """What a virtual call in an object may come to."""
        every = range(len(self.program.codes)) if self.has_classes(obj) else ()
        tables = [t for o in every if self.has_classes(o) for t in self._of(o) if t.home == obj]
        return frozenset(t.functions[slot // _WORD] for t in tables if slot // _WORD < len(t.functions))

    def has_classes(self, obj: int) -> bool:
        """Objects in other languages have none, and are not searched."""
        image = self.program.image(obj)
        return image.is_static or any(name in image.dynamic_symbols.by_name for name in (*_KINDS, *_DELETE))

    def _of(self, obj: int) -> tuple[_Table, ...]:
        if obj not in self._known:
            self._known[obj] = tuple(_Tables(self.program, obj, self._kinds).found())
        return self._known[obj]

    @cached_property
    def _kinds(self) -> frozenset[_Address]:
        """The tables of the kinds of type descriptions, where some object has them."""
        tables = ((obj, self.program.image(obj).dynamic_symbols) for obj in range(len(self.program.codes)))
        found = [(obj, t, i) for obj, t in tables for name in _KINDS for i in t.by_name.get(name, ()) if t.defined[i]]
        return frozenset((obj, int(table.value[index])) for obj, table, index in found)


class _Tables:
    """The search in one object."""

    def __init__(self, program: Program, obj: int, kinds: frozenset[_Address]) -> None:
        self.program, self.obj, self.image, self.kinds = program, obj, program.image(obj), kinds
        self.slots, self.functions = function_pointers(program, obj)

    def found(self) -> Iterator[_Table]:
        """The tables whose addresses code forms."""
        for first, described in self._described():
            last, address = first, int(self.slots[first])
            while last < len(self.slots) and self.slots[last] == address + _WORD * (last - first):
                last += 1
            functions = tuple(Function(f) for f in self.functions[first:last].tolist())
            yield _Table(functions, self._home((self.obj, described)))

    def _described(self) -> Iterator[tuple[int, int]]:
        """(row of the first function, address of the type description or 0) of what looks like a table."""
        rows = position_in(self.slots, self._formed()) if len(self.slots) else np.zeros(0, np.int64)
        for row in rows[rows >= 0].tolist():
            address = int(self.slots[row])
            above, before = (self.image.read_u64(address - _WORD * words) for words in (_HEAD, 1))
            described = self.image.pointer_at(address - _WORD)
            is_plain = above is not None and self.image.pointer_at(address - _WORD * _HEAD) is None
            if not is_plain or above is None or (above and (1 << 64) - above > _FARTHEST):
                continue
            if described is None and not before and address - _WORD not in self.image.slot_symbols:
                yield row, 0
            elif described is not None and self.program.function(self.obj, described) is None:
                yield row, described

    def _formed(self) -> Columns:
        """Addresses of data that code forms, itself or from words that the loader fills."""
        sites = self.program.codes[self.obj].sites
        words = (self.image.pointer_at(word) for word in unique(sites.loaded_address).tolist())
        tables = [target + _HEAD * _WORD for target in words if target is not None]
        return unique(np.concatenate([sites.data_target, np.array(tables, np.int64)]))

    def _at(self, place: _Address) -> _Address | None:
        """What a word points to."""
        obj, address = place
        symbol = self.program.image(obj).slot_symbols.get(address)
        if symbol is not None:
            binding = self.program.bindings.resolve(obj, symbol)
            return None if binding is None else (binding.object, binding.rva)
        target = self.program.image(obj).pointer_at(address)
        return None if target is None else (obj, target)

    def _kind(self, described: _Address) -> _Address | None:
        """What a type description begins with: the table of its kind, by the symbol's address or two words on."""
        found = self._at(described)
        is_named = described[1] in self.program.image(described[0]).slot_symbols
        return found if found is None or is_named else (found[0], found[1] - _WORD * _HEAD)

    def _home(self, described: _Address) -> int:
        """The object that a class's first base is described in."""
        for _ in range(_BASES):
            obj, address = described
            following = (self._at((obj, address + word * _WORD)) for word in _FIRST_BASES if address)
            base = next((place for place in following if place is not None and self._kind(place) in self.kinds), None)
            if base is None:
                break
            described = base
        return described[0]
