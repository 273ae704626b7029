"""The words of data from which functions can reach a lock: two functions that share one must both refer to it.

Owns: which words the code of a function forms, loads and passes, as cells: object and address in one number.
Takes: `Flow`, lock functions. Gives: columns of cells, and whether two of those lie near each other.
Must never: leave out a word that leads to a lock: what is not near is not followed.
Wrong where: an address is made by more than `_CLOSE` bytes of arithmetic from one that the code forms.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final

import numpy as np

from forkproof.arguments import data_arguments
from forkproof.code import aarch64
from forkproof.code.index import CodeIndex
from forkproof.code.operations import Atomic
from forkproof.elf.image import Machine
from forkproof.flow import Flow
from forkproof.locks.values import Content, Element, Made, Object, Value, root
from forkproof.program import Columns, Function
from forkproof.signature_values import LockFunction

_SHIFT: Final = 48
_CLOSE: Final = 4096
"""Bytes around an address that code forms within which it may go on to a lock: so far reach AArch64's anchors."""
_PAGE: Final = 4096
_NOWHERE: Final = 0x7FFF << _SHIFT
_APART: Final = 14
"""Where cells lie that stand for what functions make: in no object, and not near each other."""


class Cells:
    """The words of data from which functions can reach a lock: what two that share one must both refer to."""

    def __init__(
        self,
        flow: Flow,
        library: Mapping[int, LockFunction],
        spinning: set[Function],
        given: Mapping[Function, Collection[Value]],
    ) -> None:
        self.flow, self.library, self.spinning, self.given = flow, library, spinning, given
        values = {v for values in given.values() for v in values}
        self.makers = {begin.function for v in values if isinstance(begin := root(v.base), Made)}
        self._known: dict[Function, tuple[Columns, bool]] = {}
        self._tables: dict[int, _References] = {}

    def of(self, function: Function) -> Columns:
        """As object and address in one number; none for a function that locks what it is given."""
        return self._look(function)[0]

    def is_exact(self, function: Function) -> bool:
        """All that it does with locks is to words that it names."""
        return self._look(function)[1]

    def _look(self, function: Function) -> tuple[Columns, bool]:
        known = self._known.get(function)
        if known is None:
            is_given = function in self.given or function in self.makers
            exact = None if function in self.spinning or is_given else self._passed(function)
            known = (self._referred(function), False) if exact is None else (exact, True)
            self._known[function] = known
        return known

    def _passed(self, function: Function) -> Columns | None:
        """What the function's calls of lock functions pass, where all of it is constant, and there are such calls."""
        program, graph = self.flow.program, self.flow.graph
        obj = program.object_of(function)
        sites: dict[int, list[int]] = {}
        for edge in self.flow.outgoing(function):
            if (lock := self.library.get(int(graph.target[edge]))) is not None:
                sites.setdefault(lock.argument, []).append(int(graph.site[edge]))
        found = []
        for argument, places in sites.items():
            passed = data_arguments(program, obj, np.array(sorted(places), np.int64), argument)
            if len(passed) < len(places):
                return None
            for address, is_load in passed.values():
                found += self._targets(obj, address) if is_load else [obj << _SHIFT | address]
        return np.array(found, np.int64) if found else None

    def _targets(self, obj: int, slot: int) -> list[int]:
        """The word itself, or what the loader puts there."""
        image = self.flow.program.image(obj)
        symbol = image.slot_symbols.get(slot)
        if symbol is not None:
            binding = self.flow.program.bindings.resolve(obj, symbol)
            return [] if binding is None else [binding.object << _SHIFT | binding.rva]
        target = image.pointer_at(slot)
        return [obj << _SHIFT | slot, *([] if target is None else [obj << _SHIFT | target])]

    def _referred(self, function: Function) -> Columns:
        """All writable words that the function's code refers to."""
        program = self.flow.program
        obj = program.object_of(function)
        base = int(program.base[obj])
        if obj not in self._tables:
            self._tables[obj] = _References(program.codes[obj])
        table = self._tables[obj]
        writable = [(s.rva, s.rva + s.memory_size) for s in program.image(obj).segments if s.writable]
        found = set[int]()
        for part in (function, *self.flow.cold_parts(function)):
            formed, loaded = table.of(part - base)
            found.update(obj << _SHIFT | a for a in formed if any(low <= a < high for low, high in writable))
            for slot in loaded:
                if any(low <= slot < high for low, high in writable):
                    found.update(self._targets(obj, slot))
        found.update(begin for value in self.given.get(function, ()) if (begin := begin_of(value)) >= 0)
        found.update([begin_of(Value(Made(function, -1), 0))] if function in self.makers else [])
        more = self._operands(function) if self.flow.machine is Machine.X86_64 else self._pages(function)
        found.update(obj << _SHIFT | a for a in more if any(low - _PAGE < a < high for low, high in writable))
        return np.array(sorted(found), np.int64)

    def _pages(self, function: Function) -> Iterator[int]:
        """Pages that AArch64 keeps in a register for what is loaded and stored farther on; no locks lie in RELRO."""
        program = self.flow.program
        obj = program.object_of(function)
        code, image = program.codes[obj], program.image(obj)
        for part in (function, *self.flow.cold_parts(function)):
            index = part - int(program.base[obj])
            start = int(code.start[index])
            for page in aarch64.pages(image.read(start, int(code.size[index])), start).tolist():
                if not any(low <= page and page + _PAGE <= low + size for low, size in image.relro):
                    yield page

    def _operands(self, function: Function) -> Iterator[int]:
        """Words that atomic operations name themselves, which the columns of an object do not hold."""
        if function not in self.spinning:
            return
        for instruction in self.flow.body(function).instructions:
            for operation in instruction.operations:
                if isinstance(operation, Atomic) and operation.cell.base == "pc":
                    yield instruction.end + operation.cell.displacement


class _References:
    """The addresses that an object's functions form, and the words that they load, by function."""

    def __init__(self, code: CodeIndex) -> None:
        self.formed = self._by_owner(code.data_owner, code.sites.data_target)
        self.loaded = self._by_owner(code.loaded_owner, code.sites.loaded_address)

    @staticmethod
    def _by_owner(owner: Columns, address: Columns) -> tuple[Columns, Columns]:
        order = np.argsort(owner, kind="stable")
        return owner[order], address[order]

    def of(self, index: int) -> tuple[set[int], set[int]]:
        """Addresses formed, and words loaded, by one function of the object."""
        found = []
        for owner, address in (self.formed, self.loaded):
            first, last = owner.searchsorted(index), owner.searchsorted(index, side="right")
            found.append(set(address[first:last].tolist()))
        return found[0], found[1]


def begin_of(address: Value) -> int:
    """Where a lock is reached from, as a cell; -1 for what no word of data leads to."""
    base, offset = address.base, address.offset
    while isinstance(base, Content | Element):
        offset = base.offset
        base = base.base
    if isinstance(base, Made):  # by function, and far from each other
        return _NOWHERE | base.function << _APART
    return base.number << _SHIFT | offset if isinstance(base, Object) and offset >= 0 else -1


def near(cells: Columns, others: Columns) -> bool:
    """Some cell lies close to one of the others: in the same variable, or reached from the same anchor."""
    if not len(others) or not len(cells):
        return False
    place = others.searchsorted(cells)
    before, after = others[np.maximum(place - 1, 0)], others[np.minimum(place, len(others) - 1)]
    return bool(np.any((np.abs(cells - before) <= _CLOSE) | (np.abs(cells - after) <= _CLOSE)))
